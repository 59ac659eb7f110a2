"""How long `headrace runs` takes over a thousand run folders.

    python benchmarks/runs_listing.py --save

The folders are copies of what one real run has left, under names of their own; a tenth of them without a report, as a killed run leaves
them, so that their ledger is read. The time is that of the command, from its start to the prompt; the median of several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr

HERE = Path(__file__).resolve().parent


@hr.stage(out={"double": int})
def double(id: hr.Column[int]):
    return {"double": 2 * id}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/runs_listing.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"id": range(1000)}), f"{folder}/in.parquet")
        hr.run(hr.Pipeline("listed", double), input=f"{folder}/in.parquet", output=f"{folder}/first")
        for number in range(options.folders):
            copy = Path(shutil.copytree(f"{folder}/first", f"{folder}/runs/{number:04}"))
            if not number % 10:
                (copy / "_headrace/report.json").unlink()
        taken_s = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "headrace", "runs", f"{folder}/runs"], capture_output=True, text=True, check=True)
            taken_s.append(round(time.perf_counter() - started, 3))
            assert len(done.stdout.splitlines()) == options.folders + 1
    print(f"{options.folders:,} folders in {statistics.median(taken_s):.2f} s")
    if options.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": {"pyarrow": version("pyarrow")}, "folders": options.folders}
        (HERE / "results/runs_listing.json").write_text(json.dumps(content | {"median s": statistics.median(taken_s), "s": taken_s}, indent=1) + "\n")


if __name__ == "__main__":
    main()
