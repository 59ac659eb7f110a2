"""Values of an Arrow column as bytes, each for itself, and back: exact, with nulls, and without a Python object per number.

A value of fixed width is its own bytes, as Arrow holds them (a truth value is one byte). Text and bytes are themselves. A list is

    count * 2 + has nulls (4 bytes) | a bit per item, if it has nulls | the length of each item (4 bytes), if they vary | the items

Integers are little-endian. Nothing here says whether a value is there at all: whoever keeps the cells keeps that as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ALLOWED = "bool, integers, floats, text, bytes, dates, times, timestamps, durations, vectors of numbers (fixed-size lists), and lists of any of these"

_MOST_BYTES = 2**31 - 1  # of a column's texts or lists in one table: Arrow's offsets have 32 bits
_LENGTH = np.dtype("<u4")
_BOOL = pa.bool_()

Bools = npt.NDArray[np.bool_]


def normal(arrow: pa.DataType) -> pa.DataType:
    """The type of which `arrow` is another encoding: text without large offsets or a dictionary, and so on."""
    if pa.types.is_dictionary(arrow):
        return normal(arrow.value_type)
    if pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow):
        return pa.string()
    if pa.types.is_large_binary(arrow) or pa.types.is_binary_view(arrow) or pa.types.is_fixed_size_binary(arrow):
        return pa.binary()
    if pa.types.is_list(arrow) or pa.types.is_large_list(arrow):
        return pa.list_(normal(arrow.value_type))
    if pa.types.is_fixed_size_list(arrow):
        return pa.list_(normal(arrow.value_type), arrow.list_size)
    return arrow


def width(arrow: pa.DataType) -> int | None:
    """The bytes of each value, or None where they vary.

    Raises:
        ValueError: values of this type cannot be kept.
    """
    is_ = pa.types
    if is_.is_boolean(arrow):
        return 1
    if is_.is_integer(arrow) or is_.is_floating(arrow) or is_.is_temporal(arrow):
        if not is_.is_interval(arrow):
            return int(arrow.bit_width) // 8
    elif is_.is_string(arrow) or is_.is_binary(arrow):
        return None
    elif is_.is_list(arrow):
        width(arrow.value_type)
        return None
    elif is_.is_fixed_size_list(arrow) and (is_.is_integer(arrow.value_type) or is_.is_floating(arrow.value_type)):
        return int(arrow.list_size) * int(arrow.value_type.bit_width) // 8
    raise ValueError(f"values of type {arrow} cannot be kept; allowed are {ALLOWED}")


def record(arrow: pa.DataType) -> Any:
    """What numpy makes of a value of fixed width: something of as many bytes, as few items as can be."""
    size = width(arrow)
    return f"<u{size}" if size in (1, 2, 4, 8) else ("u1", (size,))


def raw(array: pa.Array) -> npt.NDArray[Any]:
    """The values of a column of fixed width as `record` says; nulls are zeros.

    Raises:
        ValueError: a vector with a null inside.
    """
    size = width(array.type)
    assert size is not None
    valid = is_there(array)
    present = array.drop_null()
    if pa.types.is_fixed_size_list(array.type):
        present = present.flatten()
        if present.null_count:
            raise ValueError("a vector with a null inside; fill it, or leave the whole vector null")
    out = np.zeros((len(array), size), np.uint8)
    out[valid] = _bytes(present).reshape(-1, size)
    kind = record(array.type)
    return out.reshape(-1).view(kind) if isinstance(kind, str) else out


def _bytes(array: pa.Array) -> npt.NDArray[np.uint8]:
    """The memory of a column of numbers without nulls."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    size = array.type.bit_width // 8
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.empty(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, len(array) * size, array.offset * size)


def from_raw(values: npt.NDArray[Any] | bytes | pa.Buffer, arrow: pa.DataType, count: int, valid: Bools | None) -> pa.Array:
    """A column of `count` values from the memory of `raw`; `valid` says which are there, or None that all are."""
    if arrow.num_fields:  # a vector
        numbers = pa.Array.from_buffers(arrow.value_type, count * arrow.list_size, [None, _buffer(values)])
        return pa.Array.from_buffers(arrow, count, [_bitmap(valid)], children=[numbers])
    if arrow == _BOOL:
        values = np.packbits(np.frombuffer(values, np.uint8) != 0, bitorder="little")
    return pa.Array.from_buffers(arrow, count, [_bitmap(valid), _buffer(values)])


def _buffer(values: npt.NDArray[Any] | bytes | pa.Buffer) -> pa.Buffer:
    return values if isinstance(values, pa.Buffer) else pa.py_buffer(values)


def is_there(array: pa.Array) -> Bools:
    """Which values are not null."""
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def _bitmap(valid: Bools | None) -> pa.Buffer | None:
    return None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))


def pack(array: pa.Array) -> list[bytes]:
    """The cells of a column whose values vary in length; of nulls they are empty."""
    if not pa.types.is_list(array.type):
        return [value or b"" for value in array.cast(pa.binary()).to_pylist()]
    items = array.flatten()  # without what lies below nulls
    counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(counts, dtype=np.int64)
    valid = is_there(items)
    size = width(items.type)
    flat = raw(items).tobytes() if size is not None else b""
    cells = pack(items) if size is None else []
    packed = []
    for there, start, end in zip(is_there(array).tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
        if not there:
            packed.append(b"")
            continue
        whole = bool(valid[start:end].all())
        parts = [((end - start) * 2 + (not whole)).to_bytes(4, "little")]
        if not whole:
            parts.append(np.packbits(valid[start:end], bitorder="little").tobytes())
        if size is None:
            parts.append(np.fromiter(map(len, cells[start:end]), _LENGTH, end - start).tobytes())
            parts += cells[start:end]
        else:
            parts.append(flat[start * size : end * size])
        packed.append(b"".join(parts))
    return packed


def unpack(cells: Sequence[bytes], lengths: npt.NDArray[Any], arrow: pa.DataType, valid: Bools | None) -> pa.Array:
    """A column of values that vary in length, from its cells and their lengths; `valid` says which are there, or None that all are.

    Raises:
        ValueError: these are no cells of that type.
    """
    if pa.types.is_list(arrow):
        return _lists(cells, arrow, valid)
    data = b"".join(cells)
    if pa.types.is_string(arrow) and not data.isascii():  # most text is, and asking Arrow takes as long as all the rest
        data.decode()
        if any(cell and cell[0] & 0xC0 == 0x80 for cell in cells):
            raise ValueError("a text begins in the middle of a character")
    return pa.Array.from_buffers(arrow, len(cells), [_bitmap(valid), _offsets(lengths), pa.py_buffer(data)])


def _offsets(counts: Sequence[int] | npt.NDArray[Any]) -> pa.Buffer:
    offsets = np.zeros(len(counts) + 1, np.int64)
    offsets[1:] = counts
    offsets = np.cumsum(offsets)
    if offsets[-1] > _MOST_BYTES:
        raise ValueError(f"{offsets[-1] / 1e9:.1f} GB of one column at once; read fewer keys at a time")
    return pa.py_buffer(offsets.astype(np.int32))


def _lists(cells: Sequence[bytes], arrow: pa.DataType, valid: Bools | None) -> pa.Array:
    size = width(arrow.value_type)
    counts: list[int] = []
    lengths = [np.empty(0, _LENGTH)]
    bits: list[Bools] = []
    contents: list[bytes] = []
    for cell in cells:
        count, has_nulls = divmod(int.from_bytes(cell[:4], "little"), 2)
        at = 4
        if has_nulls:
            end = at + (count + 7) // 8
            bits.append(np.unpackbits(np.frombuffer(cell[at:end], np.uint8), count=count, bitorder="little").astype(np.bool_))
            at = end
        else:
            bits.append(np.ones(count, np.bool_))
        counts.append(count)
        if size is not None:
            contents.append(cell[at:])
        else:
            start = at + 4 * count
            lengths.append(np.frombuffer(cell[at:start], _LENGTH))
            ends = list(itertools.accumulate(lengths[-1].tolist(), initial=start))
            contents += [cell[begin:end] for begin, end in itertools.pairwise(ends)]
            if ends[-1] != max(len(cell), 4):
                raise ValueError("a list is cut off")
    there = np.concatenate(bits) if bits else np.empty(0, np.bool_)
    whole = None if there.all() else there
    if size is None:
        items = unpack(contents, np.concatenate(lengths), arrow.value_type, whole)
    else:
        flat = b"".join(contents)
        if len(flat) != len(there) * size:
            raise ValueError("a list is cut off")
        items = from_raw(flat, arrow.value_type, len(there), whole)
    return pa.Array.from_buffers(arrow, len(cells), [_bitmap(valid), _offsets(counts)], children=[items])
