"""The point-in-time join is what its definition says, whatever the events; and never sees what was not known yet."""

import datetime as dt
import math

import numpy as np
import oracle
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace import FeatureView
from headrace import features as f
from headrace.features.blocks import in_one
from headrace.features.keys import dense, hashed
from headrace.features.order import in_order

HOURS = st.integers(0, 60).map(lambda hours: dt.datetime(2024, 3, 30) + dt.timedelta(hours=hours))
KEYS = st.sampled_from(["a", "b", "c"])
NUMBERS = st.sampled_from([0.0, -0.0, 0.1, 0.2, -1.5, 1e16, -1e16, 1e300, 5e-324, math.inf, -math.inf, math.nan])
WORDS = st.sampled_from(["", "x", "y", "ä"])
WHOLE = st.integers(-5, 5) | st.sampled_from([2**62, -(2**62)])
SCHEMA = pa.schema(
    {"k": pa.string(), "g": pa.int32(), "t": pa.timestamp("us"), "x": pa.float64(), "n": pa.int64(), "w": pa.string(), "v": pa.list_(pa.float32(), 2)}
)


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values | values


EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "k": maybe(KEYS),
            "g": maybe(st.integers(0, 1)),
            "t": maybe(HOURS),
            "x": maybe(NUMBERS),
            "n": maybe(WHOLE),
            "w": maybe(WORDS),
            "v": maybe(st.lists(st.sampled_from([0.0, 1.0, -1.0, math.nan]), min_size=2, max_size=2)),
        }
    ),
    max_size=24,
)
LABELS = st.lists(st.fixed_dictionaries({"k": maybe(KEYS | st.just("nobody")), "g": maybe(st.integers(0, 2)), "t": maybe(HOURS)}), max_size=8)
SPANS = st.sampled_from(["1h", "3h", "1d", "30d", "all"])
DELAYS = st.none() | st.sampled_from(["0h", "1h", "5h"])


@st.composite
def views(draw: st.DrawFn, *, every: bool = False) -> FeatureView:
    """A view with aggregates of all kinds, over random windows."""
    window = lambda: {"over": draw(SPANS), "delay": draw(DELAYS)}  # noqa: E731
    q = draw(st.sampled_from([0, 0.25, 0.5, 1]))
    named = {
        "events": f.count(**window()),
        "known": f.count("x", **window()),
        "values": f.distinct("x", **window()),
        "words": f.distinct("w", **window()),
        "total": f.sum("x", **window()),
        "average": f.mean("x", default=-1.0, **window()),
        "least": f.min("x", **window()),
        "most": f.max("x", **window()),
        "first_word": f.min("w", default="none", **window()),
        "most_words": f.max("w", **window()),
        "quarter": f.quantile("x", q, **window()),
        "middle": f.quantile("n", q, **window()),
        "newest": f.last("x", **window()),
        "newest_word": f.last("w", default="none", **window()),
        "newest_number": "n",
        "lowest": f.min("n", **window()),
        "center": f.mean("v", **window()),
    }
    key = draw(st.sampled_from(["k", ("k", "g"), ("g", "k")]))
    return FeatureView("v", key=key, time="t", features=named, delay=draw(st.sampled_from(["0h", "2h"])), ttl=draw(st.none() | st.sampled_from(["4h", "2d"])))


def same(found, expected) -> bool:
    """Whether a value is the one expected; sums as near as they are said to be."""
    if found is None or expected is None or isinstance(found, (str, int, dt.datetime)):
        return found == expected
    if isinstance(found, list):
        return all((math.isnan(one) and math.isnan(other)) or abs(one - other) <= math.ldexp(1, -22) for one, other in zip(found, expected, strict=True))
    if math.isnan(found) or (isinstance(expected, float) and not math.isfinite(expected)):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    try:
        expected = float(expected)
    except OverflowError:
        return math.isinf(found)
    return abs(found - expected) <= 2 * math.ulp(max(abs(expected), abs(found)))


@given(views(), LABELS, EVENTS)
def test_each_value_is_that_of_the_definition(view, labels, events):
    found = f.as_of(view, pa.Table.from_pylist(labels, SCHEMA.remove(3).remove(3).remove(3).remove(3)), pa.Table.from_pylist(events, SCHEMA))
    assert found.num_rows == len(labels)
    for row, label in zip(found.to_pylist(), labels, strict=True):
        expected = oracle.features(view, label, events)
        assert {name: row[name] for name in label} == label
        wrong = {name: (row[name], expected[name]) for name in view.specs if not same(row[name], expected[name])}
        assert not wrong


@given(views(), LABELS, EVENTS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(view, labels, events, random):
    labels = [label | {"id": at} for at, label in enumerate(labels)]
    types = pa.schema([*(SCHEMA.field(name) for name in ("k", "g", "t")), pa.field("id", pa.int64())])
    first = f.as_of(view, pa.Table.from_pylist(labels, types), pa.Table.from_pylist(events, SCHEMA))
    random.shuffle(labels)
    random.shuffle(events)
    second = f.as_of(view, pa.Table.from_pylist(labels, types), pa.Table.from_pylist(events, SCHEMA)).sort_by("id")
    assert repr(first.to_pylist()) == repr(second.to_pylist())  # to the last bit, and NaN like NaN


@given(views(), LABELS, EVENTS, EVENTS)
def test_nothing_that_happens_later_changes_a_value(view, labels, events, later):
    """Events after a label's own time, less the delay, are planted, and what was there is changed: the label does not see it."""
    labels = [label for label in labels if label["t"] is not None]
    assume(labels)
    label = labels[0]
    horizon = label["t"] - min(map(view.delay_of, view.specs))
    past = [event for event in events if event["t"] is None or event["t"] <= horizon]
    future = [event | {"t": horizon + dt.timedelta(microseconds=1) + (event["t"] - dt.datetime(2024, 3, 30))} for event in later if event["t"]]
    one = pa.Table.from_pylist([label], pa.schema([SCHEMA.field(name) for name in label]))
    seen = [f.as_of(view, one, pa.Table.from_pylist(rows, SCHEMA)).to_pylist() for rows in (past, events, future + past)]
    assert repr(seen[0]) == repr(seen[1]) == repr(seen[2])


@given(views(), EVENTS, HOURS)
def test_latest_is_the_join_at_one_instant(view, events, at):
    table = pa.Table.from_pylist(events, SCHEMA)
    found = f.latest(view, table, at=at).to_pylist()
    late = min(map(view.delay_of, view.specs))
    whole = [event for event in events if event["t"] is not None and all(event[k] is not None for k in view.key)]
    known = sorted({tuple(event[k] for k in view.key) for event in whole if event["t"] <= at - late})
    assert [tuple(row[k] for k in view.key) for row in found] == known
    for row in found:
        label = {k: row[k] for k in view.key} | {"t": at}
        mine = [event["t"] for event in whole if all(event[k] == row[k] for k in view.key) and event["t"] <= at - late]
        assert row["t"] == max(mine)
        expected = oracle.features(view, label, events)
        assert all(same(row[name], expected[name]) for name in view.specs)


@given(EVENTS, st.randoms(use_true_random=False))
def test_the_last_vector_of_an_instant_does_not_depend_on_the_order(events, random):
    view = FeatureView("v", key="k", time="t", features={"vector": "v"})
    labels = pa.table({"k": ["a", "b", "c"], "t": [dt.datetime(2024, 5, 1)] * 3})
    first = f.as_of(view, labels, pa.Table.from_pylist(events, SCHEMA))
    for row in first.to_pylist():
        there = [event for event in events if event["k"] == row["k"] and event["t"] and event["v"] is not None]
        newest = [event["v"] for event in there if event["t"] == max(one["t"] for one in there)]
        assert repr(row["vector"]) == repr(max(newest, key=lambda v: [(math.isnan(x), x, math.copysign(1, x)) for x in v], default=None)) or not newest
    random.shuffle(events)
    assert repr(f.as_of(view, labels, pa.Table.from_pylist(events, SCHEMA)).to_pylist()) == repr(first.to_pylist())


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40), st.data())
def test_sums_of_floats_are_exact_to_the_last_place(numbers, data):
    """Whatever their size, and whatever stands beside the window."""
    from headrace.features.sums import FloatSums

    lo = data.draw(st.integers(0, len(numbers)))
    hi = data.draw(st.integers(lo, len(numbers)))
    values = np.array(numbers, np.float64)
    found = float(FloatSums(values).over(np.array([lo]), np.array([hi]))[0])
    assume(abs(sum(map(oracle.Fraction, numbers[lo:hi]))) < 2**1023)
    assert found == pytest.approx(math.fsum(numbers[lo:hi]), rel=2**-52, abs=0) or found == math.fsum(numbers[lo:hi])
    assert found.hex() == float(FloatSums(values[lo:hi][::-1].copy()).over(np.array([0]), np.array([hi - lo]))[0]).hex()


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 3), min_size=1, max_size=300), st.integers(0, 2))
def test_places_sort_numbers_of_any_size(numbers, runs):
    """Whether they come in runs, at random, or have no room for their places."""
    numbers = np.array(sorted(numbers) * runs if runs else numbers, np.int64)
    places, ordered = in_order(numbers.copy())
    assert numbers[places].tolist() == ordered.tolist() == sorted(numbers.tolist())
    assert sorted(places.tolist()) == list(range(len(numbers)))


@given(
    st.sampled_from([pa.int8(), pa.int64(), pa.uint64()]).flatmap(
        lambda kind: st.tuples(
            st.just(kind),
            *[st.lists(st.none() | st.integers(0, 3) | st.sampled_from([127] if kind == pa.int8() else [2**63 - 1, 2**40]), max_size=20)] * 2,
        )
    )
)
def test_keys_are_numbered_alike_whichever_way(found):
    """Looked up in a table or hashed: the same keys get the same number, and nulls and strangers none."""
    kind, ours, theirs = found
    label, event = (pa.chunked_array([pa.array(values, kind)]) for values in (ours, theirs))
    for column in filter(None, (dense(label, event), hashed(label, event))):
        here, there = (column.numbers_of(in_one(side)) for side in (column.ours, column.theirs))
        numbers = {key: number for key, number in zip(ours, here.tolist(), strict=True) if key is not None}
        assert sorted(numbers.values()) == list(range(column.count))
        assert [numbers.get(key, -1) for key in ours] == here.tolist()
        assert [numbers.get(key, -1) for key in theirs] == there.tolist()
