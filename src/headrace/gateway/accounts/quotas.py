"""May this request run? A pure decision from a key's limits and its meter; the database only keeps the meter from one decision to the next."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Literal

from headrace.gateway.accounts.limits import NANO, Limits
from headrace.gateway.accounts.window import WINDOW_S, Window

HELD_S = 1.0
"""When to ask again if only what is held for requests under way stands against it: they give back what they do not use."""

Reason = Literal["requests", "tokens", "budget", "model", "revoked", "booked"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Limits per minute and what is left of them; None where there is no limit.

    `reset_*_s` is how long until all of it is there again if nothing more is asked.
    """

    limit_requests: int | None = None
    limit_tokens: int | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    reset_requests_s: float = 0.0
    reset_tokens_s: float = 0.0

    def headers(self) -> dict[str, str]:
        """The headers that OpenAI's clients know; none for what has no limit."""
        headers = {}
        for what, limit, remaining, reset_s in (
            ("requests", self.limit_requests, self.remaining_requests, self.reset_requests_s),
            ("tokens", self.limit_tokens, self.remaining_tokens, self.reset_tokens_s),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(remaining)
                headers[f"x-ratelimit-reset-{what}"] = _duration(reset_s)
        return headers


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request would use at most, in tokens and nano-USD."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    nusd: int

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Grant:
    """A request may run; its reservation waits to be settled or released under `id`.

    `second`, `day` and `nusd` say where and with how much it was counted; `expires` is when it is settled as if all of it had been used.
    """

    id: str
    key: int
    ask: Ask
    second: int
    day: str
    expires: float
    rates: Rates = Rates()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request may not run.

    Attributes:
        reason: what stands against it; `booked`: its id was booked already.
        message: the same for whoever asked.
        retry_after_s: when it is worth another try, if others do not take what gets free; None if it can never pass as it is.
        rates: limits per minute and what is left of them.
    """

    reason: Reason
    message: str
    retry_after_s: float | None = None
    rates: Rates = Rates()


@dataclass(slots=True)
class Meter:
    """What a key has used: the last minute, and of one month the money that was spent and that which is held by reservations."""

    window: Window
    month: str
    spent_nusd: int
    held_nusd: int

    def turn(self, day: str) -> str:
        """Begin the month of a day, if it is a new one; what is returned is the day to count on.

        A clock that is behind does not bring back the month before, whose money was counted: it counts on the first day of this one.
        """
        if day[:7] > self.month:
            self.month, self.spent_nusd, self.held_nusd = day[:7], 0, 0
        return max(day, f"{self.month}-01")

    def pay(self, day: str, *, spent_nusd: int = 0, held_nusd: int = 0) -> None:
        """Add to the money, if that day's month is still the one that is counted."""
        if day.startswith(self.month):
            self.spent_nusd += spent_nusd
            self.held_nusd += held_nusd

    def rates(self, limits: Limits, now: float) -> Rates:
        """Limits and what is left, at a time that the window has advanced to."""
        window, requests, tokens = self.window, limits.requests_per_minute, limits.tokens_per_minute
        return Rates(
            requests,
            tokens,
            None if requests is None else max(requests - window.requests, 0),
            None if tokens is None else max(tokens - window.tokens, 0),
            0.0 if requests is None else window.wait_s(now, requests=window.requests),
            0.0 if tokens is None else window.wait_s(now, tokens=window.tokens),
        )


def refusal(limits: Limits, meter: Meter, ask: Ask, *, now: float) -> Refusal | None:
    """Why a request may not run, or None if it may. `meter` is at `now`, and is not changed."""
    if limits.models is not None and ask.model not in limits.models:
        return Refusal("model", f"this key may not ask the model {ask.model!r}; ask one of {', '.join(map(repr, limits.models))}")
    if (never := _too_large(limits, ask)) is not None:
        return never
    against: list[Refusal] = []
    window, requests, tokens = meter.window, limits.requests_per_minute, limits.tokens_per_minute
    if requests is not None and window.requests >= requests:
        wait_s = window.wait_s(now, requests=window.requests + 1 - requests)
        against.append(Refusal("requests", f"this key's {requests:,} requests of {WINDOW_S} seconds are used up", wait_s))
    if tokens is not None and (over := window.tokens + ask.tokens - tokens) > 0:
        left = max(tokens - window.tokens, 0)
        message = f"the request may take {ask.tokens:,} tokens, and of this key's {tokens:,} of {WINDOW_S} seconds {left:,} are left"
        against.append(Refusal("tokens", message, window.wait_s(now, tokens=over)))
    budget_nusd = limits.budget_nusd
    if budget_nusd is not None and meter.spent_nusd + meter.held_nusd + ask.nusd > budget_nusd:
        left_usd = max(budget_nusd - meter.spent_nusd - meter.held_nusd, 0) / NANO
        message = f"the request may cost {ask.nusd / NANO:.6f} USD, and of this key's {limits.budget_usd:,} USD of {meter.month} {left_usd:.6f} are left"
        passes_soon = meter.spent_nusd + ask.nusd <= budget_nusd
        against.append(Refusal("budget", message, HELD_S if passes_soon else _next_month(meter.month) - now))
    # All of it has to pass: whoever waits for one limit only to be refused by the next asks in vain.
    return max(against, key=lambda each: each.retry_after_s or 0.0, default=None)


def _too_large(limits: Limits, ask: Ask) -> Refusal | None:
    """Why no amount of waiting lets a request pass, or None."""
    if limits.tokens_per_minute is not None and ask.tokens > limits.tokens_per_minute:
        message = f"the request may take {ask.tokens:,} tokens, more than this key's whole limit of {limits.tokens_per_minute:,} a minute"
        return Refusal("tokens", f"{message}: it can never pass; make the prompt or max_tokens smaller")
    if limits.budget_nusd is not None and ask.nusd > limits.budget_nusd:
        message = f"the request may cost {ask.nusd / NANO:.6f} USD, more than this key's whole budget of {limits.budget_usd:,} USD a month"
        return Refusal("budget", f"{message}: it can never pass; make the prompt or max_tokens smaller")
    return None


def day_of(now: float) -> str:
    """The day of a Unix time in UTC, `2026-01-31`; its first seven characters are the month."""
    return dt.datetime.fromtimestamp(now, dt.UTC).date().isoformat()


def _next_month(month: str) -> float:
    year, number = map(int, month.split("-"))
    return dt.datetime(year + number // 12, number % 12 + 1, 1, tzinfo=dt.UTC).timestamp()


def _duration(seconds: float) -> str:
    """As OpenAI writes them: `17ms`, `1s`, `1m1s`. Rounded up, so that whoever waits that long has waited long enough."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
