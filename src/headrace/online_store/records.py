"""The features of one key as one blob, and many blobs as columns again.

    event time | as of | expiry | numbers, by their width | a bit per feature that is there | lengths of what varies (4 bytes each) | vectors | what varies

All features of a key are one value for a store, which changes whole or not at all. The three instants are microseconds since 1970, moved up by 2**63
and big-endian: they compare as bytes as they do as instants, in whatever language. The first two say which of two values is the later one. The rest is
as in `cells`, in the order of the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.online_store import cells

TIME, RANK, EXPIRY = slice(0, 8), slice(0, 16), slice(16, 24)
"""Where in a blob the event time is, what makes it later than others, and its expiry."""

NEVER = 2**63 - 1
"""The expiry of what does not expire."""

_MIDDLE = 2**63
_INSTANT = pa.timestamp("us", tz="UTC")

Ints = npt.NDArray[np.int64]


def coded(instant_us: int) -> bytes:
    """An instant as it stands in a blob."""
    return (instant_us + _MIDDLE).to_bytes(8, "big")


def instant_us(code: bytes) -> int:
    """The instant that `coded` wrote."""
    return int.from_bytes(code, "big") - _MIDDLE


@dataclass(frozen=True, slots=True)
class Read:
    """Blobs as columns: which were found, their event times, and the features asked for."""

    found: pa.Array
    times: pa.Array
    features: list[pa.Array]


class Layout:
    """How rows of a schema lie in blobs.

    Reading 100 keys must not take much longer than the database takes: numbers of one width lie together and are turned into columns at once, and
    nothing is copied twice that may be long.

    Raises:
        ValueError: a column has a type that cannot be kept; names it.
    """

    def __init__(self, features: pa.Schema) -> None:
        self.features = features
        self._types = features.types  # asking the schema for each would take as long as making the column
        self._narrow: dict[int, list[int]] = {8: [], 4: [], 2: [], 1: []}  # by width, the places of numbers
        self._wide: dict[int, slice] = {}  # by place, where a vector lies in a blob
        self._varying: list[int] = []
        widths = {}
        for at, field in enumerate(features):
            try:
                size = cells.width(field.type)
            except ValueError as error:
                raise ValueError(f"column {field.name!r}: {error}") from None
            if size is None:
                self._varying.append(at)
            elif size in self._narrow:
                self._narrow[size].append(at)
            else:
                widths[at] = size
        fields: list[Any] = [("time", ">u8"), ("known", ">u8"), ("expires", ">u8")]
        fields += [(f"w{size}", f"<u{size}", (len(places),)) for size, places in self._narrow.items() if places]
        fields.append(("present", "u1", ((len(features) + 7) // 8,)))
        if self._varying:
            fields.append(("lengths", "<u4", (len(self._varying),)))
        self._head = np.dtype(fields)
        end = self._head.itemsize
        for at, size in widths.items():
            self._wide[at] = slice(end, end + size)
            end += size
        self._fixed_bytes = end
        self._absent = bytes(end)
        self._full = np.packbits(np.ones(len(features), np.bool_), bitorder="little").tobytes()

    def encode(self, table: pa.Table, times_us: npt.NDArray[np.int64], expiry_us: npt.NDArray[np.int64], at_us: int) -> list[bytes]:
        """The rows of a table of exactly this schema as blobs, as of `at_us`.

        Raises:
            ValueError: a value that cannot be kept; names its column.
        """
        heads = np.zeros(len(table), self._head)
        heads["time"], heads["expires"] = times_us.view(np.uint64) ^ np.uint64(_MIDDLE), expiry_us.view(np.uint64) ^ np.uint64(_MIDDLE)
        heads["known"] = at_us + _MIDDLE
        present = np.empty((len(table), len(self.features)), np.bool_)
        place = {at: (f"w{size}", column) for size, places in self._narrow.items() for column, at in enumerate(places)}
        wide: list[list[bytes]] = []
        varying: list[list[bytes]] = []
        for at, column in enumerate(table.columns):
            array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            present[:, at] = cells.is_there(array)
            try:
                if at in place:
                    heads[place[at][0]][:, place[at][1]] = cells.raw(array)
                elif at in self._wide:
                    wide.append([row.tobytes() for row in cells.raw(array)])
                else:
                    heads["lengths"][:, len(varying)] = np.fromiter(map(len, packed := cells.pack(array)), np.int64, len(array))
                    varying.append(packed)
            except ValueError as error:
                raise ValueError(f"column {self.features.names[at]!r}: {error}") from None
        heads["present"] = np.packbits(present, axis=1, bitorder="little")
        whole, size = heads.tobytes(), self._head.itemsize
        return [b"".join((whole[start : start + size], *rest)) for start, *rest in zip(range(0, len(whole), size), *wide, *varying, strict=True)]

    def decode(self, blobs: list[bytes | None], now_us: int, wanted: Sequence[int]) -> Read:
        """Blobs, None for a key that there is not, as columns; what has expired by `now_us` counts as not there. `wanted` are places in the schema.

        Raises:
            ValueError: a blob is none of this schema.
        """
        count = len(blobs)
        absent = blobs.count(None)
        filled: list[bytes] = [self._absent if blob is None else blob for blob in blobs] if absent else blobs  # type: ignore[assignment]
        starts, lengths = self._extents(filled)
        whole = b"".join(filled)
        heads = _gathered(whole, starts, self._head.itemsize).view(self._head)
        found = heads["expires"] > now_us + _MIDDLE
        missing = int(count - np.count_nonzero(found))
        if missing > absent:  # some have expired, which is rare: once more, without them
            return self.decode([blob if there else None for blob, there in zip(blobs, found.tolist(), strict=True)], now_us, wanted)
        present = None
        if missing or heads["present"].tobytes() != self._full * count:
            present = np.unpackbits(heads["present"], axis=1, count=len(self.features), bitorder="little").astype(np.bool_)
        data = self._numbers(heads)
        for at in wanted:
            if where := self._wide.get(at):
                data[at] = _gathered(whole, starts + where.start, where.stop - where.start)
        if self._varying:
            data.update(self._cells(filled, heads["lengths"], lengths, wanted))
        features = []
        for at in wanted:
            valid = None if present is None or present[:, at].all() else present[:, at]
            if at in self._varying:
                features.append(cells.unpack(data[at][0], data[at][1], self._types[at], valid))
            else:
                features.append(cells.from_raw(data[at], self._types[at], count, valid))
        times = (heads["time"] ^ np.uint64(_MIDDLE)).view(np.int64)
        return Read(
            pa.Array.from_buffers(pa.bool_(), count, [None, cells.bitmap(found)]),
            cells.from_raw(times, _INSTANT, count, found if missing else None),
            features,
        )

    def _extents(self, blobs: list[bytes]) -> tuple[Ints, Ints]:
        """Where each of the blobs begins when they lie behind each other, and how long it is: as long as what is fixed, or longer."""
        sizes, fixed = list(map(len, blobs)), self._fixed_bytes
        if sizes.count(fixed) == len(sizes):
            return np.arange(0, len(sizes) * fixed, fixed), np.full(len(sizes), fixed)
        if not self._varying or min(sizes) < fixed:
            raise ValueError("a value has another length than its view's schema says")
        lengths = np.array(sizes, np.int64)
        return np.cumsum(lengths) - lengths, lengths

    def _numbers(self, heads: npt.NDArray[Any]) -> dict[int, Any]:
        """By place, the memory of each column of numbers."""
        data: dict[int, Any] = {}
        for size, places in self._narrow.items():
            if places:
                together, length = pa.py_buffer(np.ascontiguousarray(heads[f"w{size}"].T)), size * len(heads)
                data.update({at: together.slice(column * length, length) for column, at in enumerate(places)})
        return data

    def _cells(self, blobs: list[bytes], inner: npt.NDArray[Any], lengths: Ints, wanted: Sequence[int]) -> dict[int, Any]:
        """By place, the cells of each column that varies, and their lengths, which are `inner`."""
        ends = np.cumsum(inner, axis=1, dtype=np.int64) + self._fixed_bytes
        if (ends[:, -1] != lengths).any():
            raise ValueError("a value has another length than it says itself")
        data, starts = {}, [self._fixed_bytes] * len(blobs)
        for column, at in enumerate(self._varying):
            stops = ends[:, column].tolist()
            if at in wanted:
                data[at] = [blob[start:stop] for blob, start, stop in zip(blobs, starts, stops, strict=True)], inner[:, column]
            starts = stops
        return data


def _gathered(whole: bytes, starts: Ints, size: int) -> npt.NDArray[np.void]:
    """The `size` bytes from each start on. Of a view in which an item begins with every byte, numpy copies each of them in one go."""
    return np.ndarray(max(0, len(whole) - size + 1), f"V{size}", whole, strides=(1,))[starts]
