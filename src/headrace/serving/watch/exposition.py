"""Prometheus' text format: families of series written, read, and those of several processes joined."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Family:
    """Series of one name: their kind, what they mean, and their values as lines."""

    kind: str
    said: str
    lines: list[str] = field(default_factory=list)


class Histogram:
    """Counts by bounds, and their sum. In the text, `each` bounds make one of Prometheus'."""

    __slots__ = ("bounds", "counts", "each", "sum")

    def __init__(self, bounds: tuple[float, ...], *, each: int = 1) -> None:
        self.bounds, self.each = bounds, each
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: npt.ArrayLike) -> None:
        """Count many values at once."""
        many = np.asarray(values, np.float64)
        found = np.bincount(np.searchsorted(self.bounds, many), minlength=len(self.counts))
        self.counts[:] = map(int.__add__, self.counts, found.tolist())
        self.sum += float(many.sum())

    def absorb(self, other: Histogram) -> None:
        """Count all that another one of the same bounds has counted."""
        self.counts[:] = map(int.__add__, self.counts, other.counts)
        self.sum += other.sum

    def lines(self, name: str, labels: str) -> list[str]:
        """Its series."""
        return buckets(name, labels, self.counts, self.sum, bounds=_written(self.bounds[self.each - 1 :: self.each]), each=self.each)


@cache
def _written(bounds: tuple[float, ...]) -> list[str]:
    return [f"{bound:.6g}" for bound in bounds]


def escaped(value: str) -> str:
    """The value of a label as it stands between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def line(name: str, labels: str, value: float) -> str:
    """One series, with a finite value."""
    return f"{name}{{{labels}}} {value}"


def buckets(name: str, labels: str, counts: Sequence[int], total: float, *, bounds: Sequence[str], each: int = 1) -> list[str]:
    """The lines of a histogram: `each` of `counts` make one of `bounds`, and what is left over lies beyond the last. `total` is the sum of all values."""
    lines, below = [], 0
    for at, bound in enumerate(bounds):
        below += sum(counts[at * each : (at + 1) * each])
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {below}')
    number = below + sum(counts[len(bounds) * each :])
    return [*lines, f'{name}_bucket{{{labels},le="+Inf"}} {number}', line(f"{name}_sum", labels, total), f"{name}_count{{{labels}}} {number}"]


def write(families: dict[str, Family]) -> str:
    """The text."""
    return "".join("\n".join([f"# HELP {name} {one.said}", f"# TYPE {name} {one.kind}", *one.lines, ""]) for name, one in families.items() if one.lines)


def join(mine: dict[str, Family], texts: Iterable[str]) -> dict[str, Family]:
    """Families together with those in the texts of other processes.

    Each name is explained once, and a series is taken from the first that has it. Lines that are none, and names that are of another
    kind elsewhere, are left out: one odd process must not make the whole unreadable.
    """
    joined = {name: Family(one.kind, one.said) for name, one in mine.items()}
    series = {name: dict(text.rsplit(" ", 1) for text in one.lines) for name, one in mine.items()}
    for text in texts:
        for name, one in _read(text).items():
            if joined.setdefault(name, Family(one.kind, one.said)).kind == one.kind:
                known = series.setdefault(name, {})
                for labelled in one.lines:
                    labels, value = labelled.rsplit(" ", 1)
                    known.setdefault(labels, value)
    for name, one in joined.items():
        one.lines = [f"{labels} {value}" for labels, value in series.get(name, {}).items()]
    return joined


def _read(text: str) -> dict[str, Family]:
    families: dict[str, Family] = {}
    said, name = "", ""
    for one in text.split("\n"):
        words = one.split(" ", 3)
        if one.startswith("# HELP ") and len(words) == 4:
            said = words[3]
        elif one.startswith("# TYPE ") and len(words) == 4:
            name = words[2]
            families.setdefault(name, Family(words[3], said))
        elif name and one.startswith(name) and not one.startswith("#") and "} " in one and _number(one.rsplit(" ", 1)[1]):
            families[name].lines.append(one)
    return families


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
