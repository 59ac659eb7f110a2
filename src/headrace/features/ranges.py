"""Questions about many ranges of one array at once: the least or greatest value, the n-th smallest, how many are below a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.features.order import Ints

Values = npt.NDArray[Any]


def extremes(values: Values, lo: Ints, hi: Ints, *, pick: np.ufunc) -> Values:
    """`pick`, such as np.minimum, over values[lo:hi] for many ranges, none of them empty.

    Two ranges of a power of two in length, which may overlap, make up any other one. Their answers are doubled in length step
    by step, and only those of one length are kept (a sparse table, made level by level).
    """
    found = np.empty(len(lo), values.dtype)
    levels = np.frexp((hi - lo).astype(np.float64))[1] - 1  # of the greatest power of two that is no longer than the range
    picked = values
    for level in range(int(levels.max(initial=0)) + 1):
        here = np.flatnonzero(levels == level)
        found[here] = pick(picked[lo[here]], picked[hi[here] - (1 << level)])
        picked = pick(picked[: -(1 << level)], picked[1 << level :])
    return found


class Wavelet:
    """Small whole numbers, sorted bit by bit from the highest, with counts: a wavelet matrix (Claude, Navarro and Ordóñez, 2015).

    Building it takes a pass per bit of the greatest number, and so does answering any number of questions at once.
    """

    __slots__ = ("_levels",)

    def __init__(self, numbers: Ints) -> None:
        self._levels: list[tuple[int, npt.NDArray[np.int32]]] = []
        rest = numbers
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
