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

import datetime as dt
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

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


def _number_schema(dtype: str) -> dict[str, Any]:
    """The JSON schema of a number of a numpy dtype; those that are not finite are text, since JSON has no number for them."""
    if dtype.startswith("float"):
        exact = np.finfo(dtype).max
        most = max(float(exact), float(str(exact)))  # or as it is written: 3.4028235e+38 is a little more than the float32 it stands for
        return {"anyOf": [{"type": "number", "minimum": -most, "maximum": most}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
    return {"type": "integer", "minimum": int(np.iinfo(dtype).min), "maximum": int(np.iinfo(dtype).max)}


_BASE64 = {"type": "string", "contentEncoding": "base64", "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"}
_SCALARS: dict[Any, tuple[str, pa.DataType, dict[str, Any]]] = {
    str: ("str", pa.string(), {"type": "string"}),
    bool: ("bool", pa.bool_(), {"type": "boolean"}),
    int: ("int", pa.int64(), _number_schema("int64")),
    float: ("float", pa.float64(), _number_schema("float64")),
    bytes: ("bytes", pa.binary(), _BASE64),
    Image: ("image", pa.binary(), _BASE64 | {"contentMediaType": "image/*"}),
    dt.datetime: ("datetime", pa.timestamp("us", tz="UTC"), {"type": "string", "format": "date-time"}),
    dt.date: ("date", pa.date32(), {"type": "string", "format": "date"}),
}
_BY_KIND = {kind: (arrow, schema) for kind, arrow, schema in _SCALARS.values()}


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
        """The JSON schema of one value, as bodies of requests carry it: all that is valid is accepted, but for some values of type `any`."""
        schema: dict[str, Any]
        if self.vector:
            schema = {"type": "array", "items": _number_schema(self.vector.dtype)}
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
