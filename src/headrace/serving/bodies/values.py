"""JSON values as columns, and columns as JSON values; `headrace.serving.bodies.codec` says which JSON stands for which type.

"JSON values" are what orjson makes of JSON and JSON of: None, bool, int, float, str, list, dict; of numpy arrays too on the way out.
"""

from __future__ import annotations

import binascii
import datetime as dt
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.columns import ColumnType, Vector, from_arrow

MISMATCH = (ValueError, TypeError, OverflowError, struct.error, pa.ArrowException)
"""What `parse` raises where values do not fit their type; `trace` says where."""
Loc = list[str | int]
SHOWN = 60  # characters of a value in a message

_CHUNK = 1024  # values of a long list that are looked at one by one, once they are known to hold a wrong one
_DEPTH, _CELLS = 32, 4_000_000  # of values of type `any`: levels of nesting; objects times the keys that they have between them
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PACKED = {"float16": "e", "float32": "f", "float64": "d", "int8": "b", "uint8": "B", "int16": "h", "int32": "i", "int64": "q"}  # for struct
_MIDWAY, _RIGHT = 7.038531e-26, struct.unpack("<f", (363742205).to_bytes(4, "little"))[0]
"""The one float32, with its negative, whose shortest text makes a double that rounds to its neighbour. All the others have been tried."""
_MIDWAY_BYTES, _RIGHT_BYTES = (struct.pack("<f", number)[:3] for number in (_MIDWAY, _RIGHT))  # all but the sign
_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 - instants are counted in UTC
_MICROSECOND = dt.timedelta(microseconds=1)
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, which Python's datetime holds
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d(?:[Tt ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:[Zz]|[+-]\d\d:\d\d)?)?", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_EXPECTED = {
    "str": "a string",
    "bool": "true or false",
    "int": "an integer of 64 bits, without a fraction",
    "float": 'a number, or "NaN", "Infinity" or "-Infinity"',
    "bytes": "base64 text",
    "image": "an image as base64 text",
    "datetime": "an instant such as 2024-02-29T12:00:00Z, of the years 1 to 9999 in UTC",
    "date": "a date such as 2024-02-29",
    "any": "a value that Arrow has a type for",
}


def parse(values: list[Any], column: ColumnType, *, bools: bool = True) -> list[Any] | pa.Array:
    """JSON values as Arrow, or still as a list of what Arrow makes an array of `column` from without a loss.

    `bools` says whether true or false may be among the numbers of a vector: only then is each of them looked at.

    Raises:
        one of `MISMATCH`.
    """
    if column.kind == "any":
        _check_any(values)
        return pa.array(values)
    return _lists(values, column, bools) if column.vector or column.item else _scalars(values, column)


def _scalars(values: list[Any], column: ColumnType) -> list[Any]:
    kinds = set(map(type, values))
    if type(None) in kinds:
        if not column.optional:
            raise ValueError
        kinds.discard(type(None))
        if column.kind not in ("str", "bool"):
            there = iter(_scalars([value for value in values if value is not None], column))
            return [None if value is None else next(there) for value in values]
    match column.kind:
        case "str" | "bool":
            fits = kinds <= {str if column.kind == "str" else bool}
        case "int":
            fits = kinds <= {int} and max(values, default=0) < 2**63  # orjson takes integers below 2**64, and what is beyond as a float
        case "float":
            fits = kinds <= {float, int, str}
            if fits and kinds != {float}:
                values = [_float(value) for value in values]
        case kind:
            fits = kinds <= {str}
            values = list(map(_FROM_TEXT[kind], values)) if fits else values
    if not fits:
        raise ValueError
    return values


def _float(value: float | str) -> float:
    if type(value) is not str:
        return float(value)
    if value not in _NON_FINITE:
        raise ValueError
    return _NON_FINITE[value]


def _base64(text: str) -> bytes:
    return binascii.a2b_base64(text, strict_mode=True)


def _instant(text: str) -> int:
    """Microseconds since 1970."""
    if not _INSTANT.fullmatch(text):
        raise ValueError
    moment = dt.datetime.fromisoformat(text.upper())
    count: int = (moment.replace(tzinfo=None) - _EPOCH - (moment.utcoffset() or dt.timedelta())) // _MICROSECOND
    if not _FIRST_US <= count <= _LAST_US:
        raise ValueError
    return count


def _day(text: str) -> dt.date:
    if not _DATE.fullmatch(text):
        raise ValueError
    return dt.date.fromisoformat(text)


_FROM_TEXT: dict[str, Any] = {"bytes": _base64, "image": _base64, "datetime": _instant, "date": _day}


def _lists(values: list[Any], column: ColumnType, bools: bool) -> pa.Array:
    """Lists or vectors, one per row, without a Python object per number of a vector."""
    size, absent = column.vector.size if column.vector else None, None
    if None in values:
        if not column.optional:
            raise ValueError
        absent = pa.array([value is None for value in values], pa.bool_())
        values = [[0] * (size or 0) if value is None else value for value in values]
    if not set(map(type, values)) <= {list} or (size and any(len(value) != size for value in values)):
        raise ValueError
    flat = values[0] if len(values) == 1 else list(itertools.chain.from_iterable(values))
    if column.vector:
        items = pa.Array.from_buffers(column.arrow.value_type, len(flat), [None, pa.py_buffer(_pack(flat, column.vector.dtype, bools))])
    else:
        assert column.item
        items = parse(flat, column.item, bools=bools)
        items = pa.array(items, column.item.arrow) if type(items) is list else items
    if size:
        return pa.FixedSizeListArray.from_arrays(items, size, mask=absent)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum(list(map(len, values)), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), items, mask=absent)


def _pack(flat: list[Any], dtype: str, bools: bool) -> bytes:
    """Numbers as memory has them. struct refuses what is no number, what is no integer where one is due, and what is out of range."""
    if bools and bool in set(map(type, flat)):
        raise ValueError
    form = f"={len(flat)}{_PACKED[dtype]}"
    try:
        packed = struct.pack(form, *flat)
    except struct.error:
        if not dtype.startswith("float") or str not in set(map(type, flat)):
            raise
        flat = [_NON_FINITE.get(value, value) if type(value) is str else value for value in flat]
        packed = struct.pack(form, *flat)
    if dtype == "float32" and _MIDWAY_BYTES in packed:
        return struct.pack(form, *[math.copysign(_RIGHT, value) if abs(value) == _MIDWAY else value for value in flat])
    return packed


def _check_any(values: list[Any]) -> None:
    """Refuse what Arrow would need boundless time or memory for: it gives each object of a column the keys of all of them."""
    keys: set[str] = set()
    level, objects = values, 0
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                objects += 1
                keys.update(value)
                below += value.values()
            elif type(value) is list:
                below += value
        if objects * len(keys) > _CELLS:
            raise ValueError(f"{objects} objects with {len(keys)} different keys")
        if not below:
            return
        level = below
    raise ValueError(f"more than {_DEPTH} levels of nesting")


def trace(value: Any, column: ColumnType, loc: Loc) -> Iterator[dict[str, Any]]:
    """What is wrong with one JSON value, place by place: nothing if it fits."""
    try:
        parse([value], column)
    except MISMATCH as error:
        reason = f": {short(str(error), 200)}" if column.kind == "any" else ""
    else:
        return
    size = column.vector.size if column.vector else None
    if type(value) is not list or not (column.vector or column.item) or (size and len(value) != size):
        numbers = f"a list of {size or 'any number of'} {'integers' if 'int' in column.vector.dtype else 'numbers'}" if column.vector else f"a list ({column})"
        expected = _EXPECTED.get(column.kind) or numbers
        yield detail(loc, f"expected {expected}, got {shown(value)}{reason}")
        return
    for start in range(0, len(value), _CHUNK):
        chunk = value[start : start + _CHUNK]
        if column.vector:
            yield from _trace_numbers(chunk, column.vector.dtype, loc, start)
        elif column.item and not _fit(chunk, column.item):
            for at, item in enumerate(chunk, start):
                yield from trace(item, column.item, [*loc, at])


def _trace_numbers(numbers: list[Any], dtype: str, loc: Loc, start: int) -> Iterator[dict[str, Any]]:
    ragged = ColumnType("vector", vector=Vector(None, dtype))
    if not _fit([numbers], ragged):
        for at, number in enumerate(numbers, start):
            if not _fit([[number]], ragged):
                yield detail([*loc, at], f"expected {'an integer' if 'int' in dtype else 'a number'} that {dtype} holds, got {shown(number)}")


def _fit(values: list[Any], column: ColumnType) -> bool:
    try:
        parse(values, column)
    except MISMATCH:
        return False
    return True


def expected(column: ColumnType) -> str:
    """What a column wants, in a word or two."""
    return _EXPECTED.get(column.kind, f"a list ({column})")


def detail(loc: Loc, message: str) -> dict[str, Any]:
    """One thing that is wrong, and where."""
    return {"loc": loc, "message": message}


def shown(value: Any) -> str:
    """A JSON value for a message, whatever its size."""
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    if isinstance(value, str):
        return f"the string {json.dumps(short(value, SHOWN), ensure_ascii=False)}"
    return f"the number {value!r}" if type(value) in (int, float) else json.dumps(value)


def short(text: str, most: int) -> str:
    """The text, or its beginning."""
    return text if len(text) <= most else text[: most - 1] + "…"


def write(array: pa.Array, column: ColumnType) -> list[Any]:
    """A column as JSON values, one per row; vectors of finite numbers stay numpy arrays."""
    if column.kind == "any":
        return _write_any(array)
    if column.vector:
        return _write_vectors(array, column)
    if column.item:
        items, lengths = write(array.flatten(), column.item), pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        lists = [items[stop - length : stop] for stop, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True)]
        return [one if there else None for one, there in zip(lists, array.is_valid().to_pylist(), strict=True)] if array.null_count else lists
    if column.kind in ("datetime", "date"):
        zone = "Z" if column.kind == "datetime" else ""
        texts = np.datetime_as_string(array.to_numpy(zero_copy_only=False).astype("datetime64[us]" if zone else "datetime64[D]")).tolist()
        return [None if text == "NaT" else text + zone for text in texts]
    values: list[Any] = array.to_pylist()
    if column.kind == "float":
        return [_number(value) for value in values]
    return [None if value is None else _text(value) for value in values] if column.kind in ("bytes", "image") else values


def _number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _text(value: bytes) -> str:
    return binascii.b2a_base64(value, newline=False).decode("ascii")


def _write_vectors(array: pa.Array, column: ColumnType) -> list[Any]:
    assert column.vector
    numbers = array.flatten().to_numpy(zero_copy_only=False)
    if column.vector.size and not array.null_count:
        rows = list(numbers.reshape(len(array), column.vector.size))
    else:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        stops = np.cumsum(lengths)
        rows = [numbers[stop - length : stop] for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)]
    if numbers.dtype == np.float32 and _RIGHT_BYTES in numbers.tobytes():
        rows = [row.astype(np.float64) for row in rows]  # all digits, for those who read numbers as doubles first
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        rows = [row if np.isfinite(row).all() else [_number(value) for value in row.tolist()] for row in rows]
    return [row if there else None for row, there in zip(rows, array.is_valid().to_pylist(), strict=True)] if array.null_count else rows


def _write_any(array: pa.Array) -> list[Any]:
    column = from_arrow(array.type)
    if column.kind in ("int", "str", "bool"):
        return array.to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_timestamp(array.type):  # nanoseconds are cut, as everywhere
        array = array.cast(pa.timestamp("us", "UTC"), safe=False)
    return [_plain(value) for value in array.to_pylist()]


def _plain(value: Any) -> Any:
    """Whatever Arrow gives, as JSON values; what JSON has no word for as text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return _number(value)
        case bytes():
            return _text(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case dt.datetime():
            return (value if value.tzinfo is None else value.astimezone(dt.UTC).replace(tzinfo=None)).isoformat() + "Z"
        case dt.date() | dt.time():
            return value.isoformat()
        case _:
            return str(value)
