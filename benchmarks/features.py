"""Point-in-time features: headrace in one process next to DuckDB, Polars, Daft and plain Ray Data; and what needs how much memory.

    python benchmarks/features.py --save
    python benchmarks/features.py --no-calendar --events 20e6 --rounds 1 --limit-gb 1.2 --contenders headrace-job,headrace,duckdb,polars --save

Two kinds of features of the same events, each for every label as of the label's own time:

    join       the last value: what as-of joins are made for
    windows    count, sum, mean, least and greatest value of the 30 days before

over two inputs: a calendar of short stays (`../shared/data/calendar.parquet`, 1.9 million rows, each of which is an event and a label, where
it is there), and generated events (`--events`, a fifth as many labels, 100 events to a key, but one event in ten of one hot key), both as
Parquet files.

The contenders take turns, each in a process of its own that reads the files and ends with the values as a table in memory. Seconds count
from the first byte read to the table, after the same over a thousand events; the memory is the peak of the process, for Ray that of all its processes, shared
pages counted once. With `--limit-gb` a process that has more memory resident is killed, as in a container, and what does not finish says so; not so Ray.

    headrace       hr.training_set, as documented
    headrace-job   what `headrace features --labels --local` does: from files to files, so that it ends with these
    duckdb         ASOF JOIN; window functions over events and labels together, with RANGE; told of the limit, so that it writes to the disk what has no room
    polars         join_asof; rolling over events and labels together
    daft           join_asof; window functions with range_between; needs --daft-python
    ray            Ray Data: union, repartition by key, pandas' merge_asof and rolling in map_batches

All must find the same values: a thousandth of the labels is compared with the first one's. Daft does not install beside headrace's own versions:

    python3.11 -m venv /tmp/daft && /tmp/daft/bin/pip install daft==0.7.26 numpy
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
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import dataset

CALENDAR = Path(__file__).parents[2] / "shared/data/calendar.parquet"
PIECE, SAMPLE, PER_KEY, HOT = 2_000_000, 1024, 100, 0.1
DAY_US = 86_400_000_000
SINGLE = ("duckdb", "polars", "daft")  # tools of one process, the fastest of which is the measure
LIMIT = "FEATURES_LIMIT_GB"
COUNTS = ("n", "total", "mean", "least", "most")
FOUND = {"join": ("value",), "windows": COUNTS}


def write_calendar(folder: Path) -> int:
    table = pq.read_table(CALENDAR)
    rows = np.arange(table.num_rows)
    events = pa.table({"k": table["listing_id"], "t": table["date"].cast(pa.timestamp("us")), "x": table["price"].cast(pa.float64())})
    shuffled = np.random.default_rng(0).permutation(rows)
    write(events, folder / "events", 0)  # as it lies: by listing and date
    write(events.select(["k", "t"]).take(pa.array(shuffled)).append_column("id", pa.array(rows)), folder / "labels", 0)
    return table.num_rows


def write_generated(folder: Path, events: int) -> int:
    """A year of events, in pieces. No two of one key share an instant: what is the last of two is a rule that tools do not share."""
    numbers = np.random.default_rng(0)
    keys = max(events // PER_KEY, 1)
    for piece, first in enumerate(range(0, events, PIECE)):
        rows = np.arange(first, min(first + PIECE, events))
        times = numbers.integers(0, 365 * DAY_US // events, len(rows)) * events + numbers.permutation(rows)  # its rest tells events apart
        table = pa.table({"k": _keys(numbers, len(rows), keys), "t": _times(times), "x": numbers.normal(100, 30, len(rows)).round(2)})
        write(table, folder / "events", piece)
        part = len(rows) // 5
        labels = pa.table({"k": _keys(numbers, part, keys), "t": _times(numbers.integers(0, 365 * DAY_US, part)), "id": rows[:part]})
        write(labels, folder / "labels", piece)
    return events


def _keys(numbers: np.random.Generator, count: int, keys: int) -> np.ndarray:
    return np.where(numbers.random(count) < HOT, 0, numbers.integers(0, keys, count))


def _times(since_us: np.ndarray) -> pa.Array:
    return pa.array(since_us + 19_723 * DAY_US).cast(pa.timestamp("us"))  # from 2024 on


def write(table: pa.Table, folder: Path, piece: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{piece:03}.parquet", row_group_size=131_072)


def view(kind: str, folder: str) -> Any:
    import headrace as hr
    from headrace import features as f

    over = {"over": "30d"}
    features = {"value": f.last("x")}
    if kind == "windows":
        features = {"n": f.count("x", **over), "total": f.sum("x", **over), "mean": f.mean("x", **over)}
        features |= {"least": f.min("x", **over), "most": f.max("x", **over)}
    return hr.FeatureView("view", f"{folder}/events/*.parquet", key="k", time="t", features=features)


def headrace(kind: str, folder: str) -> Callable[[], pa.Table]:
    from headrace.features import training

    return lambda: training.training_set(f"{folder}/labels/*.parquet", view(kind, folder))


def headrace_job(kind: str, folder: str) -> Callable[[], str]:
    from headrace.features.job import FeatureJob

    output = tempfile.mkdtemp(dir=folder)

    def run() -> str:
        FeatureJob.of([view(kind, folder)], output=output, labels=f"{folder}/labels/*.parquet").run()
        return output

    return run


def duckdb(kind: str, folder: str) -> Callable[[], pa.Table]:
    import duckdb as library

    db = library.connect()
    db.execute(f"SET threads = {cores()}; SET temp_directory = '{folder}/duckdb'")
    if limit := float(os.environ.get(LIMIT, "0")):
        db.execute(f"SET memory_limit = '{int(0.7e9 * limit)}B'; SET preserve_insertion_order = false")  # the rest is for what it does not count
    events, labels = f"'{folder}/events/*.parquet'", f"'{folder}/labels/*.parquet'"
    if kind == "join":
        query = f"SELECT l.*, e.x AS value FROM {labels} l ASOF LEFT JOIN (FROM {events} WHERE x IS NOT NULL) e ON l.k = e.k AND l.t >= e.t"
    else:
        # A window of RANGE has its beginning in it; so it is a microsecond shorter.
        query = f"""
            SELECT * EXCLUDE (x) FROM (
                SELECT id, k, t, x, count(x) OVER w AS n, sum(x) OVER w AS total, avg(x) OVER w AS mean, min(x) OVER w AS least, max(x) OVER w AS most
                FROM (SELECT NULL AS id, k, t, x FROM {events} UNION ALL SELECT id, k, t, NULL FROM {labels})
                WINDOW w AS (PARTITION BY k ORDER BY t RANGE BETWEEN INTERVAL '{30 * DAY_US - 1} microseconds' PRECEDING AND CURRENT ROW)
            ) WHERE id IS NOT NULL"""
    return lambda: db.sql(query).to_arrow_table()


def polars(kind: str, folder: str) -> Callable[[], pa.Table]:
    import polars as pl

    def run() -> pa.Table:
        events, labels = pl.scan_parquet(f"{folder}/events/*.parquet"), pl.scan_parquet(f"{folder}/labels/*.parquet")
        if kind == "join":
            known = events.filter(pl.col("x").is_not_null()).sort("t").rename({"x": "value"})
            return labels.sort("t").join_asof(known, on="t", by="k", check_sortedness=False).collect().to_arrow()
        both = pl.concat([events, labels], how="diagonal").sort("k", "t")
        x = pl.col("x")
        found = {"n": x.count(), "total": x.sum(), "mean": x.mean(), "least": x.min(), "most": x.max()}
        rows = both.collect()
        window = rows.lazy().rolling("t", period="30d", closed="right", group_by="k").agg(**found)
        return window.collect().with_columns(rows["id"]).filter(pl.col("id").is_not_null()).to_arrow()

    return run


def daft(kind: str, folder: str) -> Callable[[], pa.Table]:
    import datetime as dt

    import daft as library
    from daft import Window, col

    def run() -> pa.Table:
        events, labels = library.read_parquet(f"{folder}/events/*.parquet"), library.read_parquet(f"{folder}/labels/*.parquet")
        if kind == "join":
            known = events.where(col("x").not_null()).select("k", "t", col("x").alias("value"))
            return labels.join_asof(known, on="t", by="k").to_arrow()
        nothing = library.lit(None)
        both = labels.select("id", "k", "t", nothing.cast(library.DataType.float64()).alias("x")).union_all(
            events.select(nothing.cast(library.DataType.int64()).alias("id"), "k", "t", "x")
        )
        window = Window().partition_by("k").order_by("t").range_between(-dt.timedelta(microseconds=30 * DAY_US - 1), Window.current_row)
        x = col("x")
        found = {"n": x.count(), "total": x.sum(), "mean": x.mean(), "least": x.min(), "most": x.max()}
        return both.select("id", "k", "t", *(value.over(window).alias(name) for name, value in found.items())).where(col("id").not_null()).to_arrow()

    return run


def ray(kind: str, folder: str) -> Callable[[], pa.Table]:
    import logging

    import pandas as pd
    import ray as library

    if not library.is_initialized():
        library.init(address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    library.data.DataContext.get_current().enable_progress_bars = False

    def join(batch: pd.DataFrame) -> pd.DataFrame:
        labels, events = batch[batch["id"] >= 0].drop(columns="x"), batch[(batch["id"] < 0) & batch["x"].notna()]
        events = events[["k", "t", "x"]].rename(columns={"x": "value"})
        return pd.merge_asof(labels.sort_values("t"), events.sort_values("t"), on="t", by="k")

    def windows(batch: pd.DataFrame) -> pd.DataFrame:
        batch = batch.sort_values(["k", "t", "id"], ignore_index=True)  # events, whose id is -1, before the labels of the same instant
        rolled = batch.groupby("k").rolling("30D", on="t", min_periods=0)["x"].agg(["count", "sum", "mean", "min", "max"])
        batch[list(COUNTS)] = rolled.to_numpy()
        return batch[batch["id"] >= 0].drop(columns="x")

    def run() -> pa.Table:
        data = library.data
        no_label = lambda table: table.append_column("id", pa.array(np.full(len(table), -1)))  # noqa: E731
        no_event = lambda table: table.append_column("x", pa.nulls(len(table), pa.float64()))  # noqa: E731
        events = data.read_parquet(f"{folder}/events").map_batches(no_label, batch_format="pyarrow")
        labels = data.read_parquet(f"{folder}/labels").map_batches(no_event, batch_format="pyarrow")
        names = ["id", "k", "t", "x"]
        parts = events.select_columns(names).union(labels.select_columns(names)).repartition(4 * cores(), keys=["k"])
        found = parts.map_batches(join if kind == "join" else windows, batch_format="pandas", batch_size=None)
        return pa.concat_tables(library.get(found.to_arrow_refs()), promote_options="permissive")

    return run


CONTENDERS = {made.__name__.replace("_", "-"): made for made in (headrace, headrace_job, duckdb, polars, daft, ray)}


def cores() -> int:
    return len(os.sched_getaffinity(0))


class Memory(threading.Thread):
    """The most that this process and those that it started held together, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        import psutil

        while not self.done.wait(0.5):
            held = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has ended
            self.peak = max(self.peak, held)


def resident_bytes(process: int | str, what: str) -> int:
    """`VmRSS`, the memory that a process has resident, or `VmHWM`, the most that it ever had; getrusage would tell its parent's, if that had more."""
    found = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(f"{what}:")]
    return int(found[0].split()[1]) * 1024 if found else 0  # a process that has ended has none


def measure(name: str, kind: str, folder: str) -> dict[str, float]:
    """One measurement, in this process; leaves a sample of the values beside the input."""
    memory = Memory()
    if name == "ray":
        memory.start()
    made = CONTENDERS[name]
    made(kind, f"{folder}/few")()  # modules load, threads start
    run = made(kind, folder)
    started, used = time.perf_counter(), time.process_time()
    table = run()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - used
    memory.done.set()
    peak = memory.peak or resident_bytes("self", "VmHWM")
    found = dataset.dataset(table, partitioning=None) if isinstance(table, str) else dataset.dataset(table if isinstance(table, pa.Table) else pa.table(table))
    sample = found.to_table(["id", *FOUND[kind]], filter=pc.bit_wise_and(pc.field("id"), SAMPLE - 1) == 0).sort_by("id")
    pq.write_table(sample, f"{folder}/{kind}-{name}.parquet")
    return {"seconds": round(seconds, 2), "core seconds": round(cpu_s, 2), "peak GB": round(peak / 1e9, 2), "rows": found.count_rows()}


def measured(name: str, kind: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in a process of its own; `failed` says why there is none."""
    python = arguments.daft_python if name == "daft" else sys.executable
    env = os.environ | {
        "DAFT_RUNNER": "native",
        "RAY_raylet_start_wait_time_s": "300",
        "DO_NOT_TRACK": "1",
        "DAFT_ANALYTICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [python, __file__, "--measure", name, kind, folder]
    limit_gb = 0 if name == "ray" else arguments.limit_gb
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.Popen(command, stdout=out, stderr=err, env=env | {LIMIT: str(limit_gb)})
        began, killed = time.monotonic(), ""
        while done.poll() is None and not killed:
            time.sleep(0.02)
            if limit_gb and resident_bytes(done.pid, "VmRSS") > limit_gb * 1e9:
                killed = f"took more than {limit_gb:g} GB, {time.monotonic() - began:.0f} s after its start"
            elif time.monotonic() - began > arguments.timeout_s:
                killed = f"took more than {arguments.timeout_s} s"
        done.kill()
        done.wait()
        out.seek(0)
        err.seek(0)
        told, said = out.read(), err.read().strip().splitlines() or [""]
    if killed:
        return {"failed": killed}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}: {said[-1][:200]}"}
    return json.loads(told.splitlines()[-1])


def check(name: str, first: str, kind: str, folder: str) -> None:
    """The values are those of the first one: to the last bit, but for sums, which not all round as exactly as headrace."""
    ours, theirs = (pq.read_table(f"{folder}/{kind}-{one}.parquet") for one in (first, name))
    assert ours["id"].equals(theirs["id"]), f"{name}, {kind}: other labels"
    for column in FOUND[kind]:
        mine, other = (table[column].cast(pa.float64()).to_numpy() for table in (ours, theirs))
        if column in ("n", "total"):  # nothing, or the sum of nothing
            mine, other = np.nan_to_num(mine), np.nan_to_num(other)
        rough = column in ("total", "mean")
        assert np.allclose(mine, other, rtol=1e-9 if rough else 0, atol=1e-6 if rough else 0, equal_nan=True), f"{name}, {kind}: other values of {column}"


def compare(data: str, folder: str, names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders over one input, in turn."""
    write_generated(Path(folder) / "few", 1000)
    found: dict[str, Any] = {}
    for kind in FOUND:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        failed: dict[str, str] = {}
        for number in range(arguments.rounds):
            for name in names:
                if name in failed or (number and name == "ray"):  # no matter by how many times
                    continue
                run = measured(name, kind, folder, arguments)
                if "failed" in run:
                    failed[name] = run["failed"]
                else:
                    check(name, next((one for one in names if runs[one]), name), kind, folder)
                    runs[name].append(run)
                print(f"{data}, {kind}, round {number + 1}: {name:12} {json.dumps(run)}", flush=True)
        medians = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items() if of}
        found[kind] = medians | {name: {"failed": why} for name, why in failed.items()}
        if "headrace" not in medians or not set(medians) & set(SINGLE):
            continue
        for what in ("seconds", "core seconds"):
            fastest = min((name for name in SINGLE if name in medians), key=lambda name: medians[name][what])
            ratio = statistics.median(a[what] / b[what] for a, b in zip(runs["headrace"], runs[fastest], strict=True))
            found[kind] |= {f"{what} over the fastest tool": round(ratio, 2), f"fastest tool by {what}": fastest}
            print(f"{data}, {kind}: headrace takes {ratio:.2f} of the {what} of {fastest}, the fastest tool of one process", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=float, default=5e6, help="how many to generate; 0 for none")
    parser.add_argument("--no-calendar", action="store_true", help="generated events only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--daft-python", help="the python of an environment with Daft")
    parser.add_argument("--limit-gb", type=float, default=0, help="how much memory each process may have; 0 for what there is")
    parser.add_argument("--timeout-s", type=int, default=600, help="for one measurement")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/features.json, with a limit features_memory_20m.json for 20e6 events")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    names = arguments.contenders.split(",")
    results: dict[str, Any] = {}
    if "daft" in names and not arguments.daft_python:
        names.remove("daft")
        results["left out"] = "Daft: no --daft-python was given"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as temporary:
        if not arguments.no_calendar and CALENDAR.exists():
            folder = Path(temporary) / "calendar"
            rows = write_calendar(folder)
            results[f"calendar, {rows:,} events and labels"] = compare("calendar", str(folder), names, arguments)
        elif not arguments.no_calendar:
            results["calendar"] = f"left out: there is no {CALENDAR.name}"
        if arguments.events:
            folder = Path(temporary) / "generated"
            rows = write_generated(folder, int(arguments.events))
            results[f"generated, {rows:,} events"] = compare("generated", str(folder), names, arguments)
    if arguments.save:
        machine = {"cores": cores(), "machine": platform.machine(), "python": platform.python_version(), "load": round(os.getloadavg()[0], 1)}
        versions = {name: version(name) for name in ("numpy", "pyarrow", "polars", "duckdb", "ray")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "rounds": arguments.rounds}
        content |= {"limit GB": arguments.limit_gb or None, "results": results}
        file = f"features_memory_{arguments.events / 1e6:g}m.json" if arguments.limit_gb else "features.json"
        (Path(__file__).parent / "results" / file).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
