"""Aggregates: what of a key's events in a window becomes one value. They are specs; `headrace.features.windows` computes them.

The names are those of SQL, and hide Python's own in this module.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.columns import from_arrow
from headrace.errors import DefinitionError, WiringError
from headrace.features.durations import duration, written

_NUMBERS = ("sum", "mean", "quantile")
_SORTED = ("str", "bytes", "bool", "int", "float", "datetime", "date")


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One aggregate over one window; `hr.features.count` and its companions make it.

    Attributes:
        kind: `count`, `sum`, `mean`, `min`, `max`, `last`, `distinct` or `quantile`.
        column: the column of the events that it reads; None where events themselves are counted.
        over: how far back the window reaches; None for all that is known.
        delay: how late an event is known after it happened; None for the view's own delay.
        default: the value where there is none; 0 for counts.
        q: which quantile, from 0 to 1.
    """

    kind: str
    column: str | None = None
    over: dt.timedelta | None = None
    delay: dt.timedelta | None = None
    default: Any = None
    q: float | None = None

    def type_over(self, column: pa.DataType | None, what: str) -> pa.DataType:
        """The Arrow type of the feature, over a column of that type; `what` opens the message of a WiringError.

        `count` and `distinct` give int64; `mean` and `quantile` float64; `sum` int64 of whole numbers and float64 of others; `min`,
        `max` and `last` the column's own type, and so does `mean` of vectors.

        Raises:
            WiringError: there is no such aggregate of that type, or the default does not fit it.
        """
        if column is None or self.kind == "count":
            return pa.int64()
        kind = from_arrow(column).kind
        vectors = self.kind == "mean" and kind == "vector" and pa.types.is_fixed_size_list(column)
        if self.kind in _NUMBERS and kind not in ("int", "float") and not vectors:
            numbers = "numbers, or of vectors of one length" if self.kind == "mean" else "numbers"
            raise WiringError(f"{what}: {self.kind} is of {numbers}, but column {self.column!r} is {column}; convert it in the view's pipeline")
        if self.kind in ("min", "max", "distinct") and kind not in _SORTED:
            raise WiringError(f"{what}: there is no {self.kind} of column {self.column!r}, which is {column}; there is one of {', '.join(_SORTED)}")
        plain = column.value_type if pa.types.is_dictionary(column) else column
        if self.kind == "distinct":
            return pa.int64()
        if self.kind in ("mean", "quantile") and not vectors:
            found = pa.float64()
        elif self.kind == "sum":
            found = pa.int64() if kind == "int" else pa.float64()
        else:
            found = plain
        if self.default is not None:
            self.default_as(found, what)
        return found

    def default_as(self, type: pa.DataType, what: str) -> pa.Scalar:
        """The default as a value of that Arrow type.

        Raises:
            WiringError: it is none.
        """
        try:
            return pa.scalar(self.default, type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise WiringError(f"{what}: default={self.default!r} is no value of type {type}, which the feature has: {error}") from error

    def __str__(self) -> str:
        given = [self.column] if self.column is not None else []
        if self.q is not None:
            given.append(f"{self.q:g}")
        given.append("over=" + ("all" if self.over is None else written(self.over)))
        if self.delay is not None:
            given.append(f"delay={written(self.delay)}")
        return f"{self.kind}({', '.join(given)})"


def _feature(kind: str, column: str | None, over: str | dt.timedelta, delay: str | dt.timedelta | None, **more: Any) -> Feature:
    what = f"hr.features.{kind}"
    if column is not None and (not isinstance(column, str) or not column):
        raise DefinitionError(f"{what} is of a column, given by its name, such as hr.features.{kind}('price'); got {column!r}")
    reach = None if isinstance(over, str) and over.strip() == "all" else duration(over, f"{what}: over, when not 'all',")
    late = None if delay is None else duration(delay, f"{what}: delay", zero=True)
    return Feature(kind=kind, column=column, over=reach, delay=late, **more)


def _of_column(kind: str, column: str, over: str | dt.timedelta, delay: str | dt.timedelta | None, **more: Any) -> Feature:
    if column is None:
        raise DefinitionError(f"hr.features.{kind} is of a column, given by its name; got None")
    return _feature(kind, column, over, delay, **more)


def count(column: str | None = None, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None) -> Feature:
    """How many events, or how many that have a value in `column`: int64, 0 where there are none.

    `over` is how far back the window reaches (`"30d"`, `"12h"`, a timedelta, or `"all"`), `delay` how late these events are known
    if not as late as the view says. It is the same for all aggregates.
    """
    return _feature("count", column, over, delay, default=0)


def distinct(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None) -> Feature:
    """How many different values of `column`: int64, exact, 0 where there are none."""
    return _of_column("distinct", column, over, delay, default=0)


def sum(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The sum of `column`: int64 of whole numbers, float64 of others; `default` where there are no values."""
    return _of_column("sum", column, over, delay, default=default)


def mean(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The mean of `column`: float64, of vectors of one length (`hr.Vector(n)`) their mean vector, of the same type; `default` where there are no values."""
    return _of_column("mean", column, over, delay, default=default)


def min(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The least value of `column`, of the column's type; `default` where there are no values."""
    return _of_column("min", column, over, delay, default=default)


def max(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The greatest value of `column`, of the column's type; `default` where there are no values."""
    return _of_column("max", column, over, delay, default=default)


def last(column: str, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The value of `column` in the newest event that has one, of the column's type; of several at that instant, the greatest.

    `default` where there are no values. A column of any type will do, a vector, say. The column's name alone, as a feature, is
    `last` over all that is known.
    """
    return _of_column("last", column, over, delay, default=default)


def quantile(column: str, q: float, *, over: str | dt.timedelta = "all", delay: str | dt.timedelta | None = None, default: Any = None) -> Feature:
    """The `q`-quantile of `column`, from 0 to 1: float64, exact, linear between neighbours; `default` where there are no values."""
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 <= q <= 1:
        raise DefinitionError(f"hr.features.quantile: q must be a number from 0 to 1, such as 0.5 for the median, got {q!r}")
    return _of_column("quantile", column, over, delay, default=default, q=float(q))
