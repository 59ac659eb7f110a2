"""The order of events by key and time, and where in it the windows of labels begin and end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import SourceError
from headrace.features.blocks import ROWS, blocks, piece, spread, threads
from headrace.features.keys import Ints, Keys

Flags = npt.NDArray[np.bool_]
Span = tuple[Ints, Ints]
"""Of many windows the position of the first event, and the position behind the last one."""

_FINEST = ("us", "ns")  # no coarser than durations are
_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_LONG_RUN = 256
_MICROSECOND = dt.timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Block:
    """Some labels that follow each other, by key and time; or as they are where positions are looked up, since the order is of use for searches only.

    Attributes:
        back: where in that order each of them stands; None if they are as they were.
        codes: the number of the key of each, in that order.
        times: the instant of each, in that order.
    """

    back: Ints | None
    codes: Ints
    times: Ints


@dataclass(frozen=True, slots=True)
class Order:
    """The events of the labels' keys, by key and time, and the labels in blocks. What is said of labels is said block by block.

    Attributes:
        rows: which row of the events stands at each position.
        spots: key and time of the event at each position as one number; equal only for events of one key at one instant.
        firsts: the position of the first event of each key, and at last 0, for no key.
        labels: the blocks; instants are so many units `per_microsecond` since 1970.
    """

    rows: Ints
    spots: Ints
    firsts: Ints
    labels: Sequence[Block]
    per_microsecond: int
    _ruler: Ruler
    _calendar: Calendar | None
    _known: dict[int | None, list[Ints]] = field(default_factory=dict)

    @property
    def keys(self) -> Ints:
        """A number for the key of the event at each position."""
        return self.spots // self._ruler.length

    def spans(self, late: dt.timedelta, over: dt.timedelta | None) -> list[Span]:
        """The windows that end `late` before each label and reach `over` back, or to the first event of the key."""
        ends = self._ticks(late)
        return list(zip(self._behind(None if over is None else ends + self._ticks(over)), self._behind(ends), strict=True))

    def _behind(self, ticks: int | None) -> list[Ints]:
        """For each label the position behind the last event that happened by so much before it; before all of its key for None."""
        if ticks not in self._known:
            self._known[ticks] = spread(partial(self._behind_in, ticks), self.labels)
        return self._known[ticks]

    def _behind_in(self, ticks: int | None, block: Block) -> Ints:
        if ticks is None:
            return self.firsts[block.codes]
        marks = self._ruler.marks(earlier(block.times, ticks))
        if self._calendar is not None:
            return self._calendar.behind(block.codes, marks)
        return np.searchsorted(self.spots, block.codes * self._ruler.length + marks, side="right")  # 0 for labels of no key, whose spots are below 0

    def _ticks(self, took: dt.timedelta) -> int:
        """A duration in the unit of the instants."""
        return took // _MICROSECOND * self.per_microsecond


@dataclass(frozen=True, slots=True)
class Ruler:
    """Instants as small whole numbers in the same order, so that one fits beside a key's number into 64 bits.

    Either even marks from the first instant on, or a mark at every instant that there is.
    """

    first: int
    step: int
    length: int
    every: Ints | None = None

    @staticmethod
    def of(column: pa.ChunkedArray, unit: str, keys: int, what: str) -> Ruler:
        """The ruler for these instants of so many keys; `unit` and `what` as in `instants`."""
        if column.null_count == len(column):
            return Ruler(0, 1, 1)
        ends = pc.min_max(column)
        first, last = instants(pa.array([ends["min"], ends["max"]], column.type), unit, what)[0].tolist()
        step = 0
        for rows in blocks(len(column)) if last - first <= _MOST else ():
            step = int(np.gcd.reduce(instants(piece(column, rows).drop_null(), unit, what)[0] - first, initial=step))
            if step == 1:
                break
        step = step or 1
        if (last - first) // step < _MOST // max(keys, 1) - 1:
            return Ruler(first, step, (last - first) // step + 1)
        every = np.unique(instants(column.drop_null(), unit, what)[0])
        return Ruler(first, 1, len(every), every)

    def marks(self, times: Ints) -> Ints:
        """For each instant the last mark that is not after it, or -1."""
        if self.every is not None:
            return np.searchsorted(self.every, times, side="right") - 1
        if not len(times):
            return times
        last = self.first + (self.length - 1) * self.step
        before = times.min() < self.first
        within = np.clip(times, self.first, last) - self.first if before or times.max() > last else times - self.first
        if self.step > 1:
            within //= self.step
        return np.where(times < self.first, -1, within) if before else within


@dataclass(frozen=True, slots=True)
class Calendar:
    """Events of keys that have one at most marks from their first to their last, as a table in which positions are looked up rather than searched.

    Attributes:
        before: for each key the mark before its first event, and at last that of no key.
        length: how many marks there are from then to its last event.
        start: where in the table they begin.
        table: the position behind the last event by each mark.
    """

    before: Ints
    length: Ints
    start: Ints
    table: Ints

    @staticmethod
    def of(spots: Ints, firsts: Ints, marks: int, most: int) -> Calendar | None:
        """The table of these events, of keys with so many marks each; None where it would have more than `most` places."""
        if not len(spots):
            return None
        counts = np.diff(firsts[:-1], append=len(spots))
        there = counts > 0
        zeros = np.arange(len(counts)) * marks
        before = np.where(there, spots[np.minimum(firsts[:-1], len(spots) - 1)] - zeros, 0) - 1
        length = np.where(there, spots[firsts[:-1] + counts - 1] - zeros - before, 0)
        start = np.cumsum(length + 1) - length - 1
        size = int(start[-1] + length[-1]) + 1
        if size > most:
            return None
        places = np.repeat(start - before - zeros, counts)
        places += spots
        table = np.bincount(places, minlength=size)
        np.cumsum(table, out=table)
        return Calendar(np.append(before, 0), np.append(length, 0), np.append(start, 0), table)

    def behind(self, codes: Ints, marks: Ints) -> Ints:
        """The position behind the last event of each key by a mark."""
        found: Ints = self.table[self.start[codes] + np.clip(marks - self.before[codes], 0, self.length[codes])]
        return found


def earlier(times: Ints, by: int) -> Ints:
    """Instants that lie `by` before others, or at the beginning of time."""
    if by > _MOST:
        return np.full_like(times, _LEAST)
    if not by or times.min(initial=0) >= _LEAST + by:
        return times - by if by else times
    return np.where(times < _LEAST + by, _LEAST, times - by)


def order(labels: Mapping[str, pa.ChunkedArray], events: Mapping[str, pa.ChunkedArray], *, view: str) -> Order:
    """The order of events and labels that both give the columns of the key, and last that of the time.

    The names are those of the events; `view` opens the message of a WiringError or SourceError.
    """
    *key, time = events
    unit = _unit([labels[time].type, events[time].type])
    keys = Keys.of([labels[name] for name in key], [events[name] for name in key], key, view)
    what = f"{view}: the events' column {time!r}"
    ruler = Ruler.of(events[time], unit, keys.count, what)
    spots = np.empty(len(events[time]), np.int64)

    def place(rows: slice) -> bool:
        """Whether all events in these rows count."""
        times, happened = instants(piece(events[time], rows), unit, what)
        codes = keys.of_events(rows)
        counted = happened & (codes >= 0)
        np.multiply(codes, ruler.length, out=spots[rows])
        spots[rows] += ruler.marks(times)
        if not counted.all():
            spots[rows][~counted] = -1
            return False
        return True

    def by_place(rows: slice) -> Block:
        times, dated = instants(piece(labels[time], rows), unit, f"{view}: the labels' times")
        codes = np.where(dated, keys.of_labels(rows), -1)
        if calendar is not None:
            return Block(None, codes, times)
        by, _ = in_order(codes * ruler.length + ruler.marks(times))
        back = np.empty(len(by), np.int64)
        back[by] = np.arange(len(by))
        return Block(back, codes[by], times[by])

    rows = None if all(spread(place, blocks(len(spots)))) else np.flatnonzero(spots >= 0)
    by_spot, spots = in_order(spots if rows is None else spots[rows])
    firsts = np.append(np.searchsorted(spots, np.arange(keys.count) * ruler.length), 0)
    calendar = Calendar.of(spots, firsts, ruler.length, len(events[time]) + len(labels[time]))
    ordered = spread(by_place, blocks(len(labels[time])))
    return Order(by_spot if rows is None else rows[by_spot], spots, firsts, ordered, 1000 if unit == "ns" else 1, ruler, calendar)


def instants(column: pa.ChunkedArray | pa.Array, unit: str, what: str) -> tuple[Ints, Flags]:
    """Times as whole numbers since 1970 in UTC, 0 where there is none, and where there is one."""
    try:
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        times = column.cast(pa.timestamp(unit, zone)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(f"{what} cannot be told in {unit} since 1970: {error}") from error
    there = np.asarray(pc.is_valid(times)) if times.null_count else np.ones(len(times), np.bool_)
    return np.asarray(times.fill_null(0) if times.null_count else times), there


def _unit(types: Sequence[pa.DataType]) -> str:
    """The finest unit of these times: rounding one down would make an event earlier than it was."""
    return "ns" if any(pa.types.is_timestamp(kind) and kind.unit == "ns" for kind in types) else _FINEST[0]


def in_order(numbers: Ints) -> tuple[Ints, Ints]:
    """The places of the numbers in rising order, and the numbers in it; equal ones come in any order, on which nothing depends.

    Rows often come in long runs that rise, as files of sorted rows do; those are merged. Others: numbers are sorted several times as
    fast as their places are. So each number and its place are put into one that is sorted; where both have no room in 64 bits, the
    number's lowest bits are left out, and those that are then alike are sorted once more. Parts are sorted by several threads, and
    are long runs then.
    """
    if (numbers[1:] >= numbers[:-1]).all():
        return np.arange(len(numbers)), numbers
    least = int(numbers.min())
    bits = len(numbers).bit_length()
    cut = max((int(numbers.max()) - least).bit_length() + bits - 64, 0)
    packed = np.empty(len(numbers), np.uint64)
    parts = blocks(len(numbers), max(ROWS, -(-len(numbers) // threads())))
    spread(lambda rows: _pack(numbers, least, cut, bits, rows, packed[rows]), parts)
    if len(parts) > 1:
        packed.sort(kind="stable")
    places: Ints = (packed & np.uint64((1 << bits) - 1)).view(np.int64)
    packed >>= np.uint64(bits)
    if not cut:
        ordered = packed.view(np.int64)
        ordered += least
        return places, ordered
    same = packed[1:] == packed[:-1]
    if same.any():
        alike = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        places[alike] = places[alike][np.argsort(numbers[places[alike]])]
    return places, numbers[places]


def _pack(numbers: Ints, least: int, cut: int, bits: int, rows: slice, packed: npt.NDArray[np.uint64]) -> None:
    """Sort the numbers of some rows, less `least` and `cut` bits, each with `bits` bits of its place below it."""
    np.subtract(numbers[rows], least, out=packed.view(np.int64))  # which wraps around to what it should be
    packed >>= np.uint64(cut)
    falls = np.count_nonzero(packed[1:] < packed[:-1])
    packed <<= np.uint64(bits)
    packed |= np.arange(rows.start, rows.stop, dtype=np.uint64)
    packed.sort(kind="stable" if falls <= len(packed) // _LONG_RUN else None)
