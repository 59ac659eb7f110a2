"""Readers: the missing rows of units as a stream of bounded tables, whatever the format. Memory is bounded by a block, not by a unit.

Every row comes with its lineage. A row with a value that does not fit its column comes with a fault, and null there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from headrace.arrays import conform
from headrace.columns import ANY, ColumnType
from headrace.errors import SourceError
from headrace.lineage import Fault, trace
from headrace.texts import UNSURE, WRONG, salvaged, text_tables
from headrace.units import Source, Unit, plain

_PREFETCH_BYTES = 64 << 20  # a file up to this size is fetched in large parts, of a larger one row groups are streamed
_CLOCK_NS = 1_000_000_000  # object stores tell of a file's time in whole seconds here, and in fractions there

Gap = tuple[int, int | None]
"""The rows from the first number up to, and without, the second; or to the unit's end."""
Piece = tuple[Unit, int, float]
"""A gap of a unit; infinity stands for an end that only reading tells."""


def read(
    source: Source,
    todo: Sequence[tuple[Unit, Sequence[Gap]]],
    wanted: Mapping[str, ColumnType],
    *,
    block_rows: int,
    counted: Callable[[int, int], object] = lambda unit, rows: None,
) -> Iterator[pa.Table]:
    """Rows of units that lie in one row group or file, which is decoded once: tables with the columns `wanted` and their lineage.

    Each table has rows of one unit, at most `block_rows`, in order.

    Args:
        source: what the units are of; its own `units` are not looked at.
        todo: the units, by ascending `start`, each with the rows to give, as ascending gaps in the numbers of the row group.
        wanted: the columns.
        block_rows: also how much is decoded at once.
        counted: called with the id of a unit and the number of its rows, for units whose `rows` is None, when all have been given.

    Raises:
        SourceError: the file cannot be read, or is not the one any more that was cut into units; rows before may have been given.
    """
    if not todo:
        return
    unit = todo[0][0]
    if unit.id in source.unreadable:
        raise SourceError(source.unreadable[unit.id])
    assert all((other.paths, other.row_group, other.span) == (unit.paths, unit.row_group, unit.span) for other, _ in todo)
    pieces = deque(_pieces(todo))
    end = math.inf if any(other.rows is None for other, _ in todo) else max((stop for _, _, stop in pieces), default=0)
    if not end:
        return
    columns = dict(wanted) | dict.fromkeys([name for name in (source.where.columns if source.where else ()) if name not in wanted], ANY)
    with naming(unit.paths[0]):
        _refuse_changed(source, unit)
        at = 0
        for data in _tables(source, unit, columns, block_rows, pieces):
            data = _kept(data, source, due=bool(pieces) and pieces[0][1] < at + data.num_rows)
            for owner, numbers in _due(pieces, at, at + data.num_rows):
                yield _traced(_taken(data, numbers - at), wanted, source, owner, numbers)
            at += data.num_rows
            if at >= end:
                return
        if end != math.inf:
            raise SourceError(f"cannot read {_name(unit)}: it ends after {at:,} rows, where {end:,} were promised")
    for other, _ in todo:
        if other.rows is None:
            counted(other.id, at - other.start)


def _pieces(todo: Sequence[tuple[Unit, Sequence[Gap]]]) -> Iterator[Piece]:
    for unit, gaps in todo:
        end = math.inf if unit.stop is None else unit.stop
        for start, stop in gaps:
            last = end if stop is None else min(stop, end)
            if max(start, unit.start) < last:
                yield unit, max(start, unit.start), last


def _due(pieces: deque[Piece], start: int, stop: int) -> Iterator[tuple[Unit, np.ndarray]]:
    """The numbers of the rows from `start` to `stop - 1` that are to be given, per unit; pieces that are done are taken off."""
    ranges: list[tuple[Unit, np.ndarray]] = []
    while start < stop and pieces and pieces[0][1] < stop:
        unit, first, last = pieces[0]
        ranges.append((unit, np.arange(max(first, start), int(min(last, stop)))))
        if last > stop:
            break
        pieces.popleft()
    for unit, found in itertools.groupby(ranges, itemgetter(0)):
        yield unit, np.concatenate([numbers for _, numbers in found])


def _taken(data: pa.Table, rows: np.ndarray) -> pa.Table:
    """Ascending rows of a table; without a copy when they adjoin."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return data.slice(int(rows[0]), len(rows))
    return data.take(pa.array(rows))


def _kept(data: pa.Table, source: Source, *, due: bool) -> pa.Table:
    """The rows that the source's filter keeps. If none of them is due they are only counted."""
    if source.where is None:
        return data
    unsure = UNSURE in data.column_names
    if not due:
        data = data.select([*source.where.columns, *([UNSURE] if unsure else [])])
    # A row is not dropped for a value that could not be read.
    return data.filter(source.where.expression | pc.field(UNSURE) if unsure else source.where.expression)


def _traced(data: pa.Table, wanted: Mapping[str, ColumnType], source: Source, unit: Unit, numbers: np.ndarray) -> pa.Table:
    """`data` with columns of exactly the types wanted, and its lineage."""
    arrays, wrong = {}, {}
    if WRONG in data.column_names:
        wrong = {row: message for row, message in enumerate(data[WRONG].to_pylist()) if message}
    for name, column in wanted.items():
        kind = plain(source.schema.field(name).type)
        arrays[name], bad = _conformed(data[name], column, kind)
        for row, error in bad.items():
            wrong.setdefault(row, f"column {name!r} does not fit {kind if column.kind == 'any' else column}: {error}")
    faults = None
    if wrong:
        place = _name(unit)
        told = {row: Fault("input", SourceError.__name__, f"{place}, row {numbers[row]}: {message}").to_json() for row, message in wrong.items()}
        faults = pa.array([told.get(row) for row in range(data.num_rows)], pa.string())
    return trace(pa.table(arrays), unit.id, numbers, faults)


def _conformed(array: pa.ChunkedArray, column: ColumnType, kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """A source's column as exactly the type wanted (`kind` for one that is carried as it is), and the rows that do not fit."""

    def convert(part: Any, column: ColumnType) -> pa.Array:
        found = conform(part, column)
        if column.kind == "any":  # carried as it is; only files that differ in width or encoding are made alike
            found = found.cast(kind)
        found.validate(full=True)  # a text of a damaged file need not be UTF-8
        return found

    try:
        return convert(array, column), {}
    except (ValueError, pa.ArrowException):
        nullable = replace(column, optional=True)
        found, wrong = salvaged(array, lambda part: convert(part, nullable), kind if column.kind == "any" else column.arrow)
    if not column.optional and column.kind != "any":
        for row in np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False)).tolist():
            wrong.setdefault(row, f"a null; declare {column} | None, or filter them at the source")
    return found, wrong


def _tables(source: Source, unit: Unit, columns: Mapping[str, ColumnType], block_rows: int, pieces: deque[Piece]) -> Iterator[pa.Table]:
    """The raw tables of the unit's row group or files, with at least `columns`."""
    if source.format == "images":
        for number, path in enumerate(unit.paths):
            # Behind a filter the numbers are not known before.
            due = "image" in columns and (source.where is not None or (bool(pieces) and pieces[0][1] <= number))
            yield _image(source, path) if due else pa.table({"path": [path], "image": pa.nulls(1, pa.binary())})
    elif source.format == "parquet":
        fetch = unit.size_bytes <= _PREFETCH_BYTES
        options = {"pre_buffer": fetch, "buffer_size": 0 if fetch else 1 << 20, "page_checksum_verification": True}
        with pq.ParquetFile(unit.paths[0], filesystem=source.place.filesystem, **options) as file:
            for batch in file.iter_batches(block_rows, row_groups=[unit.row_group], columns=list(columns), use_threads=False):
                yield pa.Table.from_batches([batch])
    else:
        for data in text_tables(source, unit.paths[0], columns, unit.span):
            for start in range(0, data.num_rows, block_rows):
                yield data.slice(start, block_rows)


def _image(source: Source, path: str) -> pa.Table:
    """An image file as a row; one that cannot be read costs no other its place."""
    image, wrong = None, None
    try:
        with source.place.filesystem.open_input_stream(path, compression=None) as stream:
            image = stream.read()
    except OSError as error:
        wrong = f"cannot read {path!r}: {error}"
    data = pa.table({"path": [path], "image": pa.array([image], pa.binary())})
    if wrong is None:
        return data
    unsure = source.where is not None and "image" in source.where.columns
    return data.append_column(WRONG, pa.array([wrong])).append_column(UNSURE, pa.array([unsure]))


def _refuse_changed(source: Source, unit: Unit) -> None:
    infos = source.place.filesystem.get_file_info(list(unit.paths))
    there = [info for info in infos if info.type == fs.FileType.File]
    modified, size = max((info.mtime_ns or 0 for info in there), default=0), sum(info.size or 0 for info in there)
    apart = abs(modified - unit.modified_ns) if modified and unit.modified_ns else 0
    # A file that is not there any more is told of where it is opened.
    other = len(there) == len(infos) and (size != unit.size_bytes or apart >= (1 if source.place.is_local else _CLOCK_NS))
    if other or (there and modified > unit.modified_ns + _CLOCK_NS and unit.modified_ns):
        raise SourceError(f"cannot read {unit.paths[0]!r}: it changed while the run was reading it" if len(unit.paths) == 1 else _changed_run(unit))


def _changed_run(unit: Unit) -> str:
    return f"cannot read {unit.paths[0]!r} to {unit.paths[-1]!r}: one of them changed while the run was reading them"


def _name(unit: Unit) -> str:
    return f"{unit.paths[0]!r}" + ("" if unit.row_group is None else f", row group {unit.row_group}")


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Translate what a file system or a parser raises into a SourceError that names the file."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # damaged text in a file's own description is a ValueError
        raise SourceError(f"cannot read {path!r}: {error}") from error
