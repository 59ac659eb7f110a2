"""How far off is the remaining time that a run shows, on inputs whose rows are alike, of mixed lengths, and longer and longer?

    python benchmarks/eta.py --save

Runs a job whose model holds its device for a fixed time per word, and then plays the run's own events, in the order and with the
times at which they came, through what the live view reads from. The error is that of the whole time, counted from the first commit, that
is foretold at a moment, in shares of what it turned out to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import headrace as hr
from headrace.cost import Meter, Prices
from headrace.events import Committed, from_json_lines
from headrace.tally import Tally

HERE = Path(__file__).resolve().parent
INPUTS = ("alike", "mixed", "growing")
MOMENTS = (0.10, 0.25, 0.50, 0.75, 0.90)


@hr.stage(out={"words": int})
def count(text: hr.Column[str]):
    return {"words": [len(t.split()) for t in text]}


@hr.stage(out={"score": float}, batch=256, replicas=4)
class Held:
    us_per_word: float = 20.0

    def __call__(self, words: hr.Column[int]):
        time.sleep(self.us_per_word * 1e-6 * float(np.sum(words)))
        return {"score": words * 0.5}


job = hr.Pipeline("eta", count, Held(), outputs=["score"])


def write_input(path: Path, rows: int, kind: str) -> None:
    random = np.random.default_rng(0)
    lengths = {
        "alike": np.full(rows, 60),
        "mixed": np.clip(random.lognormal(3.8, 0.8, rows), 4, 400).astype(int),
        "growing": np.linspace(10, 110, rows).astype(int),
    }[kind]
    words = np.array(["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), random.integers(2, 9))) for _ in range(5000)])
    pq.write_table(pa.table({"id": np.arange(rows), "text": [" ".join(random.choice(words, length)) for length in lengths]}), path, row_group_size=4096)


def errors(output: Path) -> dict[str, float]:
    """The error of the time foretold at each moment, by the share of the run's work that was done then."""
    (record,) = (output / "_headrace").glob("events-*.jsonl")
    events = from_json_lines(record.read_text())
    commits = [event.at_s for event in events if isinstance(event, Committed)]
    tally, foretold = Tally(Meter(Prices())), []
    for event in events:
        tally.add([event])
        if (left_s := tally.eta_s) is not None and tally.share is not None:
            foretold.append((tally.share, tally.last_s + left_s))
    ends = {f"{moment:.0%}": next(end_s for share, end_s in foretold if share >= moment) for moment in MOMENTS}
    return {moment: (end_s - commits[-1]) / (commits[-1] - commits[0]) for moment, end_s in ends.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/eta.json")
    options = parser.parse_args()
    found = {}
    for kind in INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            write_input(Path(folder, "in.parquet"), options.rows, kind)
            report = hr.run(job, input=f"{folder}/in.parquet", output=f"{folder}/out", keep="id")
            found[kind] = {name: round(error, 4) for name, error in errors(Path(folder, "out")).items()}
        shown = "  ".join(f"{name} done: {error:+.1%}" for name, error in found[kind].items())
        print(f"{kind:8} {report.wall_s:4.0f} s  {shown}", flush=True)
    if options.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": {"ray": version("ray")}, "rows": options.rows, "error": found}
        (HERE / "results/eta.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
