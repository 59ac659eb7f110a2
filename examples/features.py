"""What was known of a listing when each review was written: features as of every label, and as of one day.

headrace features examples/features.py --labels ../shared/data/reviews.parquet --output review-set --local
headrace features examples/features.py --at 2024-02-01 --output review-features --local
"""

import headrace as hr


@hr.stage(out={"words": int})
def count_words(text: hr.Column[str | None]):
    return {"words": [len((t or "").split()) for t in text]}


# A review is known a day after its date: none counts for itself, nor those of the same day for each other.
reviews = hr.FeatureView(
    "reviews",
    "../shared/data/reviews.parquet",
    key="listing_id",
    time="date",
    pipeline=hr.Pipeline("words", count_words),
    delay="1d",
    features={
        "reviews_30d": hr.features.count(over="30d"),
        "reviews_before": hr.features.count(),
        "mean_words": hr.features.mean("words", over="365d", default=0.0),
        "median_words": hr.features.quantile("words", 0.5),
        "last_words": "words",
    },
)
