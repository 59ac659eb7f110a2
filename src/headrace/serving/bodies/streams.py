"""Arrow IPC streams from and to strangers: read within bounds, whatever they claim to hold.

Arrow reads a stream without copying it, so that the body's size bounds what it holds, but for four things, which are refused or
measured before anything is made of them: compressed buffers, values that are referred to many times (dictionaries, views), values
without a size (nulls by the billion), and columns that nobody asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.arrays import conform
from headrace.columns import ColumnType, accepts
from headrace.errors import listing, nearest
from headrace.serving.bodies.values import SHOWN, detail, short
from headrace.serving.wire import Failure

_DAMAGED = (pa.ArrowException, OSError, ValueError, EOFError, struct.error)
_SINGLE = {b"headrace": b"single"}
_END = b"\xff\xff\xff\xff\0\0\0\0"  # without it a stream was cut off, perhaps between two batches
_MOST_BYTES = 64 << 20  # of a column, once values that are referred to many times have been written out
_MOST_ITEMS = 1 << 20  # of a size of zero, in lists
_REFUSED = ("is_union", "is_run_end_encoded", "is_list_view", "is_large_list_view")


def read_stream(body: bytes | memoryview, columns: Mapping[str, ColumnType], *, rows: int) -> dict[str, pa.Array] | Failure:
    """The columns of a stream, each in one piece of exactly its type; or why there are none."""
    if bytes(body[-len(_END) :]) != _END:
        return _damaged("it does not end with an end-of-stream mark; was it cut off, or is it a file in place of a stream?")
    try:
        buffer = pa.py_buffer(body)
        if any(_compressed(message) for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(buffer))):
            return _damaged("its buffers are compressed; write it without compression")
        options = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.DataTypeSpecific, use_threads=False)
        with pa.ipc.open_stream(pa.BufferReader(buffer), options=options) as reader:
            if wrong := list(_wrong_columns(reader.schema, columns)):
                return Failure(422, "invalid_row", wrong[0]["message"], tuple(wrong[:20]))
            batches, count = [], 0
            for batch in reader:
                count += batch.num_rows
                if count > rows:
                    return Failure(413, "too_large", f"{count} rows and more in one request; at most {rows} are taken")
                if batch.num_rows:
                    batch.validate(full=True)
                    batches.append(batch)
            data = pa.Table.from_batches(batches, reader.schema)
    except _DAMAGED as error:
        return _damaged(str(error))
    arrays, wrong = {}, []
    for name, column in columns.items():
        try:
            arrays[name] = _exact(data[name], column) if name in data.column_names else pa.nulls(count, column.arrow)
        except (pa.ArrowException, ValueError) as error:
            wrong.append(detail([name], short(str(error), 300)))
    return Failure(422, "invalid_row", f"column {wrong[0]['loc'][0]!r}: {wrong[0]['message']}", tuple(wrong[:20])) if wrong else arrays


def write_stream(data: pa.Table, *, single: bool = False) -> memoryview:
    """A table as a stream. One of a `single` row says so, to the group that reads it next."""
    if single:
        data = data.replace_schema_metadata(_SINGLE)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return memoryview(sink.getvalue())


def is_single(body: bytes | memoryview) -> bool:
    """Whether a stream, one that `read_stream` has taken, says that its row was one by itself."""
    return bool(pa.ipc.read_schema(pa.py_buffer(body)).metadata == _SINGLE)


def _damaged(why: str) -> Failure:
    return Failure(400, "not_arrow", f"the body is not an Arrow IPC stream that can be read: {short(why, 300)}")


def _compressed(message: Any) -> bool:
    """Whether a message's buffers are compressed: each says how long it wants to become, and Arrow would believe it.

    The metadata is a flatbuffer, which Arrow has verified: Message{2: header}, DictionaryBatch{1: data}, RecordBatch{3: compression}
    (https://github.com/apache/arrow/blob/main/format/Message.fbs).
    """
    if message.type not in ("record batch", "dictionary"):
        return False
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """Where a table's field is; 0 if it has none."""
        fields = table - struct.unpack_from("<i", data, table)[0]
        at = 4 + 2 * number
        found: int = struct.unpack_from("<H", data, fields + at)[0] if at < struct.unpack_from("<H", data, fields)[0] else 0
        return table + found if found else 0

    def target(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    batch = target(field(target(0), 2))
    if message.type == "dictionary":
        batch = target(field(batch, 1))
    return field(batch, 3) != 0


def _wrong_columns(schema: pa.Schema, columns: Mapping[str, ColumnType]) -> Iterator[dict[str, Any]]:
    for name, column in columns.items():
        at = schema.get_all_field_indices(name)
        if len(at) > 1:
            yield detail([name], f"there are {len(at)} columns named {name!r}")
        elif at and not (_is_plain(schema.types[at[0]], top=True) and accepts(column, _settled(schema.types[at[0]]))):
            yield detail([name], f"column {name!r} is {short(str(schema.types[at[0]]), SHOWN)}; expected {column if column.kind == 'any' else column.arrow}")
        elif not at and not column.optional:
            yield detail([name], f"column {name!r} ({column}) is missing; there are {short(listing(schema.names), 200)}")
    for name in schema.names:
        if name not in columns:
            text = short(name, SHOWN)
            yield detail([text], f"column {text!r} is not asked for; there are {listing(columns)}{nearest(text, columns)}")


def _settled(kind: pa.DataType) -> pa.DataType:
    """The type with texts and bytes that lie beside their neighbours in place of views of them."""
    for view, plain in ((pa.string_view(), pa.string()), (pa.binary_view(), pa.binary())):
        if kind == view:
            return plain
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_settled(kind.value_type))
    return pa.dictionary(kind.index_type, _settled(kind.value_type)) if pa.types.is_dictionary(kind) else kind


def _is_plain(kind: pa.DataType, *, top: bool = False) -> bool:
    """Whether what an array of that type holds follows from its buffers' sizes, or can be measured."""
    if isinstance(kind, pa.BaseExtensionType) or any(getattr(pa.types, test)(kind) for test in _REFUSED):
        return False
    if (pa.types.is_fixed_size_list(kind) and kind.list_size < 1) or (pa.types.is_fixed_size_binary(kind) and kind.byte_width < 1):
        return False
    if pa.types.is_dictionary(kind):
        return top and not pa.types.is_nested(kind.value_type) and _is_plain(kind.value_type)
    return all(_is_plain(kind.field(at).type) for at in range(kind.num_fields))


def _exact(chunks: pa.ChunkedArray, column: ColumnType) -> pa.Array:
    for chunk in chunks.chunks:
        _measure(chunk)
    settled = _settled(chunks.type)
    if settled != chunks.type:  # by way of Python: Arrow's own cast follows the views of nulls, wherever they point
        chunks = pa.chunked_array([_plain(chunk, settled) for chunk in chunks.chunks], settled)
    return conform(chunks, column)


def _plain(array: pa.Array, settled: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(settled):
        return pa.DictionaryArray.from_arrays(array.indices, pa.array(array.dictionary.to_pylist(), settled.value_type))
    return pa.array(array.to_pylist(), settled)


def _measure(array: pa.Array) -> None:
    """Refuse an array of which a few bytes claim to be many: by referring to one value time and again, or with values that take no room."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pa.array(_lengths(array.dictionary))
        _check_bytes(pc.sum(lengths.take(array.indices)).as_py() or 0)
    elif pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        _check_bytes(int(_lengths(array).sum()))
    elif len(array) > _MOST_ITEMS and (pa.types.is_null(kind) or (pa.types.is_struct(kind) and not kind.num_fields)):
        raise ValueError(f"{len(array)} values of type {kind}")
    if pa.types.is_struct(kind):
        inner = [array.field(at) for at in range(kind.num_fields)]
    elif pa.types.is_map(kind):
        inner = [array.keys, array.items]
    else:
        inner = [array.values] if kind.num_fields else []
    for one in inner:
        _measure(one)


def _lengths(array: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bytes of each text or bytes; 0 for other types, whose values have a small size."""
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32)[::4]  # a view is four words, of which the first is the length
        views = views[array.offset : array.offset + len(array)]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), views, 0).astype(np.int64)
    lengths = np.zeros(len(array), np.int64)
    if any(test(kind) for test in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)):
        lengths[:] = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    return lengths


def _check_bytes(count: int) -> None:
    if count > _MOST_BYTES:
        raise ValueError(f"{count / 1e6:.0f} MB once written out; at most {_MOST_BYTES / 1e6:.0f} MB are taken")
