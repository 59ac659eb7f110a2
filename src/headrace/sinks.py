"""Sinks: where the rows of a run end up. Parquet, JSON Lines, or a Delta table, on any file system.

A file is written whole to the staging folder of its run. It counts once the ledger says so, and only then is it given its
place in the output folder, so that whoever reads the folder sees committed rows and no others.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import io
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace import ledger
from headrace.errors import OutputError, StorageError, listing
from headrace.filesystems import Place, locate
from headrace.formats import OUTPUT_ENDINGS, Output
from headrace.state import DataFile, State
from headrace.store import Folder

FILE_BYTES = 64 << 20  # of rows in memory; zstd makes of it a file of 20 to 60 MB
_ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Sink:
    """An output on its file system."""

    place: Place
    format: str

    @property
    def store(self) -> Folder:
        """The folder with its files and its ledger."""
        return Folder(self.place)


def open_sink(output: Output) -> Sink:
    """The sink of an output; nothing is touched yet.

    Raises:
        OutputError: the file system is unknown, or the Delta extra is not installed.
    """
    if output.format == "delta":
        _deltalake()
    return Sink(locate(output.path, error=OutputError), output.format)


def inspect(sink: Sink, schema: pa.Schema, *, restart: bool = False) -> State | None:
    """What the output's ledger knows; None for a folder that is not there or empty, and before a restart. Nothing is touched.

    Raises:
        OutputError: the folder holds something else, or the format cannot hold a column.
        StorageError: it cannot be listed or read.
    """
    if sink.format == "delta":
        _delta_schema(schema)
    held = sink.store.names("")
    for name in sink.store.names(ledger.HOME) if ledger.HOME in held else ():
        if name in ledger.OTHERS:
            raise OutputError(f"output {sink.place.uri!r} holds {ledger.OTHERS[name]} of headrace; choose another folder")
    state = ledger.load(sink.store) if ledger.HOME in held and not restart else None
    if state is None and set(held) - {ledger.HOME} and not (restart and ledger.begun(sink.store)):
        raise OutputError(f"output {sink.place.uri!r} holds no run of headrace: it has {listing(held)}; choose an empty folder")
    return state


def write(sink: Sink, run: str, data: pa.Table, *, kind: str = "part") -> DataFile:
    """Write a file of `run` with the rows of `data` into the staging folder. Dead letters (`kind="letters"`) are Parquet always."""
    format = "parquet" if kind == "letters" else sink.format
    content = _json_lines(data) if format == "jsonl" else _parquet(data)
    name = ledger.new_name(run, kind, OUTPUT_ENDINGS[format])
    sink.store.put(ledger.staged(name), content)
    return DataFile(name, data.num_rows, len(content), time.time())


def merge(sink: Sink, run: str, files: Sequence[DataFile]) -> DataFile:
    """One new file with the rows of several that are still staged."""
    contents = [sink.store.read(ledger.staged(file.name)) for file in files]
    content = b"".join(contents) if sink.format == "jsonl" else _merged(contents)
    name = ledger.new_name(run, "part", OUTPUT_ENDINGS[sink.format])
    sink.store.put(ledger.staged(name), content)
    return DataFile(name, sum(file.rows for file in files), len(content), time.time())


def _merged(contents: Sequence[bytes]) -> pa.Buffer:
    """Parquet files as one. Decoded a row group at a time: what is small in a file can be very large in memory."""
    schema = pa.unify_schemas([pq.read_schema(io.BytesIO(content)) for content in contents], promote_options="permissive")
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=_texts(schema) or False) as writer:
        held: list[pa.Table] = [schema.empty_table()]
        for content in contents:
            held.append(pq.read_table(io.BytesIO(content)))
            if sum(table.nbytes for table in held) >= _ROW_GROUP_BYTES:
                _write_group(writer, joined(held))
                del held[1:]
        _write_group(writer, joined(held))
    return stream.getvalue()


def _write_group(writer: pq.ParquetWriter, data: pa.Table) -> None:
    if data.num_rows:
        writer.write_table(data, row_group_size=_group_rows(data))


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of the same columns as one; a column that nobody declared may be null in one and text in the next."""
    return pa.concat_tables(tables, promote_options="permissive")


def _parquet(data: pa.Table) -> pa.Buffer:
    """The table as a Parquet file in memory. Built whole, because closing a half-written stream to an object store publishes it."""
    stream = pa.BufferOutputStream()
    group = _group_rows(data) if data.num_rows else None
    pq.write_table(data, stream, compression="zstd", use_dictionary=_texts(data.schema) or False, row_group_size=group)
    return stream.getvalue()


def _texts(schema: pa.Schema) -> list[str]:
    """The columns of text. Dictionaries pay for them, which repeat. Of numbers they make larger files, in six times the time."""
    return [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]


def _group_rows(data: pa.Table) -> int:
    return max(1024, int(_ROW_GROUP_BYTES / max(1, data.nbytes) * data.num_rows))


def _json_lines(data: pa.Table) -> bytes:
    """One JSON object a line; bytes and images as base64, instants in ISO form, NaN and infinities as null."""
    rows = ({name: _plain(value) for name, value in row.items()} for row in data.to_pylist())
    return "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()  # decimals keep all their digits as text


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, (dt.datetime, dt.date, dt.time)) else value


def _deltalake() -> Any:
    try:
        import deltalake
    except ImportError as error:
        raise OutputError("a Delta table needs the deltalake package: pip install 'headrace[delta]'") from error
    return deltalake


def commit_delta(sink: Sink, files: Iterable[DataFile], schema: pa.Schema) -> None:
    """Make the Delta table hold exactly `files`, in one commit of its log; a reader sees all of a run's rows or none.

    Begun again after a crash it adds what is still missing. Delta counts a file once, however often it is added.
    """
    deltalake = _deltalake()
    from deltalake.transaction import create_table_with_add_actions

    table, wanted = _delta_schema(schema), list(files)
    uri = sink.place.path if sink.place.is_local else sink.place.uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"} if endpoint.startswith("http://") else None
    try:
        there, held = None, set()
        with contextlib.suppress(deltalake.exceptions.TableNotFoundError):  # is_deltatable would hold Python's lock while it waits
            there = deltalake.DeltaTable(uri, storage_options=options)
            held = {path.rpartition("/")[2] for path in there.file_uris()}
        actions = [_added(file) for file in wanted if file.name not in held]
        if there is None:
            create_table_with_add_actions(uri, table, actions, mode="error", partition_by=[], storage_options=options)
        elif held - {file.name for file in wanted}:  # of a run that was thrown away
            there.create_write_transaction([*map(_added, wanted)], mode="overwrite", schema=table, partition_by=[])
        elif actions:
            there.create_write_transaction(actions, mode="append", schema=table, partition_by=[])
    except (deltalake.exceptions.DeltaError, OSError) as error:
        raise StorageError(f"cannot commit the Delta table {uri!r}: {error}") from error


def _added(file: DataFile) -> Any:
    from deltalake.transaction import AddAction

    stats = json.dumps({"numRecords": file.rows})
    return AddAction(path=file.name, size=file.bytes, partition_values={}, modification_time=int(file.at_s * 1000), data_change=True, stats=stats)


def _delta_schema(schema: pa.Schema) -> Any:
    """The schema as Delta's own. Delta has no vectors of fixed size; in the files they are lists anyway."""
    fields = []
    for field in schema:
        if not _in_delta(field.type):
            raise OutputError(f"a Delta table cannot hold column {field.name!r} of type {field.type}; leave it out, convert it in a stage, or write parquet")
        kind = pa.list_(field.type.value_type) if pa.types.is_fixed_size_list(field.type) else field.type
        fields.append(pa.field(field.name, kind, field.nullable))
    return _deltalake().Schema.from_arrow(pa.schema(fields))


def _in_delta(kind: pa.DataType) -> bool:
    """Whether Delta has the type. deltalake itself takes unsigned numbers for signed ones, and would misread them."""
    is_ = pa.types
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        return _in_delta(kind.value_type)
    if is_.is_struct(kind):
        return all(_in_delta(field.type) for field in kind)
    if is_.is_timestamp(kind):
        return bool(kind.unit == "us")
    known = (is_.is_boolean, is_.is_signed_integer, is_.is_float32, is_.is_float64, is_.is_decimal128, is_.is_date32)
    return any(matches(kind) for matches in (*known, is_.is_string, is_.is_large_string, is_.is_binary, is_.is_large_binary))
