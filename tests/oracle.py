"""What features are, by definition: plain Python, a label and an event at a time. Tests hold the fast code to it."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from headrace.features import Feature, FeatureView


def instant(value: dt.datetime | dt.date | None) -> dt.datetime | None:
    """The instant in UTC."""
    if value is None or isinstance(value, dt.datetime):
        return value if value is None or value.tzinfo else value.replace(tzinfo=dt.UTC)
    return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)


def rank(value: Any) -> Any:
    """What values are sorted by: NaN after all numbers."""
    return (math.isnan(value), 0.0 if math.isnan(value) else value) if isinstance(value, float) else value


def aggregate(feature: Feature, values: Sequence[tuple[dt.datetime, Any]]) -> Any:
    """The aggregate of the values that there are in a window, with their times."""
    found = sorted((value for _, value in values), key=rank)
    if feature.kind == "count":
        return len(found)
    if feature.kind == "distinct":
        return len(set(map(rank, found)))
    if not found:
        return feature.default
    if feature.kind == "mean" and isinstance(values[0][1], list):
        return [aggregate(feature, [(time, vector[at]) for time, vector in values]) for at in range(len(values[0][1]))]
    if feature.kind in ("sum", "mean"):
        finite = all(map(math.isfinite, found))
        total = sum(map(Fraction, found)) if finite else sum(found)
        return total / len(found) if feature.kind == "mean" else total
    if feature.kind == "quantile":
        place = (len(found) - 1) * feature.q
        lower, upper, share = found[math.floor(place)], found[math.ceil(place)], place - math.floor(place)
        return float(lower) if share == 0 or lower == upper else lower + (upper - lower) * share
    newest = max(time for time, _ in values)
    picked = {"min": found, "max": found[::-1], "last": sorted((value for time, value in values if time == newest), key=rank)[::-1]}
    return picked[feature.kind][0]


def features(view: FeatureView, label: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each feature of one label."""
    time = instant(label[view.time])
    whose = [event for event in events if all(event[k] is not None and event[k] == label[k] for k in view.key) and event[view.time] is not None]
    known = {} if time is None else {name: [e for e in whose if instant(e[view.time]) <= time - view.delay_of(name)] for name in view.specs}
    times = [instant(event[view.time]) for those in known.values() for event in those]
    if view.ttl is not None and times and max(times) <= time - view.ttl:
        known = {}
    row = {}
    for name, feature in view.specs.items():
        end = time and time - view.delay_of(name)
        seen = [e for e in known.get(name, []) if feature.over is None or instant(e[view.time]) > end - feature.over]
        values = [(instant(e[view.time]), True if feature.column is None else e[feature.column]) for e in seen]
        row[name] = aggregate(feature, [(when, value) for when, value in values if value is not None])
    return row
