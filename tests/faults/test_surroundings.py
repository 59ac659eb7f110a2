"""What surrounds a run goes wrong: damaged input, a full disk, a clock that jumps, nodes that go away."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import poison
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SEED, Figures, Moment, Output

from headrace import ledger
from headrace.letters import Allowance
from headrace.on_ray.cluster import connected
from headrace.on_ray.job import Job
from headrace.resume import Mode
from headrace.store import Folder

pytestmark = pytest.mark.faults

GROUP = 100  # rows of a row group


def damage(kind: str, folder: Path) -> set[int]:
    """Damage the third of the input files; returns the rows that cannot be read any more."""
    path = folder / "2.parquet"
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return set(range(1000, 1500))
    if kind == "deleted":
        path.unlink()
        return set(range(1000, 1500))
    chunk = pq.read_metadata(path).row_group(3).column(0)
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 40] ^= 0x10
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk that decays has it
    return set(range(1300, 1400))


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("planned", ["before", "after"])
@pytest.mark.parametrize("kind", ["truncated", "bit flipped", "deleted"])
def test_damaged_input(tmp_path: Path, figures: Figures, kind: str, planned: str) -> None:
    """Damaged before or after the input was listed: what cannot be read is told, and all the rest is there."""
    if (kind, planned) == ("deleted", "before"):
        pytest.skip("a file that is not there when the input is listed is no input")
    (tmp_path / "in").mkdir()
    for file in range(8):
        ids = range(file * 500, file * 500 + 500)
        pq.write_table(pa.table({"id": ids}), tmp_path / f"in/{file}.parquet", row_group_size=GROUP, write_page_checksum=True, use_dictionary=False)
    lost = damage(kind, tmp_path / "in") if planned == "before" else set()
    started = time.monotonic()
    job = Job.of(poison.pipeline("function", "", [-1]), input=str(tmp_path / "in"), output=str(tmp_path / "out"), keep="id")
    lost = lost or damage(kind, tmp_path / "in")
    job.run(mode=Mode.RESUME, allowance=Allowance.parse("20%"), connect=connected, watch=lambda events, rows: None)
    output = Output(str(tmp_path / "out"))
    ids = [row for row in range(harness.ROWS) if row not in lost]
    count = output.check(pa.table({"id": ids, "y": [2 * row for row in ids]}))
    state = ledger.load(Folder(output.place))
    assert state is not None and state.unreadable and all("2.parquet" in why for why in state.unreadable.values())
    figures.add(f"input {kind}", faults=1, runs=1, seconds=time.monotonic() - started, count=count)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "headrace-faults", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free", ["nothing", "some"])
def test_a_full_disk(stage: Any, small_disk: Path, tmp_path: Path, free: str) -> None:
    """It is told as such, with exit code 6. After room is made, the same command goes on, and ends well."""
    rows, chance = 2000, random.Random(SEED)
    (tmp_path / "in").mkdir()
    text = [chance.randbytes(600).hex() for _ in range(rows)]
    for file in range(8):
        ids = list(range(file * 250, file * 250 + 250))
        pq.write_table(pa.table({"id": ids, "text": text[file * 250 : file * 250 + 250]}), tmp_path / f"in/{file}.parquet", row_group_size=50)
    scene = stage("a full disk", output=Output(str(small_disk / "out")))
    scene.input, scene.wanted = tmp_path / "in", harness.expected(rows).set_column(1, "text", pa.array(text))
    ballast = small_disk / "ballast"
    if free == "nothing":
        ballast.write_bytes(b"")
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(2 << 20))
    run = scene.start()
    assert run.wait() == 6, run.said
    assert "No space left" in run.said and "Traceback" not in run.said
    found = scene.output.count(scene.wanted)
    assert (found.doubled, found.wrong) == (0, 0) and "_SUCCESS" not in scene.output.paths()
    ballast.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    scene.finish()
    scene.check(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_clock_that_jumps(stage: Any, seed: int) -> None:
    """By days, back and forth, in the driver and in the workers; and in between the driver is killed."""
    scene = stage("a clock that jumps")
    run = scene.start(plan={"clock": SEED + seed})
    if Moment(r"ledger/\d+-\w+/record-", seed + 1).wait(run, scene.output):
        run.kill()
    else:
        assert run.wait() == 0, run.said
    scene.finish(clock=SEED + seed + 100)
    scene.check(1)
