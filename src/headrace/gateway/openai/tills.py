"""Limits and accounts at a door: what a request may use is set aside before it is asked, and what it used is booked when it has ended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import AccountsError
from headrace.gateway.accounts.entries import Used
from headrace.gateway.accounts.quotas import Grant, Refusal
from headrace.serving.door.callers import WRONG_KEY, Caller
from headrace.serving.door.heads import PRIORITIES
from headrace.serving.wire import Failure, Said

if TYPE_CHECKING:
    from headrace.gateway.accounts.keys import Key
    from headrace.gateway.accounts.teller import Teller
    from headrace.serving.door.talk import Talk

AWAY = Failure(503, "unavailable", "the accounts cannot be asked at the moment")

_CODES = {"budget": "insufficient_quota", "model": "model_not_allowed", "revoked": "unauthorized", "booked": "overloaded"}
_STATUS = {"model": 403, "revoked": 401}
_PARTING_S = 2.0  # for a replica to say what a request that was given up had come to
_Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request may be asked; these are the headers of its answer."""

    grant: Grant
    headers: tuple[_Header, ...]


@dataclass(frozen=True, slots=True)
class Declined:
    """A request may not; with the headers that say when it may. `tight` is whether it might if its prompt were counted exactly."""

    failure: Failure
    headers: tuple[_Header, ...]
    tight: bool


class Till:
    """What a door asks its teller. Lives on the door's loop."""

    def __init__(self, teller: Teller) -> None:
        self.teller = teller
        self._tasks: set[asyncio.Task[None]] = set()

    async def doorman(self, presented: bytes) -> Caller | Failure:
        """Who presents a key; see `callers.Doorman`."""
        try:
            key = await self.teller.find(presented)
        except AccountsError:
            return AWAY
        return WRONG_KEY if key is None else caller_of(key)

    async def admit(self, caller: Caller, model: str, *, prompt_tokens: int, completion_tokens: int) -> Admitted | Declined:
        """Set aside what a request may use at most."""
        if caller.account is None:
            raise ValueError("only keys of the accounts are counted")
        try:
            result = await self.teller.reserve(caller.account, model, prompt_tokens=prompt_tokens, max_tokens=completion_tokens)
        except AccountsError:
            return Declined(AWAY, ((b"retry-after", b"1"),), tight=False)
        rates = tuple((name.encode(), value.encode()) for name, value in result.rates.headers().items())
        return Admitted(result, rates) if isinstance(result, Grant) else _declined(result, rates)

    def settle(self, admitted: Admitted, talk: Talk | None, *, status: int, took_s: float) -> None:
        """Book what a request has come to; done in the background, and by `close` at the latest."""
        self._start(self._settle(admitted.grant, talk, status, took_s))

    def give_back(self, grant: Grant) -> None:
        """Undo a reservation of which nothing was used; done in the background, and by `close` at the latest."""
        self._start(self._give_back(grant))

    async def close(self) -> None:
        """Wait until all is booked."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _settle(self, grant: Grant, talk: Talk | None, status: int, took_s: float) -> None:
        if talk is None or (talk.said is None and status in (429, 503)):  # no replica has begun on it
            await self.teller.release(grant)
            return
        said = talk.said
        if said is None or not said.status:  # given up: the replica says what it had come to
            said = await talk.settled(timeout_s=_PARTING_S) or said or Said(status, prompt_tokens=0)
        used = Used(
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
            cached_tokens=min(said.cached_tokens, said.prompt_tokens),
            status=status,
            queue_s=said.queue_s,
            ttft_s=talk.first_s if talk.first_s is not None else said.first_s,
            took_s=took_s,
        )
        await self.teller.settle(grant, used)

    async def _give_back(self, grant: Grant) -> None:
        await self.teller.release(grant)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def caller_of(key: Key) -> Caller:
    """What a key may ask."""
    limits = key.limits
    counted = limits.models is not None or limits.tokens_per_minute is not None or limits.requests_per_minute is not None or limits.budget_usd is not None
    return Caller(key.name, PRIORITIES[limits.priority.encode()], limits.models, not counted, limits.log_prompts, key.id)


def _declined(refusal: Refusal, rates: tuple[_Header, ...]) -> Declined:
    never = refusal.retry_after_s is None
    again: list[_Header] = []
    if refusal.retry_after_s is not None:
        again = [(b"retry-after", b"%d" % max(1, math.ceil(refusal.retry_after_s))), (b"retry-after-ms", b"%d" % math.ceil(refusal.retry_after_s * 1e3))]
    elif refusal.reason in ("tokens", "budget"):
        again = [(b"x-should-retry", b"false")]  # OpenAI's clients would, which does not help
    code = _CODES.get(refusal.reason, "overloaded")
    status = _STATUS.get(refusal.reason, 429)
    return Declined(Failure(status, code, refusal.message), (*rates, *again), refusal.reason in ("tokens", "budget") or never)
