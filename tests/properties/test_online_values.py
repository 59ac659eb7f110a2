"""The online store: no value is changed on the way, and the order in which tables are written does not matter."""

import datetime as dt
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.test_round_trips import CASES, LEAVES, equal, optional

from headrace.arrays import table
from headrace.columns import type_of
from headrace.online_store import open_store
from headrace.online_store.reading import Reader
from headrace.online_store.records import NEVER, Layout
from headrace.online_store.views import MARKER, ViewSchema

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
UNITS = st.sampled_from(["s", "ms", "us", "ns"])
ZONES = st.sampled_from([None, "UTC", "Asia/Tokyo", "-11:30"])
WHOLE = [(arrow, st.integers(low, high)) for arrow, low, high in (
    (pa.int8(), -(2**7), 2**7 - 1), (pa.uint8(), 0, 2**8 - 1), (pa.int16(), -(2**15), 2**15 - 1), (pa.uint16(), 0, 2**16 - 1),
    (pa.int32(), -(2**31), 2**31 - 1), (pa.uint32(), 0, 2**32 - 1), (pa.int64(), -(2**63), 2**63 - 1), (pa.uint64(), 0, 2**64 - 1),
)]  # fmt: skip
ARROW = st.one_of(
    st.sampled_from(WHOLE),
    st.builds(lambda unit, zone: (pa.timestamp(unit, zone), st.integers(-(2**63), 2**63 - 1)), UNITS, ZONES),
    st.sampled_from([(pa.date32(), st.integers(-(2**31), 2**31 - 1)), (pa.duration("ns"), st.integers(-(2**63), 2**63 - 1))]),
)


def there_and_back(data: pa.Table) -> pa.Table:
    layout = Layout(data.schema)
    blobs = layout.encode(data, np.zeros(len(data), np.int64), np.full(len(data), NEVER), 0)
    reader = Reader(layout, range(len(data.schema)))
    whole = reader.read([*blobs], 0)
    whole.validate(full=True)
    back = reader.read([*blobs, None], 0)
    back.validate(full=True)
    assert back.schema == reader.schema
    for name, column in zip(whole.column_names, whole.columns, strict=True):
        again = back[name].slice(0, len(blobs))
        assert again.equals(column) or equal(again.to_pylist(), column.to_pylist())  # not a number is equal here
    assert back["found"].to_pylist() == [True] * len(blobs) + [False] and back["event_time"].null_count == 1
    back = back.select(data.column_names)
    assert all(column[len(blobs)].as_py() is None for column in back.columns)
    return back.slice(0, len(blobs))


@given(st.data())
def test_values_come_back_as_they_went(data):
    """Columns of any type that a stage can write, nullable or not, nested or not, several beside each other."""
    cases = data.draw(st.lists(CASES | LEAVES.map(optional), min_size=1, max_size=10))
    count = data.draw(st.integers(0, 4))
    types = {f"c{at}": type_of(annotation) for at, (annotation, _) in enumerate(cases)}
    columns = [data.draw(st.lists(values, min_size=count, max_size=count)) for _, values in cases]
    rows = [dict(zip(types, row, strict=True)) for row in zip(*columns, strict=True)]
    given = table(rows, types)
    back = there_and_back(given)
    for name, column in zip(given.column_names, given.columns, strict=True):
        assert equal(back[name].to_pylist(), column.to_pylist()), name


@given(st.data())
def test_arrows_own_types_come_back_bit_by_bit(data):
    """Integers of all widths, and instants of all units and zones, in a slice of a larger column too."""
    arrow, numbers = data.draw(ARROW)
    values = data.draw(st.lists(st.none() | numbers, max_size=9))
    storage = pa.array(values, pa.int64() if arrow.bit_width == 64 and not pa.types.is_integer(arrow) else pa.int32() if pa.types.is_date(arrow) else arrow)
    array = storage if storage.type == arrow else storage.view(arrow)
    for column in (array, array.slice(1), pa.chunked_array([array, array.slice(2)], arrow)):
        given = pa.table({"x": column, "l": pa.array([[1, None]] * len(column), pa.list_(pa.int16()))})
        assert there_and_back(given).equals(given)


def test_any_number_of_rows_with_nulls_and_without():
    """Bitmaps and numbers of all widths, where they end within a byte or a word; all features, and some of them in another order."""
    for count in (*range(1, 18), 64, 257):
        some = [None if at % 3 == 1 else at % 100 for at in range(count)]
        columns = {str(arrow): pa.array(some, pa.int8()).cast(arrow) for arrow in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.bool_(), pa.float32())}
        columns |= {f"all {name}": column.fill_null(column[0]) for name, column in columns.items()}
        columns |= {"v": pa.array([[at, at] for at in range(count)], pa.list_(pa.float32(), 2))}
        given = pa.table(columns)
        assert there_and_back(given).equals(given)
        layout, places = Layout(given.schema), list(range(len(columns)))
        blobs = layout.encode(given, np.zeros(count, np.int64), np.full(count, NEVER), 0)
        for wanted in (places[::-1], places[1::3], places[5:] + places[:5], places[:1]):
            assert Reader(layout, wanted).read([*blobs], 0).drop(["found", "event_time"]).equals(given.select(wanted))


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=3))
def test_bytes_that_are_no_value_are_refused_or_read(blobs):
    """Whatever lies there: an error in words, or a table that Arrow itself finds sound; never a crash."""
    schema = pa.schema({"n": pa.int32(), "s": pa.string(), "l": pa.list_(pa.list_(pa.float32()))})
    layout = Layout(schema)
    head = bytes(8 * 2) + b"\xff" * 8 + bytes(8 + 4) + b"\x07"
    for kept in (blobs, [head + len(blob).to_bytes(4, "little") * 2 + blob * 2 for blob in blobs]):
        try:
            read = Reader(layout, range(3)).read(list(kept), 0)
        except ValueError:
            continue
        read.validate(full=True)


KEY_PARTS = {"str": st.text(st.characters(exclude_categories=["Cs"]), max_size=4), "int": st.integers(), "date": st.dates(), "bytes": st.binary(max_size=3)}


@given(st.data())
def test_different_keys_are_written_differently(data):
    kinds = data.draw(st.lists(st.sampled_from(list(KEY_PARTS)), min_size=1, max_size=3))
    schema = ViewSchema(tuple((f"k{at}", kind) for at, kind in enumerate(kinds)), pa.schema({"x": pa.int8()}))
    parts = st.tuples(*(KEY_PARTS[kind] for kind in kinds))
    keys = data.draw(st.lists(parts if len(kinds) > 1 else parts.map(lambda part: part[0]), unique=True, max_size=8))
    written = schema.encode(keys)
    assert len(set(written)) == len(keys) and MARKER not in written
    assert ViewSchema.from_bytes(schema.to_bytes()) == schema


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=7, unique=True),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_any_order_of_the_same_writes_ends_alike(tmp_path_factory, rows, size, random):
    """Each row has a value of its own; those of one key and one instant are told apart by when they were computed."""
    expected = {}
    for number, (key, day, at) in enumerate(rows):
        expected[key] = max(expected.get(key, (-1, -1, -1)), (day, at, number))
    orders = [list(enumerate(rows)) for _ in range(3)]
    for order in orders[1:]:
        random.shuffle(order)
    path = tmp_path_factory.mktemp("order") / "features.db"
    with open_store(path) as store:
        for view, order in zip(("first", "second", "third"), orders, strict=True):
            for at in (0, 1):
                batch = [(number, row) for number, row in order if row[2] == at]
                for part in itertools.batched(batch, size) if hasattr(itertools, "batched") else [batch[i : i + size] for i in range(0, len(batch), size)]:
                    write(store, view, part, at)
            for number, row in order:  # once more, one by one and mixed
                write(store, view, [(number, row)], row[2])
            got = store.read(view, list("abc"))["value"].to_pylist()
            assert got == [expected.get(key, (None,))[-1] for key in "abc"]


def write(store, view, part, at):
    columns = {"key": [row[0] for _, row in part], "time": [NOW + dt.timedelta(days=row[1]) for _, row in part], "value": [number for number, _ in part]}
    store.write(view, pa.table(columns), key="key", time="time", at=NOW + dt.timedelta(days=at))


@pytest.mark.parametrize(
    "arrow", [pa.struct({"x": pa.int8()}), pa.null(), pa.decimal128(5), pa.list_(pa.null()), pa.list_(pa.string(), 2), pa.map_(pa.int8(), pa.int8())]
)
def test_other_types_are_refused(arrow):
    with pytest.raises(ValueError, match=r"column 'x': values of type .* cannot be kept; allowed are bool"):
        Layout(pa.schema({"x": arrow}))
