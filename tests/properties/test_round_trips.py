"""Rows to Arrow and back: no value of any column type is changed on the way."""

import datetime as dt
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace as hr
from headrace.arrays import conform, table, to_arrow, to_rows, to_stage
from headrace.columns import from_arrow, type_of
from headrace.testing import same

ZONES = [None, dt.UTC, dt.timezone(dt.timedelta(hours=-11, minutes=-30)), ZoneInfo("Asia/Tokyo"), ZoneInfo("Europe/Berlin")]
FLOATS = st.floats(width=32)
VALUES = {
    str: st.text(st.characters(exclude_categories=["Cs"])),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(),
    bytes: st.binary(),
    hr.Image: st.binary(),
    dt.datetime: st.sampled_from(ZONES).flatmap(
        lambda zone: st.datetimes(dt.datetime(1, 1, 3), dt.datetime(9999, 12, 29), timezones=st.just(zone), allow_imaginary=False)
    ),
    dt.date: st.dates(),
    hr.Vector(3): st.lists(FLOATS, min_size=3, max_size=3),
    hr.Vector(): st.lists(FLOATS, max_size=4),
    hr.Vector(2, "int8"): st.lists(st.integers(-128, 127), min_size=2, max_size=2),
    hr.Vector(dtype="uint8"): st.lists(st.integers(0, 255), max_size=4),
    hr.Vector(dtype="int64"): st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    hr.Vector(1, "float16"): st.lists(st.floats(width=16), min_size=1, max_size=1),
}
SCALARS = st.sampled_from([annotation for annotation in VALUES if not isinstance(annotation, hr.Vector)])


def optional(case):
    annotation, values = case
    return annotation | None, st.none() | values


def listed(case):
    annotation, values = case
    return list[annotation], st.lists(values, max_size=3)


# An annotation and a strategy for its values: a scalar or a vector, optional or not, or lists of such, up to three deep.
LEAVES = st.sampled_from(list(VALUES.items()))
CASES = st.recursive(LEAVES | LEAVES.map(optional), lambda inner: inner.map(listed) | inner.map(listed).map(optional), max_leaves=3)
COLUMNS = CASES.flatmap(lambda case: st.tuples(st.just(case[0]), st.lists(case[1], max_size=6)))


def normal(value):
    """The value as it comes back: instants in UTC, vectors as lists."""
    if isinstance(value, dt.datetime):
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)
    return [normal(item) for item in value] if isinstance(value, (list, np.ndarray)) else value


def equal(found, expected):
    """Equality in which NaN equals NaN, and which knows an int from a float and a null from either."""
    return same([normal(value) for value in found], [normal(value) for value in expected], tolerance=0)


@given(COLUMNS)
def test_rows_come_back_as_they_went(column):
    """Rows to a table and back are the same rows, whatever the type, its nulls and its nesting."""
    annotation, values = column
    types = {"x": type_of(annotation)}
    data = table([{"x": value} for value in values], types)
    data.validate(full=True)
    assert data.schema.field("x").type == types["x"].arrow
    back = [row["x"] for row in to_rows(data, types)]
    if types["x"].vector:
        back = [None if value is None else value.tolist() for value in back]
    assert equal(back, values)


@given(COLUMNS, st.integers(0, 6), st.integers(0, 6))
def test_a_stage_that_copies_changes_nothing(column, start, stop):
    """What a stage receives, of a whole column or of a slice, can be returned as it is, and is the same column then."""
    annotation, values = column
    kind = type_of(annotation)
    array = to_arrow(values, kind, rows=len(values))[start:stop]
    assert equal(to_arrow(to_stage(array, kind), kind, rows=len(array)).to_pylist(), array.to_pylist())


@given(COLUMNS, st.integers(0, 6))
def test_conform_is_idempotent_over_chunks(column, cut):
    """A column that is right already stays as it is, in however many chunks it comes."""
    annotation, values = column
    kind = type_of(annotation)
    array = to_arrow(values, kind, rows=len(values))
    again = conform(pa.chunked_array([array[:cut], array[cut:]]), kind)
    assert again.equals(conform(again, kind)) or equal(again.to_pylist(), array.to_pylist())
    assert again.type == array.type


@given(CASES)
def test_a_type_is_read_back_from_its_own_arrow_type(case):
    """A source with a column's own Arrow type is always accepted, and feeds a stage that declares the column."""
    column = type_of(case[0])
    assert from_arrow(column.arrow).kind in (column.kind, "list", "bytes")
    assert hr.columns.accepts(column, column.arrow)
    assert column.feeds(column)


@given(LEAVES.flatmap(lambda case: st.tuples(st.just(case[0]), st.lists(case[1], min_size=1, max_size=4), st.integers(0, 3))))
def test_a_null_that_is_not_declared_is_refused(case):
    """One null among values of a type without `| None` is refused, in a column and inside a list."""
    annotation, values, at = case
    values.insert(at, None)
    for kind, rows in ((type_of(annotation), values), (type_of(list[annotation]), [values])):
        with pytest.raises(ValueError, match="null"):
            to_arrow(rows, kind, rows=len(rows))


@given(SCALARS, SCALARS, st.data())
def test_a_value_of_another_type_is_refused(annotation, other, data):
    """A value never changes its type silently; only an int may stand for a float, and an instant for a date."""
    value = data.draw(VALUES[other])
    column, found = type_of(annotation), type_of(other)
    if column.feeds(found) or (annotation, other) in {(float, int), (float, bool), (dt.date, dt.datetime), (int, bool)}:
        return
    with pytest.raises(ValueError, match=r"expected|tried"):
        to_arrow([value], column, rows=1)
