"""Do rows per second grow with replicas, and stay, with the memory, where they are when the input grows?

    python benchmarks/scaling.py --save

A function on CPUs and a model that holds its device for a fixed time per row, without using the CPU, so that what limits a run
is the device or headrace, and not the cores of the machine. Texts in, vectors of 384 numbers out. Measured: rows/s in steady
state with 1, 2 and 4 replicas, and with an input ten times as long; beside them the most memory at any moment of all processes of the run,
Ray's object store included, as shares of pages (PSS), so that shared pages count once; and of the driver alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

HERE = Path(__file__).resolve().parent
REPLICAS = (1, 2, 4)
VECTOR = np.linspace(0, 1, 384, dtype="float32")


@hr.stage(out={"words": int})
def count(text: hr.Column[str]):
    return {"words": [len(t.split()) for t in text]}


class Held:
    us_per_row: float = 1000.0

    def __call__(self, words: hr.Column[int]):
        time.sleep(self.us_per_row * 1e-6 * len(words))
        return {"vector": np.broadcast_to(VECTOR, (len(words), len(VECTOR)))}


def pipeline(replicas: int) -> hr.Pipeline:
    held = hr.stage(out={"vector": hr.Vector(384)}, batch=256, replicas=replicas)(Held)
    return hr.Pipeline("scaling", count, held(), outputs=["vector"])


def write_input(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    words = np.array(["quiet", "noisy", "central", "breakfast", "host", "garden", "view", "stairs", "late"])
    with pq.ParquetWriter(path, pa.schema({"id": pa.int64(), "text": pa.string()})) as writer:
        for start in range(0, rows, 8192):
            count_ = min(8192, rows - start)
            texts = [" ".join(random.choice(words, length)) for length in random.integers(5, 120, count_)]
            writer.write_table(pa.table({"id": np.arange(start, start + count_), "text": texts}))


def pss(process: psutil.Process) -> float:
    """Bytes of a process in GB, pages shared with others in equal parts; 0 once it is gone."""
    try:
        return process.memory_full_info().pss / 1e9
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0


def run(replicas: int, path: Path, rows: int) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", str(replicas), str(path), f"{folder}/out"]
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        every, driver = [0.0], [0.0]
        while process.poll() is None:
            driver.append(pss(process))
            every.append(driver[-1] + sum(pss(child) for child in process.children(recursive=True)))
            time.sleep(1.0)
        assert process.returncode == 0 and process.stdout is not None
        report = json.loads(process.stdout.read())
        assert report["rows_in"] == report["rows_out"] == rows
    return {
        "rows/s steady": report["steady_rows_per_s"],
        "rows/s with start-up": report["rows_per_s"],
        "GB in all": max(every),
        "GB in all, first half": max(every[: len(every) // 2 + 1]),
        "GB driver": max(driver),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling.json")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        replicas, path, output = options.run
        print(json.dumps(hr.run(pipeline(int(replicas)), input=path, output=output, keep="id").to_dict()))
        return
    cases = [
        *((f"{replicas} replica{'s' * (replicas > 1)}", replicas, options.rows) for replicas in REPLICAS),
        ("4 replicas, 10 times the rows", 4, 10 * options.rows),
    ]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in cases}
    with tempfile.TemporaryDirectory() as folder:
        for rows in {rows for _, _, rows in cases}:
            write_input(Path(folder, f"{rows}.parquet"), rows)
        for number in range(options.rounds):
            for name, replicas, rows in cases:
                figures = run(replicas, Path(folder, f"{rows}.parquet"), rows)
                measured[name].append(figures)
                print(f"round {number + 1}  {name:30}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)
    median = {name: {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]} for name, runs in measured.items()}
    one, four, long = (median[name] for name in ("1 replica", "4 replicas", "4 replicas, 10 times the rows"))
    ratios = {
        "2 replicas over 1": median["2 replicas"]["rows/s steady"] / one["rows/s steady"],
        "4 replicas over 1": four["rows/s steady"] / one["rows/s steady"],
        "10 times the rows: rows/s": long["rows/s steady"] / four["rows/s steady"],
        "10 times the rows: memory in all": long["GB in all"] / four["GB in all"],
        "10 times the rows: memory of the driver": long["GB driver"] / four["GB driver"],
    }
    for name, ratio in ratios.items():
        print(f"{name:42} {ratio:.2f}")
    if options.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("ray", "pyarrow", "numpy")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": options.rows, "median": median}
        content |= {"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}, "rounds": measured}
        (HERE / "results/scaling.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
