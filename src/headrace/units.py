"""Units: the pieces that an input is cut into. A row is known, over all runs on one output, by its unit and its number there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.filesystems import Place
from headrace.filters import Filter

UNIT_ROWS = 1 << 18  # a larger row group becomes several units


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the input: rows of a row group or of a text file, or a run of image files.

    It is the rows `start` to `start + rows - 1` that a row group or file has behind the source's filter, or all from `start`
    where `rows` is None, because only reading tells (text files, and everything behind a filter). `span` narrows a file of JSON
    Lines to the lines that begin within these bytes; its rows are numbered from 0. `modified_ns` and `size_bytes` identify
    the version of the file.
    """

    id: int
    paths: tuple[str, ...]
    row_group: int | None
    start: int
    rows: int | None
    size_bytes: int
    modified_ns: int
    span: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[tuple[str, ...], int | None, int, tuple[int, int] | None]:
        """What the unit is in every run over the same input, whatever its id."""
        return (self.paths, self.row_group, self.start, self.span)

    @property
    def stop(self) -> int | None:
        """The number after that of its last row, if known."""
        return None if self.rows is None else self.start + self.rows


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one format on one file system, cut into units.

    `row_bytes` is the weight of a row on average, `heaviest_bytes` that in the heaviest part of the input, `nulls` how many
    nulls the statistics of a column tell of, `unreadable` why units of certain ids have no rows to give.
    """

    place: Place
    format: str
    schema: pa.Schema
    units: tuple[Unit, ...]
    where: Filter | None = None
    row_bytes: int = 1024
    heaviest_bytes: int = 1024
    nulls: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Rows in all that can be read, or None when only reading tells."""
        counts = [unit.rows for unit in self.units if unit.id not in self.unreadable]
        return None if None in counts else sum(count for count in counts if count is not None)


def plain(arrow: pa.DataType) -> pa.DataType:
    """The type of a column's values, be they encoded in a dictionary or not."""
    return arrow.value_type if pa.types.is_dictionary(arrow) else arrow


def write_units(units: Sequence[Unit]) -> bytes:
    """The units as one Parquet file in memory, a row each."""
    counts = pa.array([0, *(len(unit.paths) for unit in units)], pa.int32())
    data = pa.table(
        {
            "id": pa.array([unit.id for unit in units], pa.int32()),
            "paths": pa.ListArray.from_arrays(_sums(counts), pa.array([path for unit in units for path in unit.paths], pa.string())),
            "row_group": pa.array([unit.row_group for unit in units], pa.int32()),
            "start": pa.array([unit.start for unit in units], pa.int64()),
            "rows": pa.array([unit.rows for unit in units], pa.int64()),
            "size_bytes": pa.array([unit.size_bytes for unit in units], pa.int64()),
            "modified_ns": pa.array([unit.modified_ns for unit in units], pa.int64()),
            "span_start": pa.array([unit.span and unit.span[0] for unit in units], pa.int64()),
            "span_stop": pa.array([unit.span and unit.span[1] for unit in units], pa.int64()),
        }
    )
    stream = pa.BufferOutputStream()
    pq.write_table(data, stream, compression="zstd")
    return bytes(stream.getvalue())


def _sums(counts: pa.Array) -> pa.Array:
    return pa.array(counts.to_numpy().cumsum(), pa.int32())


def read_units(content: bytes) -> tuple[Unit, ...]:
    """The inverse of `write_units`.

    Raises:
        OSError, pyarrow.ArrowException, KeyError: `content` is not such a file.
    """
    data = pq.read_table(pa.BufferReader(content), use_threads=False).combine_chunks()
    lists = data["paths"].combine_chunks()
    known = lists.flatten().dictionary_encode()
    texts = known.dictionary.to_pylist()  # one text for all units of a file
    flat, ends = [texts[at] for at in known.indices.to_pylist()], lists.value_lengths().to_numpy().cumsum().tolist()
    paths = [tuple(flat[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
    spans = [None if start is None else (start, stop) for start, stop in zip(data["span_start"].to_pylist(), data["span_stop"].to_pylist(), strict=True)]
    plain_columns = [data[name].to_pylist() for name in ("row_group", "start", "rows", "size_bytes", "modified_ns")]
    return tuple(map(Unit, data["id"].to_pylist(), paths, *plain_columns, spans))


def rows_in(content: bytes, counts: Mapping[int, int]) -> int | None:
    """The rows of all units in what `write_units` wrote; `counts` has those of units that only reading told. None where one is not known.

    Reads two columns of the table, and loads neither pyarrow.dataset nor pandas, which `read_units` does.

    Raises:
        OSError, pyarrow.ArrowException, KeyError: `content` is not such a file.
    """
    data = pq.ParquetFile(pa.BufferReader(content)).read(columns=["id", "rows"], use_threads=False)
    known = [counts.get(unit) if rows is None else rows for unit, rows in zip(data["id"].to_pylist(), data["rows"].to_pylist(), strict=True)]
    return None if None in known else sum(rows for rows in known if rows is not None)


def digest(units: Sequence[Unit]) -> str:
    """A short name for exactly these units of these versions of their files, in this order, whatever their ids."""
    known = [
        [unit.paths for unit in units],
        [(unit.row_group, unit.start, unit.rows, unit.span) for unit in units],
        [(unit.size_bytes, unit.modified_ns) for unit in units],
    ]
    return hashlib.sha256(json.dumps(known, separators=(",", ":")).encode()).hexdigest()[:16]
