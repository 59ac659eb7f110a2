"""Events and labels cut into parts by key, so that all of a key is in one part and a part fits into memory.

Rows are read once, and written, part by part, as row groups of a few files; a part is then read from all of them. What is held
in memory is a bounded number of rows while cutting, and one part while joining, of its wider columns one at a time.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.features.reading import Reading
from headrace.store import Folder
from headrace.units import Unit, plain

_FILE_BYTES = 192 << 20  # of rows in memory, which become one file
_FILE_ROWS = 1 << 20
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64 (Steele, Lea and Flood, 2014)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A task: some units of an input, cut by key into files `{name}-0.parquet`, `{name}-1.parquet`, ...

    Rows without a key, or with null in `needed`, are left out and counted; where nothing is needed all are kept.
    """

    name: str
    reading: Reading
    units: tuple[Unit, ...]
    key: tuple[str, ...]
    needed: tuple[str, ...]
    parts: int
    folder: Folder

    @property
    def memory_bytes(self) -> int:
        """About how much it takes."""
        return 4 * _FILE_BYTES

    def __call__(self) -> dict[str, Any]:
        """Do it; what was written, in words of JSON: `files`, each with its rows by part, and `rows` and `left_out`."""
        files, rows, left_out = [], 0, 0
        for number, table in enumerate(_gathered(self.reading.tables(self.units))):
            rows += table.num_rows
            whole = table
            if self.needed:
                there = np.ones(table.num_rows, np.bool_)
                for column in self.needed:
                    there &= pc.is_valid(table[column]).to_numpy()
                whole = table if there.all() else table.filter(pa.array(there))
            left_out += table.num_rows - whole.num_rows
            name = f"{self.name}-{number}.parquet"
            files.append({"name": name, "rows": self._write(name, whole)})
        return {"files": files, "rows": rows, "left_out": left_out}

    def _write(self, name: str, table: pa.Table) -> dict[str, int]:
        """A row group for each part that has rows; how many each has."""
        part = part_of([table[column] for column in self.key], self.parts)
        by_part = np.argsort(part, kind="stable")
        counts = np.bincount(part, minlength=self.parts)
        table = table.take(pa.array(by_part))
        stream = io.BytesIO()
        with pq.ParquetWriter(stream, table.schema, compression="zstd", compression_level=1) as writer:
            start = 0
            for count in counts[counts > 0].tolist():
                writer.write_table(table.slice(start, count), row_group_size=count)
                start += count
        self.folder.put(name, stream.getvalue())
        return {str(at): int(counts[at]) for at in np.flatnonzero(counts)}


class Part:
    """One part of an input as columns: narrow ones are read together, any other when it is asked for, each time anew."""

    def __init__(self, folder: Folder, schema: pa.Schema, files: Sequence[Mapping[str, Any]], part: int) -> None:
        self.schema = schema
        self.rows = sum(file["rows"].get(str(part), 0) for file in files)
        self._folder = folder
        # The row groups of a file are those of its parts that have rows, in order.
        self._groups = [(file["name"], list(file["rows"]).index(str(part))) for file in files if str(part) in file["rows"]]
        self._narrow = self._read([field.name for field in schema if pa.types.is_primitive(field.type)])

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column."""
        return self._narrow[name] if name in self._narrow.column_names else self._read([name])[name]

    def table(self) -> pa.Table:
        """All columns."""
        return self._read(self.schema.names)

    def _read(self, names: list[str]) -> pa.Table:
        schema = pa.schema([self.schema.field(name) for name in names])
        tables = [schema.empty_table()]
        for name, group in self._groups if names else []:
            place = self._folder.place.child(name)
            with pq.ParquetFile(place.path, filesystem=place.filesystem) as file:
                tables.append(file.read_row_group(group, columns=names, use_threads=False).cast(schema))
        return pa.concat_tables(tables)


def part_of(key: Sequence[pa.ChunkedArray], parts: int) -> npt.NDArray[np.int64]:
    """The part that each row belongs to, by its key alone: the same for one key in any width, encoding or process; 0 for null."""
    mixed = np.zeros(len(key[0]), np.uint64)
    for column in key:
        mixed = _mixed(mixed * np.uint64(31) + _hashed(column))
    there = np.ones(len(mixed), np.bool_)
    for column in key:
        there &= pc.is_valid(column).to_numpy() if column.null_count else True
    return np.where(there, (mixed % np.uint64(parts)).astype(np.int64), 0)


def _hashed(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    kind = plain(column.type)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_date32(kind):
        numbers = column.cast(kind).cast(pa.int32()) if pa.types.is_date32(kind) else column.cast(kind)
        filled = numbers.fill_null(False if pa.types.is_boolean(kind) else 0)
        return np.asarray(filled).astype(np.int64).astype(np.uint64)
    encoded = column.cast(kind).combine_chunks().dictionary_encode()
    values = [zlib.crc32(value.encode() if isinstance(value, str) else bytes(value)) for value in encoded.dictionary.to_pylist()]
    found: npt.NDArray[np.uint64] = np.array([*values, 0], np.uint64)[np.asarray(encoded.indices.fill_null(len(values)))]
    return found


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for multiplier, shift in zip(_MIX, (30, 27), strict=True):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(multiplier)
    return numbers ^ (numbers >> np.uint64(31))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer tables, each of a bounded size."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.nbytes for one in waiting) >= _FILE_BYTES or sum(one.num_rows for one in waiting) >= _FILE_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
