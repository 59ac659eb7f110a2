"""Look features up: what is known of each listing is published to a store, and a pipeline adds it to every request.

python examples/lookup.py
headrace check examples/lookup.py --input ../shared/data/reviews.parquet --limit 200
headrace run examples/lookup.py --input ../shared/data/reviews.parquet --output attention --keep review_id --limit 2000
"""

import datetime as dt
from pathlib import Path

import pyarrow.parquet as pq

import headrace as hr
from headrace import features
from headrace.online_store import publish

REVIEWS = str(Path(__file__).parent / "../../shared/data/reviews.parquet")
STORE = "reviews.db"  # a path in this folder; a service on several machines takes redis://host:6379/0

reviews = hr.FeatureView(
    "reviews",
    REVIEWS,
    key="listing_id",
    time="date",
    features={"reviews": features.count(), "reviews_30d": features.count(over="30d"), "newest": "text"},
)
lookup = hr.Lookup(reviews, store=STORE, types={"listing_id": int, "newest": str})


@hr.stage(out={"attention": float})
def attention(reviews: hr.Column[int], reviews_30d: hr.Column[int], newest: hr.Column[str | None]):
    """How much a listing is talked about lately, from 0 to 1; 0 if it is not known."""
    share = reviews_30d / reviews.clip(1)
    return {"attention": [part if text else 0.0 for part, text in zip(share.tolist(), newest, strict=True)]}


score = hr.Pipeline("score", lookup, attention, outputs=["reviews", "attention"])

if __name__ == "__main__":
    events = pq.read_table(REVIEWS, columns=["listing_id", "date", "text"])
    now = dt.datetime.combine(max(events["date"].to_pylist()), dt.time(), dt.UTC)
    known = features.latest(reviews, events, at=now)
    done = publish(reviews, known, STORE, at=now)
    print(f"published {done.rows:,} listings, {done.newer:,} of them new, to {STORE}")
    listing = known["listing_id"][0].as_py()
    print(score.local([{"listing_id": listing}, {"listing_id": -1}]))
