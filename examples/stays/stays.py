"""How likely a listing is booked on a night, asked 14 days before: the same file scores all listings in a batch, and answers one at a time.

headrace run examples/stays/stays.py --input stays-output/questions.parquet --output stays-output/scored --keep booked
headrace serve examples/stays/stays.py
headrace check examples/stays/stays.py --input stays-output/questions.parquet
"""

import datetime as dt

from inputs import numbers, words  # the files beside this one
from score import Hear, Score
from views import CITY, listings, nights, reviews

import headrace as hr

STORE = str(CITY / "features.db")  # what publish.py writes; for several machines a Redis

stays = hr.Pipeline(
    "stays",
    hr.Lookup(listings, store=STORE, types={"listing_id": int, "accommodates": int, "list_price": float}),
    hr.Lookup(nights, store=STORE, types={"listing_id": int, "price_low_30d": float}),
    hr.Lookup(reviews, store=STORE, types={"listing_id": int, "last_review": dt.date}),
    numbers,
    words,
    Hear(),
    Score(),
    outputs=["chance", "occupancy_30d", "reviews"],
)
