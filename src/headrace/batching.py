"""Batch rules: how the rows that a worker holds are cut into the slices that a stage is called with.

Pure functions from lengths to row indices; every row is in exactly one slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.errors import DefinitionError, check_number

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Slices of at most `count` rows, in order."""

    count: int

    def __post_init__(self) -> None:
        check_number(self.count, "hr.rows(n)", whole=True)

    def slices(self, lengths: Indices, *, shrink: int = 1) -> Iterator[Indices]:
        """Index arrays over `len(lengths)` rows; `shrink` divides the count (never below one row)."""
        step = max(1, self.count // shrink)
        for start in range(0, len(lengths), step):
            yield np.arange(start, min(start + step, len(lengths)))

    def __str__(self) -> str:
        return f"{self.count} row" + ("s" if self.count != 1 else "")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Slices of rows of like length whose padded size, rows x longest row, is at most `budget` tokens.

    A row longer than the budget is a slice of its own. Text is measured without a tokenizer: a token is taken to be
    `bytes_per_token` bytes of UTF-8. `longest` is the length at which the model cuts a row, if it does.
    """

    budget: int
    of: str
    bytes_per_token: float = 4.0
    longest: int | None = None

    def __post_init__(self) -> None:
        check_number(self.budget, "hr.tokens(budget)", whole=True)
        check_number(self.bytes_per_token, "hr.tokens(bytes_per_token=...)")
        if self.longest is not None:
            check_number(self.longest, "hr.tokens(longest=...)", whole=True)
        if not isinstance(self.of, str) or not self.of:
            raise DefinitionError(f"hr.tokens(..., of=...) must name the column that is measured, got {self.of!r}")

    def slices(self, lengths: Indices, *, shrink: int = 1) -> Iterator[Indices]:
        """Index arrays in order of falling length, so that the slice that needs most memory comes first."""
        budget = max(1, self.budget // shrink)
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            count = max(1, budget // max(1, int(lengths[order[start]])))
            yield order[start : start + count]
            start += count

    def __str__(self) -> str:
        return f"{self.budget:,} tokens of {self.of}"


BatchRule = Rows | Tokens


def rows(count: int) -> Rows:
    """The simple rule: at most `count` rows a call."""
    return Rows(count)


def tokens(budget: int, *, of: str, bytes_per_token: float = 4.0, longest: int | None = None) -> Tokens:
    """At most `budget` tokens a call, padding included, measured on column `of` (text, or vectors of token ids)."""
    return Tokens(budget, of, bytes_per_token, longest)
