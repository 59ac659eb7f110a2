"""Readers: a unit's rows as a stream of bounded tables, whatever the format. Memory is bounded by a block, not by a unit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from headrace.arrays import conform
from headrace.columns import ANY, ColumnType
from headrace.errors import SourceError
from headrace.units import Source, Unit, plain

_STREAM_BYTES = 4 << 20  # what is parsed at once of CSV and JSON Lines; a longer line makes it grow
_LONGEST_LINE_BYTES = 1 << 30
_PREFETCH_BYTES = 64 << 20  # a file up to this size is fetched in large parts, of a larger one row groups are streamed


def read(source: Source, unit: Unit, wanted: Mapping[str, ColumnType], *, block_rows: int) -> Iterator[pa.Table]:
    """A unit's rows as tables of at most `block_rows` rows with exactly the columns `wanted`, in order.

    Raises:
        SourceError: the file cannot be read, or a value does not fit the column's type; names file, column and position.
    """
    extra = [name for name in (source.where.columns if source.where else ()) if name not in wanted]
    columns = {**wanted, **dict.fromkeys(extra, ANY)}
    left = unit.limit
    with naming(unit.paths[0]):
        seen = 0
        for data in _tables(source, unit, columns, block_rows):
            rows = data.num_rows
            if source.where:
                data = data.filter(source.where.expression)
            if left is not None:
                data = data.slice(0, left)
                left -= data.num_rows
            yield _conformed(data, wanted, source, unit, seen)
            seen += rows
            if left == 0:
                return


def _conformed(data: pa.Table, wanted: Mapping[str, ColumnType], source: Source, unit: Unit, before: int) -> pa.Table:
    arrays = {}
    for name, column in wanted.items():
        try:
            array = conform(data[name], column)
            if column.kind == "any":  # carried as it is; only files that differ in width or encoding are made alike
                array = array.cast(plain(source.schema.field(name).type))
            arrays[name] = array
        except (ValueError, pa.ArrowException) as error:
            place = f"{unit.paths[0]!r}" + ("" if unit.row_group is None else f", row group {unit.row_group}")
            raise SourceError(f"{place}, after row {before}: column {name!r} does not fit {column}: {error}") from error
    return pa.table(arrays)


def _tables(source: Source, unit: Unit, columns: Mapping[str, ColumnType], block_rows: int) -> Iterator[pa.Table]:
    """The unit's raw tables, with at least `columns`."""
    if source.format == "images":
        for path in unit.paths:
            with naming(path), source.place.filesystem.open_input_stream(path, compression=None) as stream:
                image = stream.read()
            yield pa.table({"path": [path], "image": pa.array([image], pa.binary())})
    elif source.format == "parquet":
        fetch = unit.size_bytes <= _PREFETCH_BYTES
        with pq.ParquetFile(unit.paths[0], filesystem=source.place.filesystem, pre_buffer=fetch, buffer_size=0 if fetch else 1 << 20) as file:
            for batch in file.iter_batches(block_rows, row_groups=[unit.row_group], columns=list(columns), use_threads=False):
                yield pa.Table.from_batches([batch])
    else:
        for data in text_tables(source, unit.paths[0], columns):
            for start in range(0, data.num_rows, block_rows):
                yield data.slice(start, block_rows)


def text_tables(source: Source, path: str, columns: Mapping[str, ColumnType]) -> Iterator[pa.Table]:
    """Tables of a CSV or JSON Lines file. A line longer than a block makes it read on with larger blocks."""
    done, block_bytes = 0, _STREAM_BYTES
    while True:
        seen = 0
        try:
            for data in _parsed(source, path, columns, block_bytes):
                seen += data.num_rows
                if seen > done:
                    yield data.slice(max(0, done - (seen - data.num_rows)))
                    done = seen
            return
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error) or block_bytes >= _LONGEST_LINE_BYTES:
                raise
            block_bytes = min(8 * block_bytes, _LONGEST_LINE_BYTES)


def _parsed(source: Source, path: str, columns: Mapping[str, ColumnType], block_bytes: int) -> Iterator[pa.Table]:
    if source.place.filesystem.get_file_info(path).size == 0:
        return  # pyarrow refuses an empty file; a run over many files does not
    types = {name: source.schema.field(name).type for name in columns}
    with source.place.filesystem.open_input_stream(path) as stream:
        reader: Any
        if source.format == "csv":
            reader = pa.csv.open_csv(
                stream,
                pa.csv.ReadOptions(block_size=block_bytes),
                pa.csv.ParseOptions(delimiter="\t" if path.lower().endswith((".tsv", ".tsv.gz")) else ",", newlines_in_values=True),
                # Only an empty cell is a null: Arrow's own list would make one of the texts NA and null.
                pa.csv.ConvertOptions(column_types=types, include_columns=list(columns), strings_can_be_null=True, null_values=[""]),
            )
        else:
            parse = pa.json.ParseOptions(explicit_schema=pa.schema(types) if types else None, unexpected_field_behavior="ignore" if types else "infer")
            reader = pa.json.open_json(stream, pa.json.ReadOptions(block_size=block_bytes, use_threads=False), parse)
        with reader:
            for batch in reader:
                data = pa.Table.from_batches([batch])
                for name, column in columns.items():
                    if source.format == "csv" and column.kind == "str" and not column.optional:
                        at = data.schema.get_field_index(name)  # an empty cell is an empty text, unless nulls are declared
                        data = data.set_column(at, name, pc.fill_null(data[name], ""))
                yield data


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Translate what a file system or a parser raises into a SourceError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"cannot read {path!r}: {error}") from error
