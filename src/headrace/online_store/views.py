"""What a store knows of a view: its key columns, its features, and how keys are written.

All keys of a view are of the same kinds, so a key is written as plain text, which a person can read with the store's own tools: text as it is, a
whole number in decimals, a date as 2026-01-31, bytes in hexadecimal, and a key of several columns as each part after its length, `3:abc2:17`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.errors import OnlineStoreError, WrongKeyError, listing, nearest
from headrace.online_store import cells
from headrace.online_store.records import Layout
from headrace.stage import NAME

MARKER = b"\xff"
"""A key that no view can have, since it is no UTF-8. It is there as long as the values beside it are the current ones."""

RESERVED = ("found", "event_time")
"""Columns that `read` adds to the features."""

_KINDS = {"str": "text", "int": "a whole number", "date": "a date", "bytes": "bytes", "bool": "true or false"}


def check_name(view: Any) -> None:
    """Raise OnlineStoreError unless this can be a view's name."""
    if not isinstance(view, str) or not NAME.fullmatch(view):
        raise OnlineStoreError(f"the name of a feature view is an identifier such as 'listing_stats', got {view!r}")


@dataclass(frozen=True, slots=True)
class ViewSchema:
    """The key columns of a view, each a name and `str`, `int`, `date`, `bytes` or `bool`, and its features with their Arrow types."""

    keys: tuple[tuple[str, str], ...]
    features: pa.Schema

    @classmethod
    def of(cls, table: pa.Table, *, key: str | Sequence[str], time: str) -> ViewSchema:
        """The schema of a table: of its key columns, and of all columns that are neither key nor time.

        Raises:
            OnlineStoreError: a column is missing, or of a type that cannot be kept.
        """
        names = (key,) if isinstance(key, str) else tuple(key)
        known = table.schema.names
        if twice := [name for name in known if known.count(name) > 1]:
            raise OnlineStoreError(f"the table has two columns {twice[0]!r}; give each a name of its own")
        for what, name in (*(("key", name) for name in names), ("time", time)):
            if name not in known:
                raise OnlineStoreError(f"{what}={name!r} is no column of the table, which has {listing(known)}" + nearest(name, known))
        if not names or len(set(names)) < len(names) or time in names:
            raise OnlineStoreError(f"key and time must be different columns, at least one for the key; got key={key!r} and time={time!r}")
        keys = tuple((name, _kind(table.schema.field(name))) for name in names)
        fields = [pa.field(field.name, cells.normal(field.type)) for field in table.schema if field.name not in (*names, time)]
        if not fields:
            raise OnlineStoreError(f"the table has no features beside its key and its time; it has {listing(known)}")
        if taken := [field.name for field in fields if field.name in RESERVED]:
            raise OnlineStoreError(f"a feature cannot be called {taken[0]!r}, which reading adds; rename it")
        features = pa.schema(fields)
        try:
            Layout(features)
        except ValueError as error:
            raise OnlineStoreError(str(error)) from None
        return cls(keys, features)

    def to_bytes(self) -> bytes:
        """As a store keeps it: an Arrow schema, whose metadata has the keys."""
        return bytes(self.features.with_metadata({"headrace.keys": json.dumps(self.keys)}).serialize())

    @classmethod
    def from_bytes(cls, content: bytes) -> ViewSchema:
        """What `to_bytes` wrote.

        Raises:
            ValueError: it did not write this.
        """
        schema = pa.ipc.read_schema(pa.py_buffer(content))
        try:
            keys = tuple((str(name), str(kind)) for name, kind in json.loads(schema.metadata[b"headrace.keys"]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"the schema says nothing of keys ({error})") from None
        return cls(keys, schema.remove_metadata())

    def difference(self, other: ViewSchema) -> str:
        """What is not the same in `other`, in words that name the first column; empty when all is. The order of the features does not matter."""
        if self.keys != other.keys:
            return f"its key is {_keys(self.keys)}, not {_keys(other.keys)}"
        lacking = [name for name in self.features.names if name not in other.features.names]
        return missing_from(self.features, other.features) or (f"its feature {lacking[0]!r} is not given" if lacking else "")

    def encode(self, keys: Sequence[Any]) -> list[bytes | None]:
        """Keys as they are written; None for one that is null, or has a null in it.

        Raises:
            WrongKeyError: a key of another kind than the view's.
        """
        if len(self.keys) == 1:
            return self._column(keys, 0)
        if wrong := [value for value in keys if value is not None and (not isinstance(value, (tuple, list)) or len(value) != len(self.keys))]:
            raise WrongKeyError(f"a key of this view is a tuple of {_keys(self.keys)}, got {wrong[0]!r}")
        parts = [(None,) * len(self.keys) if value is None else value for value in keys]
        columns = [self._column(column, at) for at, column in enumerate(zip(*parts, strict=True))]
        return [None if None in key else b"".join([b"%d:%b" % (len(part), part) for part in key]) for key in zip(*columns, strict=True)]

    def _column(self, values: Sequence[Any], at: int) -> list[bytes | None]:
        name, kind = self.keys[at]
        kinds = set(map(type, values))
        if kind == "int" and kinds <= {int}:
            return [b"%d" % value for value in values]
        try:
            if kind == "str" and kinds <= {str}:
                return [value.encode() for value in values]
            return [None if value is None else _text(value, kind) for value in values]
        except UnicodeEncodeError as error:
            raise WrongKeyError(f"key column {name!r}: {error.object!r} is no text that UTF-8 can hold") from None
        except TypeError as error:
            raise WrongKeyError(f"key column {name!r} is {_KINDS[kind]}, got {error}") from None


def missing_from(kept: pa.Schema, wanted: pa.Schema) -> str:
    """The first feature of `wanted` that is not kept as such, in words; empty when all are."""
    for field in wanted:
        if field.name not in kept.names:
            return f"it has no feature {field.name!r}; it has {listing(kept.names)}" + nearest(field.name, kept.names)
        if (there := kept.field(field.name).type) != cells.normal(field.type):
            return f"its feature {field.name!r} is {there}, not {field.type}"
    return ""


def _keys(keys: Collection[tuple[str, str]]) -> str:
    return " and ".join(f"{name!r} ({_KINDS.get(kind, kind)})" for name, kind in keys)


def _kind(field: pa.Field) -> str:
    arrow = cells.normal(field.type)
    if pa.types.is_string(arrow):
        return "str"
    is_ = pa.types
    tests = {"int": is_.is_integer, "date": is_.is_date, "bytes": is_.is_binary, "bool": is_.is_boolean}
    if kind := next((kind for kind, holds in tests.items() if holds(arrow)), None):
        return kind
    raise OnlineStoreError(f"key column {field.name!r} is of type {field.type}; a key is {', '.join(_KINDS.values())}, or several of these; cast it")


def plain(keys: Iterable[Any]) -> list[Any]:
    """Keys as Python values."""
    if isinstance(keys, (str, bytes)):
        raise OnlineStoreError(f"keys is a list of keys, such as [{keys!r}], got {keys!r}")
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        return list(keys.to_pylist())
    return list(keys.tolist() if isinstance(keys, np.ndarray) else keys)


def _text(value: Any, kind: str) -> bytes:
    """A value of another kind than plain text or a plain whole number, or of one of numpy's types."""
    match kind, value:
        case "str", str():
            return str(value).encode()
        case "bool", bool() | np.bool_():
            return b"true" if value else b"false"
        case "int", int() | np.integer() if not isinstance(value, bool):
            return b"%d" % int(value)
        case "date", dt.date() if not isinstance(value, dt.datetime):
            return value.isoformat().encode()
        case "bytes", bytes():
            return value.hex().encode()
    raise TypeError(f"{value!r}")
