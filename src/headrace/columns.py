"""Columns and their types: one description, mapped to Arrow (batch) and to JSON schema (online).

A column's type is written as a Python annotation:

    str bool int float bytes           as they are; int is 64 bits, float is double
    datetime.datetime  datetime.date   instants are UTC microseconds; a naive one is taken as UTC
    hr.Vector(384)  hr.Vector()        one vector per row, of fixed or of varying (ragged) length
    hr.Image                           one encoded image (PNG, JPEG, ...) per row, as bytes
    list[T]                            a list per row
    T | None                           nulls allowed; without it a null is an error

A stage receives numbers as numpy arrays of shape (rows,), fixed vectors as numpy arrays of shape (rows, size), ragged
vectors as a list of 1-D arrays, and everything else, and everything that may be null, as a list of Python values. Arrays
are read-only views of Arrow memory: copy before writing to one.
"""

from __future__ import annotations

import base64
import datetime as dt
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import DefinitionError, check_number, listing, nearest

if TYPE_CHECKING:
    Column = Sequence  # a plain list type-checks where a column is asked for
else:

    class Column:
        """Marks a stage's parameter as a column: `text: hr.Column[str]`; `hr.Column` alone takes any type."""

        __class_getitem__ = classmethod(types.GenericAlias)


class Image(bytes):
    """Marks a column of encoded images, one per row; the values are plain bytes."""


@dataclass(frozen=True, slots=True)
class Vector:
    """Marks a column of numeric vectors: `hr.Vector(384)`, or `hr.Vector()` when lengths differ from row to row."""

    size: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.size is not None:
            check_number(self.size, "hr.Vector(size), when given,", whole=True)
        if self.dtype not in _VECTOR_DTYPES:
            raise DefinitionError(
                f"hr.Vector(dtype=...) must be one of {listing(_VECTOR_DTYPES)}, got {self.dtype!r}" + nearest(str(self.dtype), _VECTOR_DTYPES)
            )

    def __or__(self, other: None) -> ColumnType:
        """`hr.Vector(384) | None`: an instance is no type that Python itself could make a union of."""
        return ColumnType("vector", optional=True, vector=self) if other is None else NotImplemented

    __ror__ = __or__


_VECTOR_DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")

_SCALARS: dict[Any, tuple[str, pa.DataType, dict[str, Any]]] = {
    str: ("str", pa.string(), {"type": "string"}),
    bool: ("bool", pa.bool_(), {"type": "boolean"}),
    int: ("int", pa.int64(), {"type": "integer"}),
    float: ("float", pa.float64(), {"type": "number"}),
    bytes: ("bytes", pa.binary(), {"type": "string", "contentEncoding": "base64"}),
    Image: ("image", pa.binary(), {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}),
    dt.datetime: ("datetime", pa.timestamp("us", tz="UTC"), {"type": "string", "format": "date-time"}),
    dt.date: ("date", pa.date32(), {"type": "string", "format": "date"}),
}
_BY_KIND = {kind: (arrow, schema) for kind, arrow, schema in _SCALARS.values()}
_NUMBERS = ("bool", "int", "float")
_PYTHON: dict[str, tuple[type, ...]] = {  # Arrow alone would cut 1.5 to the int 1, and take 5 for an instant and text for bytes
    "str": (str,),
    "bool": (bool, np.bool_),
    "int": (int, np.integer),
    "float": (int, float, np.integer, np.floating),
    "bytes": (bytes, bytearray, memoryview),
    "image": (bytes, bytearray, memoryview),
    "datetime": (dt.datetime, np.datetime64),
    "date": (dt.date, np.datetime64),
}


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A column's type in normal form; `type_of` makes it from an annotation."""

    kind: str
    optional: bool = False
    vector: Vector | None = None
    item: ColumnType | None = None

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow type that carries it; undefined for `any`."""
        if self.vector:
            return pa.list_(pa.from_numpy_dtype(np.dtype(self.vector.dtype)), self.vector.size or -1)
        return pa.list_(self.item.arrow) if self.item else _BY_KIND[self.kind][0]

    def json_schema(self) -> dict[str, Any]:
        """The JSON schema of one value; bytes and images travel as base64 text."""
        schema: dict[str, Any]
        if self.vector:
            number = "number" if self.vector.dtype.startswith("float") else "integer"
            schema = {"type": "array", "items": {"type": number}}
            if self.vector.size:
                schema |= {"minItems": self.vector.size, "maxItems": self.vector.size}
        elif self.item:
            schema = {"type": "array", "items": self.item.json_schema()}
        else:
            schema = dict(_BY_KIND[self.kind][1]) if self.kind != "any" else {}
        return {"anyOf": [schema, {"type": "null"}]} if self.optional else schema

    def feeds(self, reader: ColumnType) -> bool:
        """Whether a stage that declares `reader` can be given this type."""
        if "any" in (self.kind, reader.kind):
            return True
        if self.optional and not reader.optional:
            return False
        if self.kind == reader.kind == "vector":
            assert self.vector is not None
            assert reader.vector is not None
            return self.vector.dtype == reader.vector.dtype and reader.vector.size in (None, self.vector.size)
        if self.item and reader.item:
            return self.item.feeds(reader.item)
        return self.kind == reader.kind or {self.kind, reader.kind} == {"bytes", "image"}

    def __str__(self) -> str:
        if self.vector:
            dtype = "" if self.vector.dtype == "float32" else f", {self.vector.dtype}"
            text = f"Vector({self.vector.size or 'ragged'}{dtype})"
        else:
            text = f"list[{self.item}]" if self.item else self.kind
        return f"{text} | None" if self.optional else text


ANY = ColumnType("any")


def type_of(annotation: Any) -> ColumnType:
    """The column type that an annotation stands for.

    Raises:
        DefinitionError: headrace has no such column type.
    """
    if isinstance(annotation, ColumnType):
        return annotation
    if annotation in (Any, Column, Vector):  # hr.Column[hr.Vector] takes any vector: its writer says which
        return ANY
    if isinstance(annotation, Vector):
        return ColumnType("vector", vector=annotation)
    for known, (kind, *_) in _SCALARS.items():  # by identity: a mistaken annotation, such as [str], need not be hashable
        if annotation is known:
            return ColumnType(kind)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = next(arg for arg in args if arg is not type(None))
        return replace(type_of(inner), optional=True)
    if origin is typing.Annotated:  # hr.Column[...] with an exact vector, spelled for a static type checker
        return type_of(args[1])
    if origin is list and len(args) == 1 and (item := type_of(args[0])).kind != "any":
        return ColumnType("list", item=item)
    raise DefinitionError(
        f"no column type for {annotation!r}; allowed are str, bool, int, float, bytes, datetime.datetime, datetime.date, "
        "hr.Vector(n), hr.Vector(), hr.Image, list[T] and T | None"
    )


def types_of(annotations: Mapping[str, Any], where: str) -> dict[str, ColumnType]:
    """The column types of named annotations; `where` opens the message of a DefinitionError."""
    if not isinstance(annotations, Mapping):
        raise DefinitionError(f"{where} must give columns and their types, such as {{'text': str}}, got {annotations!r}")
    types: dict[str, ColumnType] = {}
    for name, annotation in annotations.items():
        try:
            types[name] = type_of(annotation)
        except DefinitionError as error:
            raise DefinitionError(f"{where}: column {name!r}: {error}") from None
    return types


def from_arrow(arrow: pa.DataType) -> ColumnType:
    """The nearest column type for a source's Arrow type; `any` for one that headrace has no name for (a struct, say)."""
    is_ = pa.types
    if is_.is_dictionary(arrow):
        return from_arrow(arrow.value_type)
    if is_.is_list(arrow) or is_.is_large_list(arrow) or is_.is_fixed_size_list(arrow):
        if is_.is_floating(arrow.value_type) and arrow.value_type.bit_width <= 32:
            size = arrow.list_size if is_.is_fixed_size_list(arrow) else None
            return ColumnType("vector", vector=Vector(size, str(np.dtype(arrow.value_type.to_pandas_dtype()))))
        return ColumnType("list", item=from_arrow(arrow.value_type))
    tests = {
        "str": is_.is_string(arrow) or is_.is_large_string(arrow) or is_.is_string_view(arrow),
        "bytes": is_.is_binary(arrow) or is_.is_large_binary(arrow) or is_.is_fixed_size_binary(arrow),
        "bool": is_.is_boolean(arrow),
        "int": is_.is_integer(arrow),
        "float": is_.is_floating(arrow),
        "datetime": is_.is_timestamp(arrow),
        "date": is_.is_date(arrow),
    }
    return next((ColumnType(kind) for kind, matches in tests.items() if matches), ANY)


def accepts(column: ColumnType, arrow: pa.DataType) -> bool:
    """Whether a source column of Arrow type `arrow` can be read as `column` without loss of meaning."""
    found = from_arrow(arrow)
    if pa.types.is_null(arrow):
        return column.optional or column.kind == "any"
    if column.vector:
        size = arrow.list_size if pa.types.is_fixed_size_list(arrow) else None
        numbers = found.vector or (found.item and found.item.kind in ("int", "float"))
        return bool(numbers) and (size is None or column.vector.size in (None, size))
    if column.item:  # items of type null: every list is empty
        return bool(found.item or found.vector) and (pa.types.is_null(arrow.value_type) or accepts(column.item, arrow.value_type))
    return column.kind in ("any", found.kind) or (column.kind, found.kind) in {("float", "int"), ("image", "bytes"), ("datetime", "date"), ("date", "datetime")}


def conform(array: pa.ChunkedArray, column: ColumnType) -> pa.Array:
    """A source's array as one contiguous array of exactly the Arrow type of `column`.

    Raises:
        ValueError: a null where none is allowed, or a value that the type cannot hold (pyarrow's own errors are ValueErrors).
    """
    whole = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if isinstance(whole, pa.ChunkedArray):  # combine_chunks keeps several chunks beyond 2 GB of text
        raise ValueError(f"{whole.nbytes / 1e9:.1f} GB in one block; lower the block size")
    if pa.types.is_dictionary(whole.type):
        whole = whole.dictionary_decode()
    if column.kind == "any":
        return whole
    if column.kind in ("bytes", "image") and pa.types.is_string(whole.type):  # JSON and CSV carry bytes as base64
        whole = pa.array([value if value is None else base64.b64decode(value, validate=True) for value in whole.to_pylist()], pa.binary())
    if column.kind == "datetime" and pa.types.is_timestamp(whole.type) and whole.type.tz is None:
        whole = pc.assume_timezone(whole.cast(pa.timestamp("us"), safe=False), "UTC")
    if whole.type != column.arrow:
        whole = whole.cast(column.arrow, safe=column.kind != "datetime")  # nanoseconds are cut to microseconds
    _refuse_nulls(whole, column)
    return whole


def _refuse_nulls(array: pa.Array, column: ColumnType, unit: str = "row") -> None:
    if array.null_count and not column.optional:
        at = pc.index(pc.is_null(array), True).as_py()
        raise ValueError(f"{array.null_count} nulls, the first in {unit} {at}; declare {column} | None, or filter them at the source")
    if column.item:
        _refuse_nulls(array.flatten(), column.item, "list item")
    if column.vector and array.flatten().null_count:
        raise ValueError("a vector with a null inside; fill it at the source")


def to_stage(array: pa.Array, column: ColumnType) -> Any:
    """What a stage receives for a column: see the module's first lines."""
    if column.kind == "any":
        column = from_arrow(array.type)
        column = replace(column, optional=bool(array.null_count))
    if column.optional or not (column.vector or column.kind in _NUMBERS):
        if column.vector:
            return [None if item.values is None else item.values.to_numpy(zero_copy_only=False) for item in array]
        return array.to_pylist()
    if not column.vector:
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    if not len(array):
        return []
    bounds = array.offsets.to_numpy()
    return np.split(array.flatten().to_numpy(zero_copy_only=False), (bounds - bounds[0])[1:-1])


def to_arrow(values: Any, column: ColumnType, *, rows: int) -> pa.Array:
    """A stage's result for one column, checked, as an Arrow array of `rows` values.

    `values` is anything with one value per row: list, numpy array, torch tensor on any device, pandas series, Arrow array.

    Raises:
        ValueError: another number of rows, another type or shape, or a null where none is allowed.
    """
    if hasattr(values, "detach"):  # a torch tensor, without importing torch; numpy has no bfloat16
        values = values.detach().cpu()
        values = values.float().numpy() if "bfloat16" in str(values.dtype) else values.numpy()
    if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(values, "__len__") or getattr(values, "shape", None) == ():
        raise ValueError(f"expected one value per row, got {type(values).__name__}; return a list or an array")
    if len(values) != rows:
        raise ValueError(f"{len(values)} values for {rows} rows; a stage returns one value per row, in order")
    try:
        if column.vector and not isinstance(values, (pa.Array, pa.ChunkedArray)):
            return _vectors(values, column.vector, column.optional)
        return conform(_array(values, column), column)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _array(values: Any, column: ColumnType) -> pa.Array:
    """Values of the column's own kind as an Arrow array; nothing is converted that would lose its meaning."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if not accepts(column, values.type):
            raise ValueError(f"an Arrow array of {values.type}; expected {column.arrow}")
        return values
    if column.kind == "any":
        return pa.array(values)
    _check_kind(values, column)
    return pa.array(map(_listed, values) if column.item else values, column.arrow, size=len(values), from_pandas=False)


def _check_kind(values: Any, column: ColumnType) -> None:
    typed = isinstance(values, np.ndarray) and values.dtype != object
    for kind in ({values.dtype.type} if typed else set(map(type, values))) - {type(None)}:
        if issubclass(kind, (str, bytes, Mapping, Set)) if column.item or column.vector else not issubclass(kind, _PYTHON[column.kind]):
            raise ValueError(f"a value of Python type {kind.__name__}; expected {column}")
    if column.item:
        _check_kind(list(itertools.chain.from_iterable(value for value in values if value is not None)), column.item)


def _listed(value: Iterable[Any] | None) -> list[Any] | None:
    return None if value is None else list(value)


def _vectors(values: Any, vector: Vector, optional: bool) -> pa.Array:
    """Vectors of fixed or ragged length as an Arrow array, without a Python object per number."""
    dtype, absent = np.dtype(vector.dtype), None
    if isinstance(values, np.ndarray) and values.ndim == 2:
        rows: Any = values
    else:
        if optional:
            absent = pa.array([value is None for value in values], pa.bool_())
        empty = np.zeros(vector.size or 0, dtype)
        rows = [empty if value is None and optional else np.asarray(value) for value in values]
    for at, row in enumerate(rows[:1] if isinstance(rows, np.ndarray) else rows):
        if row.ndim == 0 and row.item() is None:
            raise ValueError(f"row {at} is null; declare the vector | None, or return one")
        if row.ndim != 1 or (len(row) and row.dtype.kind not in ("biuf" if dtype.kind == "f" else "biu")):
            raise ValueError(f"row {at} is an array of {row.dtype} with shape {row.shape}; expected 1-D {dtype}")
        if vector.size and len(row) != vector.size:
            raise ValueError(f"row {at} is a vector of {len(row)} numbers; expected {vector.size}")
    wide = np.ravel(rows) if isinstance(rows, np.ndarray) else np.concatenate([row for row in rows if len(row)] or [np.empty(0, dtype)])
    flat = wide.astype(dtype, copy=False)
    if dtype.kind in "iu" and (flat != wide).any():
        raise ValueError(f"the number {wide[flat != wide][0]} does not fit {dtype}; declare a wider dtype")
    if vector.size:
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), vector.size, mask=absent)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=absent)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, ColumnType]) -> pa.Table:
    """Rows as a table with exactly `columns`.

    Raises:
        ValueError: a row lacks a column, or has a value that its type forbids; names the column.
    """
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise ValueError(f"a row must map column names to values, such as {{{next(iter(columns))!r}: ...}}, got {wrong[0]!r}")
    arrays = {}
    for name, column in columns.items():
        try:
            values = [row.get(name) if column.optional else row[name] for row in rows]
            arrays[name] = to_arrow(values, column, rows=len(rows))
        except KeyError:
            at = next(i for i, row in enumerate(rows) if name not in row)
            raise ValueError(f"row {at} has no column {name!r}; it has {listing(rows[at])}" + nearest(name, rows[at])) from None
        except ValueError as error:
            raise ValueError(f"column {name!r} ({column}): {error}") from None
    return pa.table(arrays)  # never empty: a pipeline reads at least one column


def to_rows(data: pa.Table, columns: Mapping[str, ColumnType]) -> list[dict[str, Any]]:
    """The table as one dictionary per row; vectors are numpy arrays, all else plain Python values."""
    lists = {}
    for name, column in columns.items():
        array = conform(data[name], column)
        lists[name] = list(to_stage(array, column)) if column.vector else array.to_pylist()
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
