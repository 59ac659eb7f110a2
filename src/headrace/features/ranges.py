"""Questions about many ranges of one array at once: the least or greatest value, the n-th smallest, how many are below a bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.features.blocks import spread
from headrace.features.keys import Ints
from headrace.features.order import Span

Values = npt.NDArray[Any]


def extremes(values: Values, ranges: Sequence[Span], *, pick: np.ufunc) -> list[Values]:
    """`pick`, such as np.minimum, over values[lo:hi] for many ranges in several blocks; 0 for those that are empty.

    Two ranges of a power of two in length, which may overlap, make up any other one. Their answers are doubled in length step
    by step, and only those of one length are kept (a sparse table, made level by level).
    """
    found = [np.zeros(len(lo), values.dtype) for lo, _ in ranges]
    levels = [np.frexp((hi - lo).astype(np.float64))[1] - 1 for lo, hi in ranges]  # of the greatest power of two that is no longer
    last = max(int(of.max(initial=0)) for of in levels)
    for level in range(last + 1):
        of_level = [(out, np.flatnonzero(of == level), *span) for out, of, span in zip(found, levels, ranges, strict=True)]
        spread(partial(_answer, values, 1 << level, pick), of_level)
        if level < last:
            values = pick(values[: -(1 << level)], values[1 << level :])
    return found


def _answer(picked: Values, length: int, pick: np.ufunc, block: tuple[Values, Ints, Ints, Ints]) -> None:
    found, here, lo, hi = block
    found[here] = pick(picked[lo[here]], picked[hi[here] - length])


class Wavelet:
    """Small whole numbers, sorted bit by bit from the highest, with counts: a wavelet matrix (Claude, Navarro and Ordóñez, 2015).

    Building it takes a pass per bit of the greatest number, and so does answering any number of questions at once.
    """

    __slots__ = ("_levels",)

    def __init__(self, numbers: Ints) -> None:
        self._levels: list[tuple[int, npt.NDArray[np.int32]]] = []
        rest: npt.NDArray[np.signedinteger[Any]] = numbers if len(numbers) and int(numbers.max()) >> 31 else numbers.astype(np.int32)
        for bit in reversed(range(int(numbers.max(initial=0)).bit_length())):
            zero = ((rest >> bit) & 1) == 0
            counts = np.zeros(len(rest) + 1, np.int32)
            np.cumsum(zero, out=counts[1:], dtype=np.int32)
            self._levels.append((bit, counts))
            rest = np.concatenate([rest[zero], rest[~zero]])

    def smallest(self, lo: Ints, hi: Ints, n: Ints) -> Ints:
        """Of each range the number that has `n` others before it when sorted; `n` is less than the length of the range."""
        found = np.zeros(len(lo), np.int64)
        for bit, counts in self._levels:
            zeros = int(counts[-1])
            before, until = counts[lo], counts[hi]
            low = until - before
            up = n >= low
            lo = np.where(up, zeros + lo - before, before)
            hi = np.where(up, zeros + hi - until, until)
            n = np.where(up, n - low, n)
            found |= up.astype(np.int64) << bit
        return found

    def below(self, lo: Ints, hi: Ints, bound: Ints) -> Ints:
        """How many numbers of each range are less than `bound`."""
        found = np.zeros(len(lo), np.int64)
        top = 1 << (self._levels[0][0] + 1 if self._levels else 0)
        all_below = bound >= top
        length = hi - lo
        for bit, counts in self._levels:
            zeros = int(counts[-1])
            before, until = counts[lo], counts[hi]
            up = ((bound >> bit) & 1) == 1
            found += np.where(up, until - before, 0)
            lo = np.where(up, zeros + lo - before, before)
            hi = np.where(up, zeros + hi - until, until)
        return np.where(all_below, length, found)
