"""How likely a listing is booked on a night, asked 14 days before: the same file scores all listings in a batch, and answers one at a time.

headrace run examples/stays/stays.py --input stays-output/questions.parquet --output stays-output/scored --keep listing_id,night,booked
headrace serve examples/stays/stays.py
headrace check examples/stays/stays.py --input stays-output/questions.parquet
"""

import datetime as dt

from inputs import numbers, words  # the files beside this one
from score import Hear, Score
from views import CITY, listings, nights, reviews

import headrace as hr

STORE = str(CITY / "features.db")  # what publish.py writes; for several machines a Redis


def lookup(view: hr.FeatureView, **types: type) -> hr.Lookup:
    """A view's features; `types` are those of the events' columns that they are made of."""
    return hr.Lookup(view, store=STORE, types={"listing_id": int} | types)


stays = hr.Pipeline(
    "stays",
    lookup(listings, accommodates=int, list_price=float),
    lookup(nights, price_low_30d=float),
    lookup(reviews, last_review=dt.date),
    numbers,
    words,
    Hear(),
    Score(),
    outputs=["chance", "occupancy_30d", "reviews"],
)
