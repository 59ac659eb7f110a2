"""One process that runs the batches of a depot, with an engine of its own: `batch_process.py FOLDER [delay in ms]`.

Its engine gives each answer a usage of its own, so that one that was paid for another would be seen. What it books goes to the end of a
file, one line per charge; that an id counts once is for the reader to see to.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.limits import Limits
from headrace.gateway.batches.lines import Answered, Line, Lost, Outcome, Retry
from headrace.gateway.batches.records import Charge, Usage
from headrace.gateway.batches.worker import Worker

FOLDER, DELAY_MS = sys.argv[1], float(sys.argv[2])


async def send(line: Line) -> Outcome:
    """An answer; where it takes time, now and then something else."""
    tokens = random.getrandbits(30)
    if DELAY_MS:
        await asyncio.sleep(random.uniform(0, DELAY_MS / 1000))
        fate = random.random()
        if fate < 0.02:
            return Retry(0.01)
        if fate < 0.04:
            return Lost("the replica died")
        if line.number % 50 == 0:
            return Answered(400, b'{"error":{"message":"no"}}')
    return Answered(200, b'{"choices":[{"text":"%s"}],"usage":{"total_tokens":%d}}' % (b"x" * 200, tokens), Usage(tokens, 0))


async def book(charges: Sequence[Charge]) -> None:
    handle = os.open(f"{FOLDER}/booked", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, b"".join(b"%s %d\n" % (charge.id.encode(), charge.usage.input_tokens) for charge in charges))
    finally:
        os.close(handle)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def main() -> None:
    with Depot(FOLDER, limits=Limits(poll_s=0.1, attempts=100, retry_s=0.01, free_bytes=1, floor_bytes=1)) as depot:
        before = peak = resident_bytes()

        def measure() -> None:
            nonlocal peak
            while True:
                peak = max(peak, resident_bytes())
                time.sleep(0.02)

        threading.Thread(target=measure, daemon=True).start()
        stopping, times = asyncio.Event(), {}
        worker = asyncio.create_task(Worker(depot, send=send, book=book, slots=lambda: 256).run(stopping))
        names = [name for name, _ in depot.catalog.live()]
        while not worker.done() and any(name for name, _ in depot.catalog.live()):
            for name in names:
                found = await asyncio.to_thread(depot.catalog.batch, name)
                times.setdefault(found.status if found is not None else "", time.monotonic())
            await asyncio.sleep(0.05)
        times["over"] = time.monotonic()
        stopping.set()
        await worker
    print(json.dumps({"times": times, "grown_mb": (peak - before) / 1e6}))


asyncio.run(main())
