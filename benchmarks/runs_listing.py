"""How long `headrace runs` takes over a thousand outputs, most of them ended, some at work or dead, some damaged.

    python benchmarks/runs_listing.py --save

Each round is the whole command in a process of its own, its start included. Beside it: the same command over one output, which is what
Python and the imports take; and listing again where the reports alone are read, one after the other, which is what any listing must do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from headrace.errors import OutputError
from headrace.events import BlockDone, Committed, Event, GroupPlanned, RunFinished, RunStarted
from headrace.filesystems import locate
from headrace.ledger import Ledger
from headrace.report import Report
from headrace.state import Change, DataFile, State
from headrace.store import Folder
from headrace.tally import READER, WRITER, Tally
from headrace.units import Unit, write_units

UNITS, ROWS, COMMITS, BEGAN_S = 100, 10_000, 40, 1_790_000_000.0
DEAD_EVERY, DAMAGED_EVERY = 10, 50  # outputs
HEAVY = ("ray", "torch", "pandas", "pyarrow.dataset")
BARE = """
import json, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("*/_headrace/report.json"):
    try:
        json.loads(path.read_bytes())
    except ValueError:
        pass
"""
LOADED = f"import sys; from headrace.cli import app; app(['runs', sys.argv[1]], standalone_mode=False); assert not set({HEAVY}) & sys.modules.keys()"


def ledger(folder: Path) -> str:
    """Write what a run leaves beside its output that was killed after some commits; returns the run's name."""
    store = Folder(locate(str(folder), error=OutputError))
    units = [Unit(at, (f"in/{at}.parquet",), 0, 0, ROWS, 1_000_000, 1) for at in range(UNITS)]
    store.put("_headrace/units-1.parquet", write_units(units))
    held, _ = Ledger.claim(store)
    held.begin(State(request={"pipeline": "reviews", "input": ["in"]}, facts={}, units="_headrace/units-1.parquet"))
    for at in range(COMMITS):
        held.commit(Change(files=[DataFile(held.new_name("part", ".parquet"), ROWS, 1_000_000, BEGAN_S)], done={at: [(0, ROWS)]}))
    return held.run


def report(run: str) -> str:
    """A report as a run of ten minutes leaves it, with its figures over time."""
    tally, rows = Tally(), UNITS * ROWS
    names = [READER, "clean", "embed", WRITER]
    events: list[Event] = [RunStarted("reviews", ("in",), "out", run, BEGAN_S, rows, at_s=BEGAN_S), *(GroupPlanned(name, "tasks", 1.0) for name in names)]
    for at in range(600):
        events += [BlockDone(name, rows // 600, 0.7, 0, 0, at_s=BEGAN_S + at) for name in names]
        events.append(Committed(rows // 600, 0, at_s=BEGAN_S + at))
    tally.add([*events, RunFinished(rows, rows, 0, 600.0, at_s=BEGAN_S + 600)])
    return json.dumps({**Report.of(tally, output="out", state=None).to_dict(), "bottleneck": ""}, indent=2)


def outputs(folder: Path, count: int) -> None:
    """Write the outputs."""
    first = folder / "run-0000"
    run = ledger(first)
    text = report(run)
    for at in range(count):
        here = folder / f"run-{at:04}"
        if at:
            shutil.copytree(first, here, ignore=shutil.ignore_patterns("report.json"))
        if at % DEAD_EVERY != 1:
            (here / "_headrace/report.json").write_text(text if at % DAMAGED_EVERY != 2 else text[:1000])


def seconds(arguments: list[str]) -> tuple[float, float]:
    """How long a command takes, and how much of it a core was at work for it."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    took_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/runs_listing.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs(Path(folder), arguments.outputs)
        size = Path(folder, "run-0000/_headrace/report.json").stat().st_size
        what = {
            "all": ["-m", "headrace", "runs", folder],
            "one": ["-m", "headrace", "runs", f"{folder}/run-0000"],
            "reports alone": ["-c", BARE, folder],
        }
        took_s: dict[str, list[tuple[float, float]]] = {name: [] for name in what}
        for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine meets all alike
            for name, command in what.items():
                took_s[name].append(seconds(command))
        listed = subprocess.run([sys.executable, "-m", "headrace", "runs", folder, "--json"], check=True, capture_output=True, text=True).stdout
        seconds(["-c", LOADED, folder])
    states = [one["state"] for one in json.loads(listed)]
    assert len(states) == arguments.outputs
    counts = {state: states.count(state) for state in sorted(set(states))}
    print(f"{arguments.outputs:,} outputs ({', '.join(f'{number} {state}' for state, number in counts.items())}), reports of {size / 1e3:.0f} kB")
    results = {}
    for name, times in took_s.items():
        walls, cores = zip(*times, strict=True)
        results[name] = {"median s": round(statistics.median(walls), 2), "best s": round(min(walls), 2), "core s": round(statistics.median(cores), 2)}
        print(f"{name:14} {results[name]['median s']:5.2f} s, {results[name]['best s']:5.2f} s at best, {results[name]['core s']:5.2f} core-seconds")
    each_ms = 1000 * (results["all"]["median s"] - results["one"]["median s"]) / arguments.outputs
    print(f"{each_ms:.2f} ms per output beyond the start of the command")
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("pyarrow", "rich", "typer")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "outputs": arguments.outputs, "states": counts}
        content |= {"report bytes": size, "rounds": arguments.rounds, "results": results, "ms per output": round(each_ms, 2)}
        (Path(__file__).parent / "results/runs_listing.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
