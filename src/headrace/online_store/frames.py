"""A record batch of numbers and truth values, made in one step: as a message of Arrow's IPC format, whose body they are.

Python makes an Arrow array in a microsecond or two, and a table of a dozen in twenty more: a tenth of what it takes to read 100 keys from a database.
A message is read by Arrow itself, all columns at once. What stands in front of its body is the same for all batches of so many rows, but for the numbers
of nulls; it is made once, by Arrow. https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.online_store import cells


class Frame:
    """The message for batches of `count` rows, at least one, of a schema.

    Args:
        schema: columns of numbers, times and truth values.
        count: the rows.
        nulls: whether there is room for bitmaps that say which values are there.
    """

    def __init__(self, schema: pa.Schema, count: int, *, nulls: bool) -> None:
        self._schema, self._count = schema, count
        arrays = [cells.from_raw(bytes(8 * count), each, count, np.zeros(count, np.bool_) if nulls else None) for each in schema.types]
        message = pa.RecordBatch.from_arrays(arrays, schema=schema).serialize().to_pybytes()
        self._body = 8 + int(struct.unpack_from("<i", message, 4)[0])
        self._head, self._size = np.frombuffer(message[: self._body], np.uint8), len(message)
        header = _table(message, _field(message, _table(message, 8), 2))
        self._nodes_at, nodes = _vector(message, _field(message, header, 1))
        buffers_at, buffers = _vector(message, _field(message, header, 2))
        offsets = np.ndarray((buffers, 2), "<i8", message, buffers_at)[:, 0] + self._body
        assert (nodes, buffers) == (len(schema), 2 * len(schema))
        self._bits, self._values = offsets[::2].tolist(), offsets[1::2].tolist()

    def begin(self) -> npt.NDArray[np.uint8]:
        """A message whose values are still to be filled in."""
        message = np.empty(self._size, np.uint8)
        message[: self._body] = self._head
        return message

    def values(self, message: npt.NDArray[np.uint8], at: int, columns: int, kind: Any, items: int) -> npt.NDArray[Any]:
        """The memory of some columns of one width, from column `at` on: a row of `items` each."""
        step = self._values[at + 1] - self._values[at] if columns > 1 else 0
        return np.ndarray((columns, items), kind, message, self._values[at], (step, np.dtype(kind).itemsize))

    def nulls(self, message: npt.NDArray[np.uint8], there: npt.NDArray[np.bool_]) -> None:
        """Fill in which values are there, by row and column."""
        nodes = np.ndarray((there.shape[1], 2), "<i8", message, self._nodes_at)
        nodes[:, 1] = self._count - there.sum(axis=0)
        for at, bits in zip(self._bits, np.packbits(there, axis=0, bitorder="little").T, strict=True):
            message[at : at + len(bits)] = bits

    def batch(self, message: npt.NDArray[np.uint8]) -> pa.RecordBatch:
        """The batch, in the message's memory."""
        return pa.ipc.read_record_batch(pa.py_buffer(message), self._schema)


# Of FlatBuffers, in which the front of a message is written: a table begins with the way back to its list of fields; whatever is no number is reached by
# an offset. https://flatbuffers.dev/internals


def _table(message: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", message, at)[0])


def _field(message: bytes, table: int, number: int) -> int:
    fields = table - int(struct.unpack_from("<i", message, table)[0])
    return table + int(struct.unpack_from("<H", message, fields + 4 + 2 * number)[0])


def _vector(message: bytes, at: int) -> tuple[int, int]:
    start = _table(message, at)
    return start + 4, int(struct.unpack_from("<I", message, start)[0])
