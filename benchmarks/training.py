"""What does Ray Train cost a loop? Rows per second of the same loop in one process and as one worker on Ray, in turn, in one run.

    python benchmarks/training.py --rows 2000000                               # a loop of 3 us a row, as light as they come
    python benchmarks/training.py --hidden 16384 --rows 100000                 # one of 90 us a row
    python benchmarks/training.py --hidden 16384 --rows 100000 --prepare-us 50 # the same beside a stage that works so long on each row

The loop is a network in numpy, forward and back, whose width (`--hidden`) says how long a row takes. Start-up is left out of both: a rate runs
from the first batch to the last. The share of the time in which the worker waits for rows is told as well; with `--prepare-us` the pipeline's
stage burns CPU on every row, on cores beside the worker's. A loop that makes its rows itself would have to do that in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import threadpoolctl

import headrace as hr

WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    hidden: int = 512
    batch: int = 512


@hr.stage(out={"x": hr.Vector(WIDTH)}, batch=1024)
class Prepare:
    us_per_row: float = 0.0

    def __call__(self, raw: hr.Column[hr.Vector(WIDTH)]):
        until = time.thread_time() + self.us_per_row * 1e-6 * len(raw)
        while time.thread_time() < until:
            pass
        return {"x": np.tanh(raw)}


def network(shard, settings, run):
    random = np.random.default_rng(0)
    first, last = (random.normal(0, 0.05, shape).astype("f4") for shape in ((WIDTH, settings.hidden), (settings.hidden, 1)))
    if folder := run.resume():
        first, last = np.load(folder / "first.npy"), np.load(folder / "last.npy")

    def save(folder):
        np.save(folder / "first.npy", first)
        np.save(folder / "last.npy", last)

    for batch in shard.batches(settings.batch):
        hidden = np.maximum(batch["x"] @ first, 0)
        error = hidden @ last - batch["y"][:, None]
        back = (error @ last.T) * (hidden > 0)
        last -= 1e-3 * hidden.T @ error / len(error)
        first -= 1e-3 * batch["x"].T @ back / len(error)
        run.report(loss=float((error**2).mean()))
        run.checkpoint(save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512, help="units of the network")
    parser.add_argument("--prepare-us", type=float, default=0.0, help="CPU time of the stage on each row, in microseconds")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/training.json")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    flat = random.normal(size=arguments.rows * WIDTH).astype("f4")
    table = pa.table({"raw": pa.FixedSizeListArray.from_arrays(pa.array(flat), WIDTH), "y": random.normal(size=arguments.rows).astype("f4")})
    training = hr.Training(
        "network", network, data=hr.Pipeline("p", Prepare(us_per_row=arguments.prepare_us)), keep=["y"], settings=Settings(hidden=arguments.hidden)
    )
    training = dataclasses.replace(training, epochs=arguments.epochs)
    found: dict[str, list[float]] = {"alone": [], "on_ray": [], "ratio": [], "wait_share": []}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, f"{folder}/in.parquet", row_group_size=50_000)
        for number in range(arguments.rounds):
            with threadpoolctl.threadpool_limits(1):  # as a worker on one core has it
                alone = dataclasses.replace(training, data=hr.Pipeline("p", Prepare())).local(table).record
            ray = hr.train(training, input=f"{folder}/in.parquet", output=f"{folder}/{number}").record
            found["alone"].append(alone.rows_per_s)
            found["on_ray"].append(ray.rows_per_s)
            found["ratio"].append(ray.rows_per_s / alone.rows_per_s)
            found["wait_share"].append(ray.wait_share)
            print(f"alone {alone.rows_per_s:,.0f} rows/s, on Ray {ray.rows_per_s:,.0f}: {found['ratio'][-1]:.3f}; waiting {ray.wait_share:.2%}", flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    print(f"median: {median['ratio']:.3f} of the rate alone, {median['wait_share']:.2%} of the time waiting for rows")
    if arguments.save:
        about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "ray": version("ray"), "numpy": version("numpy")}
        options = {name: value for name, value in vars(arguments).items() if name != "save"}
        path = Path(__file__).parent / "results" / "training.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        name = f"{arguments.hidden} hidden, {arguments.prepare_us:g} us to prepare"
        path.write_text(json.dumps(before | {name: {"about": about, "options": options, "median": median, "rounds": found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
