"""Bodies of requests and answers: JSON or Arrow to columns of exactly the pipeline's types, and back.

Exact or refused, as in `headrace.arrays`. JSON has fewer types than columns have, so

    bytes, images          are base64 text (RFC 4648, standard alphabet, padded)
    datetimes, dates       are ISO 8601 text; an instant without an offset is UTC, and is cut to microseconds
    numbers for a float    are rounded to the nearest one, as every JSON number is; one beyond its range is refused
    floats not finite      are the text "NaN", "Infinity" or "-Infinity"
    numbers for an int     are integers without a fraction or an exponent, exact to 64 bits
"""

from __future__ import annotations

import datetime as dt
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from headrace.columns import ColumnType
from headrace.errors import listing, nearest
from headrace.serving.bodies.streams import is_single, read_stream, write_stream
from headrace.serving.bodies.values import MISMATCH, SHOWN, Loc, detail, expected, parse, short, shown, trace, write
from headrace.serving.wire import Content, Failure

_DETAILS = 20  # of a refused body: enough to see what is wrong with it


class Refused(Exception):  # noqa: N818 - a verdict on a body, not an error of ours
    """A body that is not taken, and why: `failure` is the answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(slots=True)
class Incoming:
    """The rows of one request, checked. `rows` may be 0. `single`: it was one row by itself, and the answer is one.

    `group` is () unless a column has the type `any`, whose Arrow type, and with it what a stage receives, follows from the values at
    hand: requests of different `group` must not share a table, or each would change what the other's stage sees.
    """

    rows: int
    single: bool
    group: tuple[Any, ...]
    columns: Mapping[str, list[Any] | pa.Array]


class Codec:
    """Reads requests whose columns are `reads`, of at most `rows` rows each, and writes answers whose columns are `writes`.

    It has no state beyond the types: any number of threads may use one.
    """

    def __init__(self, reads: Mapping[str, ColumnType], writes: Mapping[str, ColumnType], *, rows: int) -> None:
        self.reads, self.writes, self.rows = dict(reads), dict(writes), rows
        self._names = frozenset(reads)
        self._anys = [name for name, column in reads.items() if column.kind == "any"]
        self._given = {name for name in self._anys if not reads[name].optional}  # a null is allowed, but has to be said
        self._arrow = {name: column.arrow for name, column in reads.items() if column.kind != "any"}
        self._vectors = any(_innermost(column).vector for column in reads.values())

    def decode(self, body: bytes | memoryview, content: Content) -> Incoming:
        """A request's rows.

        Raises:
            Refused: 400, the body is no JSON or no Arrow stream; 413, too many rows; 422, rows of other columns or types.
        """
        if content is Content.ARROW:
            columns = read_stream(body, self.reads, rows=self.rows)
            if isinstance(columns, Failure):
                raise Refused(columns)
            count = len(next(iter(columns.values())))
            return self._incoming(columns, count, single=count == 1 and is_single(body))
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refused(Failure(400, "not_json", _not_json(error))) from None
        if type(data) is not dict:
            raise _invalid([detail([], f'expected an object, one row or {{"rows": [...]}}, got {shown(data)}')])
        single = not (len(data) == 1 and "rows" in data)
        rows: list[Any] = [data] if single else data["rows"]
        if not single:
            if type(rows) is not list:
                hint = '; "rows" alone always means several rows: send this one as {"rows": [{"rows": ...}]}' if "rows" in self.reads else ""
                raise _invalid([detail(["rows"], f"expected a list of rows, got {shown(rows)}{hint}")])
            if len(rows) > self.rows:
                raise Refused(Failure(413, "too_large", f"{len(rows)} rows in one request; at most {self.rows} are taken"))
        whole = bytes(body) if self._vectors else b""
        try:
            columns = self._columns(rows, bools=b"true" in whole or b"false" in whole)
        except MISMATCH:
            raise _invalid(self._wrong(rows, single)) from None
        return self._incoming(columns, len(rows), single=single)

    def table(self, parts: Sequence[Incoming]) -> pa.Table:
        """The rows of all parts, one after the other: exactly the columns read, each in one piece. All parts must be of one `group`."""
        assert all(part.group == parts[0].group for part in parts)
        arrays = []
        for name in self.reads:
            pieces = [part.columns[name] for part in parts]
            if len(pieces) > 1 and all(type(piece) is list for piece in pieces):
                pieces = [list(itertools.chain.from_iterable(pieces))]
            some = [pa.array(piece, self._arrow[name]) if type(piece) is list else piece for piece in pieces]
            arrays.append(some[0] if len(some) == 1 else pa.concat_arrays(some))
        return pa.Table.from_arrays(arrays, list(self.reads))

    def encode(self, data: pa.Table, cuts: Sequence[tuple[int, int, bool, Content]]) -> list[bytes | memoryview]:
        """The body of each answer, which is given as (its first row, the row after its last, whether it is a single row, how to write it)."""
        rows: list[dict[str, Any]] = []
        if any(content is not Content.ARROW for *_, content in cuts):
            columns = [write(_whole(data.column(name)), column) for name, column in self.writes.items()]
            rows = [dict(zip(self.writes, values, strict=True)) for values in zip(*columns, strict=True)]
        bodies: list[bytes | memoryview] = []
        for start, stop, single, content in cuts:
            if content is Content.ARROW:
                bodies.append(write_stream(data.select(list(self.writes)).slice(start, stop - start), single=single))
            else:
                bodies.append(orjson.dumps(rows[start] if single else {"rows": rows[start:stop]}, option=orjson.OPT_SERIALIZE_NUMPY))
        return bodies

    def _incoming(self, columns: Mapping[str, list[Any] | pa.Array], rows: int, *, single: bool) -> Incoming:
        anys = [array for array in map(columns.__getitem__, self._anys) if isinstance(array, pa.Array)] if self._anys else []
        return Incoming(rows, single, tuple((array.type, array.null_count > 0) for array in anys), columns)

    def _columns(self, rows: Sequence[Any], *, bools: bool = True) -> dict[str, list[Any] | pa.Array]:
        """The rows as columns; one of `MISMATCH` where they do not fit. A column that is not there is null."""
        names = self._names
        for row in rows:
            if type(row) is not dict or not self._given <= row.keys() <= names:
                raise ValueError
        return {name: parse([row.get(name) for row in rows], column, bools=bools) for name, column in self.reads.items()}

    def _wrong(self, rows: Sequence[Any], single: bool) -> list[dict[str, Any]]:
        """What is wrong with rows that do not fit."""
        found: list[dict[str, Any]] = []
        for at, row in enumerate(rows):
            try:
                self._columns([row])
            except MISMATCH:
                found += itertools.islice(self._trace(row, [] if single else ["rows", at]), _DETAILS - len(found))
                if len(found) == _DETAILS:
                    break
        if not found:  # each row fits by itself: a column of type `any` needs values of one kind
            for name in self._anys:
                try:
                    parse([row.get(name) for row in rows], self.reads[name])
                except MISMATCH as error:
                    found.append(detail(["rows", name], f"the rows' values do not go into one column: {short(str(error), 200)}"))
        return found

    def _trace(self, row: Any, loc: Loc) -> Iterator[dict[str, Any]]:
        if type(row) is not dict:
            yield detail(loc, f"expected an object, got {shown(row)}")
            return
        for key in row:
            if key not in self._names:
                name = short(key, SHOWN)
                yield detail([*loc, name], f"there is no such column; there are {listing(self.reads)}{nearest(name, self.reads)}")
        for name, column in self.reads.items():
            if name in row or column.optional:
                yield from trace(row.get(name), column, [*loc, name])
            else:
                yield detail([*loc, name], f"missing; expected {expected(column)}")


def sample(reads: Mapping[str, ColumnType]) -> dict[str, Any]:
    """A made-up row of those types, of Python values, none of them null; an image is a small grey PNG."""
    return {name: _made_up(column) for name, column in reads.items()}


def _made_up(column: ColumnType) -> Any:
    if column.vector:
        return np.full(column.vector.size or 4, 0.5 if column.vector.dtype.startswith("float") else 1, column.vector.dtype)
    if column.item:
        return [_made_up(column.item)]
    made: dict[str, Any] = {
        "str": "a short text",
        "bool": True,
        "int": 1,
        "float": 0.5,
        "bytes": b"bytes",
        "datetime": dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC),
        "date": dt.date(2024, 2, 29),
        "any": "a short text",
    }
    return _grey_png(32) if column.kind == "image" else made[column.kind]


def _grey_png(side: int) -> bytes:
    """A PNG of `side` times `side` grey pixels, 8-bit RGB (https://www.w3.org/TR/png-3)."""
    lines = zlib.compress((b"\0" + b"\x80" * 3 * side) * side)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", lines), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def _innermost(column: ColumnType) -> ColumnType:
    while column.item:
        column = column.item
    return column


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _not_json(error: orjson.JSONDecodeError) -> str:
    said = error.msg
    if not error.doc and "UTF-8" not in said:
        return "the body is empty; expected a JSON object"
    if "BOM" in said:
        return "the body begins with a byte order mark; send JSON without one"
    if "UTF-8" in said:
        return "the body is not UTF-8"
    if "depth" in said:
        return "the body is nested too deeply"
    return f"the body is not JSON: {said} at character {error.pos}"


def _invalid(details: list[dict[str, Any]]) -> Refused:
    first = details[0]
    place = ".".join(map(str, first["loc"]))
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return Refused(Failure(422, "invalid_row", f"{place}: {first['message']}{more}" if place else f"{first['message']}{more}", tuple(details)))
