"""Batch rules: how the rows that a worker holds are cut into the slices that a stage is called with.

Pure functions from lengths to row indices; every row is in exactly one slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.errors import DefinitionError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Slices of at most `count` rows, in order."""

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise DefinitionError(f"hr.rows(n) must be a whole number of at least 1, got {self.count!r}")

    def slices(self, lengths: Indices, *, shrink: int = 1) -> Iterator[Indices]:
        """Index arrays over `len(lengths)` rows; `shrink` divides the count (never below one row)."""
        step = max(1, self.count // shrink)
        for start in range(0, len(lengths), step):
            yield np.arange(start, min(start + step, len(lengths)))

    def __str__(self) -> str:
        return f"{self.count} rows"


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
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise DefinitionError(f"hr.tokens(budget) must be a whole number of at least 1, got {self.budget!r}")
        if not isinstance(self.of, str) or not self.of:
            raise DefinitionError(f"hr.tokens(..., of=...) must name the column that is measured, got {self.of!r}")
        if self.bytes_per_token <= 0 or (self.longest is not None and self.longest < 1):
            raise DefinitionError(f"bytes_per_token and longest must be positive, got {self.bytes_per_token}, {self.longest}")

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
