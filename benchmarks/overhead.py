"""What exactly-once costs: an empty pipeline beside plain Ray Data that reads and writes the same files. And what a kill costs.

    python benchmarks/overhead.py --rows 6000000 --rounds 5 --save

Each round runs, in one Ray and in turn, over the same Parquet files: headrace with a stage that returns the column it reads,
and Ray Data's `read_parquet`, `map_batches` of the same function, `write_parquet`, with the same compression.

Then a run of headrace whose stage takes a fixed time per row, as a model would, is killed (driver, Ray and workers, by SIGKILL)
when about half of its rows are committed, and run again. The stage counts the rows that it is called with: those beyond the
number of rows are the work that was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.ledger import load
from headrace.store import Folder

FILES = 16


@hr.stage(out={"id": int}, batch=65_536)
def same(id: hr.Column[int]):
    return {"id": id}


@hr.stage(out={"id": int}, batch=1024)
class Counted:
    us_per_row: float = 0.0
    count: str = ""  # a file; a line for each call, with the number of rows

    def setup(self, device: str):
        self.file = os.open(self.count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, id: hr.Column[int]):
        time.sleep(self.us_per_row * 1e-6 * len(id))
        os.write(self.file, b"%d\n" % len(id))
        return {"id": id}


empty = hr.Pipeline("empty", same)
counted = hr.Pipeline("counted", Counted())


def write_input(folder: Path, rows: int) -> int:
    """Rows as a table of a feature store has them: an id, a short text, 16 numbers. Returns their size in bytes."""
    numbers = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    folder.mkdir()
    size = 0
    for file in range(FILES):
        count = rows // FILES
        data = {"id": np.arange(file * count, (file + 1) * count)}
        data["text"] = np.char.add(np.char.add(numbers.choice(words, count), " "), numbers.choice(words, count))
        data |= {f"x{number}": numbers.random(count, np.float32) for number in range(16)}
        table = pa.table(data)
        size += table.nbytes
        pq.write_table(table, folder / f"{file:03}.parquet", row_group_size=131_072)
    return size


def headrace_s(source: Path, output: Path) -> float:
    started = time.perf_counter()
    hr.run(empty, input=str(source), output=str(output), keep="all")
    return time.perf_counter() - started


def ray_data_s(source: Path, output: Path) -> float:
    import ray

    started = time.perf_counter()
    dataset = ray.data.read_parquet(str(source)).map_batches(lambda batch: {**batch, "id": batch["id"]}, batch_size=65_536)
    dataset.write_parquet(str(output), compression="zstd")
    return time.perf_counter() - started


def killed(folder: Path, rows: int, minutes: float) -> dict[str, float]:
    """Run in a process of its own, kill it half-way, run again: the share of rows that were run twice."""
    source, output, count = folder / "in", folder / "killed", folder / "count"
    replicas = 2 * (os.cpu_count() or 1)
    slow = f"counted.us_per_row={minutes * 60e6 * replicas / rows}"
    command = [sys.executable, "-m", "headrace", "run", f"{__file__}::counted", "--set", slow, "--set", f"counted.count={count}"]
    command += ["--input", str(source), "--output", str(output), "--keep", "all", "--quiet"]
    process = subprocess.Popen(command, start_new_session=True)
    store = Folder(locate(str(output), error=OutputError))
    while process.poll() is None and ((state := load(store)) is None or state.rows_done < rows / 2):
        time.sleep(0.05)
    time.sleep(random.uniform(0, 5))  # or it would always be right after a commit
    tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for number in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    state = load(store)
    assert state is not None
    subprocess.run(command, check=True)
    run = sum(map(int, count.read_text().split()))
    return {"committed at the kill": round(state.rows_done / rows, 4), "run twice": round(run / rows - 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5, help="how long the job takes that is killed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead.json")
    arguments = parser.parse_args()
    import ray

    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    times: dict[str, list[float]] = {"headrace": [], "Ray Data": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as folder:
        source, output = Path(folder) / "in", Path(folder) / "out"
        size = write_input(source, arguments.rows)
        print(f"{arguments.rows:,} rows, {size / 1e9:.2f} GB in memory, {FILES} files")
        for number in range(arguments.rounds + 1):
            for name, measure in (("headrace", headrace_s), ("Ray Data", ray_data_s)):
                shutil.rmtree(output, ignore_errors=True)
                taken = measure(source, output)
                rows = sum(pq.read_metadata(path).num_rows for path in output.glob("*.parquet"))
                assert rows == arguments.rows, f"{name} wrote {rows} rows"
                if number:  # the first round warms up: processes start, modules load
                    times[name].append(taken)
                print(f"{'round ' + str(number) if number else 'warm-up'}: {name:9} {taken:6.2f} s, {arguments.rows / taken:12,.0f} rows/s", flush=True)
        ratios = [ray_s / ours for ours, ray_s in zip(times["headrace"], times["Ray Data"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"headrace runs at {ratio:.2f} of plain Ray Data's rate (median of {arguments.rounds} rounds)")
        ray.shutdown()
        shutil.rmtree(output)
        kill = killed(Path(folder), arguments.rows, arguments.minutes)
        print(f"killed when {kill['committed at the kill']:.1%} were committed: {kill['run twice']:.2%} of the rows were run twice")
        results = {"rate over plain Ray Data": round(ratio, 3), "seconds": times, "killed": {"job, minutes": arguments.minutes, **kill}}
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("numpy", "pyarrow", "ray")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": arguments.rows, "bytes": size, "results": results}
        (Path(__file__).parent / "results/overhead.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
