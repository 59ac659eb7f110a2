"""The point-in-time join beside DuckDB and Polars, each in memory in this process with all its threads, in turn in every round.

    python benchmarks/features.py --rounds 5 --save
    python benchmarks/features.py --calendar ../shared/data/calendar.parquet

Generated events of so many keys over a year, microseconds apart, and as many labels:

    asof       the last value that is known at the time of each label: DuckDB's ASOF join, Polars' join_asof
    windows    count, sum, mean, least and greatest value of the 30 days before each label: in DuckDB a window over events and
               labels together, in Polars a rolling aggregation over them
    quantile   the median of these windows; DuckDB's quantile_cont, Polars' median

With `--calendar` events and labels are the rows of a calendar of prices, where many share a day: each row is a label for what was
known a day before. Values are compared before anything is timed: equal, but for sums in the last digits.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import headrace as hr
from headrace import features as f

YEAR_US = 365 * 86_400_000_000
WINDOW = dt.timedelta(days=30)
AGGREGATES = {"n": "count(x)", "total": "sum(x)", "average": "avg(x)", "least": "min(x)", "most": "max(x)"}
MEDIAN = {"median": "quantile_cont(x, 0.5)"}
FEATURES = {
    "asof": {"last": f.last("x")},
    "windows": {name: getattr(f, kind)("x", over=WINDOW) for name, kind in zip(AGGREGATES, ("count", "sum", "mean", "min", "max"), strict=True)},
    "quantile": {"median": f.quantile("x", 0.5, over=WINDOW)},
}


def generated(rows: int, keys: int) -> tuple[pa.Table, pa.Table]:
    """Events and labels, in no order."""
    rng = np.random.default_rng(7)

    def some() -> dict[str, pa.Array]:
        return {"k": pa.array(rng.integers(0, keys, rows)), "t": pa.array(rng.integers(0, YEAR_US, rows)).cast(pa.timestamp("us"))}

    return pa.table(some() | {"x": pa.array(rng.normal(100, 30, rows).round(2))}), pa.table(some() | {"id": pa.array(range(rows))})


def calendar(path: str) -> tuple[pa.Table, pa.Table]:
    """Prices as events, and all rows as labels for what was known a day before."""
    rows = pq.read_table(path, columns=["listing_id", "date", "price"]).rename_columns(["k", "t", "x"])
    rows = rows.set_column(1, "t", rows["t"].cast(pa.timestamp("us"))).filter(pc.is_valid(rows["x"])).combine_chunks()
    labels = rows.select(["k"]).append_column("t", pc.subtract(rows["t"], pa.scalar(dt.timedelta(days=1), pa.duration("us"))))
    return rows, labels.append_column("id", pa.array(range(rows.num_rows)))


def headrace(events: pa.Table, labels: pa.Table, what: str) -> pa.Table:
    return f.as_of(hr.FeatureView("v", key="k", time="t", features=FEATURES[what]), labels, events)


def with_duckdb(events: pa.Table, labels: pa.Table, what: str) -> pa.Table:
    if what == "asof":
        query = "select l.*, e.x as last from labels l asof left join events e on l.k = e.k and l.t >= e.t"
    else:
        chosen = ", ".join(f"{sql} over w as {name}" for name, sql in (AGGREGATES if what == "windows" else MEDIAN).items())
        query = f"""
            select * exclude (x) from (
                select k, t, id, x, {chosen} from (select k, t, null as id, x from events union all select k, t, id, null from labels)
                window w as (partition by k order by t range between interval '{WINDOW.days} days' - interval 1 microsecond preceding and current row)
            ) where id is not null"""
    return duckdb.sql(query).to_arrow_table()


def with_polars(events: pa.Table, labels: pa.Table, what: str) -> pa.Table:
    one, other = pl.from_arrow(events), pl.from_arrow(labels)
    if what == "asof":
        return other.sort("t").join_asof(one.sort("t").rename({"x": "last"}), on="t", by="k", strategy="backward", check_sortedness=False).to_arrow()
    both = pl.concat([one.with_columns(id=pl.lit(None, pl.Int64)), other.with_columns(x=pl.lit(None, pl.Float64)).select("k", "t", "x", "id")])
    x = pl.col("x")
    wanted = [x.count().alias("n"), x.sum().alias("total"), x.mean().alias("average"), x.min().alias("least"), x.max().alias("most")]
    chosen = wanted if what == "windows" else [x.median().alias("median")]
    # Rows of one instant see each other, as in DuckDB; the label's own number comes back through the order, which rolling keeps.
    ordered = both.sort("k", "t")
    rolled = ordered.rolling(index_column="t", period=WINDOW, group_by="k", closed="right").agg(*chosen)
    return rolled.with_columns(ordered["id"]).filter(pl.col("id").is_not_null()).to_arrow()


CONTENDERS: dict[str, Callable[[pa.Table, pa.Table, str], pa.Table]] = {"headrace": headrace, "duckdb": with_duckdb, "polars": with_polars}


def compare(events: pa.Table, labels: pa.Table, what: str) -> None:
    """Hold the others' values to ours; of rows at one instant with different values, each takes another for the last."""
    ours = headrace(events, labels, what).sort_by("id")
    for name, contender in list(CONTENDERS.items())[1:]:
        theirs = contender(events, labels, what).sort_by("id")
        for column in FEATURES[what]:
            found, expected = (table[column].cast(pa.float64()).fill_null(0).to_numpy() for table in (theirs, ours))
            apart = ~np.isclose(found, expected, rtol=1e-9, atol=1e-6)
            assert not apart.any(), f"{name}, {what}, {column}: {apart.sum()} values differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of events, and of labels")
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--calendar", metavar="PATH", help="a calendar instead of generated events")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/features.json, or features_calendar.json")
    arguments = parser.parse_args()
    events, labels = calendar(arguments.calendar) if arguments.calendar else generated(arguments.rows, arguments.keys)
    print(f"{events.num_rows:,} events, {labels.num_rows:,} labels, {len(os.sched_getaffinity(0))} cores")
    results: dict[str, dict[str, object]] = {}
    for what in arguments.only:
        compare(events, labels, what)
        took_s: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        cores_s: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine meets all alike
            for name, contender in CONTENDERS.items():
                started, busy = time.perf_counter(), time.process_time()
                contender(events, labels, what)
                took_s[name].append(time.perf_counter() - started)
                cores_s[name].append(time.process_time() - busy)  # of all threads: what others do on the machine counts less
        medians = {name: statistics.median(times) for name, times in took_s.items()}
        over_best = medians["headrace"] / min(medians["duckdb"], medians["polars"])
        busy_s = {name: statistics.median(times) for name, times in cores_s.items()}
        results[what] = {name: {"s": round(median, 3), "core s": round(busy_s[name], 3)} for name, median in medians.items()}
        results[what]["headrace over the best other"] = round(over_best, 2)
        shown = ", ".join(f"{name} {median:.2f} s ({busy_s[name]:.2f} core-s)" for name, median in medians.items())
        print(f"{what:9} {shown} -> {over_best:.2f} times the best other", flush=True)
    if arguments.save:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("duckdb", "numpy", "polars", "pyarrow")}
        content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "events": events.num_rows, "labels": labels.num_rows}
        content |= {"rounds": arguments.rounds, "median s": results}
        name = "features_calendar" if arguments.calendar else "features"
        (Path(__file__).parent / f"results/{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
