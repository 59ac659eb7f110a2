"""What the models see of a question: the same two stages prepare the rows of a training, of a batch job and of the service.

headrace explain examples/stays/inputs.py
"""

import datetime as dt

import numpy as np

import headrace as hr

AHEAD = dt.timedelta(days=14)  # how long before a night it is asked about

Number = hr.Column[float | None]


@hr.stage(out={"numbers": hr.Vector(12)})
def numbers(
    night: hr.Column[dt.date],
    accommodates: hr.Column[int | None],
    list_price: Number,
    occupancy_30d: Number,
    occupancy_7d: Number,
    price_30d: Number,
    price_low_30d: Number,
    reviews: hr.Column[int],
    reviews_90d: hr.Column[int],
    last_review: hr.Column[dt.date | None],
):
    year = np.array([2 * np.pi * one.timetuple().tm_yday / 365 for one in night])
    silent_days = [None if last is None else (one - AHEAD - last).days for one, last in zip(night, last_review, strict=True)]
    known = [accommodates, list_price, occupancy_30d, occupancy_7d, price_30d, price_low_30d, reviews, reviews_90d, silent_days]
    columns = [np.cos(year), np.sin(year), [one.weekday() in (4, 5) for one in night], *known]
    return {"numbers": np.stack([np.asarray(column, "float32") for column in columns], axis=1)}  # what is not known is NaN


@hr.stage(out={"words": hr.Vector(8)})
def words(words_0: Number, words_1: Number, words_2: Number, words_3: Number, words_4: Number, words_5: Number, words_6: Number, words_7: Number):
    columns = [words_0, words_1, words_2, words_3, words_4, words_5, words_6, words_7]
    return {"words": np.nan_to_num(np.stack([np.asarray(column, "float32") for column in columns], axis=1))}  # of no reviews, zeros


inputs = hr.Pipeline("inputs", numbers, words)
