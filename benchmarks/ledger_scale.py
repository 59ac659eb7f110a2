"""How a ledger behaves at ten billion rows: time and memory to load it, to plan a resume, and to compact it.

    python benchmarks/ledger_scale.py --save

A synthetic output of 100,000 units of 100,000 rows: 45 % of the units done, a tenth of them partly, in 20 pieces each, the rest not begun;
200,000 data files, and 200 commits since the last compaction. Each measurement is made in a process of its own, whose peak memory
is reported, that of the interpreter with its libraries (about 100 MB) included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from headrace import resume
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.intervals import Intervals
from headrace.ledger import Ledger, load
from headrace.state import Change, DataFile, State
from headrace.store import Folder
from headrace.units import Unit, read_units, write_units

ROWS_PER_UNIT, PIECES, COMMITS = 100_000, 20, 200
RAY_BYTES_PER_ROW = 8  # a sorted list of all ids in the memory of each filter actor, as measured for ray.data.checkpoint of Ray 2.60


def synthetic(folder: str, units: int) -> None:
    """Write the ledger and the unit table that a run leaves which was killed half-way."""
    table = [Unit(number, (f"in/{number // 100:04}.parquet",), number % 100, 0, ROWS_PER_UNIT, 50_000_000, 1) for number in range(units)]
    full, partly = int(0.45 * units), units // 10
    state = State(request={}, facts={}, units="_headrace/units-1.parquet")
    piece = ROWS_PER_UNIT // (2 * PIECES)
    for number in range(full):
        state.done[number] = Intervals([(0, ROWS_PER_UNIT)])
    for number in range(full, full + partly):
        state.done[number] = Intervals((2 * at * piece, (2 * at + 1) * piece) for at in range(PIECES))
    rows = sum(done.rows for done in state.done.values())
    files = 2 * units
    for number in range(files):
        count = rows // files + (number < rows % files)
        name = f"part-000001-0123456789ab-{number:08x}.parquet"
        state.files[name] = DataFile(name, count, 30_000_000, 1.0)
    store = Folder(locate(folder, error=OutputError))
    store.put(state.units, write_units(table))
    held, _ = Ledger.claim(store)
    held.begin(state)
    for commit in range(COMMITS):
        unit = full + partly + commit
        name = held.new_name("part", ".parquet")
        held.commit(Change(files=[DataFile(name, 4096, 1_000_000, 1.0)], done={unit: [(0, 4096)]}))


def measure(what: str, folder: str) -> dict[str, float]:
    """One measurement, in this process."""
    store = Folder(locate(folder, error=OutputError))
    started = time.perf_counter()
    if what == "load":
        assert load(store) is not None
    elif what == "resume plan":
        state = load(store)
        assert state is not None
        table = read_units(store.read(state.units))
        started = time.perf_counter()
        assert resume.todo(state, table)
    else:
        held, state = Ledger.claim(store)
        assert state is not None
        held.state = state
        started = time.perf_counter()
        held.compact()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.perf_counter() - started, 2), "peak MB": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ledger_scale.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    rows = arguments.units * ROWS_PER_UNIT
    with tempfile.TemporaryDirectory() as folder:
        synthetic(folder, arguments.units)
        size = sum(path.stat().st_size for path in Path(folder, "_headrace").rglob("*") if path.is_file())
        committed = sum(file.rows for file in load(Folder(locate(folder, error=OutputError))).files.values())
        print(f"{rows:,} rows in {arguments.units:,} units, {committed:,} of them committed; ledger and unit table are {size / 1e6:.1f} MB on disk")
        results: dict[str, dict[str, float]] = {}
        for what in ("load", "resume plan", "compact"):
            done = subprocess.run([sys.executable, __file__, "--measure", what, folder], check=True, capture_output=True, text=True)
            results[what] = json.loads(done.stdout)
            print(f"{what:12} {results[what]['seconds']:6.2f} s, peak {results[what]['peak MB']:,.0f} MB")
    ray = RAY_BYTES_PER_ROW * committed / 1e9
    print(f"a checkpoint of Ray Data for the same rows: {ray:,.0f} GB of ids in the memory of each filter actor")
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("numpy", "pyarrow")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rows": rows, "units": arguments.units}
        content |= {"committed rows": committed, "megabytes on disk": round(size / 1e6, 1), "results": results, "Ray Data, GB": round(ray, 1)}
        (Path(__file__).parent / "results/ledger_scale.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
