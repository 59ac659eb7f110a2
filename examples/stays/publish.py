"""What is known of each listing two weeks before the calendars end, to the store that the service asks; and questions whose answers the calendar has.

python examples/stays/publish.py
"""

import datetime as dt

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from inputs import AHEAD  # the files beside this one
from stays import STORE
from views import CITY, listings, nights, reviews

import headrace as hr
from headrace.features.reading import read_events
from headrace.online_store import publish

if __name__ == "__main__":
    calendar = pq.read_table(CITY / "calendar.parquet")
    night = pc.min(calendar.group_by("listing_id").aggregate([("date", "max")])["date_max"]).as_py()  # the last one that all calendars have
    now = dt.datetime.combine(night - AHEAD, dt.time(), dt.UTC)
    for view in (listings, nights, reviews):
        done = publish(view, hr.features.latest(view, read_events(view).whole(), at=now), STORE, at=now)
        print(f"{view.name}: {done.rows:,} listings as of {now:%Y-%m-%d}, {done.newer:,} of them new in the store")
    asked = calendar.filter(pc.equal(calendar["date"], pa.scalar(night, pa.date32())))
    booked = pc.invert(asked["available"]).cast(pa.int64())
    pq.write_table(pa.table({"listing_id": asked["listing_id"], "night": asked["date"], "booked": booked}), CITY / "questions.parquet")
    print(f"{len(asked):,} questions about the night of {night}")
