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

from headrace.features.order import Flags, Ints

Floats = npt.NDArray[np.float64]

_BITS = 32
_HALF = 1 << (_BITS - 1)
_TOP = 31  # the place of the highest digit: 2^(31 * 32) and up


def running(values: npt.NDArray[np.generic]) -> Ints:
    """Sums of the first 0, 1, 2, ... values, of whole numbers or flags."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:], dtype=np.int64)
    return sums


def whole_sums(values: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Flags]:
    """The sums of values[lo:hi] for many ranges, and which of them do not fit into 64 bits."""
    sums = running(values)
    totals = sums[hi] - sums[lo]
    longest = int((hi - lo).max(initial=0))
    if max(abs(int(values.max(initial=0))), abs(int(values.min(initial=0)))) * longest < 1 << 63:
        return totals, np.zeros(len(lo), np.bool_)
    upper, lower = running(values >> _BITS), running(values & ((1 << _BITS) - 1))
    top = upper[hi] - upper[lo] + ((lower[hi] - lower[lo]) >> _BITS)
    return totals, (top < -_HALF) | (top >= _HALF)


def float_sums(values: Floats, lo: Ints, hi: Ints) -> Floats:
    """The sums of values[lo:hi] for many ranges: within one unit in the last place, independent of the order of values.

    As in IEEE arithmetic a range with NaN, or with both infinities, is NaN, and one with one of them is that one.
    """
    finite = np.isfinite(values)
    if finite.all():
        return _finite_sums(values, lo, hi)
    totals = _finite_sums(np.where(finite, values, 0.0), lo, hi)
    up, down, none = (running(flags) for flags in (values == np.inf, values == -np.inf, np.isnan(values)))
    has_up, has_down, has_none = (sums[hi] > sums[lo] for sums in (up, down, none))
    totals[has_up] = np.inf
    totals[has_down] = -np.inf
    totals[has_none | (has_up & has_down)] = np.nan
    return totals


def _finite_sums(values: Floats, lo: Ints, hi: Ints) -> Floats:
    digits: dict[int, Ints] = {}
    largest = float(np.abs(values).max(initial=0.0))
    place = min(int(np.frexp(largest)[1]) // _BITS, _TOP)
    rest = values
    while largest and rest.any():
        units = np.trunc(_scaled(rest, -place))
        rest = rest - _scaled(units, place)  # both steps are exact
        sums = running(units)
        digits[place] = sums[hi] - sums[lo]
        place -= 1
    totals, carry = np.zeros(len(lo)), np.zeros(len(lo), np.int64)
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
