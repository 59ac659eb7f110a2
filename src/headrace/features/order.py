"""The order of events by key and time, and where in it the windows of labels begin and end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import SourceError, WiringError
from headrace.units import plain

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_FINEST = ("us", "ns")  # no coarser than durations are
_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_LONG_RUN = 256
_MICROSECOND = dt.timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Order:
    """The events of the labels' keys, by key and time, and the labels in the same order.

    Attributes:
        rows: which row of the events stands at each position.
        keys: a number for the key of the event at each position.
        spots: key and time of the event at each position as one number; equal only for events of one key at one instant.
        labels: which row of the labels stands at each position among them.
        starts: for each label, in that order, the position of the first event of its key.
        times: the instant of each label, so many units `per_microsecond` since 1970.
    """

    rows: Ints
    keys: Ints
    spots: Ints
    labels: Ints
    starts: Ints
    times: Ints
    per_microsecond: int
    _codes: Ints
    _ruler: Ruler
    _known: dict[int, Ints] = field(default_factory=dict)

    def until(self, late: dt.timedelta) -> Ints:
        """For each label the position behind the last event that happened by `late` before it."""
        return self._behind(self.ticks(late))

    def since(self, late: dt.timedelta, over: dt.timedelta | None) -> Ints:
        """For each label the position of the first event of a window that reaches `over` back from `late` before it."""
        return self.starts if over is None else self._behind(self.ticks(late) + self.ticks(over))

    def _behind(self, ticks: int) -> Ints:
        if ticks not in self._known:
            spots = self._codes * self._ruler.length + self._ruler.marks(earlier(self.times, ticks))
            self._known[ticks] = np.searchsorted(self.spots, spots, side="right")  # 0 for labels of no key, whose spots are below 0
        return self._known[ticks]

    def ticks(self, took: dt.timedelta) -> int:
        """A duration in the unit of `times`."""
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
    def of(times: Ints, keys: int) -> Ruler:
        """The ruler for these instants of so many keys."""
        if not len(times):
            return Ruler(0, 1, 1)
        first, last = int(times.min()), int(times.max())
        most = _MOST // max(keys, 1) - 1
        step = 1
        if last - first >= most and last - first <= _MOST:
            step = int(np.gcd.reduce(times - first)) or 1
        if (last - first) // step < most:
            return Ruler(first, step, (last - first) // step + 1)
        every = np.unique(times)
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
    label_times, dated = instants(labels[time], unit, f"{view}: the labels' times")
    event_times, happened = instants(events[time], unit, f"{view}: the events' column {time!r}")
    label_codes, event_codes, keys = _codes([labels[name] for name in key], [events[name] for name in key], key, view)
    label_codes[~dated] = -1
    counted = happened & (event_codes >= 0)
    rows = None if counted.all() else np.flatnonzero(counted)
    if rows is not None:
        event_codes, event_times = event_codes[rows], event_times[rows]
    ruler = Ruler.of(event_times, keys)
    spots = event_codes * ruler.length + ruler.marks(event_times)
    places = label_codes * ruler.length + ruler.marks(label_times)
    with ThreadPoolExecutor(2) as pool:
        by_spot, by_place = pool.map(_sorting, (spots, places))
    if by_spot is not None:
        rows, spots = by_spot if rows is None else rows[by_spot], spots[by_spot]
    elif rows is None:
        rows = np.arange(len(spots))
    counts = np.bincount(event_codes, minlength=keys) if keys else np.zeros(0, np.int64)
    event_codes = np.repeat(np.arange(keys), counts)
    firsts = np.concatenate([np.cumsum(counts) - counts, [0]]).astype(np.int64)  # the last one is that of no key
    by_place = np.arange(len(places)) if by_place is None else by_place
    codes = label_codes[by_place]
    return Order(rows, event_codes, spots, by_place, firsts[codes], label_times[by_place], 1000 if unit == "ns" else 1, codes, ruler)


def instants(column: pa.ChunkedArray, unit: str, what: str) -> tuple[Ints, Flags]:
    """Times as whole numbers since 1970 in UTC, 0 where there is none, and where there is one."""
    try:
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        times = column.cast(pa.timestamp(unit, zone)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(f"{what} cannot be told in {unit} since 1970: {error}") from error
    there = pc.is_valid(times).to_numpy() if times.null_count else np.ones(len(times), np.bool_)
    return (times.fill_null(0) if times.null_count else times).to_numpy(), there


def _unit(types: Sequence[pa.DataType]) -> str:
    """The finest unit of these times: rounding one down would make an event earlier than it was."""
    return "ns" if any(pa.types.is_timestamp(kind) and kind.unit == "ns" for kind in types) else _FINEST[0]


def _sorting(numbers: Ints) -> Ints | None:
    """The places of the numbers in rising order, or None where they are in it; equal ones come in any order, on which nothing depends.

    Rows often come in long runs that rise, as files of sorted rows do; those are merged. Others: numbers are sorted several times as
    fast as their places are. So each number and its place are put into one that is sorted; where both have no room in 64 bits, the
    number's lowest bits are left out, and those that are then alike are sorted once more.
    """
    falls = np.count_nonzero(numbers[1:] < numbers[:-1])
    if falls <= len(numbers) // _LONG_RUN:
        return np.argsort(numbers, kind="stable") if falls else None
    least = numbers.min()
    bits = len(numbers).bit_length()
    cut = max((int(numbers.max()) - int(least)).bit_length() + bits - 64, 0)
    packed = (numbers - least).view(np.uint64)  # which wraps around to what it should be
    packed >>= np.uint64(cut)
    packed <<= np.uint64(bits)
    packed |= np.arange(len(numbers), dtype=np.uint64)
    packed.sort()
    places: Ints = (packed & np.uint64((1 << bits) - 1)).view(np.int64)
    if cut:
        packed >>= np.uint64(bits)
        same = packed[1:] == packed[:-1]
        if same.any():
            alike = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
            places[alike] = places[alike][np.argsort(numbers[places[alike]])]
    return places


def _codes(labels: Sequence[pa.ChunkedArray], events: Sequence[pa.ChunkedArray], names: Sequence[str], view: str) -> tuple[Ints, Ints, int]:
    """A number for every key of a label, for labels and events, and how many there are; -1 for a key that is null, or of no label."""
    ours, theirs, known = np.zeros(len(labels[0]), np.int64), np.zeros(len(events[0]), np.int64), 1
    for place, (name, label, event) in enumerate(zip(names, labels, events, strict=True)):
        one, other = _alike(label, event, name, view)
        here, there, count = _dense(one, other) or _hashed(one, other)
        if not place:
            ours, theirs, known = here, there, count
            continue
        ours = np.where((ours < 0) | (here < 0), -1, ours * count + here)
        theirs = np.where((theirs < 0) | (there < 0), -1, theirs * count + there)
        known *= count
        if known > 4 * (len(ours) + len(theirs)) + 1024:  # number only those that there are
            seen = np.unique(ours[ours >= 0])
            ours, theirs, known = _among(seen, ours), _among(seen, theirs), len(seen)
    return ours, theirs, known


def _dense(label: pa.ChunkedArray, event: pa.ChunkedArray) -> tuple[Ints, Ints, int] | None:
    """The numbers of whole numbers that lie close together, looked up in a table rather than hashed; None of others."""
    if not pa.types.is_integer(label.type) or label.null_count == len(label):
        return None
    least, most = pc.min_max(label).as_py().values()
    if least == _LEAST or most > _MOST or most - least > 4 * (len(label) + len(event)) + 1024:
        return None
    ours = _whole(label, least - 1, least)
    seen = np.zeros(most - least + 2, np.int64)
    seen[ours] = 1
    seen[-1] = 0  # where a null is looked up, as place -1
    numbers = np.where(seen, np.cumsum(seen) - 1, -1)
    try:
        event = event.cast(pa.int64())
    except pa.ArrowInvalid:  # beyond 64 bits
        return None
    others = _whole(event, least - 1, 0)
    outside = (others < least) | (others > most)
    others = np.where(outside, -1, others - least) if outside.any() else others - least
    return numbers[ours], numbers[others], int(seen.sum())


def _whole(column: pa.ChunkedArray, null: int, zero: int) -> Ints:
    """Whole numbers, less `zero`."""
    whole = column.cast(pa.int64())
    return np.asarray(whole.fill_null(null) if whole.null_count else whole) - np.int64(zero)


def _hashed(label: pa.ChunkedArray, event: pa.ChunkedArray) -> tuple[Ints, Ints, int]:
    values = pc.unique(label).drop_null()
    return _numbers(label, values), _numbers(event, values), len(values)


def _numbers(column: pa.ChunkedArray, values: pa.Array) -> Ints:
    found = pc.index_in(column, value_set=values)
    return np.asarray(found.fill_null(-1) if found.null_count else found).astype(np.int64)


def _among(seen: Ints, codes: Ints) -> Ints:
    if not len(seen):
        return np.full_like(codes, -1)
    at = np.searchsorted(seen, codes).clip(max=len(seen) - 1)
    return np.where(seen[at] == codes, at, -1)


def _alike(label: pa.ChunkedArray, event: pa.ChunkedArray, name: str, view: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Both columns of a key in one type."""
    one, other = plain(label.type), plain(event.type)
    try:
        fields = [pa.schema([("key", one)]), pa.schema([("key", other)])]
        kind = pa.unify_schemas(fields, promote_options="permissive").field(0).type
        if {pa.types.is_integer(one), pa.types.is_integer(other)} == {True, False}:
            raise pa.ArrowTypeError("a number and none")
        return label.cast(kind), event.cast(kind)
    except pa.ArrowException as error:
        raise WiringError(f"{view}: key column {name!r} is {one} in the labels but {other} in the events; convert one of them") from error
