"""Many blobs as a table.

Reading 100 keys must not take much longer than the database takes: what is fixed in all blobs is copied in a few steps, whatever the number of columns,
and only what is text is looked at key by key.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.online_store import cells
from headrace.online_store.frames import Frame
from headrace.online_store.records import KINDS, MIDDLE, Layout

FOUND, TIME = pa.field("found", pa.bool_()), pa.field("event_time", pa.timestamp("us", tz="UTC"))
"""Columns that are added to the features."""

_FRAMES = 256  # that are kept, one for each number of keys, with nulls and without

_AT = operator.itemgetter(0)

Ints = npt.NDArray[np.int64]


class Reader:
    """Turns blobs of a layout into tables of some of its features, `found` and `event_time`. Threads may share it.

    Args:
        layout: how they lie in the blobs.
        wanted: the places of the features in the layout's schema, in the order of the table.
    """

    def __init__(self, layout: Layout, wanted: Sequence[int]) -> None:
        fields = list(layout.features)
        self.schema = pa.schema([*(fields[at] for at in wanted), FOUND, TIME])
        self._layout, self._absent = layout, bytes(layout.fixed_bytes)
        self._head = np.dtype(f"V{layout.head.itemsize}")
        vectors = [(at, where.start, np.dtype(f"V{where.stop - where.start}")) for at, where in layout.wide.items() if at in wanted]
        self._wide = [(wanted.index(at), fields[at], at, start, kind) for at, start, kind in vectors]
        self._varying = [(column, wanted.index(at), fields[at]) for column, at in enumerate(layout.varying) if at in wanted]
        # Numbers and truth values, found and event time among them: neighbours that are neighbours in a blob, too, are copied together.
        where = {at: (name, column) for name, places in layout.numbers.items() for column, at in enumerate(places)}
        where |= {len(fields): ("", 0), len(fields) + 1: ("w8", len(layout.numbers["w8"]))}
        self._columns = [at for at in (*wanted, len(fields), len(fields) + 1) if at in where]
        self._fixed = pa.schema([[*fields, FOUND, TIME][at] for at in self._columns])
        self._runs: list[tuple[str, int, int, int]] = []  # the name in a blob's head; from which column of it on, into which of the table, how many
        for to, (name, column) in enumerate(where[at] for at in self._columns):
            if self._runs and self._runs[-1][0] == name and sum(self._runs[-1][1::2]) == column:
                self._runs[-1] = (*self._runs[-1][:3], self._runs[-1][3] + 1)
            else:
                self._runs.append((name, column, to, 1))
        self._frames: dict[tuple[int, bool], Frame] = {}

    def read(self, blobs: list[bytes | None], now_us: int) -> pa.Table:
        """Blobs, None for a key that there is not, as a table; what has expired by `now_us` counts as not there.

        Raises:
            ValueError: a blob is none of the layout.
        """
        layout, count = self._layout, len(blobs)
        if not count:
            return self.schema.empty_table()
        absent = blobs.count(None)
        filled: list[bytes] = [self._absent if blob is None else blob for blob in blobs] if absent else blobs  # type: ignore[assignment]
        starts, lengths = self._extents(filled)
        whole = b"".join(filled)
        heads = _gathered(whole, starts, self._head).view(layout.head)
        found = heads["expires"] > now_us + MIDDLE
        missing = count - int(np.count_nonzero(found))
        if missing > absent:  # some have expired, which is rare: once more, without them
            return self.read([blob if there else None for blob, there in zip(blobs, found.tolist(), strict=True)], now_us)
        present = None
        if missing or heads["present"].tobytes() != layout.full * count:
            bits = np.unpackbits(heads["present"], axis=1, count=len(layout.features), bitorder="little")
            present = np.column_stack([bits.view(np.bool_), np.ones(count, np.bool_), found])
        table = pa.Table.from_batches([self._batch(heads, found, present)])
        columns = self._cells(filled, heads["lengths"], lengths, present) if layout.varying else []
        for at, field, place, start, kind in self._wide:
            columns.append((at, field, cells.from_raw(_gathered(whole, starts + start, kind), field.type, count, _valid(present, place))))
        for at, field, column in sorted(columns, key=_AT):
            table = table.add_column(at, field, column)
        return table

    def _extents(self, blobs: list[bytes]) -> tuple[Ints, Ints]:
        """Where each of the blobs begins when they lie behind each other, and how long it is: as long as what is fixed, or longer."""
        sizes, fixed = list(map(len, blobs)), self._layout.fixed_bytes
        if self._layout.varying and min(sizes) >= fixed:
            lengths = np.array(sizes, np.int64)
            return lengths.cumsum() - lengths, lengths
        if self._layout.varying or sizes.count(fixed) < len(sizes):
            raise ValueError("a value has another length than its view's schema says")
        return np.arange(0, len(sizes) * fixed, fixed), np.full(len(sizes), fixed)

    def _batch(self, heads: npt.NDArray[Any], found: cells.Bools, present: cells.Bools | None) -> pa.RecordBatch:
        """The numbers and truth values."""
        count = len(heads)
        frame = self._frame(count, nulls=present is not None)
        message = frame.begin()
        for name, start, to, columns in self._runs:
            if kind := KINDS.get(name):
                frame.values(message, to, columns, kind, count)[:] = heads[name][:, start : start + columns].T
            else:
                truths = heads[name][:, start : start + columns] if name else found[:, np.newaxis]
                frame.values(message, to, columns, "u1", (count + 7) // 8)[:] = np.packbits(truths, axis=0, bitorder="little").T
        if present is not None:
            frame.nulls(message, present[:, self._columns])
        return frame.batch(message)

    def _frame(self, count: int, *, nulls: bool) -> Frame:
        frame = self._frames.get((count, nulls))
        if frame is None:
            if len(self._frames) >= _FRAMES:
                self._frames.clear()
            frame = self._frames[count, nulls] = Frame(self._fixed, count, nulls=nulls)
        return frame

    def _cells(self, blobs: list[bytes], inner: npt.NDArray[Any], lengths: Ints, present: cells.Bools | None) -> list[tuple[int, pa.Field, pa.Array]]:
        """The columns that vary in length; `inner` are the lengths of their cells, as the blobs have them."""
        ends = np.cumsum(inner, axis=1, dtype=np.int64) if inner.shape[1] > 1 else inner
        start = self._layout.fixed_bytes
        if (ends[:, -1] != lengths - start).any():
            raise ValueError("a value has another length than it says itself")
        columns = []
        for column, at, field in self._varying:
            if inner.shape[1] == 1:
                values = [blob[start:] for blob in blobs]
            else:
                stops = ends[:, column] + start
                bounds = zip(blobs, (stops - inner[:, column]).tolist(), stops.tolist(), strict=True)
                values = [blob[begin:stop] for blob, begin, stop in bounds]
            valid = _valid(present, self._layout.varying[column])
            columns.append((at, field, cells.unpack(values, inner[:, column], field.type, valid)))
        return columns


def _valid(present: cells.Bools | None, place: int) -> cells.Bools | None:
    """Which values of a feature are there; None if all are."""
    return None if present is None or present[:, place].all() else present[:, place]


def _gathered(whole: bytes, starts: Ints, kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """The bytes from each start on, as many as an item of `kind` has. Of a view in which an item begins with every byte, numpy copies each in one go."""
    return np.ndarray(max(0, len(whole) - kind.itemsize + 1), kind, whole, strides=(1,))[starts]
