"""What exactly-once costs: an empty pipeline beside plain Ray Data that reads and writes the same files. And what a kill costs.

    python benchmarks/overhead.py --rows 6000000 --rounds 5 --save

Each round runs, in one Ray and in turn, over the same Parquet files: headrace with a stage that returns the column it reads,
and Ray Data's `read_parquet`, `map_batches` of the same function, `write_parquet`, with the same compression. Then one run of
headrace is killed (the driver, by SIGKILL) when about half of the rows are committed, and run again: rows that went through
the stage more than once are the work that was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr

FILES = 16


@hr.stage(out={"id": int}, batch=65_536)
def same(id: hr.Column[int]):
    return {"id": id}


empty = hr.Pipeline("empty", same)


def write_input(folder: Path, rows: int) -> int:
    """Rows as a table of a feature store has them: an id, a short text, 16 numbers. Returns their size in bytes."""
    random = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    folder.mkdir()
    size = 0
    for file in range(FILES):
        count = rows // FILES
        data = {"id": np.arange(file * count, (file + 1) * count)}
        data["text"] = np.char.add(np.char.add(random.choice(words, count), " "), random.choice(words, count))
        data |= {f"x{number}": random.random(count, np.float32) for number in range(16)}
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


def killed(source: Path, output: Path, rows: int) -> dict[str, float]:
    """Run in a process of its own, kill it half-way, run again: the share of rows that were run twice."""
    command = [sys.executable, "-m", "headrace", "run", f"{__file__}::empty", "--input", str(source), "--output", str(output), "--keep", "all", "-q"]
    process = subprocess.Popen(command, start_new_session=True)
    from headrace.filesystems import locate
    from headrace.ledger import load
    from headrace.errors import OutputError
    from headrace.store import Folder

    store = Folder(locate(str(output), error=OutputError))
    while process.poll() is None:
        state = load(store)
        if state is not None and state.rows_done > rows / 2:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = load(store).rows_done
    again = time.perf_counter()
    subprocess.run(command, check=True)
    again = time.perf_counter() - again
    read = sum(json.loads(line)["rows"] for file in (output / "_headrace").glob("events-*.jsonl") for line in file.open() if '"BlockDone"' in line)
    return {"committed at the kill": round(done / rows, 4), "run by the second run": round(read / rows, 4), "second run, s": round(again, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead.json")
    arguments = parser.parse_args()
    import logging

    import ray

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
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
        results = {"rate over plain Ray Data": round(ratio, 3), "rounds": times, "kill": killed(source, output, arguments.rows)}
        print(results["kill"])
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("numpy", "pyarrow", "ray")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": arguments.rows, "bytes": size, "results": results}
        (Path(__file__).parent / "results/overhead.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
