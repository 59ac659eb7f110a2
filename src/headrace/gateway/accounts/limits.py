"""What a key may do: models, rates, money, priority. Every value is checked before it comes near the database."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from headrace.errors import AccountsError, listing, nearest

Priority = Literal["interactive", "normal", "batch"]

NANO = 10**9
"""Money is kept as whole nano-USD (10^-9 USD), so that sums are exact."""

MOST_PER_MINUTE = 10**9
MOST_USD = 10**8
MOST_MODELS = 100

_MODEL = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key may do.

    Attributes:
        models: names of the models that it may ask; None allows all that the gateway serves.
        requests_per_minute: how many requests are admitted in any 60 seconds; None does not limit them.
        tokens_per_minute: how many tokens, prompt and completion together, in any 60 seconds; None does not limit them.
        budget_usd: what may be spent in a calendar month of UTC; None does not limit it, 0 allows only what costs nothing.
        priority: who goes first when there is not room for all.
        log_prompts: whether the owner agrees to prompts and answers being logged; nothing in this package logs them.

    Raises:
        AccountsError: a value that is not allowed.
    """

    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    budget_usd: float | None = None
    priority: Priority = "normal"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.models is not None:
            object.__setattr__(self, "models", _models(self.models))
        for field in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, field)
            if value is not None:
                whole(value, field, least=1, most=MOST_PER_MINUTE, instead="; None is no limit, and a key that is revoked is stopped")
        if self.budget_usd is not None:
            usd(self.budget_usd, "budget_usd", most=MOST_USD)
        if self.priority not in get_args(Priority):
            allowed = get_args(Priority)
            raise AccountsError(f"priority must be one of {listing(allowed)}, got {self.priority!r}{nearest(str(self.priority), allowed)}")
        if not isinstance(self.log_prompts, bool):
            raise AccountsError(f"log_prompts must be True or False, got {self.log_prompts!r}")

    @property
    def budget_nusd(self) -> int | None:
        """The budget in nano-USD."""
        return None if self.budget_usd is None else round(Decimal(str(self.budget_usd)) * NANO)

    def changed(self, **changes: Any) -> Limits:
        """These limits with some of them changed.

        Raises:
            AccountsError: there is no such limit, or the value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise AccountsError(f"a key has no limit {name!r}; it has {listing(known)}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)


def whole(value: Any, what: str, *, least: int = 0, most: int, instead: str = "") -> None:
    """Raise AccountsError unless `value` is a whole number from `least` to `most`; `instead` is the fix to offer."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise AccountsError(f"{what} must be a whole number from {least:,} to {most:,}, got {value!r}{instead}")


def usd(value: Any, what: str, *, most: int) -> None:
    """Raise AccountsError unless `value` is a sum of money from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value) or not 0 <= value <= most:
        raise AccountsError(f"{what} must be a number of USD from 0 to {most:,}, got {value!r}")


def is_model(name: Any) -> bool:
    """Whether this can be the name of a model: printable ASCII without spaces, at most 200 characters."""
    return isinstance(name, str) and _MODEL.fullmatch(name) is not None


def _models(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise AccountsError(f"models must be a list of names, got the text {names!r}; write [{names!r}]")
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        if not is_model(name):
            raise AccountsError(f"{str(name)[:80]!r} cannot be a model's name: printable ASCII without spaces, at most 200 characters")
    if not 1 <= len(unique) <= MOST_MODELS:
        raise AccountsError(f"models must name 1 to {MOST_MODELS} models, got {len(unique)}; leave it out to allow all")
    return unique
