"""The values of columns: rows to Arrow arrays, to what a stage receives, and back.

Conversions are exact or refused: a value that its column's type cannot hold is an error, never rounded, cut or dropped.
"""

from __future__ import annotations

import base64
import datetime as dt
import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.columns import ColumnType, Vector, accepts, from_arrow
from headrace.errors import listing, nearest

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


def conform(array: pa.ChunkedArray, column: ColumnType) -> pa.Array:
    """A source's array as one contiguous array of exactly the Arrow type of `column`.

    Raises:
        ValueError: a null where none is allowed, or a value that the type cannot hold (pyarrow's own errors are ValueErrors).
    """
    whole = array
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks == 1 else whole.combine_chunks()  # which copies a single one, too
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
