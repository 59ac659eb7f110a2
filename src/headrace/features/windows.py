"""Aggregates of one column over the windows of many labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.columns import from_arrow
from headrace.errors import SourceError
from headrace.features.aggregates import Feature
from headrace.features.blocks import in_one, spread
from headrace.features.keys import Ints
from headrace.features.order import Flags, Order, Span
from headrace.features.ranges import Values, Wavelet, extremes
from headrace.features.sums import FloatSums, WholeSums, running
from headrace.units import plain


class Windows:
    """The values of one column of the events, without nulls and in their order; what is computed once for several features is kept."""

    def __init__(self, column: pa.ChunkedArray, order: Order) -> None:
        self._order = order
        self._column: pa.ChunkedArray | pa.Array = column.cast(plain(column.type)) if pa.types.is_dictionary(column.type) else column
        if pa.types.is_primitive(column.type):
            self._column = in_one(self._column)  # of which values are taken several times as fast
        self._rows = order.rows
        self._spots = order.spots
        self._skipped: Ints | None = None  # before each position, how many events have a value
        if column.null_count:
            there = pc.is_valid(column).to_numpy()[order.rows]
            self._rows, self._spots, self._skipped = order.rows[there], order.spots[there], running(there)

    def aggregate(self, feature: Feature, spans: Sequence[Span], *, what: str) -> list[tuple[pa.Array, Flags]]:
        """The feature over each window, of which there are several blocks, and where there is one at all.

        `what` opens the message of a SourceError, when a sum does not fit.
        """
        if (skipped := self._skipped) is not None:
            spans = spread(lambda span: (skipped[span[0]], skipped[span[1]]), spans)
        if feature.kind == "last":
            values = self._last(spans)
        elif feature.kind in ("min", "max"):
            values = self._extremes(feature.kind, spans)
        elif feature.kind == "mean" and pa.types.is_fixed_size_list(self._column.type):
            values = self._mean_vectors(spans, what)
        else:
            numbers = self._numbers_over(feature, what)
            values = spread(lambda span: pa.array(numbers(*span)), spans)
        counts = feature.kind in ("count", "distinct")
        return [(of, np.ones(len(lo), np.bool_) if counts else hi > lo) for of, (lo, hi) in zip(values, spans, strict=True)]

    def _numbers_over(self, feature: Feature, what: str) -> Callable[[Ints, Ints], Values]:
        """What gives the numbers of many windows, 0 where there are no values; what several blocks need is made before."""
        if feature.kind == "count":
            return lambda lo, hi: hi - lo
        if feature.kind == "distinct":
            return partial(_distinct, self._before, self._firsts)
        if feature.kind == "quantile":
            assert feature.q is not None
            return partial(_quantile, *self._sorted, self._firsts, feature.q)
        if feature.kind == "sum" and from_arrow(self._column.type).kind == "int":
            return partial(_whole_sum, WholeSums(self._whole(what)), what)
        sums = self._sums
        return sums.over if feature.kind == "sum" else lambda lo, hi: sums.over(lo, hi) / np.maximum(hi - lo, 1)

    def _last(self, spans: Sequence[Span]) -> list[pa.Array]:
        if not len(self._rows):
            return [pa.nulls(len(lo), self._column.type) for lo, _ in spans]
        newest = self._newest

        def rows_of(span: Span) -> Ints:
            at = span[1] - 1
            found: Ints = newest[np.maximum(at, 0, out=at)]
            return found

        if pa.types.is_primitive(self._column.type):
            return spread(lambda span: _without_negative_zero(self._column.take(pa.array(rows_of(span)))), spans)
        rows = spread(rows_of, spans)
        taken = self._column.take(pa.array(np.concatenate(rows)))  # at once, since it may put the column's pieces together
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        return [in_one(taken.slice(start, stop - start)) for start, stop in itertools.pairwise(ends)]

    def _mean_vectors(self, spans: Sequence[Span], what: str) -> list[pa.Array]:
        """The mean of vectors, one of their numbers after the other; zeros where there are none."""
        vectors, size = self._taken, self._column.type.list_size
        if (numbers := vectors.flatten()).null_count:
            raise SourceError(f"{what}: a vector has null in it; fill it, or leave the vector out, in the view's pipeline")
        table = np.asarray(numbers).reshape(len(vectors), size)
        found = [np.zeros((len(lo), size), table.dtype) for lo, _ in spans]

        def add(sums: FloatSums, at: int, block: tuple[Span, Values]) -> None:
            (lo, hi), means = block
            means[:, at] = sums.over(lo, hi) / np.maximum(hi - lo, 1)

        for at in range(size):
            sums = FloatSums(table[:, at].astype(np.float64) + 0.0)
            spread(partial(add, sums, at), list(zip(spans, found, strict=True)))
        return [pa.FixedSizeListArray.from_arrays(pa.array(means.ravel()), type=self._column.type) for means in found]

    @cached_property
    def _taken(self) -> pa.Array:
        """The values in order."""
        return in_one(self._column.take(pa.array(self._rows)))

    @cached_property
    def _numbers(self) -> Values:
        """The values in order, of a column of numbers."""
        column = self._column.fill_null(0) if self._column.null_count else self._column
        return np.asarray(column)[self._rows]

    def _whole(self, what: str) -> Ints:
        try:
            return np.asarray(self._column.cast(pa.int64()).fill_null(0))[self._rows]
        except pa.ArrowInvalid as error:
            raise SourceError(f"{what}: a value does not fit into 64 bits; make the column a float in the view's pipeline") from error

    @cached_property
    def _floats(self) -> Values:
        return self._numbers.astype(np.float64, copy=False) + 0.0

    @cached_property
    def _sums(self) -> FloatSums:
        return FloatSums(self._floats)

    def _extremes(self, kind: str, spans: Sequence[Span]) -> list[pa.Array]:
        values, back = self._comparable
        # Where NaN is the greatest value, it is a least one only if there is no other; fmin leaves it out, maximum takes it.
        return spread(back, extremes(values, spans, pick=np.fmin if kind == "min" else np.maximum))

    @cached_property
    def _comparable(self) -> tuple[Values, Callable[[Values], pa.Array]]:
        """The values as numbers of the same order, and the way back."""
        type = self._column.type
        if from_arrow(type).kind in ("int", "float"):
            values = self._numbers
            return values + values.dtype.type(0) if values.dtype.kind == "f" else values, lambda found: pa.array(found, type)
        encoded = self._taken.dictionary_encode()
        by_value = pc.sort_indices(encoded.dictionary)
        ranks = np.empty(len(by_value), np.int64)
        ranks[by_value.to_numpy()] = np.arange(len(by_value))
        words = encoded.dictionary.take(by_value) if len(by_value) else pa.nulls(1, type)
        return ranks[encoded.indices.to_numpy()], lambda found: words.take(pa.array(found))

    @cached_property
    def _newest(self) -> Ints:
        """For each position the event's row, but at the last position of one key and instant that of the greatest value there."""
        newest = self._rows
        same = self._spots[1:] == self._spots[:-1]
        if same.any():
            newest = newest.copy()
            tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
            ranks = _ranks(in_one(self._column.take(pa.array(self._rows[tied]))))
            newest[tied] = self._rows[tied[np.lexsort((ranks, self._spots[tied]))]]
        return newest

    @cached_property
    def _sorted(self) -> tuple[Values, Wavelet]:
        """Each key's values by size, NaN last, and which of them stands at each position."""
        size = _ranks(pa.array(self._floats))
        by_value = np.argsort(self._firsts * (int(size.max(initial=0)) + 1) + size)
        ranks = np.empty(len(by_value), np.int64)
        ranks[by_value] = np.arange(len(by_value)) - self._firsts
        return self._floats[by_value], Wavelet(ranks)

    @cached_property
    def _before(self) -> Wavelet:
        """For each position which one of the key's last had the same value: 1 for the key's first, and so on, 0 where there was none."""
        numbers = np.asarray(_without_negative_zero(self._taken).dictionary_encode().indices).astype(np.int64)
        by_value = np.argsort(self._firsts * (int(numbers.max(initial=0)) + 1) + numbers, kind="stable")
        keys, values = self._firsts[by_value], numbers[by_value]
        same = (values[1:] == values[:-1]) & (keys[1:] == keys[:-1])
        before = np.zeros(len(keys), np.int64)
        before[by_value[1:][same]] = by_value[:-1][same] - keys[1:][same] + 1
        return Wavelet(before)

    @cached_property
    def _firsts(self) -> Ints:
        """The first position of the key at each position."""
        keys = self._order.keys if self._skipped is None else self._order.keys[np.diff(self._skipped) == 1]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return np.repeat(starts, np.diff(np.concatenate([starts, [len(keys)]])))


def _whole_sum(sums: WholeSums, what: str, lo: Ints, hi: Ints) -> Ints:
    totals, too_large = sums.over(lo, hi)
    if too_large.any():
        raise SourceError(f"{what}: a sum does not fit into 64 bits; make the column a float in the view's pipeline")
    return totals


def _quantile(by_value: Values, wavelet: Wavelet, firsts: Ints, q: float, lo: Ints, hi: Ints) -> Values:
    found = np.zeros(len(lo))
    there = hi > lo
    if not there.any():
        return found
    lo, hi = lo[there], hi[there]
    place = (hi - lo - 1) * q
    lower = np.floor(place).astype(np.int64)
    upper = np.ceil(place).astype(np.int64)
    one, other = (by_value[firsts[lo] + wavelet.smallest(lo, hi, n)] for n in (lower, upper))
    share = place - lower
    with np.errstate(invalid="ignore", over="ignore"):  # between infinities there is no number
        found[there] = np.where((share == 0) | (one == other), one, one + (other - one) * share)
    return found


def _distinct(before: Wavelet, firsts: Ints, lo: Ints, hi: Ints) -> Ints:
    """A value counts where the one before it that is the same, of the same key, lies outside of the window."""
    found = np.zeros(len(lo), np.int64)
    there = hi > lo
    if there.any():
        lo, hi = lo[there], hi[there]
        found[there] = before.below(lo, hi, lo - firsts[lo] + 1)
    return found


def _without_negative_zero(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return pc.add(column, pa.scalar(0, column.type)) if pa.types.is_floating(column.type) else column


def _ranks(values: pa.Array) -> Ints:
    """Numbers in the order of values of any type; the same for the same value."""
    kind = from_arrow(values.type).kind
    if kind in ("str", "bytes", "bool", "int", "float", "datetime", "date"):
        encoded = _without_negative_zero(values).dictionary_encode()
        ranks = np.empty(len(encoded.dictionary), np.int64)
        ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
        return np.asarray(ranks[encoded.indices.to_numpy()])
    if pa.types.is_fixed_size_list(values.type) and pa.types.is_floating(values.type.value_type) and not values.flatten().null_count:
        return _ranks(_as_bytes(values))
    told = [_key(value) for value in values.to_pylist()]
    return np.array(_places(told), np.int64)


def _as_bytes(vectors: pa.Array) -> pa.Array:
    """Vectors as bytes of the same order: from the first number on, NaN after all others."""
    size = vectors.type.list_size
    numbers = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), size)
    numbers = np.where(np.isnan(numbers), numbers.dtype.type(np.nan), numbers)
    bits = numbers.view(f"u{numbers.itemsize}")
    sign = bits.dtype.type(1) << (numbers.itemsize * 8 - 1)
    ordered = np.where(bits & sign, ~bits, bits | sign).astype(f">u{numbers.itemsize}")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size * numbers.itemsize), len(vectors), [None, pa.py_buffer(ordered.tobytes())]).cast(pa.binary())


def _key(value: Any) -> Any:
    """A nested value as tuples that Python can sort: nulls first, NaN last."""
    if value is None:
        return (0,)
    if isinstance(value, dict):
        return (1, *((name, _key(one)) for name, one in value.items()))
    if isinstance(value, (list, tuple)):
        return (1, *map(_key, value))
    if isinstance(value, float):
        return (1, value != value, 0.0 if value != value else value, np.copysign(1.0, value))  # noqa: PLR0124
    return (1, value)


def _places(values: Sequence[Any]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    places, place = [0] * len(values), 0
    for before, at in zip([order[:1], *([one] for one in order)], order, strict=False):
        place += before != [] and values[before[0]] != values[at]
        places[at] = place
    return places
