"""Is the accelerator kept busy behind CPU-heavy preparation? headrace beside plain Ray Data and beside one process that takes turns.

    python benchmarks/accelerator_busy.py --rounds 3 --save

An emulated accelerator is held for a fixed time per padded token without using the CPU. Before it, texts are normalised, split
and turned into ids in pure Python, which takes about as long per row. Contenders, each in a process of its own on a Ray with
one logical GPU and the machine's cores:

    headrace    functions and a stage with a token budget
    documented  Ray Data as its documentation shows batch inference: default reading, batches of 64, an actor pool of one
    tuned       the input cut finely, batches of 256 sorted by length within the actor, four blocks in flight
    in turn     one process that prepares a batch and runs it, one after the other

Busy is the share of the time in which the device is held, from when it first is for 95 % of some three seconds (the ramp, counted
from the start of the job on a running Ray) until the last batch ends. Useful is the share of that time that tokens
without padding need.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr

HERE = Path(__file__).resolve().parent
CONTENDERS = ("headrace", "documented", "tuned", "in turn")
CORES = len(os.sched_getaffinity(0))
VECTOR = np.ones(384, "float32")
WORD = re.compile(r"\w+|[^\w\s]")
BUDGET_TOKENS = 16_384
LONGEST = 256
STEADY_S, STEADY = 3.0, 0.95


def encode(text: str) -> np.ndarray:
    """Word ids: about as much work as a tokenizer in pure Python."""
    text = unicodedata.normalize("NFKC", text).lower()
    return np.fromiter((zlib.crc32(word.encode()) % 30_000 for word in WORD.findall(text)), "int32")[:LONGEST]


def hold(us_per_token: float, lengths: list[int], trace: str) -> np.ndarray:
    """Hold the device for a batch padded to its longest row, and note from when to when."""
    started = time.time()
    time.sleep(us_per_token * 1e-6 * len(lengths) * max(lengths))
    with open(f"{trace}/{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps([started, time.time(), len(lengths), sum(lengths)]) + "\n")
    return np.broadcast_to(VECTOR, (len(lengths), len(VECTOR)))


@hr.stage(out={"tokens": hr.Vector(dtype="int32")})
def tokenise(text: hr.Column[str]):
    return {"tokens": [encode(t) for t in text]}


@hr.stage(out={"vector": hr.Vector(384)}, on=[hr.gpu(1)], batch=hr.tokens(BUDGET_TOKENS, of="tokens"))
class Emulated:
    us_per_token: float = 2.0
    trace: str = ""

    def __call__(self, tokens: hr.Column[hr.Vector(dtype="int32")]):
        return {"vector": hold(self.us_per_token, [len(row) for row in tokens], self.trace)}


class Plain:
    """The same as a class for Ray Data; `sort` runs a batch as slices of the same budget, sorted by length."""

    def __init__(self, us_per_token: float, trace: str, sort: bool = False) -> None:
        self.us_per_token, self.trace, self.sort = us_per_token, trace, sort

    def __call__(self, batch):
        lengths = np.array([len(row) for row in batch["tokens"]])
        order = np.argsort(-lengths) if self.sort else np.arange(len(lengths))
        vectors, at = np.empty((len(lengths), len(VECTOR)), "float32"), 0
        while at < len(order):
            rows = order[at : at + max(1, BUDGET_TOKENS // int(lengths[order[at]]))] if self.sort else order
            vectors[rows] = hold(self.us_per_token, lengths[rows].tolist(), self.trace)
            at += len(rows)
        return {"id": batch["id"], "vector": vectors}


def prepare(batch):
    tokens = np.empty(len(batch["text"]), object)
    tokens[:] = [encode(text) for text in batch["text"]]
    return {"id": batch["id"], "tokens": tokens}


def run_headrace(path: str, output: str, trace: str, us_per_token: float) -> None:
    pipeline = hr.Pipeline("busy", tokenise, Emulated(us_per_token=us_per_token, trace=trace), outputs=["vector"])
    print(hr.run(pipeline, input=path, output=output, keep="id"), file=sys.stderr)


def run_ray_data(path: str, output: str, trace: str, us_per_token: float, *, tuned: bool) -> None:
    import ray

    rows = ray.data.read_parquet(path)
    if tuned:
        pool = ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4)
        rows = rows.repartition(target_num_rows_per_block=2048).map_batches(prepare, batch_size=None)
        vectors = rows.map_batches(Plain, fn_constructor_args=[us_per_token, trace, True], compute=pool, num_gpus=1, batch_size=2048)
    else:
        pool = ray.data.ActorPoolStrategy(size=1)
        vectors = rows.map_batches(prepare).map_batches(Plain, fn_constructor_args=[us_per_token, trace], compute=pool, num_gpus=1, batch_size=64)
    vectors.write_parquet(output)


def run_in_turn(path: str, output: str, trace: str, us_per_token: float) -> None:
    plain, written = Plain(us_per_token, trace, sort=True), []
    for batch in pq.ParquetFile(path).iter_batches(2048):
        done = plain(prepare({name: np.array(batch[name].to_pylist(), object) for name in ("id", "text")}))
        written.append(pa.table({"id": pa.array(done["id"].tolist()), "vector": pa.FixedSizeListArray.from_arrays(done["vector"].ravel(), len(VECTOR))}))
    os.makedirs(output)
    pq.write_table(pa.concat_tables(written), f"{output}/all.parquet")


def contend(name: str, path: str, folder: str, us_per_token: float) -> None:
    """Run a contender in this process, and note when its job began and ended."""
    trace, output = f"{folder}/trace", f"{folder}/out"
    os.makedirs(trace)
    if name != "in turn":
        import ray

        ray.init(address="local", num_cpus=CORES, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    started = time.time()
    if name == "headrace":
        run_headrace(path, output, trace, us_per_token)
    elif name == "in turn":
        run_in_turn(path, output, trace, us_per_token)
    else:
        run_ray_data(path, output, trace, us_per_token, tuned=name == "tuned")
    Path(f"{folder}/span.json").write_text(json.dumps([started, time.time()]))


def held_s(spans: np.ndarray, start_s: float, stop_s: float) -> float:
    """Seconds of a window in which the device is held."""
    return float(np.clip(np.minimum(spans[:, 1], stop_s) - np.maximum(spans[:, 0], start_s), 0, None).sum())


def figures(folder: Path, us_per_token: float) -> dict[str, float]:
    lines = [json.loads(line) for file in (folder / "trace").iterdir() for line in file.read_text().splitlines()]
    spans = np.array(sorted(lines))
    started, ended = json.loads((folder / "span.json").read_text())
    last = spans[-1, 1]
    steady = next((begin for begin in spans[:, 0] if held_s(spans, begin, begin + STEADY_S) >= STEADY * STEADY_S and begin + STEADY_S <= last), None)
    since = spans[0, 0] if steady is None else steady
    busy_s = held_s(spans, since, last)
    inside = spans[spans[:, 0] >= since]
    gaps = inside[1:, 0] - inside[:-1, 1]
    return {
        "busy": busy_s / (last - since),
        "useful": inside[:, 3].sum() * us_per_token * 1e-6 / (last - since),
        "first busy s": spans[0, 0] - started,
        "steady s": (steady or last) - started,
        "job s": ended - started,
        "rows/s": spans[:, 2].sum() / (ended - started),
        "longest gap s": float(gaps.max(initial=0)),
        "gaps over 20 ms, s": float(gaps[gaps > 0.02].sum()),
    }


def measure(name: str, path: str, rows: int, us_per_token: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--contender", name, "--input", path, "--folder", folder, "--us-per-token", str(us_per_token)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ids = pq.read_table(f"{folder}/out", columns=["id"])["id"].to_numpy()
        assert len(ids) == rows and len(np.unique(ids)) == rows, f"{name} wrote {len(ids)} rows"
        return {key: round(value, 4) for key, value in figures(Path(folder), us_per_token).items()}


def write_input(path: str, rows: int) -> float:
    """Texts of review-like lengths, several row groups; returns microseconds to prepare a row."""
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), random.integers(2, 9))) for _ in range(5000)])
    lengths = np.clip(random.lognormal(4.2, 0.8, rows), 4, 400).astype(int)
    texts = [" ".join(random.choice(words, length)) for length in lengths]
    pq.write_table(pa.table({"id": np.arange(rows), "text": texts}), path, row_group_size=8192)
    started = time.perf_counter()
    for text in texts[:2000]:
        encode(text)
    return (time.perf_counter() - started) / min(rows, 2000) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--us-per-token", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/accelerator_busy.json")
    for hidden in ("--contender", "--input", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.input, arguments.folder, arguments.us_per_token)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/in.parquet"
        prepare_us = write_input(path, arguments.rows)
        print(f"preparing a row takes {prepare_us:.0f} us of a core")
        for number in range(arguments.rounds):
            for name in arguments.only:
                results[name].append(measure(name, path, arguments.rows, arguments.us_per_token))
                print(f"round {number + 1} {name:11}", "  ".join(f"{key} {value:.3g}" for key, value in results[name][-1].items()), flush=True)
    summary = {name: {key: round(statistics.median(one[key] for one in runs), 4) for key in runs[0]} for name, runs in results.items()}
    for name, median in summary.items():
        print(f"{name:11}", "  ".join(f"{key} {value:.3g}" for key, value in median.items()))
    if arguments.save:
        machine = {"cores": CORES, "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("ray", "numpy", "pyarrow")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": arguments.rows}
        content |= {"us per token": arguments.us_per_token, "us to prepare a row": round(prepare_us), "median": summary, "rounds": results}
        (HERE / "results/accelerator_busy.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
