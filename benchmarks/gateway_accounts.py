"""What it costs a request of a gateway to be reserved and settled: latency alone, throughput under load, in one process and in three.

    python benchmarks/gateway_accounts.py --save
    python benchmarks/gateway_accounts.py --where postgresql+psycopg://user:password@host/database

A pair is one `reserve` and one `settle`, each awaited, of a key with limits on requests, tokens and money. Every process has a key of its own
and as many tasks as it says, each of which asks again as soon as it has its answer: the most that such a process can do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Used
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Grant
from headrace.gateway.accounts.teller import Teller

PRICES = Prices.of({"m": {"prompt": 0.10, "cached": 0.01, "completion": 0.40}})
LOADS = ((1, 1), (1, 64), (1, 512), (3, 1), (3, 64))  # processes, tasks in each
WARM_S = 0.5


async def measure(where: str, tasks: int, seconds: float, begin_at: float) -> list[float]:
    """How long each pair took, of those that began after a while."""
    database = Database(where)
    token = Keys(database).create(f"bench-{os.getpid()}", limits=Limits(requests_per_minute=10**8, tokens_per_minute=10**9, budget_usd=10**6))
    took_s: list[float] = []
    async with Teller(Books(database, prices=PRICES)) as teller:
        key = await teller.find(token)
        assert key is not None
        await asyncio.sleep(begin_at - time.time())
        end = time.perf_counter() + WARM_S + seconds

        async def work() -> None:
            while (start := time.perf_counter()) < end:
                grant = await teller.reserve(key.id, "m", prompt_tokens=500, max_tokens=500)
                assert isinstance(grant, Grant), grant
                await teller.settle(grant, Used(prompt_tokens=480, completion_tokens=120, queue_s=0.1, ttft_s=0.2, took_s=1.0))
                if start >= end - seconds:
                    took_s.append(time.perf_counter() - start)

        await asyncio.gather(*(work() for _ in range(tasks)))
    return took_s


def load(where: str, processes: int, tasks: int, seconds: float) -> dict[str, float]:
    """All processes at once, and their figures together."""
    begin_at = str(time.time() + 2 + processes)
    command = [sys.executable, __file__, "--measure", where, str(tasks), str(seconds), begin_at]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    took_s = [each for process in running for each in json.loads(process.communicate()[0])]
    cuts = statistics.quantiles(took_s, n=100)
    return {"pairs per second": round(len(took_s) / seconds), "p50 ms": round(cuts[49] * 1e3, 2), "p99 ms": round(cuts[98] * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--where", help="an SQLite file or the URL of a PostgreSQL; by default an SQLite file that is deleted afterwards")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gateway_accounts.json")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        where, tasks, seconds, begin_at = arguments.measure
        print(json.dumps(asyncio.run(measure(where, int(tasks), float(seconds), float(begin_at)))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        where = arguments.where or f"{folder}/accounts.db"
        Database(where).close()
        for processes, tasks in LOADS:
            found = results[f"{processes} x {tasks}"] = load(where, processes, tasks, arguments.seconds)
            print(f"{processes} x {tasks:3} tasks: {found['pairs per second']:6,} pairs/s, p50 {found['p50 ms']:.2f} ms, p99 {found['p99 ms']:.2f} ms")
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {"sqlalchemy": version("sqlalchemy"), "sqlite": sqlite3.sqlite_version}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "processes x tasks": results}
        (Path(__file__).parent / "results/gateway_accounts.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
