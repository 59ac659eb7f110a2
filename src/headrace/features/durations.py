"""Durations as they are written: `"30d"`, `"12h"`, `"90s"`, or a `datetime.timedelta`."""

from __future__ import annotations

import datetime as dt
import re

from headrace.errors import DefinitionError

_UNITS = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "min": "minutes", "s": "seconds", "ms": "milliseconds"}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")


def duration(value: str | dt.timedelta, what: str, *, zero: bool = False) -> dt.timedelta:
    """The duration that is written, above 0 or, with `zero`, at least 0; `what` opens the message of a DefinitionError."""
    took = value if isinstance(value, dt.timedelta) else _read(value, what)
    if took < dt.timedelta(0) or (not took and not zero):
        raise DefinitionError(f"{what} must be {'at least' if zero else 'above'} 0, got {value!r}")
    return took


def _read(value: object, what: str) -> dt.timedelta:
    found = _WRITTEN.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[2] not in _UNITS:
        units = ", ".join(f"{short} ({long})" for short, long in _UNITS.items())
        raise DefinitionError(f"{what} must be a number and a unit such as '30d', or a datetime.timedelta, got {value!r}; units are {units}")
    try:
        return dt.timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError:
        raise DefinitionError(f"{what} must be at most {dt.timedelta.max.days} days, got {value!r}") from None


def written(took: dt.timedelta) -> str:
    """The duration as text that `duration` reads, in the largest unit from days down that it is a whole number of."""
    for unit in ("d", "h", "m", "s"):
        whole, rest = divmod(took, dt.timedelta(**{_UNITS[unit]: 1}))
        if not rest:
            return f"{whole}{unit}"
    return f"{took / dt.timedelta(milliseconds=1):g}ms"
