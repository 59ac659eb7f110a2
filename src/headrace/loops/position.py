"""Where a training got to in its data: which rows of which unit were given, in which epoch; and the order of what is left.

A row is known by its unit and its number there, as in a batch job. In epoch `e`, unit number `u` of `n` goes by `e * n + u`: so one
stream has the rows of all epochs, nothing stops where one ends, and the position is the set of rows that the workers have taken,
whatever their number. Rows are kept as intervals: memory grows with the parts that workers take in one piece, not with rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from headrace.errors import SourceError
from headrace.intervals import Intervals
from headrace.lineage import ROW, UNIT, spans
from headrace.units import Unit

Taken = Mapping[int, Intervals]
Left = list[tuple[Unit, list[tuple[int, int | None]]]]

_FOLD_ROWS = 1 << 18  # rows whose places are kept one by one, until they are folded into intervals
_MOST_UNITS = 1 << 31  # a unit goes by a number of 32 bits


class Position:
    """The rows that one worker has given to its loop, beside those that earlier runs had `taken`, which one of the workers keeps."""

    def __init__(self, taken: Taken | None = None) -> None:
        self._taken = united([taken or {}])
        self._parts: list[pa.Table] = []
        self._loose = 0

    def take(self, data: pa.Table) -> None:
        """Note the rows of a table with lineage."""
        self._parts.append(data.select([UNIT, ROW]))
        self._loose += data.num_rows
        if self._loose >= _FOLD_ROWS:
            self._fold()

    def taken(self) -> Taken:
        """All rows noted so far."""
        self._fold()
        return self._taken

    def _fold(self) -> None:
        if self._parts:
            for unit, found in spans(pa.concat_tables(self._parts)).items():
                into = self._taken.setdefault(unit, Intervals())
                for start, stop in found:
                    into.add(start, stop)
        self._parts, self._loose = [], 0


def united(parts: Iterable[Taken]) -> dict[int, Intervals]:
    """The rows that are in any of the parts."""
    whole: dict[int, Intervals] = {}
    for part in parts:
        for unit, rows in part.items():
            into = whole.setdefault(unit, Intervals())
            for start, stop in rows:
                into.add(start, stop)
    return whole


def to_json(taken: Taken) -> str:
    """As text that a checkpoint keeps."""
    return json.dumps({str(unit): rows.flat for unit, rows in taken.items()}, separators=(",", ":"))


def from_json(text: str) -> dict[int, Intervals]:
    """The inverse of `to_json`.

    Raises:
        ValueError: it is no such text.
    """
    return {int(unit): Intervals.of(flat) for unit, flat in json.loads(text).items()}


def order(count: int, *, epoch: int, shuffle: bool, seed: int) -> list[int]:
    """The order of so many units in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist() if shuffle else list(range(count))


def left(units: Sequence[Unit], *, epochs: int, shuffle: bool, seed: int, taken: Taken) -> Left:
    """The rows of all epochs that were not taken, in the order in which they are to be given.

    Raises:
        SourceError: more units over all epochs than there are numbers for.
    """
    if len(units) * epochs >= _MOST_UNITS:
        raise SourceError(
            f"{len(units):,} parts of the input, {epochs:,} times each, are more than {_MOST_UNITS:,}; use larger files or row groups, or fewer epochs"
        )
    found: Left = []
    nothing = Intervals()
    for epoch in range(epochs):
        for at in order(len(units), epoch=epoch, shuffle=shuffle, seed=seed):
            unit = replace(units[at], id=epoch * len(units) + at)
            if gaps := taken.get(unit.id, nothing).missing(unit.start, unit.stop):
                found.append((unit, gaps))
    return found


def mixed(data: pa.Table, *, seed: int) -> pa.Table:
    """The rows of a block in an order that `seed` and the block decide."""
    if data.num_rows < 2:
        return data
    first = (data[UNIT][0].as_py(), data[ROW][0].as_py())
    return data.take(pa.array(np.random.default_rng((seed, *first)).permutation(data.num_rows)))
