"""Batches of files with real processes: killed at random, too large for memory, and on a full disk."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import CHAT, FakeEngine, ask, depot_in, form, order, over, pieces, requests, text_of, until, working
from harness import SEED, SOURCE, Figures

from headrace.gateway.batches import orders
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.records import Batch, File, new_id

pytestmark = pytest.mark.faults

PROCESS = Path(__file__).with_name("batch_process.py")
KILLS = 10
MOST_GROWN_MB = 100
LEAST_LINES_PER_S = 5000


def begin(folder: Path, lines: int) -> str:
    """A depot with a batch of so many lines; the batch's id."""
    with Depot(str(folder)) as depot:
        name = new_id("file")
        with depot.shelf.begin(name) as sheet:
            at = 0
            for first in range(1, lines + 1, 10_000):
                text = b"".join(
                    b'{"custom_id":"r%d","method":"POST","url":"%s","body":{"model":"m","prompt":"%s"}}\n' % (number, CHAT.encode(), b"y" * 150)
                    for number in range(first, min(first + 10_000, lines + 1))
                )
                sheet.write(at, text)
                at += len(text)
        file = File(id=name, owner="ann", filename="in.jsonl", purpose="batch", bytes=at, created_at=int(time.time()))
        depot.catalog.add_file(file, owner_bytes=1 << 40)
        return orders.place(depot, "ann", {"input_file_id": name, "endpoint": CHAT, "completion_window": "24h"}).id


def start(folder: Path, delay_ms: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen([sys.executable, str(PROCESS), str(folder), str(delay_ms)], stdout=subprocess.PIPE, text=True, env=environment)


def lines_of(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with open(folder / "contents" / name, "rb") as file:
        for line in file:
            yield json.loads(line)


def check(folder: Path, name: str, count: int) -> Batch:
    """Every line is in one of the two files, once; each id was only ever booked with one usage, which is the output's."""
    with Depot(str(folder)) as depot:
        batch = depot.catalog.batch(name)
        assert batch is not None and batch.status == "completed"
        assert not depot.catalog.unbooked(batch)
    booked: dict[str, int] = {}
    for line in (folder / "booked").read_text().splitlines():
        charge, tokens = line.split()
        assert booked.setdefault(charge, int(tokens)) == int(tokens), "booked again, and not the same"
    seen = bytearray(count + 1)
    for file, size in ((batch.output_id, batch.progress.output_bytes), (batch.error_id, batch.progress.error_bytes)):
        if size:
            assert (folder / "contents" / file).stat().st_size == size
            for line in lines_of(folder, file):
                number = int(line["custom_id"][1:])
                seen[number] += 1
                if line["response"]["status_code"] == 200:
                    assert booked.pop(f"batch:{name}:{number}") == line["response"]["body"]["usage"]["total_tokens"]
    assert seen == b"\0" + b"\1" * count
    assert not booked
    return batch


def test_kills_lose_double_and_bill_nothing_twice(tmp_path: Path, figures: Figures):
    """Two processes at a time want the batch, and one has it. One is killed, the other goes on or takes over, and is killed too."""
    rng, count, since_s = random.Random(SEED), 20_000, time.monotonic()
    name = begin(tmp_path, count)
    struck: list[int] = []
    with Depot(str(tmp_path)) as depot:

        def done() -> int:
            batch = depot.catalog.batch(name)
            assert batch is not None
            return batch.progress.done.rows

        for _ in range(KILLS):
            processes = [start(tmp_path, 200) for _ in range(2)]
            try:
                for process in processes:
                    before, patience_s = done(), time.monotonic() + 60
                    while done() == before and time.monotonic() < patience_s:
                        time.sleep(0.01)
                    time.sleep(rng.uniform(0, 0.3))
                    process.kill()
                    struck.append(done())
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
    assert struck[-1] < count and len(set(struck)) > KILLS, f"too few kills came while it was at work: {struck}"
    process = start(tmp_path, 20)
    assert process.wait(timeout=120) == 0
    batch = check(tmp_path, name, count)
    assert batch.progress.failed == count // 50
    figures.add("batches of files, their process killed", faults=2 * KILLS, runs=2 * KILLS + 1, seconds=time.monotonic() - since_s)
    booked = (tmp_path / "booked").read_text().count("\n")
    print(f"{2 * KILLS} kills at {struck} of {count:,} lines; {booked - batch.progress.completed} charges were booked again under their ids")


def test_a_million_lines_in_little_memory(tmp_path: Path):
    count = 1_000_000
    name = begin(tmp_path, count)
    process = start(tmp_path, 0)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    check(tmp_path, name, count)
    found = json.loads(told)
    validated_s = found["times"]["in_progress"] - found["times"]["validating"]
    ran_s = found["times"]["over"] - found["times"]["in_progress"]
    print(f"{count / validated_s:,.0f} lines/s validated, {count / ran_s:,.0f} lines/s run, {found['grown_mb']:.0f} MB more memory")
    assert found["grown_mb"] < MOST_GROWN_MB
    assert count / ran_s > LEAST_LINES_PER_S


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "headrace-batches", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_holds_everything_up_and_loses_nothing(small_disk: Path):
    async def test() -> None:
        engine = FakeEngine()
        with depot_in(small_disk, open_lines=200, pause_s=0.05, floor_bytes=100_000) as depot:
            batch = await order(depot, requests(2000))
            name = depot.catalog.live()[0][0]
            (small_disk / "ballast").write_bytes(b"x" * (depot.shelf.free_bytes() - 200_000))
            kind, body = form(b"x" * 1_000_000, purpose="batch")
            assert (await ask(depot, "POST", "/v1/files", body=pieces(body), kind=kind)).error == (507, "insufficient_storage", None)
            assert len(list((small_disk / "contents").iterdir())) == 1
            async with working(depot, engine):
                await until(lambda: asyncio.sleep(0.2, depot.catalog.batch(name).progress.done.rows > 0))
                stuck = -1
                while stuck != (stuck := depot.catalog.batch(name).progress.done.rows):  # noqa: ASYNC110  until it stays so
                    await asyncio.sleep(0.3)
                assert 0 < stuck < 2000 and engine.sent.total() <= stuck + 200
                file = (await ask(depot, "GET", "/v1/files")).value["data"][0]["id"]
                assert (await ask(depot, "DELETE", f"/v1/files/{file}")).status == 200  # with the last reserve
                await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
                found = await over(depot, batch)
            assert found["request_counts"] == {"total": 2000, "completed": 2000, "failed": 0}
            assert len(await text_of(depot, found["output_file_id"])) == 2000 == len(engine.booked)
            assert set(engine.sent.values()) == {1}

    asyncio.run(test())
