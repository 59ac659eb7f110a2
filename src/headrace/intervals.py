"""Sets of row numbers as sorted, disjoint, half-open intervals. Their size grows with gaps, never with rows."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
"""The rows from the first number up to, and without, the second."""


class Intervals:
    """A set of row numbers. 16 bytes per interval; neighbours are merged as they come."""

    __slots__ = ("_bounds",)

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._bounds = array("q")
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Add the rows `start` to `stop - 1`; some may be there already."""
        if not 0 <= start <= stop:
            raise ValueError(f"an interval runs from a row of at least 0 to a later one, got {start} to {stop}")
        if start == stop:
            return
        bounds = self._bounds
        # An even position lies between two intervals, an odd one within one: there the old bound stays.
        first, last = bisect_left(bounds, start), bisect_right(bounds, stop)
        bounds[first:last] = array("q", ([] if first % 2 else [start]) + ([] if last % 2 else [stop]))

    def discard(self, start: int, stop: int) -> None:
        """Take out the rows `start` to `stop - 1`, as far as they are there."""
        if start >= stop:
            return
        bounds = self._bounds
        first, last = bisect_left(bounds, start), bisect_right(bounds, stop)
        bounds[first:last] = array("q", ([start] if first % 2 else []) + ([stop] if last % 2 else []))

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any of the rows `start` to `stop - 1` is there."""
        first = bisect_right(self._bounds, start)
        return start < stop and bool(first % 2 or (first < len(self._bounds) and self._bounds[first] < stop))

    def missing(self, start: int, stop: int | None) -> list[tuple[int, int | None]]:
        """The rows of `start` to `stop - 1` that are not there; without a `stop`, the last interval has no end."""
        found: list[tuple[int, int | None]] = []
        for begin, end in self:
            if stop is not None and begin >= stop:
                break
            if end <= start:
                continue
            if begin > start:
                found.append((start, begin))
            start = end
        if stop is None or start < stop:
            found.append((start, stop))
        return found

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    @property
    def flat(self) -> list[int]:
        """Start, stop, start, stop, ...: the form in which records keep them."""
        return self._bounds.tolist()

    @classmethod
    def of(cls, flat: Iterable[int]) -> Intervals:
        """The inverse of `flat`.

        Raises:
            ValueError: the numbers are not ascending pairs.
        """
        made = cls()
        made._bounds = array("q", flat)
        bounds = made._bounds
        if len(bounds) % 2 or (bounds and bounds[0] < 0) or any(bounds[at] >= bounds[at + 1] for at in range(len(bounds) - 1)):
            raise ValueError(f"intervals are ascending pairs of numbers, got {bounds.tolist()[:8]}")
        return made

    def __iter__(self) -> Iterator[Span]:
        pairs = iter(self._bounds)
        return zip(pairs, pairs, strict=True)

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and self._bounds == other._bounds

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Intervals({list(self)})"
