"""How likely a listing is booked on a night, asked 14 days before: the same file scores all listings in a batch, and answers one at a time.

headrace run examples/stays/stays.py --input stays-output/questions.parquet --output stays-output/scored --keep listing_id,night,booked
headrace serve examples/stays/stays.py
headrace check examples/stays/stays.py --input stays-output/questions.parquet
"""

import dataclasses
import datetime as dt

from inputs import numbers, words  # the files beside this one
from score import Hear, Score
from views import CITY, listings, nights, reviews

import headrace as hr
from headrace.stage import Stage

STORE = str(CITY / "features.db")  # what publish.py writes; for several machines a Redis


def lookup(view: hr.FeatureView, **types: type) -> Stage:
    """A lookup that asks for a quarter of a core: it waits for the store most of the time, and three of them fit beside the models on a laptop."""
    return dataclasses.replace(Stage.of(hr.Lookup(view, store=STORE, types={"listing_id": int} | types)), on=(hr.cpu(0.25),))


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
