"""Feature views: what they refuse and why; types; the edges of windows; zones, units and late events."""

import datetime as dt
import math
import pickle

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import headrace as hr
from headrace import features as f
from headrace.errors import DefinitionError, SourceError, WiringError
from headrace.features.blocks import ROWS

VIEW = {"key": "k", "time": "t", "features": {"n": f.count()}}
EVENTS = pa.schema({"k": pa.string(), "t": pa.timestamp("us"), "x": pa.float64(), "n": pa.int32(), "w": pa.string(), "v": pa.list_(pa.float32(), 2)})
NOON = dt.datetime(2024, 3, 31, 12)


def view(**more) -> hr.FeatureView:
    return hr.FeatureView("v", **(VIEW | more))


def events(*rows) -> pa.Table:
    """Events of one key: hours from noon on, and a value."""
    return pa.table({"k": ["a"] * len(rows), "t": pa.array([NOON + dt.timedelta(hours=h) for h, _ in rows], pa.timestamp("us")), "x": [x for _, x in rows]})


def value(feature, rows, *, at=NOON, **more):
    """The feature of key a at an instant."""
    labels = pa.table({"k": ["a"], "t": pa.array([at], pa.timestamp("us"))})
    return f.as_of(view(features={"found": feature}, **more), labels, events(*rows))["found"][0].as_py()


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (lambda: hr.FeatureView("two words", **VIEW), ["identifier", "'two words'"]),
        (lambda: view(source=3), ["'v'", "path, glob or URI", "got 3"]),
        (lambda: view(source=[]), ["source must be", "got []"]),
        (lambda: view(key=()), ["key must be", "got ()"]),
        (lambda: view(key=("k", "k")), ["key must be", "('k', 'k')"]),
        (lambda: view(time="k"), ["time must be", "not in the key", "'k'"]),
        (lambda: view(features={}), ["features must be names and aggregates", "got {}"]),
        (lambda: view(features={"k": f.count()}), ["feature 'k'", "key or of the time"]),
        (lambda: view(features={"a b": f.count()}), ["identifier", "'a b'"]),
        (lambda: view(features={"a": 3}), ["feature 'a'", "hr.features.count()", "got 3"]),
        (lambda: view(delay="-1d"), ["'v'", "delay", "'-1d'"]),
        (lambda: view(delay=dt.timedelta(-1)), ["delay must be at least 0"]),
        (lambda: view(ttl="0s"), ["ttl must be above 0", "'0s'"]),
        (lambda: view(pipeline=len), ["pipeline must be an hr.Pipeline"]),
        (lambda: f.count(over="30 days"), ["hr.features.count: over", "'30d'", "'30 days'", "d (days)"]),
        (lambda: f.count(over="0d"), ["over", "above 0", "'0d'"]),
        (lambda: f.count(over=30), ["over", "got 30"]),
        (lambda: f.count(over="99999999999d"), ["at most", "99999999999d"]),
        (lambda: f.sum(None), ["hr.features.sum is of a column", "None"]),
        (lambda: f.sum(""), ["hr.features.sum is of a column", "''"]),
        (lambda: f.quantile("x", 1.5), ["q must be a number from 0 to 1", "1.5"]),
        (lambda: f.quantile("x", True), ["q must be a number", "True"]),
        (lambda: f.quantile("x", math.nan), ["q must be a number", "nan"]),
    ],
)
def test_what_no_view_can_be_is_refused(mistake, parts):
    with pytest.raises(DefinitionError) as caught:
        mistake()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        ({"features": {"a": f.mean("xx")}}, ["reads column 'xx'", "'x'", "did you mean 'x'?"]),
        ({"key": "key"}, ["reads column 'key'", "lack"]),
        ({"time": "n", "features": {"c": f.count()}}, ["column 'n'", "timestamp or a date", "int32", "in which unit"]),
        ({"time": "w"}, ["column 'w'", "timestamp or a date", "string"]),
        ({"key": "x"}, ["key column 'x'", "double", "whole numbers, text"]),
        ({"features": {"a": f.sum("w")}}, ["feature 'a'", "sum is of numbers", "'w' is string"]),
        ({"features": {"a": f.mean("w")}}, ["feature 'a'", "mean is of numbers, or of vectors of one length", "'w' is string"]),
        ({"features": {"a": f.sum("v")}}, ["feature 'a'", "sum is of numbers, but", "fixed_size_list"]),
        ({"features": {"a": f.mean("v", default=0.0)}}, ["feature 'a'", "default=0.0", "fixed_size_list"]),
        ({"features": {"a": f.max("v")}}, ["feature 'a'", "no max of column 'v'", "fixed_size_list"]),
        ({"features": {"a": f.max("n", default="none")}}, ["feature 'a'", "default='none'", "int32"]),
    ],
)
def test_what_does_not_fit_the_events_is_refused(mistake, parts):
    with pytest.raises(WiringError) as caught:
        f.schema_of(view(**mistake), EVENTS)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("labels", "more", "kind", "parts"),
    [
        ({"k": ["a"]}, {}, WiringError, ["column 't' of the labels", "they have 'k'"]),
        ({"k": ["a"], "t": [1]}, {}, WiringError, ["the labels' column 't'", "int64"]),
        ({"k": [1], "t": [NOON]}, {}, WiringError, ["key column 'k'", "int64 in the labels", "string in the events"]),
        ({"k": ["a"], "t": [NOON], "n": [1]}, {}, WiringError, ["column 'n'", "as a feature is called"]),
        ({"k": ["a"], "t": [NOON]}, {"key": ("k", "t")}, DefinitionError, ["has the key 'k'", "got 'k', 't'"]),
        ({"k": ["a"], "t": [NOON]}, {"time": "tt"}, WiringError, ["column 'tt'", "did you mean 't'?"]),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, more, kind, parts):
    with pytest.raises(kind) as caught:
        f.as_of(view(), pa.table(labels), events((0, 1.0)), **more)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_types_are_declared():
    every = {
        "count": f.count(),
        "distinct": f.distinct("w"),
        "sum_int": f.sum("n"),
        "sum_float": f.sum("x"),
        "mean": f.mean("n"),
        "median": f.quantile("n", 0.5),
        "least": f.min("n"),
        "newest": f.last("w"),
        "vector": "v",
    }
    types = f.schema_of(view(features=every), EVENTS)
    assert [str(kind) for kind in types.types[:8]] == ["int64", "int64", "int64", "double", "double", "double", "int32", "string"]
    assert types.field("vector").type == EVENTS.field("v").type
    empty = f.as_of(view(features=every), EVENTS.empty_table().select(["k", "t"]), EVENTS.empty_table())
    assert empty.schema.types[2:] == types.types
    one = f.as_of(view(features=every), pa.table({"k": ["a"], "t": [NOON]}), EVENTS.empty_table())
    assert one.schema.types[2:] == types.types
    assert one.to_pylist()[0] == {"k": "a", "t": NOON, "count": 0, "distinct": 0} | dict.fromkeys(list(every)[2:])


@pytest.mark.parametrize(
    ("hours", "counted"),
    [(0, True), (-23.999, True), (-24, False), (0.001, False)],
)
def test_the_end_of_a_window_is_in_it_and_its_beginning_is_not(hours, counted):
    assert value(f.count(over="1d"), [(hours, 1.0)]) == counted
    assert value(f.count(over="1d"), [(hours - 2, 1.0)], delay="2h") == counted
    assert value(f.count(over="1d", delay="2h"), [(hours - 2, 1.0)]) == counted


def test_a_view_lives_for_its_time_and_no_longer():
    rows = [(-5, 2.0)]
    assert value(f.sum("x"), rows, ttl="6h") == 2
    assert value(f.sum("x", default=-1.0), rows, ttl="5h") == -1
    assert value(f.count(), rows, ttl="5h") == 0


def test_duplicates_count_as_often_as_they_are_there():
    assert value(f.sum("x"), [(-1, 2.0), (-1, 2.0)]) == 4
    assert value(f.distinct("x"), [(-1, 2.0), (-1, 2.0)]) == 1


@pytest.mark.parametrize(
    ("feature", "expected"),
    [(f.min("x"), 1), (f.max("x"), math.nan), (f.sum("x"), math.nan), (f.last("x"), math.nan), (f.distinct("x"), 2), (f.count("x"), 4)],
)
def test_nan_is_the_greatest_value_and_null_is_none(feature, expected):
    found = value(feature, [(-2, 1.0), (-1, math.nan), (-1, 1.0), (-1, math.nan), (-1, None)])
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_the_least_of_nans_alone_is_nan():
    assert math.isnan(value(f.min("x"), [(-1, math.nan), (-1, None)]))


def test_zones_are_instants_and_dates_are_midnight_in_utc():
    zoned = pa.array([dt.datetime(2024, 3, 31, 12)], pa.timestamp("us")).cast(pa.timestamp("ns", "Europe/Madrid"))  # 14:00 there
    times = pa.chunked_array([zoned])
    table = pa.table({"k": pa.array(["a"]).dictionary_encode(), "t": times})
    stamps = [NOON, NOON - dt.timedelta(microseconds=1)]
    assert f.as_of(view(), pa.table({"k": ["a", "a"], "t": stamps}), table)["n"].to_pylist() == [1, 0]
    days = pa.table({"k": ["a", "a"], "t": [dt.date(2024, 3, 31), dt.date(2024, 4, 1)]})
    assert f.as_of(view(), days, table)["n"].to_pylist() == [0, 1]
    midnight = pa.table({"k": ["a"], "t": [dt.date(2024, 3, 31)]})
    early = pa.table({"k": ["a", "a"], "t": [dt.datetime(2024, 3, 31), dt.datetime(2024, 3, 30, 23, 59)]})
    assert f.as_of(view(), early, midnight)["n"].to_pylist() == [1, 0]


def test_a_nanosecond_is_not_rounded_away():
    """An event a nanosecond after the label is not known to it."""
    base = np.datetime64("2024-01-01", "ns")
    table = pa.table({"k": ["a"], "t": pa.array([base + 1])})
    labels = pa.table({"k": ["a", "a"], "t": pa.array([base, base + 1])})
    assert f.as_of(view(), labels, table)["n"].to_pylist() == [0, 1]


def test_times_that_cannot_be_told_are_refused():
    far = pa.table({"k": ["a"], "t": pa.array([2**62], pa.timestamp("s"))})
    with pytest.raises(SourceError, match="labels' times cannot be told in us since 1970"):
        f.as_of(view(), far, events((0, 1.0)))


def test_windows_reach_back_to_the_beginning_of_time_and_no_further():
    first = pa.table({"k": ["a"], "t": pa.array([-(2**63) + 1], pa.int64()).cast(pa.timestamp("us"))})
    assert f.as_of(view(features={"n": f.count(over="9000d")}), first, first)["n"].to_pylist() == [1]
    assert f.as_of(view(features={"n": f.count()}, delay="1d"), first, first)["n"].to_pylist() == [0]


def test_times_too_far_apart_for_even_marks_are_ordered_all_the_same():
    rng = np.random.default_rng(3)
    times = rng.integers(-(2**60), 2**60, 300)
    keys = rng.integers(0, 40, 300)
    table = pa.table({"k": keys, "t": pa.array(times).cast(pa.timestamp("us"))})
    found = f.as_of(view(), table, table)["n"].to_pylist()
    assert found == [int(((keys == k) & (times <= t)).sum()) for k, t in zip(keys, times, strict=True)]


def test_whole_numbers_are_summed_exactly_or_not_at_all():
    def total(numbers, kind):
        table = pa.table({"k": ["a"] * len(numbers), "t": [NOON] * len(numbers), "x": pa.array(numbers, kind)})
        return f.as_of(view(features={"total": f.sum("x")}), pa.table({"k": ["a"], "t": [NOON]}), table)["total"].to_pylist()

    assert total([2**62, 2**62 - 1, 2**62, -(2**62)], pa.int64()) == [2**63 - 1]
    assert total([200, 100], pa.uint8()) == [300]
    assert total([-(2**63)], pa.int64()) == [-(2**63)]
    with pytest.raises(SourceError, match="feature 'total': a sum does not fit into 64 bits"):
        total([2**62, 2**62], pa.int64())
    with pytest.raises(SourceError, match="feature 'total': a value does not fit into 64 bits"):
        total([2**63], pa.uint64())


def test_a_small_sum_beside_large_numbers_keeps_all_its_digits():
    rows = [(-30, 1e300), (-29, -1e300), (-28, math.inf), (-2, 0.1), (-1, 0.2)]
    assert value(f.sum("x", over="3h"), rows) == 0.1 + 0.2
    assert value(f.sum("x", over="29.5h"), rows) == math.inf


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.struct({"a": pa.float32()}), pa.list_(pa.float32(), 1)])
def test_of_nested_values_at_one_instant_the_greatest_is_the_last(kind):
    rows = [{"a": x} if pa.types.is_struct(kind) else [x] for x in (1.0, -2.0, 3.0, -0.0, None)]
    for order in (rows, rows[::-1]):
        table = pa.table({"k": ["a"] * 6, "t": [NOON] * 6, "x": pa.array([*order, None], kind)})
        found = f.as_of(view(features={"x": "x"}), pa.table({"k": ["a"], "t": [NOON]}), table)["x"].to_pylist()
        assert found == [rows[2]]


@pytest.mark.parametrize(
    "values",
    [[False, True], [dt.date(2024, 1, 1), dt.date(2025, 1, 1)], [NOON, NOON + dt.timedelta(1)], [b"a", b"b"], ["a", "b"], [1, 2], [1.5, 2.5]],
)
def test_what_can_be_sorted_has_a_least_and_a_greatest_value(values):
    table = pa.table({"k": ["a", "a"], "t": [NOON, NOON], "x": values[::-1]})
    every = view(features={"least": f.min("x"), "most": f.max("x"), "newest": f.last("x", default=values[0]), "different": f.distinct("x")})
    labels = pa.table({"k": ["a", "b"], "t": [NOON, NOON]})
    known, unknown = f.as_of(every, labels, table).to_pylist()
    assert list(known.values())[2:] == [values[0], values[1], values[1], 2]
    assert list(unknown.values())[2:] == [None, None, values[0], 0]


def test_keys_of_two_columns_and_other_names():
    table = pa.table({"a": [1, 1, 2, None], "b": ["x", "y", "x", "x"], "t": [NOON] * 4})
    labels = pa.table({"one": pa.array([1, 2, 2, None], pa.int8()), "other": ["x", "y", "x", "x"], "when": [NOON] * 4})
    found = f.as_of(view(key=("a", "b")), labels, table, key=("one", "other"), time="when")
    assert found["n"].to_pylist() == [1, 0, 1, 0]
    assert found.column_names == ["one", "other", "when", "n"]
    assert f.left_out(view(key=("a", "b")), table) == 1


def test_chunked_tables_are_as_good_as_whole_ones():
    rows = [(-h, float(h % 5)) for h in range(20)]
    parts = pa.concat_tables([events(*rows[at : at + 3]) for at in range(0, 20, 3)])
    every = view(features={"n": f.count(over="9h"), "x": "x", "m": f.quantile("x", 0.3, over="9h"), "d": f.distinct("x", over="9h")})
    labels = pa.concat_tables([pa.table({"k": ["a"], "t": [NOON - dt.timedelta(hours=h)]}) for h in range(6)])
    found = f.as_of(every, labels, parts).to_pylist()
    assert found == f.as_of(every, labels, parts.combine_chunks()).to_pylist()
    for row in found:
        expected = oracle.features(every, row, events(*rows).to_pylist())
        assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_the_mean_of_vectors_is_a_vector():
    vectors = pa.array([[1, 2], None, [3, -2], [0.1, 0.1]], pa.list_(pa.float32(), 2))
    times = [NOON - dt.timedelta(hours=h) for h in (1, 2, 3, 30)]
    table = pa.table({"k": ["a"] * 4, "t": times, "v": vectors})
    labels = pa.table({"k": ["a", "b"], "t": [NOON, NOON]})
    features = {"day": f.mean("v", over="1d"), "ever": f.mean("v", default=[0.0, 1.0])}
    found = f.as_of(view(features=features), labels, table.slice(0, 3))
    assert found.schema.field("day").type == vectors.type
    assert found["day"].to_pylist() == [[2.0, 0.0], None]
    assert found["ever"].to_pylist() == [[2.0, 0.0], [0.0, 1.0]]
    third = f.as_of(view(features=features), labels, table)["ever"].to_pylist()[0]
    assert third == pytest.approx([4.1 / 3, 0.1 / 3], rel=2**-23)
    hole = pa.array([[1, None]], pa.list_(pa.float32(), 2))
    with pytest.raises(SourceError, match="feature 'day': a vector has null in it"):
        f.as_of(view(features=features), labels, pa.table({"k": ["a"], "t": [NOON], "v": hole}))


@pytest.mark.parametrize("step_us", [1, 86_400_000_000], ids=["microseconds", "days"])
def test_many_labels_are_joined_as_a_few_are(step_us):
    """Labels in several blocks, and more events than one thread sorts, give what a few labels with the events of their keys give."""
    rng = np.random.default_rng(0)
    many, keys = 2 * ROWS + 1000, 500
    times = lambda count: pa.array(rng.integers(0, 10**13 // step_us, count) * step_us, pa.timestamp("us"), mask=rng.random(count) < 0.01)  # noqa: E731
    words = pa.array(["x", "y", "z"]).take(pa.array(rng.integers(0, 3, many), mask=rng.random(many) < 0.1))
    table = pa.table({"k": rng.integers(0, keys, many), "t": times(many), "x": pa.array(rng.normal(size=many), mask=rng.random(many) < 0.1), "w": words})
    labels = pa.table({"k": rng.integers(0, keys + 1, many), "t": times(many)})
    window = {"over": "30d"}
    numbers = {"n": f.count(**window), "sum": f.sum("x", **window), "mean": f.mean("x", delay="1d"), "middle": f.quantile("x", 0.5, **window)}
    values = {"least": f.min("x", **window), "most": f.max("w", **window), "d": f.distinct("w"), "x": "x", "w": f.last("w", default="none")}
    every = view(features=numbers | values, ttl="90d")
    found = f.as_of(every, labels, table)
    for key in (0, 7, keys):
        few, mine = (of.filter(pc.equal(of["k"], key)) for of in (labels, table))
        assert found.filter(pc.equal(found["k"], key)).equals(f.as_of(every, few, mine))


def test_latest_leaves_out_keys_of_which_nothing_is_known_yet():
    table = pa.table({"k": ["b", "a", "a"], "t": [NOON, NOON, NOON - dt.timedelta(hours=3)], "x": [1.0, 2.0, 3.0]})
    found = f.latest(view(features={"n": f.count(), "x": "x"}, delay="1h"), table, at=NOON)
    assert found.to_pylist() == [{"k": "a", "t": NOON - dt.timedelta(hours=3), "n": 1, "x": 3.0}]
    assert f.latest(view(), table.slice(0, 0), at=NOON).num_rows == 0


def test_latest_gives_each_key_of_two_columns_its_own_values():
    """Whichever way the second column's values come in the first one's groups."""
    table = pa.table({"a": ["p", "q", "q"], "b": ["y", "x", "y"], "t": [NOON - dt.timedelta(hours=h) for h in range(3)], "x": [1.0, 2.0, 3.0]})
    found = f.latest(view(key=("a", "b"), features={"x": "x"}), table, at=NOON)
    assert found.to_pylist() == table.sort_by([("a", "ascending"), ("b", "ascending")]).to_pylist()


def test_a_view_is_a_value():
    full = view(source="in/*.parquet", features={"n": f.count(over="36h", delay="90s"), "x": "x"}, delay="1d", ttl="2w")
    assert pickle.loads(pickle.dumps(full)) == full
    assert full != view()
    assert [str(feature) for feature in full.specs.values()] == ["count(over=36h, delay=90s)", "last(x, over=all)"]
    assert full.columns == ("k", "t", "x")
    with pytest.raises(TypeError):
        full.features["n"] = f.count()
