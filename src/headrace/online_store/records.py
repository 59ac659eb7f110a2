"""The features of one key as one blob, and many blobs as columns again.

    event time | as of | expiry | a bit per feature that is there | values of fixed width | lengths of the others (4 bytes each) | the others

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
_LENGTH_BYTES = 4


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

    Raises:
        ValueError: a column has a type that cannot be kept; names it.
    """

    def __init__(self, features: pa.Schema) -> None:
        self.features = features
        self._present_bytes = (len(features) + 7) // 8
        fields: list[Any] = [("time", ">u8"), ("known", ">u8"), ("expires", ">u8"), ("present", "u1", (self._present_bytes,))]
        self._varying = []
        for at, field in enumerate(features):
            try:
                fixed = cells.width(field.type) is not None
            except ValueError as error:
                raise ValueError(f"column {field.name!r}: {error}") from None
            if fixed:
                fields.append((str(at), cells.record(field.type)))
            else:
                self._varying.append(at)
        if self._varying:
            fields.append(("lengths", "<u4", (len(self._varying),)))
        self._record = np.dtype(fields)
        self._full = np.packbits(np.ones(len(features), np.bool_), bitorder="little").tobytes()
        self._absent = bytes(self._record.itemsize)

    def encode(self, table: pa.Table, times_us: npt.NDArray[np.int64], expiry_us: npt.NDArray[np.int64], at_us: int) -> list[bytes]:
        """The rows of a table of exactly this schema as blobs, as of `at_us`.

        Raises:
            ValueError: a value that cannot be kept; names its column.
        """
        rows = np.zeros(len(table), self._record)
        rows["time"], rows["expires"] = times_us.view(np.uint64) ^ np.uint64(_MIDDLE), expiry_us.view(np.uint64) ^ np.uint64(_MIDDLE)
        rows["known"] = at_us + _MIDDLE
        present = np.empty((len(table), len(self.features)), np.bool_)
        varying = []
        for at, column in enumerate(table.columns):
            array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            present[:, at] = cells.is_there(array)
            try:
                if at in self._varying:
                    varying.append(cells.pack(array))
                else:
                    rows[str(at)] = cells.raw(array)
            except ValueError as error:
                raise ValueError(f"column {self.features.names[at]!r}: {error}") from None
        rows["present"] = np.packbits(present, axis=1, bitorder="little")
        for at, packed in enumerate(varying):
            rows["lengths"][:, at] = np.fromiter(map(len, packed), np.int64, len(packed))
        whole, size = rows.tobytes(), self._record.itemsize
        starts = range(0, len(whole), size)
        if not varying:
            return [whole[start : start + size] for start in starts]
        return [b"".join((whole[start : start + size], *others)) for start, *others in zip(starts, *varying, strict=True)]

    def decode(self, blobs: list[bytes | None], now_us: int, wanted: Sequence[int]) -> Read:
        """Blobs, None for a key that there is not, as columns; what has expired by `now_us` counts as not there. `wanted` are places in the schema.

        Raises:
            ValueError: a blob is none of this schema.
        """
        size = self._record.itemsize
        absent = blobs.count(None)
        filled = [self._absent if blob is None else blob for blob in blobs]
        if self._varying:
            whole = b"".join([blob[:size] for blob in filled])
        else:
            whole = b"".join(filled)
            if set(map(len, filled)) - {size}:
                raise ValueError("a value has another length than its view's schema says")
        if len(whole) != len(filled) * size:
            raise ValueError("a value is shorter than its view's schema says")
        rows = np.frombuffer(whole, self._record)
        found = rows["expires"] > now_us + _MIDDLE
        missing = int(len(filled) - np.count_nonzero(found))
        if missing > absent:  # some have expired, which is rare: once more, without them
            return self.decode([blob if there else None for blob, there in zip(blobs, found.tolist(), strict=True)], now_us, wanted)
        present = None
        if missing or rows["present"].tobytes() != self._full * len(filled):
            present = np.unpackbits(rows["present"], axis=1, count=len(self.features), bitorder="little").astype(np.bool_)
        cut = self._cut(filled, rows) if self._varying else {}
        features = []
        for at in wanted:
            arrow = self.features.field(at).type
            valid = None if present is None or present[:, at].all() else present[:, at]
            if at in cut:
                features.append(cells.unpack(cut[at], arrow, valid))
            else:
                features.append(cells.from_raw(np.ascontiguousarray(rows[str(at)]), arrow, len(filled), valid))
        times = (rows["time"].astype(np.uint64) ^ np.uint64(_MIDDLE)).view(np.int64)
        return Read(
            cells.from_raw(found.view(np.uint8), pa.bool_(), len(filled), None),
            cells.from_raw(times, _INSTANT, len(filled), found if missing else None),
            features,
        )

    def _cut(self, blobs: Sequence[bytes], rows: npt.NDArray[Any]) -> dict[int, list[bytes]]:
        """The cells of varying length, by their column's place."""
        ends = np.cumsum(rows["lengths"], axis=1, dtype=np.int64) + self._record.itemsize
        if (ends[:, -1] != np.fromiter(map(len, blobs), np.int64, len(blobs))).any():
            raise ValueError("a value has another length than it says itself")
        cut, starts = {}, [self._record.itemsize] * len(blobs)
        for column, at in enumerate(self._varying):
            stops = ends[:, column].tolist()
            cut[at] = [blob[start:stop] for blob, start, stop in zip(blobs, starts, stops, strict=True)]
            starts = stops
        return cut
