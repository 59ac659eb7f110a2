"""Sums of values over many ranges of one array, exact for whole numbers and as good as exact for floats.

Differences of running sums are fast, but those of floats lose what is small beside what came before, and one infinity spoils all
that follow. So a float is taken apart, without loss, into whole numbers that count units of 2^32, 1, 2^-32 and so on; their
running sums are exact in 64 bits (for up to 2^31 rows, wrapping around in between does no harm), and only the finished sum of a range
is put together as a float again. Its digits are unique, so that it does not depend on the order of the values, nor on others'.
The idea of fixed places for digits is that of reproducible summation (Demmel and Nguyen, 2013).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.features.keys import Ints
from headrace.features.order import Flags

Floats = npt.NDArray[np.float64]

_BITS = 32
_HALF = 1 << (_BITS - 1)
_TOP = 31  # the place of the highest digit: 2^(31 * 32) and up


def running(values: npt.NDArray[np.generic]) -> Ints:
    """Sums of the first 0, 1, 2, ... values, of whole numbers or flags."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:], dtype=np.int64)
    return sums


class WholeSums:
    """Exact sums over ranges of one array of whole numbers."""

    __slots__ = ("_largest", "_sums", "_values")

    def __init__(self, values: Ints) -> None:
        self._values, self._sums = values, running(values)
        self._largest = max(abs(int(values.max(initial=0))), abs(int(values.min(initial=0))))

    def over(self, lo: Ints, hi: Ints) -> tuple[Ints, Flags]:
        """The sums of values[lo:hi] for many ranges, and which of them do not fit into 64 bits."""
        totals = self._sums[hi] - self._sums[lo]
        if self._largest * int((hi - lo).max(initial=0)) < 1 << 63:
            return totals, np.zeros(len(lo), np.bool_)
        upper, lower = running(self._values >> _BITS), running(self._values & ((1 << _BITS) - 1))
        top = upper[hi] - upper[lo] + ((lower[hi] - lower[lo]) >> _BITS)
        return totals, (top < -_HALF) | (top >= _HALF)


class FloatSums:
    """Sums over ranges of one array: within one unit in the last place, independent of the order of values.

    As in IEEE arithmetic a range with NaN, or with both infinities, is NaN, and one with one of them is that one.
    """

    __slots__ = ("_digits", "_odd")

    def __init__(self, values: Floats) -> None:
        finite = np.isfinite(values)
        self._odd = None if finite.all() else [running(flags) for flags in (values == np.inf, values == -np.inf, np.isnan(values))]
        self._digits = _running_digits(values if self._odd is None else np.where(finite, values, 0.0))

    def over(self, lo: Ints, hi: Ints) -> Floats:
        """The sums of values[lo:hi] for many ranges."""
        totals = _put_together({place: sums[hi] - sums[lo] for place, sums in self._digits.items()}, len(lo))
        if self._odd is not None:
            has_up, has_down, has_none = (sums[hi] > sums[lo] for sums in self._odd)
            totals[has_up] = np.inf
            totals[has_down] = -np.inf
            totals[has_none | (has_up & has_down)] = np.nan
        return totals


def _running_digits(values: Floats) -> dict[int, Ints]:
    """The running sums of the values' digits, by their place."""
    digits: dict[int, Ints] = {}
    largest = float(np.abs(values).max(initial=0.0))
    place = min(int(np.frexp(largest)[1]) // _BITS, _TOP)
    rest = values
    while largest and rest.any():
        units = np.trunc(_scaled(rest, -place))
        rest = rest - _scaled(units, place)  # both steps are exact
        digits[place] = running(units)
        place -= 1
    return digits


def _put_together(digits: dict[int, Ints], count: int) -> Floats:
    """So many floats from the sums of their digits."""
    totals, carry = np.zeros(count), np.zeros(count, np.int64)
    place = min(digits, default=_TOP)
    while digits or carry.any():
        digit = digits.pop(place, 0) + carry
        if place == _TOP:  # halved, since the digit alone may be more than there is a float for
            with np.errstate(over="ignore"):
                whole = (totals / 2 + np.ldexp(digit.astype(np.float64), place * _BITS - 1)) * 2
            return np.where(digit == 0, totals, whole)
        carry = (digit + _HALF) >> _BITS
        digit = digit - (carry << _BITS)  # from -2^31 to 2^31 - 1, so that the first digit that is not 0 outweighs all that follow
        totals = totals + np.ldexp(digit.astype(np.float64), place * _BITS)
        place += 1
    return totals


def _scaled(values: Floats, places: int) -> Floats:
    """Values times 2^(32 * places)."""
    exponent = places * _BITS
    return values * 2.0**exponent if abs(exponent) < 1000 else np.ldexp(values, exponent)
