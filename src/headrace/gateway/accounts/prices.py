"""What tokens cost: USD per million, by model."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from headrace.errors import AccountsError, listing, nearest
from headrace.gateway.accounts.limits import is_model, usd

MOST_USD_PER_MILLION = 10_000

_KINDS = ("prompt", "cached", "completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """USD per million tokens of one model. `cached` are prompt tokens that the engine had computed before; by default they cost what others do.

    Raises:
        AccountsError: no number from 0 to 10,000 with at most six decimals, or cached tokens that cost more than others.
    """

    prompt: float | Decimal
    completion: float | Decimal
    cached: float | Decimal | None = None
    _picos: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # USD per million tokens with six decimals are whole pico-USD per token, so that sums are exact.
        picos = tuple(
            _pico(self.prompt if value is None else value, kind) for kind, value in zip(_KINDS, (self.prompt, self.cached, self.completion), strict=True)
        )
        if picos[1] > picos[0]:
            # A reservation does not know what will be cached, and must not be below what is booked.
            raise AccountsError(f"cached tokens must not cost more than other prompt tokens ({self.prompt}), got {self.cached}")
        object.__setattr__(self, "_picos", picos)

    def nusd(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> int:
        """What a request costs in nano-USD, rounded up; `cached_tokens` are among `prompt_tokens`."""
        prompt, cached, completion = self._picos
        return -(-(prompt * (prompt_tokens - cached_tokens) + cached * cached_tokens + completion * completion_tokens) // 1000)


class Prices:
    """Prices by model. A model without one costs nothing, and its usage says so: `priced` is false."""

    def __init__(self, prices: Mapping[str, Price] | None = None) -> None:
        self._prices = dict(prices or {})

    @classmethod
    def of(cls, table: Mapping[str, Mapping[str, float | Decimal]], *, where: str = "prices") -> Prices:
        """Prices from a mapping such as `{"small": {"prompt": 0.10, "cached": 0.01, "completion": 0.40}}`.

        Raises:
            AccountsError: a key that is not known, one that is missing, or a value that is no price.
        """
        return cls({model: _price(model, entry, where) for model, entry in table.items()})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Prices:
        """Prices from a TOML file with one table for each model.

            ["Qwen/Qwen3-0.6B"]
            prompt = 0.10      # USD per million tokens
            cached = 0.01
            completion = 0.40

        Raises:
            AccountsError: the file cannot be read, or holds something else.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"), parse_float=Decimal)
        except (OSError, UnicodeDecodeError) as error:
            raise AccountsError(f"the prices in {str(path)!r} cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise AccountsError(f"the file of prices {str(path)!r} is no TOML: {error}") from error
        return cls.of(table, where=repr(str(path)))

    def __contains__(self, model: str) -> bool:
        return model in self._prices

    def nusd(self, model: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> int:
        """What a request costs in nano-USD; 0 for a model without a price."""
        price = self._prices.get(model)
        return price.nusd(prompt_tokens, completion_tokens, cached_tokens) if price is not None else 0


def _price(model: str, entry: Any, where: str) -> Price:
    if not is_model(model):
        raise AccountsError(f"{where}: {model[:80]!r} cannot be a model's name: printable ASCII without spaces, at most 200 characters")
    if not isinstance(entry, Mapping):
        raise AccountsError(f'{where}: {model!r} must be a table of prices, got {entry!r}; a name with dots in it has to be in quotes: ["{model}"]')
    for kind in entry:
        if kind not in _KINDS:
            hint = nearest(kind, _KINDS) or "; a model's name with dots in it has to be in quotes"
            raise AccountsError(f"{where}: {model!r} has no price for {kind!r}, but may have {listing(_KINDS)}{hint}")
    for kind in ("prompt", "completion"):
        if kind not in entry:
            raise AccountsError(f"{where}: {model!r} lacks a price for {kind!r} tokens, in USD per million; write 0 if they cost nothing")
    try:
        return Price(**entry)
    except AccountsError as error:
        raise AccountsError(f"{where}: {model!r}: {error}") from error


def _pico(value: Any, kind: str) -> int:
    usd(value, f"the price of a million {kind} tokens", most=MOST_USD_PER_MILLION)
    pico = Decimal(str(value)) * 10**6
    if pico != int(pico):
        raise AccountsError(f"the price of a million {kind} tokens may have six decimals, got {value}")
    return int(pico)
