"""Does preparing the next slice beside the accelerator pay? The worker's thread, on and off, in one run.

    python benchmarks/overlap.py

An emulated accelerator is busy for a fixed time per token without using the CPU. Beside it, for each slice, the worker cuts
out rows and turns them into Python values, and encodes and checks the results: token ids in, a vector of 384 numbers out.
Reported is the share of the time in which the accelerator is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

import headrace as hr
from headrace.stage import Stage
from headrace.worker import Worker

VECTOR = np.ones(384, "float32")


def accelerator(us_per_token: float) -> Stage:
    """A stage that holds its device for `us_per_token` microseconds per padded token."""

    @hr.stage(out={"vector": hr.Vector(384)}, batch=hr.tokens(16_384, of="tokens"))
    class Emulated:
        def __call__(self, tokens: hr.Column[hr.Vector(dtype="int32")]):
            time.sleep(us_per_token * 1e-6 * len(tokens) * max(map(len, tokens)))
            return {"vector": np.broadcast_to(VECTOR, (len(tokens), 384))}

    return Stage.of(Emulated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overlap.json")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.2, 0.8, arguments.rows), 4, 512).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("int32")
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(random.integers(0, 30_000, offsets[-1]).astype("int32")))
    table = pa.table({"tokens": ids})
    results = {}
    for us_per_token in (0.1, 0.5, 2.0):
        stage = accelerator(us_per_token)
        busy_s = us_per_token * 1e-6 * sum(len(part) * lengths[part].max() for part in stage.batch.slices(lengths))
        shares: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for overlap, values in shares.items():
                worker = Worker([stage], overlap=overlap)
                started = time.perf_counter()
                worker(table)
                values.append(busy_s / (time.perf_counter() - started))
        off, on = (statistics.median(values) for values in shares.values())
        results[f"{us_per_token} us/token"] = {"busy share without": round(off, 3), "busy share with": round(on, 3), "speed-up": round(on / off, 3)}
        print(f"{us_per_token:4} us/token: busy {off:.1%} of the time without overlap, {on:.1%} with, {on / off:.2f} times as fast")
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("numpy", "pyarrow")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": arguments.rows, "results": results}
        (Path(__file__).parent / "results/overlap.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
