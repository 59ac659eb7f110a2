"""How much of a run is done, by the bytes of its input: rows of large files take longer than rows of small ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from headrace.resume import Todo


class Weights:
    """Counts settled rows against the units of a run. Memory grows with units.

    A unit weighs what it has of its files' bytes. How much of it is done is known once its rows are; where only reading tells
    how many they are, it counts for nothing until it was read.
    """

    def __init__(self, todo: Todo) -> None:
        rows_of: Counter[tuple[str, ...]] = Counter()
        for unit, _ in todo:
            rows_of[unit.paths] += unit.rows or 0
        self._left: dict[int, int | None] = {}
        self._weights: dict[int, float] = {}
        self._settled: Counter[int] = Counter()
        for unit, rows in todo:
            known = [stop - start for start, stop in rows if stop is not None]
            count = sum(known) if len(known) == len(rows) else None
            self._left[unit.id] = count
            size = float(unit.span[1] - unit.span[0] if unit.span else unit.size_bytes)
            if unit.rows and not unit.span:
                size = size * (unit.rows if count is None else count) / rows_of[unit.paths]
            self._weights[unit.id] = max(1.0, size)
        self._total = sum(self._weights.values())
        self._done = 0.0

    @property
    def share(self) -> float | None:
        """The part of the run that is done, 0 to 1, or None while no unit with a known number of rows has been begun."""
        return min(1.0, self._done / self._total) if self._done else None

    def settle(self, spans: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Note rows that are done, or given up."""
        for unit, rows in spans.items():
            self._add(unit, sum(stop - start for start, stop in rows))

    def count(self, unit: int, rows: int) -> None:
        """Note how many rows a unit has, once reading has told."""
        if unit in self._left and self._left[unit] is None:
            self._left[unit] = rows
            self._add(unit, self._settled.pop(unit, 0))

    def _add(self, unit: int, count: int) -> None:
        rows = self._left.get(unit)
        if rows is None:
            self._settled[unit] += count
        elif rows:
            self._done += self._weights[unit] * count / rows
