"""Where the time of a run goes: every second of its replicas, and of its start and end, by what they were spent on.

    python benchmarks/split.py --input ../shared/data/reviews.parquet --rows 8000

Runs examples/reviews.py by the command, and reads the split off the events and the report that the run leaves beside its output.
The forward pass is timed inside the replicas: it is all of a model's computing but the gathering and encoding of slices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from headrace.events import BlockDone, ReplicaReady, RunStarted, from_json_lines
from headrace.tally import READER, WRITER

HERE = Path(__file__).resolve().parent


def run(pipeline: str, input: str, rows: int, folder: Path) -> tuple[dict, list, float, float]:
    """One run: its report, its events, when the command was given, and when the prompt came back."""
    asked = time.time()
    command = [sys.executable, "-m", "headrace", "run", pipeline, "--input", input, "--output", str(folder / "out"), "--limit", str(rows), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    back = time.time()
    (record,) = (folder / "out/_headrace").glob("events-*.jsonl")
    return json.loads(done.stdout), from_json_lines(record.read_text()), asked, back


def split(report: dict, events: list, asked: float, back: float) -> dict[str, dict[str, float]]:
    """Seconds by what they were spent on: of the command, and of the replicas while they were ready, in shares."""
    started = next(event for event in events if isinstance(event, RunStarted))
    ready = [event.at_s for event in events if isinstance(event, ReplicaReady)]
    setup = [event.setup_s for event in events if isinstance(event, ReplicaReady)]
    blocks = [event for event in events if isinstance(event, BlockDone)]
    model = max((group for group in report["groups"] if group["kind"] == "model"), key=lambda group: group["busy_s"])
    computed = [event for event in blocks if event.group == model["name"]]
    last = max(event.at_s for event in computed)
    ended = report["started_s"] + report["wall_s"]
    busy = {group["name"]: group["busy_s"] for group in report["groups"]}
    functions = sum(group["busy_s"] for group in report["groups"] if group["kind"] == "tasks")
    return {
        "of the command, in seconds": {
            "imports, checks of the input, before the run": report["started_s"] - asked,
            "starting Ray, taking the output": started.at_s - report["started_s"],
            "starting the replicas' processes": min(ready) - started.at_s - min(setup),
            "set-up of the model (median of replicas)": sorted(setup)[len(setup) // 2],
            "from the first replica that is ready to its first block": max(0.0, min(event.at_s - event.busy_s for event in computed) - min(ready)),
            "steady: from the first block to the end of the last": last - min(event.at_s - event.busy_s for event in computed),
            "last commit, merging, publishing, the mark of success": max(0.0, ended - last),
            "report, ending Ray, back to the prompt": back - ended,
        },
        "of the replicas, while ready, in shares": {**model["shares"], "of computing: padding": model["padding"]},
        "of all processes, in seconds of work": {"reading": busy[READER], "functions": functions, "the model": model["busy_s"], "writing": busy[WRITER]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--pipeline", default=str(HERE.parent / "examples/reviews.py"))
    parser.add_argument("--save", action="store_true", help="write results/split.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report, events, asked, back = run(options.pipeline, options.input, options.rows, Path(folder))
    found = split(report, events, asked, back)
    for title, parts in found.items():
        print(title)
        for name, value in parts.items():
            print(f"   {value:8.2f}  {name}")
    print(f"{report['rows_per_s']:.0f} rows/s, {report['steady_rows_per_s']:.0f} in steady state")
    if options.save:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("ray", "pyarrow", "numpy", "torch")},
            "pipeline": Path(options.pipeline).name,
            "rows": options.rows,
            "rows/s": {"with start-up": round(report["rows_per_s"], 1), "steady": round(report["steady_rows_per_s"], 1)},
            "split": {title: {name: round(value, 3) for name, value in parts.items()} for title, parts in found.items()},
        }
        (HERE / "results/split.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
