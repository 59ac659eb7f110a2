"""One request to a service, tried until there is an answer, the time is up, or the retry budget is spent.

Pipelines are pure, so that a request may be sent twice. Tried again are lost connections and the statuses 429, 502 and 503, after a pause with
full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter) on top of what `Retry-After` asks for. Time and chance
are given in, so that tests need neither.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import DeadlineError, FailedError, OverloadedError, RowError, ServiceError, UnauthorizedError, UnavailableError

_AGAIN = (429, 502, 503)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_EARNED = 0.1  # tokens a request: in the long run, a tenth of the requests may be sent once more
_MOST_EARNED = 10  # times the reserve


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Lost(Exception):  # noqa: N818  it is no error yet
    """No answer came back. `reached` says whether the service may have begun on the request: a refused connection cost it nothing."""

    def __init__(self, why: str, *, reached: bool) -> None:
        super().__init__(why)
        self.reached = reached


Send = Callable[[float], Awaitable[Answer]]
"""Sends the request once, with so many seconds left; raises `Lost`, or TimeoutError when they are over."""


@dataclass(slots=True)
class Budget:
    """A token bucket that all requests of a client share: each brings a tenth of a token, and each retry that can burden the service takes one."""

    reserve: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.reserve

    def earn(self) -> None:
        """A request is made."""
        self.left = min(self.left + _EARNED, _MOST_EARNED * self.reserve)

    def take(self) -> bool:
        """Whether a retry may be made; if so, it is paid for."""
        if self.left < 1:
            return False
        self.left -= 1
        return True


def _draw(most_s: float) -> float:
    return random.uniform(0, most_s)  # noqa: S311  no secret


@dataclass(frozen=True, slots=True)
class World:
    """Time and chance."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    draw: Callable[[float], float] = _draw


async def exchange(
    send: Send, *, end_s: float, budget: Budget, hedge_s: float | None = None, world: World | None = None, request_id: str = "", where: str = ""
) -> Answer:
    """The first answer that it makes no sense to ask for again, be it good or bad.

    Args:
        end_s: the instant, by `world.now`, until which it is tried.
        hedge_s: after how long without an answer a second attempt starts beside the first; the better answer counts.
        request_id: for the errors.
        where: for the errors, too: the address.

    Raises:
        DeadlineError: the time is up, or the service says so.
        OverloadedError, UnavailableError: what the last attempt came to, when time or budget allow no other.
    """
    world = world or World()
    budget.earn()
    for attempt in itertools.count():
        left_s = end_s - world.now()
        if left_s <= 0:
            raise DeadlineError(f"no answer from {where} in time", 0, "deadline_exceeded", request_id)
        asked_s, burden = 0.0, True
        try:
            answer = await _first(send, left_s, hedge_s, budget)
        except TimeoutError:
            raise DeadlineError(f"no answer from {where} in time", 0, "deadline_exceeded", request_id) from None
        except Lost as lost:
            burden = lost.reached
            error: ServiceError = UnavailableError(f"no answer from {where}: {lost}", 0, "unavailable", request_id)
        else:
            if answer.status not in _AGAIN:
                return answer
            error, asked_s = error_of(answer, request_id), _retry_after_s(answer)
        pause_s = asked_s + world.draw(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
        if world.now() + pause_s >= end_s or (burden and not budget.take()):
            raise error
        await world.sleep(pause_s)
    raise AssertionError


async def _first(send: Send, left_s: float, hedge_s: float | None, budget: Budget) -> Answer:
    """The answer of one attempt, or with `hedge_s` the better one of up to two."""
    if hedge_s is None or hedge_s >= left_s:
        return await send(left_s)
    every = [asyncio.ensure_future(send(left_s))]
    try:
        if not (await asyncio.wait(every, timeout=hedge_s))[0] and budget.take():
            every.append(asyncio.ensure_future(send(left_s - hedge_s)))
        waiting = set(every)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = [one for one in done if one.exception() is None and one.result().status not in _AGAIN]
            if good or not waiting:
                return (good or list(done))[0].result()
    finally:
        for one in every:
            one.cancel()
        await asyncio.gather(*every, return_exceptions=True)


def _retry_after_s(answer: Answer) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", "0")))
    except ValueError:  # an HTTP date, which headrace does not send
        return 1.0


def error_of(answer: Answer, request_id: str, *, first_row: int = 0) -> ServiceError:
    """The error that an answer stands for; rows in its details are counted from `first_row`."""
    try:
        told = json.loads(answer.content)
    except ValueError:  # of something between the service and us
        told = None
    told = told if isinstance(told, Mapping) else {}
    error = told.get("error")
    return error_from(error if isinstance(error, Mapping) else {}, answer.status, str(told.get("request_id") or request_id), first_row=first_row)


def error_from(error: Mapping[str, Any], status: int, request_id: str, *, first_row: int = 0) -> ServiceError:
    """The same from what stands below `error` in a body."""
    code = str(error.get("code", ""))
    details = [_moved(detail, first_row) for detail in error.get("details") or () if isinstance(detail, Mapping)]
    message = str(error.get("message") or f"the service answered with status {status}")
    for detail in details[:1]:
        place, said = _place(detail.get("loc")), str(detail.get("message", ""))
        if said and said not in message:
            message += f": {place + ': ' if place else ''}{said}"
    return (_BY_CODE.get(code) or _BY_STATUS.get(status, ServiceError))(message, status, code, request_id, details)


_BY_CODE: Mapping[str, type[ServiceError]] = {
    "stage_failed": FailedError,
    "invalid_row": RowError,
    "unauthorized": UnauthorizedError,
    "overloaded": OverloadedError,
    "unavailable": UnavailableError,
    "deadline_exceeded": DeadlineError,
}
_BY_STATUS: Mapping[int, type[ServiceError]] = {
    401: UnauthorizedError,
    422: RowError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}


def _moved(detail: Mapping[str, Any], first_row: int) -> Mapping[str, Any]:
    """A detail of a part of the rows, as one of all the rows."""
    place = detail.get("loc")
    if first_row and isinstance(place, Sequence) and len(place) > 1 and place[0] == "rows" and isinstance(place[1], int):
        return {**detail, "loc": ["rows", place[1] + first_row, *place[2:]]}
    return detail


def _place(loc: Any) -> str:
    if not isinstance(loc, Sequence) or isinstance(loc, str):
        return ""
    if len(loc) > 1 and loc[0] == "rows":
        return ", ".join([f"row {loc[1]}", *map(repr, loc[2:])])
    return ", ".join(map(repr, loc))
