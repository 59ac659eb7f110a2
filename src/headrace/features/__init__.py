"""Features of keys over time: what a key's events say of it, as it was known at any instant.

    reviews = hr.FeatureView("reviews", "reviews/*.parquet", key="listing_id", time="date", features={
        "reviews_30d": hr.features.count(over="30d"),
        "mean_stars": hr.features.mean("stars"),
        "host": "host_name",
    })

The same view gives training sets (`as_of`: a value per label, as of the label's own time) and what is known now (`latest`:
a row per key). `FeatureView` says what counts, and when; it and `training_set` are attributes of `headrace` itself as well.
"""

from headrace.features.aggregates import Feature, count, distinct, last, max, mean, min, quantile, sum
from headrace.features.asof import as_of, latest, left_out
from headrace.features.training import training_set
from headrace.features.view import FeatureView, schema_of

__all__ = [
    "Feature",
    "FeatureView",
    "as_of",
    "count",
    "distinct",
    "last",
    "latest",
    "left_out",
    "max",
    "mean",
    "min",
    "quantile",
    "schema_of",
    "sum",
    "training_set",
]
