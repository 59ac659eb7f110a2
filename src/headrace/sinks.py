"""Sinks: where the rows of a run end up. Parquet, JSON Lines, or a Delta table, on any file system.

A data file appears under its final name only when it is complete. `finish` knows exactly which files belong to the run,
removes every other data file (a writer that died after its write leaves one), and then puts down `_SUCCESS`.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from headrace.errors import OutputError, listing
from headrace.events import FileWritten
from headrace.filesystems import Place, locate
from headrace.formats import OUTPUT_ENDINGS, Output

FILE_BYTES = 64 << 20  # of rows in memory; zstd makes of it a file of 20 to 60 MB
RECORD = "_headrace"  # what headrace keeps beside the data; readers skip names that start with _
SUCCESS = "_SUCCESS"
_ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Sink:
    """An output on its file system."""

    place: Place
    format: str


def open_sink(output: Output) -> Sink:
    """The sink of an output; nothing is touched yet.

    Raises:
        OutputError: the file system is unknown, or the Delta extra is not installed.
    """
    if output.format == "delta":
        _deltalake()
    return Sink(locate(output.path, error=OutputError), output.format)


def vacant(sink: Sink, schema: pa.Schema, *, pipeline: str) -> None:
    """Check, without touching anything, that the folder can take the rows of a new run.

    Raises:
        OutputError: the folder is not empty; says what is in it. Or it cannot be listed, or the format cannot hold a column.
    """
    place = sink.place
    if sink.format == "delta":
        _delta_schema(schema)
    try:
        held = [info.base_name for info in place.filesystem.get_file_info(fs.FileSelector(place.path, allow_not_found=True))]
        if RECORD in held:
            owner = json.loads(_read(place.child(f"{RECORD}/run.json")))["pipeline"]
            state = "finished" if SUCCESS in held else "unfinished"
            whose = "this pipeline" if owner == pipeline else f"another pipeline, {owner!r}"
            raise OutputError(f"output {place.uri!r} holds the {state} run of {whose}; choose an empty folder, or remove this one first")
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"cannot list {place.uri!r}: {error}") from error
    if held:
        raise OutputError(f"output {place.uri!r} is not empty: it holds {listing(sorted(held))}; choose an empty folder")


def prepare(sink: Sink, schema: pa.Schema, *, pipeline: str) -> None:
    """Make the folder, and note whose it is; the same checks and errors as `vacant`."""
    vacant(sink, schema, pipeline=pipeline)
    place = sink.place
    try:
        place.filesystem.create_dir(place.path, recursive=True)
        put(place.child(f"{RECORD}/run.json"), json.dumps({"pipeline": pipeline, "format": sink.format}).encode())
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"cannot write to {place.uri!r}: {error}") from error


def write(sink: Sink, tables: Sequence[pa.Table]) -> FileWritten:
    """Write one data file with the rows of `tables`; complete under its name, or not there at all."""
    data = pa.concat_tables(tables)
    name = f"part-{uuid.uuid4().hex}{OUTPUT_ENDINGS[sink.format]}"
    content = _json_lines(data) if sink.format == "jsonl" else _parquet(data)
    try:
        put(sink.place.child(name), content)
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"cannot write {name} to {sink.place.uri!r}: {error}") from error
    return FileWritten(name, data.num_rows, len(content))


def finish(sink: Sink, files: Sequence[FileWritten], schema: pa.Schema) -> None:
    """Leave exactly `files`, commit them to the Delta table if it is one, and mark the run as a success."""
    place = sink.place
    try:
        ours = {file.path for file in files}
        for info in place.filesystem.get_file_info(fs.FileSelector(place.path)):
            # With a dot before its name it is what a writer on a local disk was writing when it died.
            if info.base_name.removeprefix(".").startswith("part-") and info.base_name not in ours:
                place.filesystem.delete_file(info.path)
        if sink.format == "delta":
            _commit_delta(sink, files, schema)
        put(place.child(SUCCESS), b"")
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"cannot finish {place.uri!r}: {error}") from error


def put(place: Place, content: bytes | pa.Buffer) -> None:
    """Write a file whole: on a local disk under another name first, on an object store in one request."""
    target = place.path
    if place.is_local:
        folder, name = os.path.split(target)
        target = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}")
    parent = os.path.dirname(place.path)
    if place.is_local:
        os.makedirs(parent, exist_ok=True)
    try:
        with place.filesystem.open_output_stream(target) as stream:
            stream.write(content)
        if place.is_local:
            os.replace(target, place.path)
    except OSError:
        if place.is_local and os.path.exists(target):
            os.unlink(target)
        raise


def _read(place: Place) -> bytes:
    with place.filesystem.open_input_stream(place.path) as stream:
        return bytes(stream.read())


def _parquet(data: pa.Table) -> pa.Buffer:
    """The table as a Parquet file in memory. Built whole, because closing a half-written stream to an object store publishes it."""
    flat = [field.name for field in data.schema if not pa.types.is_nested(field.type)]
    group = max(1024, int(_ROW_GROUP_BYTES / max(1, data.nbytes) * data.num_rows)) if data.num_rows else None
    stream = pa.BufferOutputStream()
    # A dictionary over the numbers of vectors costs time and saves nothing.
    pq.write_table(data, stream, compression="zstd", use_dictionary=flat or False, row_group_size=group)
    return stream.getvalue()


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


def _commit_delta(sink: Sink, files: Sequence[FileWritten], schema: pa.Schema) -> None:
    """Create the table and add all files in one commit, so that a reader sees the whole run or nothing."""
    deltalake = _deltalake()
    from deltalake.transaction import AddAction, create_table_with_add_actions

    table = _delta_schema(schema)
    uri = sink.place.path if sink.place.is_local else sink.place.uri
    actions = [
        AddAction(
            path=file.path,
            size=file.bytes,
            partition_values={},
            modification_time=int(file.at_s * 1000),
            data_change=True,
            stats=json.dumps({"numRecords": file.rows}),
        )
        for file in files
    ]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        create_table_with_add_actions(
            uri,
            table,
            actions,
            mode="error",
            partition_by=[],
            storage_options={"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"} if endpoint.startswith("http://") else None,
        )
    except deltalake.exceptions.DeltaError as error:
        raise OutputError(f"cannot commit the Delta table {uri!r}: {error}") from error


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
