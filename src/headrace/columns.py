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
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import DefinitionError

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
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise DefinitionError(f"hr.Vector(size) must be a whole number of at least 1, or left out, got {self.size!r}")
        if self.dtype not in _VECTOR_DTYPES:
            raise DefinitionError(f"hr.Vector(dtype=...) must be one of {', '.join(_VECTOR_DTYPES)}, got {self.dtype!r}")


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
            assert self.vector is not None and reader.vector is not None
            same = self.vector.dtype == reader.vector.dtype
            return same and reader.vector.size in (None, self.vector.size)
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
    if annotation is Any or annotation is Column:
        return ANY
    if annotation is Vector:
        return ColumnType("vector", vector=Vector())
    if isinstance(annotation, Vector):
        return ColumnType("vector", vector=annotation)
    if annotation in _SCALARS:
        return ColumnType(_SCALARS[annotation][0])
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = next(arg for arg in args if arg is not type(None))
        return replace(type_of(inner), optional=True)
    if origin is typing.Annotated:  # hr.Column[...] with an exact vector, spelled for a static type checker
        return type_of(args[1])
    if origin is list and len(args) == 1:
        return ColumnType("list", item=type_of(args[0]))
    raise DefinitionError(
        f"no column type for {annotation!r}; allowed are str, bool, int, float, bytes, datetime.datetime, datetime.date, "
        f"hr.Vector(n), hr.Vector(), hr.Image, list[T] and T | None"
    )


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
    if column.kind in ("any", found.kind) and not column.item:
        return not (column.vector and column.vector.size and found.vector and found.vector.size not in (None, column.vector.size))
    if column.vector:
        return found.item is not None and found.item.kind in ("int", "float")
    if column.item:
        return bool(found.item or found.vector) and accepts(column.item, arrow.value_type)
    return (column.kind, found.kind) in {("float", "int"), ("image", "bytes"), ("datetime", "date"), ("date", "datetime")}


def conform(array: pa.ChunkedArray, column: ColumnType) -> pa.Array:
    """A source's array as one contiguous array of exactly the Arrow type of `column`.

    Raises:
        ValueError: a null where none is allowed, or a value that the type cannot hold (pyarrow's own errors are ValueErrors).
    """
    whole = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if isinstance(whole, pa.ChunkedArray):  # combine_chunks keeps several chunks beyond 2 GB of text
        raise ValueError(f"{whole.nbytes / 1e9:.1f} GB in one block; lower the block size")
    if column.kind == "any":
        return whole
    if pa.types.is_dictionary(whole.type):
        whole = whole.dictionary_decode()
    if column.kind in ("bytes", "image") and pa.types.is_string(whole.type):  # JSON and CSV carry bytes as base64
        whole = pa.array([value if value is None else base64.b64decode(value) for value in whole.to_pylist()], pa.binary())
    if column.kind == "datetime" and pa.types.is_timestamp(whole.type) and whole.type.tz is None:
        whole = pc.assume_timezone(whole.cast(pa.timestamp("us"), safe=False), "UTC")
    if column.kind == "datetime" and whole.type != column.arrow:
        whole = whole.cast(column.arrow, safe=False)  # nanoseconds are cut to microseconds
    if whole.type != column.arrow:
        whole = whole.cast(column.arrow)
    if whole.null_count and not column.optional:
        at = pc.index(pc.is_null(whole), True).as_py()
        raise ValueError(f"{whole.null_count} nulls, the first in row {at}; declare {column} | None, or filter them at the source")
    return whole


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
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise ValueError(f"expected one value per row, got {type(values).__name__}; return a list or an array")
    if len(values) != rows:
        raise ValueError(f"{len(values)} values for {rows} rows; a stage returns one value per row, in order")
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return conform(values, column)
    try:
        if column.vector and not column.optional:
            return _vectors(values, column.vector)
        if column.vector or column.item:
            values = [value if value is None else list(value) for value in values]
        array = pa.array(values, column.arrow, from_pandas=False)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error
    return conform(array, column)


def _vectors(values: Any, vector: Vector) -> pa.Array:
    """Vectors of fixed or ragged length as an Arrow array, without a Python object per number."""
    dtype = np.dtype(vector.dtype)
    rows = values if isinstance(values, np.ndarray) and values.ndim == 2 else [np.asarray(value) for value in values]
    for at, row in enumerate(rows[:1] if isinstance(rows, np.ndarray) else rows):
        if row.ndim != 1 or not np.can_cast(row.dtype, dtype, "same_kind"):
            raise ValueError(f"row {at} is an array of {row.dtype} with shape {row.shape}; expected 1-D {dtype}")
        if vector.size and len(row) != vector.size:
            raise ValueError(f"row {at} is a vector of {len(row)} numbers; expected {vector.size}")
    if isinstance(rows, np.ndarray):
        flat = np.ascontiguousarray(rows, dtype).reshape(-1)
        lengths = np.full(len(rows), rows.shape[1])
    else:
        flat = np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if vector.size:
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), vector.size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, ColumnType]) -> pa.Table:
    """Rows as a table with exactly `columns`.

    Raises:
        ValueError: a row lacks a column, or has a value that its type forbids; names the column.
    """
    arrays = {}
    for name, column in columns.items():
        try:
            values = [row.get(name) if column.optional else row[name] for row in rows]
            arrays[name] = pa.array(values) if column.kind == "any" else to_arrow(values, column, rows=len(rows))
        except KeyError:
            at = next(i for i, row in enumerate(rows) if name not in row)
            raise ValueError(f"row {at} has no column {name!r}; it has {sorted(rows[at])}") from None
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
