"""Texts: CSV and JSON Lines as tables. A row that cannot be parsed keeps its place, as nulls beside a word on what is wrong.

Arrow's parsers stop at the first such row. So what they refuse is parsed again in a way that finds the row, by the same
parsers: a value reads the same whether or not there is a bad one near it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from headrace.columns import ColumnType
from headrace.units import Source

WRONG = "__headrace_wrong"
"""A column that tables with bad rows have: what is wrong with the row, else null."""
UNSURE = "__headrace_unsure"
"""Beside `WRONG`: whether a value that the source's filter needs could not be read, so that the row must be kept."""

_STREAM_BYTES = 4 << 20  # what is parsed at once; a longer line makes it grow
_LONGEST_LINE_BYTES = 1 << 30
_GUESSING_LINES = 1000
_SEARCHED_LINES = 1024  # at once, for bad ones
_CSV_NUMBERS_FROM = 2  # of rows, the header being the first
_WHERE_IN_ARROW = re.compile(r"^In CSV column #\d+: |Row #\d+: | in row \d+$")
_ROW = re.compile(r" in row (\d+)$")

Result = TypeVar("Result")
Wrong = dict[int, tuple[str, bool]]
"""Row of a table -> what is wrong with it, and whether the source's filter needed that."""


def text_tables(source: Source, path: str, columns: Mapping[str, ColumnType], span: tuple[int, int] | None = None) -> Iterator[pa.Table]:
    """Tables of a CSV or JSON Lines file with `columns`, and `WRONG` and `UNSURE` where needed.

    Without columns, it has those of the first rows that can be parsed, with guessed types; only the first table is of use then.
    """
    if source.format != "csv":
        return _json_tables(source, path, columns, span)
    if source.place.filesystem.get_file_info(path).size == 0:
        return iter(())  # pyarrow refuses an empty file; a run over many files does not
    return _csv_tables(source, path, columns)


def bisected(convert: Callable[[int, int], Result], start: int, stop: int) -> Iterator[tuple[int, Result | ValueError]]:
    """What `convert` makes of the rows `start` to `stop - 1`, in parts: halved until what fails is one row, whose error is given.

    Where the error tells of a row, the cuts are made around it; it need not be right.
    """
    left = [(start, stop)]
    while left:
        start, stop = left.pop()
        try:
            yield start, convert(start, stop)
        except (ValueError, pa.ArrowException) as error:
            if stop - start <= 1:
                yield start, error if isinstance(error, ValueError) else ValueError(str(error))
                continue
            told = _ROW.search(str(error))
            row = start + int(told[1]) if told else stop
            cuts = sorted({start, row, row + 1, stop} if row < stop else {start, (start + stop) // 2, stop})
            left += reversed(list(itertools.pairwise(cuts)))


def salvaged(array: Any, convert: Callable[[Any], pa.Array], kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """`convert(array)`, of type `kind`, with nulls for the rows where it fails, and the errors of these rows."""
    parts: list[pa.Array] = []
    wrong: dict[int, str] = {}
    for row, part in bisected(lambda start, stop: convert(array.slice(start, stop - start)), 0, len(array)):
        if isinstance(part, ValueError):
            wrong[row] = _WHERE_IN_ARROW.sub("", str(part))
            part = pa.nulls(1, kind)
        parts.append(part)
    return pa.concat_arrays(parts), wrong


def _misfit(name: str, column: ColumnType, kind: pa.DataType, error: str) -> str:
    return f"column {name!r} does not fit {kind if column.kind == 'any' else column}: {error}"


def _marked(data: pa.Table, wrong: Wrong) -> pa.Table:
    if not wrong:
        return data
    found = [wrong.get(row, (None, False)) for row in range(data.num_rows)]
    data = data.append_column(WRONG, pa.array([message for message, _ in found], pa.string()))
    return data.append_column(UNSURE, pa.array([unsure for _, unsure in found], pa.bool_()))


def _csv_tables(source: Source, path: str, columns: Mapping[str, ColumnType]) -> Iterator[pa.Table]:
    """The file from its start, once more for every reason that is found to parse it in another way; no row twice."""
    done, block_bytes, raw = 0, _STREAM_BYTES, False
    while True:
        seen = 0
        try:
            for data in _csv(source, path, columns, block_bytes, raw=raw):
                seen += data.num_rows
                if seen > done:
                    yield data.slice(max(0, done - (seen - data.num_rows)))
                    done = seen
            return
        except pa.ArrowInvalid as error:
            if "straddl" in str(error) and block_bytes < _LONGEST_LINE_BYTES:
                block_bytes = min(8 * block_bytes, _LONGEST_LINE_BYTES)
            elif "conversion error" in str(error) and columns and not raw:
                raw = True
            else:
                raise


def _csv(source: Source, path: str, columns: Mapping[str, ColumnType], block_bytes: int, *, raw: bool) -> Iterator[pa.Table]:
    """The tables of one pass over the file; a `raw` one converts the cells itself, and finds those that do not convert."""
    types = {name: source.schema.field(name).type for name in columns}
    misshapen: deque[tuple[int, str]] = deque()

    def skip(row: Any) -> str:
        if row.number is None:  # told of only without threads
            return "error"
        misshapen.append((row.number - _CSV_NUMBERS_FROM, f"Expected {row.expected_columns} columns, got {row.actual_columns}: {row.text[:200]}"))
        return "skip"

    parse = pa.csv.ParseOptions(delimiter="\t" if path.lower().endswith((".tsv", ".tsv.gz")) else ",", newlines_in_values=True, invalid_row_handler=skip)
    convert = _converting(dict.fromkeys(types, pa.binary()) if raw else types)
    with (
        source.place.filesystem.open_input_stream(path) as stream,
        pa.csv.open_csv(stream, pa.csv.ReadOptions(block_size=block_bytes, use_threads=False), parse, convert) as reader,
    ):
        at = 0
        for data in _until_none(reader):
            wrong: Wrong = {}
            if raw:
                data, wrong = _cells(data, columns, types, source)
            else:
                for name in filter(lambda name: _texts(columns[name]), columns):
                    data = data.set_column(data.schema.get_field_index(name), name, pc.fill_null(data[name], ""))
            if misshapen:
                data, wrong = _spliced(data, wrong, misshapen, at)
            at += data.num_rows
            if data.num_rows:
                yield _marked(data, wrong)


def _converting(types: Mapping[str, pa.DataType]) -> pa.csv.ConvertOptions:
    # Only an empty cell is a null: Arrow's own list would make one of the texts NA and null.
    return pa.csv.ConvertOptions(column_types=types, include_columns=list(types), strings_can_be_null=True, null_values=[""])


def _until_none(reader: Any) -> Iterator[pa.Table]:
    """The reader's tables, and an empty one for the misshapen rows at the end."""
    for batch in reader:
        yield pa.Table.from_batches([batch])
    yield reader.schema.empty_table()


def _spliced(data: pa.Table, wrong: Wrong, misshapen: deque[tuple[int, str]], at: int) -> tuple[pa.Table, Wrong]:
    """`data`, which begins at row `at` of the file, with rows of nulls where the parser has skipped one."""
    rows: list[int | None] = []
    taken, skipped = 0, {}
    while misshapen and misshapen[0][0] - at - len(rows) <= data.num_rows - taken:
        number, message = misshapen.popleft()
        before = number - at - len(rows)
        rows += range(taken, taken + before)
        taken += before
        skipped[len(rows)] = (message, True)
        rows.append(None)
    rows += range(taken, data.num_rows)
    moved = {now: wrong[was] for now, was in enumerate(rows) if was in wrong}
    return data.take(pa.array(rows, pa.int64())), moved | skipped


def _cells(data: pa.Table, columns: Mapping[str, ColumnType], types: Mapping[str, pa.DataType], source: Source) -> tuple[pa.Table, Wrong]:
    """Columns of bytes as columns of `types`, and the rows with a cell that is none."""
    wrong: Wrong = {}
    arrays = {}
    for name, column in columns.items():
        kind = types[name]
        cells = data[name].combine_chunks()
        cells = (pc.fill_null(cells, b"") if _texts(column) else cells).dictionary_encode()  # a bad cell seldom comes alone: each is tried once
        values, bad_values = salvaged(cells.dictionary, functools.partial(_cast, kind=kind), kind)
        arrays[name] = values.take(cells.indices)
        codes = pa.array(list(bad_values), cells.indices.type)
        rows = np.flatnonzero(pc.is_in(cells.indices, codes).to_numpy(zero_copy_only=False)) if bad_values else ()
        bad = {int(row): bad_values[cells.indices[row].as_py()] for row in rows}
        needed = source.where is not None and name in source.where.columns
        for row, error in bad.items():
            message, unsure = wrong.get(row, (_misfit(name, column, kind, error), False))
            wrong[row] = (message, unsure or needed)
    return pa.table(arrays), wrong


def _texts(column: ColumnType) -> bool:
    """Whether an empty cell is an empty text: it is, unless nulls are declared."""
    return column.kind == "str" and not column.optional


def _cast(cells: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cells as the CSV parser reads them. Arrow's own casts of text differ from it in spaces, spellings of truth, and times."""
    if pa.types.is_binary(kind) or not len(cells):
        return cells.cast(kind) if len(cells) else pa.nulls(0, kind)
    texts = cells.cast(pa.string())
    if pa.types.is_string(kind):
        return texts
    stream = pa.BufferOutputStream()
    pa.csv.write_csv(pa.table({"cell": texts, "": pa.nulls(len(texts), pa.int8())}), stream)  # a second column, for a line of one null is blank
    content = stream.getvalue()
    read = pa.csv.ReadOptions(block_size=content.size + 1, use_threads=False)
    parsed = pa.csv.read_csv(pa.BufferReader(content), read, pa.csv.ParseOptions(newlines_in_values=True), _converting({"cell": kind}))
    return parsed["cell"].combine_chunks()


def _json_tables(source: Source, path: str, columns: Mapping[str, ColumnType], span: tuple[int, int] | None) -> Iterator[pa.Table]:
    types = pa.schema([(name, source.schema.field(name).type) for name in columns])
    needed = source.where.columns if source.where else ()
    filesystem = source.place.filesystem
    with filesystem.open_input_file(path) if span else filesystem.open_input_stream(path) as stream:
        for lines in _lines(_within(stream, *span) if span else iter(lambda: stream.read(_STREAM_BYTES), b"")):
            if not lines.isspace():
                yield _objects(lines, columns, types, needed) if columns else _guessed(lines)


def _within(file: Any, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin at the bytes `start` to `stop - 1` of a file, in pieces."""

    def line_at(offset: int) -> int:
        """Where the first line that begins at `offset` or later does so."""
        if offset == 0:
            return 0
        offset -= 1
        file.seek(offset)
        while piece := file.read(1 << 16):
            if (end := piece.find(b"\n")) >= 0:
                return int(offset + end + 1)
            offset += len(piece)
        return offset

    at, end = line_at(start), line_at(stop)
    file.seek(at)
    while at < end and (piece := file.read(min(_STREAM_BYTES, end - at))):
        at += len(piece)
        yield piece


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces of a file, cut anew at the ends of lines."""
    held: list[bytes] = []
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end:
            yield b"".join([*held, piece[:end]])
            held = []
        held.append(piece[end:])
        if sum(map(len, held)) > _LONGEST_LINE_BYTES:
            raise pa.ArrowInvalid(f"a line straddles the largest block, of {_LONGEST_LINE_BYTES:,} bytes")
    if rest := b"".join(held):
        yield rest


def _objects(lines: bytes, columns: Mapping[str, ColumnType], types: pa.Schema, needed: tuple[str, ...]) -> pa.Table:
    try:
        return _parsed(lines, types)
    except (ValueError, pa.ArrowException):
        single = _split(lines)
    parts: list[pa.Table] = []
    wrong: Wrong = {}
    rows = 0
    cuts = [*range(0, len(single), _SEARCHED_LINES), len(single)]
    found = (bisected(lambda start, stop: _parsed(b"\n".join(single[start:stop]), types), *ends) for ends in itertools.pairwise(cuts))
    for at, part in itertools.chain.from_iterable(found):
        if isinstance(part, ValueError):
            part, message, failed = _object(single[at], columns, types)
            wrong[rows] = (message, not failed.isdisjoint(needed))
        rows += part.num_rows
        parts.append(part)
    return _marked(pa.concat_tables(parts).combine_chunks(), wrong)


def _split(lines: bytes) -> list[bytes]:
    return [line for line in lines.split(b"\n") if line and not line.isspace()]


def _object(line: bytes, columns: Mapping[str, ColumnType], types: pa.Schema) -> tuple[pa.Table, str, set[str]]:
    """What can be read of a bad line as one row, what is wrong with it, and with which columns."""
    arrays, failed = {}, {}
    for field in types:
        try:
            array = _parsed(line, pa.schema([field]))[field.name].combine_chunks()
            arrays[field.name] = array if len(array) == 1 else pa.nulls(1, field.type)
        except (ValueError, pa.ArrowException) as error:
            arrays[field.name] = pa.nulls(1, field.type)
            failed[field.name] = _misfit(field.name, columns[field.name], field.type, _WHERE_IN_ARROW.sub("", str(error)))
    message = next(iter(failed.values()), "not one JSON object")
    try:
        if not isinstance(json.loads(line), dict):
            message = "not a JSON object"
    except (ValueError, RecursionError) as error:
        message = f"not a JSON object: {error}"
    return pa.table(arrays), message, set(failed or types.names)


def _guessed(lines: bytes) -> pa.Table:
    """The first of the lines that can be parsed together, with the types that they look like."""
    try:
        return _parsed(lines, None)
    except (ValueError, pa.ArrowException) as error:
        single = _split(lines)[:_GUESSING_LINES]
        for _, part in bisected(lambda start, stop: _parsed(b"\n".join(single[start:stop]), None), 0, len(single)):
            if not isinstance(part, ValueError):
                return part
        raise error


def _parsed(lines: bytes, types: pa.Schema | None) -> pa.Table:
    if re.match(rb"\s*null", lines):
        raise ValueError("null, where an object should be")  # Arrow would crash
    read = pa.json.ReadOptions(block_size=len(lines) + 1, use_threads=False)
    parse = pa.json.ParseOptions(explicit_schema=types, unexpected_field_behavior="infer" if types is None else "ignore")
    return pa.json.read_json(pa.BufferReader(lines), read, parse)
