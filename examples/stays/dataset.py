"""The training set: whether a night is booked, and what was known of the listing 14 days before it. Trained on the past, tested on what came later.

python examples/stays/dataset.py
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from inputs import AHEAD  # the files beside this one
from views import CITY, listings, nights, reviews

import headrace as hr

EVERY = 5  # days between the labels of a listing: what is known changes little from one day to the next
TEST = 0.3


def labels() -> pa.Table:
    """A row per listing and night: what is asked (`listing_id`, `night`), as of when (`at`), and the answer (`booked`)."""
    calendar = pq.read_table(CITY / "calendar.parquet", columns=["listing_id", "date", "available"])
    day = calendar["date"].cast(pa.int32()).to_numpy()
    whom = calendar["listing_id"].to_numpy()
    first = day.min() + 30 + AHEAD.days  # the windows are full from then on
    chosen = calendar.filter(pa.array((day >= first) & ((day + whom) % EVERY == 0)))
    at = pc.subtract(chosen["date"].cast(pa.timestamp("s")), pa.scalar(AHEAD, pa.duration("s"))).cast(pa.date32())
    answer = pc.invert(chosen["available"]).cast(pa.int64())
    return pa.table({"listing_id": chosen["listing_id"], "night": chosen["date"], "at": at, "booked": answer})


def split(rows: pa.Table) -> dict[str, pa.Table]:
    """By time: nobody who trains knows a night that was not over when the first question of the test was asked."""
    at, night = (rows[name].cast(pa.int32()).to_numpy() for name in ("at", "night"))
    begin = np.quantile(at, 1 - TEST)
    return {"train": rows.filter(pa.array(night < begin)), "test": rows.filter(pa.array(at >= begin))}


if __name__ == "__main__":
    for name, rows in split(hr.training_set(labels(), [listings, nights, reviews], time="at")).items():
        pq.write_table(rows, CITY / f"{name}.parquet", row_group_size=1024)
        print(f"{name}: {rows.num_rows:,} rows of {pc.min(rows['night'])} to {pc.max(rows['night'])}, {100 * pc.mean(rows['booked']).as_py():.0f}% booked")
