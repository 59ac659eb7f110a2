"""Columns: one type, seen as Python, Arrow and JSON; what is converted, and what is refused."""

import datetime as dt
import types
import typing

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.arrays import conform, table, to_arrow, to_rows, to_stage
from headrace.columns import ANY, ColumnType, accepts, from_arrow, type_of, types_of
from headrace.errors import DefinitionError

UTC_US = pa.timestamp("us", tz="UTC")
NOON = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
BASE64 = {"type": "string", "contentEncoding": "base64", "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"}
LARGEST = {16: 65504.0, 32: 3.4028235e38, 64: 1.7976931348623157e308}  # of float32 as JSON writes it, which is a little more than the number
FLOATS = {
    bits: {"anyOf": [{"type": "number", "minimum": -most, "maximum": most}, {"enum": ["NaN", "Infinity", "-Infinity"]}]} for bits, most in LARGEST.items()
}
INTS = {bits: {"type": "integer", "minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1} for bits in (8, 64)}

SPELLINGS = [
    (str, "str", pa.string(), {"type": "string"}),
    (bool, "bool", pa.bool_(), {"type": "boolean"}),
    (int, "int", pa.int64(), INTS[64]),
    (float, "float", pa.float64(), FLOATS[64]),
    (bytes, "bytes", pa.binary(), BASE64),
    (hr.Image, "image", pa.binary(), BASE64 | {"contentMediaType": "image/*"}),
    (dt.datetime, "datetime", UTC_US, {"type": "string", "format": "date-time"}),
    (dt.date, "date", pa.date32(), {"type": "string", "format": "date"}),
    (hr.Vector(), "Vector(ragged)", pa.list_(pa.float32()), {"type": "array", "items": FLOATS[32]}),
    (hr.Vector(2, "int8"), "Vector(2, int8)", pa.list_(pa.int8(), 2), {"type": "array", "items": INTS[8], "minItems": 2, "maxItems": 2}),
    (hr.Vector(1, "float16"), "Vector(1, float16)", pa.list_(pa.float16(), 1), {"type": "array", "items": FLOATS[16], "minItems": 1, "maxItems": 1}),
    (hr.Vector(2) | None, "Vector(2) | None", pa.list_(pa.float32(), 2), None),
    (None | hr.Vector(), "Vector(ragged) | None", pa.list_(pa.float32()), None),
    (list[str], "list[str]", pa.list_(pa.string()), {"type": "array", "items": {"type": "string"}}),
    (list[int | None], "list[int | None]", pa.list_(pa.int64()), None),
    (str | None, "str | None", pa.string(), {"anyOf": [{"type": "string"}, {"type": "null"}]}),
    (typing.Optional[str], "str | None", pa.string(), None),  # noqa: UP045  the older spelling is what is tested
    (typing.Annotated[hr.Column[list], hr.Vector(3)], "Vector(3)", pa.list_(pa.float32(), 3), None),
    (type_of(int), "int", pa.int64(), None),
]


@pytest.mark.parametrize(("annotation", "text", "arrow", "schema"), SPELLINGS)
def test_a_type_in_all_its_forms(annotation, text, arrow, schema):
    """An annotation gives a column type with one name, one Arrow type and one JSON schema."""
    column = type_of(annotation)
    assert (str(column), column.arrow) == (text, arrow)
    assert schema is None or column.json_schema() == schema


@pytest.mark.parametrize("annotation", [typing.Any, hr.Column, hr.Vector, ANY])
def test_any(annotation):
    """A column may be left untyped; any value is then allowed online."""
    assert type_of(annotation) == ANY
    assert ANY.json_schema() == {}


@pytest.mark.parametrize(
    "annotation", [complex, dict, list, [str], {"a": str}, "str", int | str, int | str | None, list[typing.Any], list[dict], None, 3, tuple[int, int]]
)
def test_an_unknown_annotation_is_refused(annotation):
    """What is no column type is refused with the annotation and all that are, hashable or not."""
    with pytest.raises(DefinitionError) as caught:
        type_of(annotation)
    named = typing.get_args(annotation)[0] if isinstance(annotation, types.GenericAlias) and annotation == list[dict] else annotation
    parts = [f"no column type for {named!r}", "str, bool, int, float, bytes", "hr.Vector(n)", "list[T]"]
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (lambda: hr.Vector(0), ["hr.Vector(size)", "at least 1", "got 0"]),
        (lambda: hr.Vector(2.0), ["hr.Vector(size)", "whole number", "got 2.0"]),
        (lambda: hr.Vector(True), ["hr.Vector(size)", "got True"]),
        (lambda: hr.Vector(3, "float23"), ["dtype", "'float16', 'float32'", "got 'float23'", "did you mean 'float32'?"]),
        (lambda: types_of({"text": dict}, "stage 'clean': out"), ["stage 'clean': out", "column 'text'", "no column type for <class 'dict'>"]),
        (lambda: types_of(["text"], "pipeline 'p': inputs"), ["pipeline 'p': inputs", "{'text': str}", "got ['text']"]),
    ],
)
def test_a_mistaken_type_is_refused(mistake, parts):
    """The error says where, what, the value and what is allowed."""
    with pytest.raises(DefinitionError) as caught:
        mistake()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_vector_makes_a_union_with_none_only():
    """`hr.Vector(3) | str` is refused by Python itself, like any union of an instance."""
    with pytest.raises(TypeError):
        hr.Vector(3) | str


@pytest.mark.parametrize(
    ("arrow", "text"),
    [
        (pa.large_string(), "str"),
        (pa.string_view(), "str"),
        (pa.dictionary(pa.int32(), pa.string()), "str"),
        (pa.binary(4), "bytes"),
        (pa.uint8(), "int"),
        (pa.float16(), "float"),
        (pa.timestamp("ns"), "datetime"),
        (pa.date64(), "date"),
        (pa.list_(pa.float32(), 3), "Vector(3)"),
        (pa.large_list(pa.float16()), "Vector(ragged, float16)"),
        (pa.list_(pa.float64()), "list[float]"),
        (pa.list_(pa.list_(pa.int8())), "list[list[int]]"),
        (pa.struct({"a": pa.int8()}), "any"),
        (pa.decimal128(5), "any"),
        (pa.null(), "any"),
    ],
)
def test_the_nearest_type_of_a_source(arrow, text):
    """Whatever width or encoding a source has, it is named as the user would declare it."""
    assert str(from_arrow(arrow)) == text


@pytest.mark.parametrize(
    ("annotation", "arrow", "accepted"),
    [
        (str, pa.large_string(), True),
        (str, pa.int64(), False),
        (int, pa.uint16(), True),
        (int, pa.float64(), False),
        (int, pa.bool_(), False),
        (float, pa.int32(), True),
        (bytes, pa.string(), False),
        (hr.Image, pa.large_binary(), True),
        (dt.datetime, pa.date32(), True),
        (dt.date, pa.timestamp("s"), True),
        (hr.Vector(2), pa.list_(pa.float32(), 2), True),
        (hr.Vector(2), pa.list_(pa.float32(), 3), False),
        (hr.Vector(2), pa.list_(pa.float64(), 3), False),
        (hr.Vector(2), pa.list_(pa.float32()), True),
        (hr.Vector(), pa.list_(pa.float32(), 3), True),
        (hr.Vector(), pa.list_(pa.float64()), True),
        (hr.Vector(), pa.list_(pa.string()), False),
        (hr.Vector(), pa.float32(), False),
        (list[int], pa.list_(pa.int8()), True),
        (list[str], pa.list_(pa.int8()), False),
        (list[float], pa.list_(pa.float32(), 2), True),
        (list[list[int]], pa.list_(pa.list_(pa.int8())), True),
        (list[int], pa.int64(), False),
        (list[int], pa.list_(pa.null()), True),
        (int, pa.null(), False),
        (int | None, pa.null(), True),
        (typing.Any, pa.null(), True),
        (typing.Any, pa.struct({"a": pa.int8()}), True),
    ],
)
def test_accepts(annotation, arrow, accepted):
    """A source's type is accepted where reading it so loses no meaning."""
    assert accepts(type_of(annotation), arrow) is accepted


@pytest.mark.parametrize(
    ("written", "read", "fits"),
    [
        (str, str, True),
        (str, int, False),
        (int, float, False),
        (str, str | None, True),
        (str | None, str, False),
        (str, typing.Any, True),
        (bytes, hr.Image, True),
        (hr.Vector(3), hr.Vector(), True),
        (hr.Vector(), hr.Vector(3), False),
        (hr.Vector(3), hr.Vector(3, "int8"), False),
        (hr.Vector(3), list[float], False),
        (list[int], list[int | None], True),
        (list[int | None], list[int], False),
    ],
)
def test_feeds(written, read, fits):
    """A writer fits a reader that allows all that the writer may give."""
    assert type_of(written).feeds(type_of(read)) is fits


@pytest.mark.parametrize(
    ("values", "annotation", "expected"),
    [
        (pa.array([1, 2], pa.uint8()), int, [1, 2]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), str, ["a", "b", "a"]),
        (pa.array(["a"]).dictionary_encode(), typing.Any, ["a"]),
        (pa.array(["a", "b"], pa.large_string()), str, ["a", "b"]),
        (pa.array(["aGk="]), bytes, [b"hi"]),
        (pa.array(["aGk=", None]), hr.Image | None, [b"hi", None]),
        (pa.array([dt.datetime(2024, 5, 1, 12)], pa.timestamp("s")), dt.datetime, [NOON]),
        (pa.array([NOON], pa.timestamp("ns", tz="Asia/Tokyo")), dt.datetime, [NOON]),
        (pa.array([1714564800_000_000_001], pa.timestamp("ns", tz="UTC")), dt.datetime, [NOON]),
        (pa.array([dt.date(2024, 5, 1)]), dt.datetime, [NOON.replace(hour=0)]),
        (pa.array([NOON], UTC_US), dt.date, [dt.date(2024, 5, 1)]),
        (pa.array([[1.0, 2.0]], pa.large_list(pa.float64())), hr.Vector(2), [[1.0, 2.0]]),
        (pa.nulls(2), hr.Vector() | None, [None, None]),
        (pa.nulls(0), str, []),
        (pa.array([[], []]), list[int], [[], []]),
    ],
)
def test_conform(values, annotation, expected):
    """A source's encoding gives way to the column's own: text from dictionaries, bytes from base64, instants in UTC."""
    column = type_of(annotation)
    found = conform(pa.chunked_array([values.slice(0, 1), values.slice(1)]), column)
    assert found.to_pylist() == expected
    assert column.kind == "any" or found.type == column.arrow


@pytest.mark.parametrize(
    ("values", "annotation", "parts"),
    [
        (pa.array(["a", None, None]), str, ["2 nulls", "first in row 1", "str | None"]),
        (pa.array([[1], [None]]), list[int], ["1 nulls", "list item 1", "int | None"]),
        (pa.array([[1.0, None]], pa.list_(pa.float32(), 2)), hr.Vector(2), ["null inside"]),
        (pa.array(["not base64!"]), bytes, ["base64"]),
        (pa.array([2**63], pa.uint64()), int, ["9223372036854775808 not in range"]),
        (pa.array([[1.0], [1.0, 2.0]]), hr.Vector(2), ["expected size"]),
    ],
)
def test_conform_refuses(values, annotation, parts):
    """A null that is not declared, at any depth, and a value that the type cannot hold are refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        conform(values, type_of(annotation))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("values", "annotation", "dtype", "shape"),
    [
        ([1, 2, 3], int, "int64", (3,)),
        ([1.0, 2.0], float, "float64", (2,)),
        ([True, False], bool, "bool", (2,)),
        ([[1, 2], [3, 4]], hr.Vector(2), "float32", (2, 2)),
        ([], hr.Vector(2), "float32", (0, 2)),
        ([], int, "int64", (0,)),
    ],
)
def test_numbers_arrive_as_arrays(values, annotation, dtype, shape):
    """Numbers and fixed vectors reach a stage as one array, whole or as a slice of a longer column."""
    column = type_of(annotation)
    array = to_arrow(values, column, rows=len(values))
    found = to_stage(array, column)
    assert (str(found.dtype), found.shape) == (dtype, shape)
    assert np.array_equal(to_stage(array[1:], column), np.asarray(values, dtype).reshape(shape)[1:])


@pytest.mark.parametrize(
    ("array", "annotation", "expected"),
    [
        (pa.array(["a", "b"]), str, ["a", "b"]),
        (pa.array([1, None]), int | None, [1, None]),
        (pa.array([1, None]), typing.Any, [1, None]),
        (pa.array([[1], []]), list[int], [[1], []]),
        (pa.array([{"a": 1}]), typing.Any, [{"a": 1}]),
        (pa.nulls(1), typing.Any, [None]),
        (pa.array([], pa.list_(pa.float32())), hr.Vector(), []),
    ],
)
def test_all_else_arrives_as_a_list(array, annotation, expected):
    """Text, lists, and whatever may be null reach a stage as a list of Python values."""
    assert to_stage(array, type_of(annotation)) == expected


@pytest.mark.parametrize("optional", [False, True])
def test_ragged_vectors_arrive_as_a_list_of_arrays(optional):
    """Each row is an array of its own length, also in a slice; a null row is None."""
    values = [np.ones(2), np.zeros(0), None if optional else np.ones(1), np.ones(3)]
    column = type_of(hr.Vector() | None if optional else hr.Vector())
    found = to_stage(to_arrow(values, column, rows=4)[1:], column)
    assert [None if row is None else (row.dtype, len(row)) for row in found] == [None if value is None else (np.float32, len(value)) for value in values[1:]]


class Tensor:
    """As much of a torch tensor as headrace touches."""

    def __init__(self, values, dtype="torch.float32"):
        self.values, self.dtype = np.asarray(values, "f4"), dtype

    def detach(self):
        return self

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.values)

    def numpy(self):
        if "bfloat16" in self.dtype:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


@pytest.mark.parametrize(
    ("values", "annotation", "expected"),
    [
        (np.array([1, 2], np.int16), int, [1, 2]),
        ([np.int64(1), 2], int, [1, 2]),
        (np.array([1, 2], np.int16), float, [1.0, 2.0]),
        (np.array(["a", "b"]), str, ["a", "b"]),
        (np.array(["a", None], object), str | None, ["a", None]),
        ((bytearray(b"a"), b"b"), bytes, [b"a", b"b"]),
        (np.array(["2024-05-01T12:00"], "M8[ns]"), dt.datetime, [NOON]),
        ([float("inf"), None], float | None, [float("inf"), None]),
        (np.array([[1, 2]], np.float64), hr.Vector(2), [[1.0, 2.0]]),
        (np.array([[1, 2], [3, 4]]).T, hr.Vector(2, "uint8"), [[1, 3], [2, 4]]),
        ([[], [1, 2]], hr.Vector(dtype="int8"), [[], [1, 2]]),
        ([None, np.array([1, 2])], hr.Vector(2) | None, [None, [1.0, 2.0]]),
        ([[], None, (1,)], hr.Vector() | None, [[], None, [1.0]]),
        (np.zeros((0, 2)), hr.Vector(2), []),
        ([np.array([1, 2]), None], list[int] | None, [[1, 2], None]),
        ([[np.ones(2)], []], list[hr.Vector(2)], [[[1.0, 1.0]], []]),
        (Tensor([[1, 2]]), hr.Vector(2), [[1.0, 2.0]]),
        (Tensor([1.5], "torch.bfloat16"), float, [1.5]),
        (pa.array([1], pa.int8()), int, [1]),
        (pa.chunked_array([[[1.0]], [[2.0]]]), hr.Vector(1), [[1.0], [2.0]]),
        ([1, None], typing.Any, [1, None]),
    ],
)
def test_to_arrow(values, annotation, expected):
    """One value per row is taken from lists, numpy, tensors and Arrow alike."""
    column = type_of(annotation)
    found = to_arrow(values, column, rows=len(expected))
    assert found.to_pylist() == expected
    assert column.kind == "any" or found.type == column.arrow


@pytest.mark.parametrize(
    ("values", "annotation", "parts"),
    [
        ("ab", str, ["one value per row", "got str", "list or an array"]),
        (3, int, ["one value per row", "got int"]),
        (np.array(3), int, ["one value per row", "got ndarray"]),
        ({1, 2}, int, ["one value per row", "got set"]),
        ({"a": 1, "b": 2}, str, ["one value per row", "got dict"]),
        ([1], int, ["1 values for 2 rows", "in order"]),
        ([1, None], int, ["1 nulls", "row 1", "int | None"]),
        ([1, 1.5], int, ["float", "expected int"]),
        (np.array([1.0, 2.5]), int, ["float64", "expected int"]),
        (np.array([1, 2]), bool, ["int64", "expected bool"]),
        (["1", "2"], int, ["str", "expected int"]),
        ([1, 2], str, ["int", "expected str"]),
        ([b"a", b"b"], str, ["bytes", "expected str"]),
        (["a", "b"], bytes, ["str", "expected bytes"]),
        ([5, 6], dt.datetime, ["int", "expected datetime"]),
        ([dt.date(2024, 1, 1)] * 2, dt.datetime, ["date", "expected datetime"]),
        ([2**70, 1], int, ["too large"]),
        (np.ones((2, 1)), float, ["1-dimensional"]),
        ([[1], "ab"], list[int], ["str", "expected list[int]"]),
        (["ab", "cd"], list[str], ["str", "expected list[str]"]),
        ([[1], [None]], list[int], ["list item 1", "int | None"]),
        ([[1], [2.5]], list[int], ["float", "expected int"]),
        (pa.array(["1", "2"]), int, ["Arrow array of string", "expected int64"]),
        (pa.array([{"a": 1}] * 2), str, ["Arrow array of struct", "expected string"]),
        ([[1.0, 2.0], [1.0]], hr.Vector(2), ["row 1", "vector of 1 numbers", "expected 2"]),
        ([[1.0, 2.0], None], hr.Vector(2), ["row 1 is null", "| None"]),
        ([1.0, 2.0], hr.Vector(2), ["row 0", "shape ()", "1-D float32"]),
        (["ab", "cd"], hr.Vector(2), ["row 0", "<U2", "1-D float32"]),
        ([[0.5], [1.0]], hr.Vector(1, "int8"), ["row 0", "float64", "1-D int8"]),
        ([[1], [300]], hr.Vector(1, "int8"), ["300 does not fit int8", "wider dtype"]),
        (np.array([[1], [-1]]), hr.Vector(1, "uint8"), ["-1 does not fit uint8"]),
        (np.ones((2, 3)), hr.Vector(2), ["vector of 3 numbers", "expected 2"]),
        ([object(), 1], typing.Any, ["object"]),
    ],
)
def test_to_arrow_refuses(values, annotation, parts):
    """Another number of rows, another type or shape, a null: refused with what was found and what was expected."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        to_arrow(values, type_of(annotation), rows=2)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"text": "a", "n": 1}, {"txt": "b", "n": 1}], ["row 1", "no column 'text'", "'txt', 'n'", "did you mean 'txt'?"]),
        ([{"text": "a", "n": "one"}], ["column 'n' (int)", "str", "expected int"]),
        ([{"text": "a", "n": None}], ["column 'n' (int)", "int | None"]),
        (["a"], ["a row must map column names", "{'text': ...}", "got 'a'"]),
        ({"text": "a", "n": 1}, ["a row must map column names", "got 'text'"]),
    ],
)
def test_table_refuses(rows, parts):
    """A row without a column, with a wrong value, or that is no row, is refused by row and column."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is checked below
        table(rows, {"text": type_of(str), "n": type_of(int)})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_table_and_back():
    """Columns come in the order asked for, what is not asked for is left out, and an optional one may be absent."""
    columns = {"b": type_of(int | None), "a": type_of(hr.Vector(2)), "c": ANY}
    data = table([{"a": [1, 2], "c": {"x": 1}, "d": 0}, {"a": [3, 4], "b": 5, "c": None}], columns)
    rows = to_rows(data, columns)
    assert data.column_names == ["b", "a", "c"]
    assert [(row["b"], row["a"].tolist(), row["c"]) for row in rows] == [(None, [1.0, 2.0], {"x": 1}), (5, [3.0, 4.0], None)]


def test_column_types_compare_by_value():
    """Two spellings of a type are equal, so that plans and schemas can be compared."""
    assert type_of(typing.Optional[int]) == type_of(int | None) == ColumnType("int", optional=True)  # noqa: UP045
