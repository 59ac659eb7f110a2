"""Lines of batches, asked of the service's own replicas: as many as leave no other request waiting, within what their owner's key may do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from headrace.errors import AccountsError
from headrace.gateway.accounts.entries import Used
from headrace.gateway.accounts.quotas import HELD_S, Grant, Refusal
from headrace.gateway.batches.lines import Answered, Failed, Lost, Outcome, Retry, request_id
from headrace.gateway.batches.records import Charge, Usage
from headrace.gateway.openai import asked as asking
from headrace.gateway.openai import refusals
from headrace.gateway.openai.files import NOBODY
from headrace.gateway.openai.models import Models, billed_as, length_of, speech
from headrace.gateway.openai.refusals import Refused
from headrace.serving.door.journey import MOVED, Journey
from headrace.serving.door.routing import BROKEN_OFF, CROWDED, NO_ROOM
from headrace.serving.door.talk import Whole, count
from headrace.serving.wire import Failure, Question, Said, Stats

if TYPE_CHECKING:
    from headrace.gateway.accounts.keys import Key
    from headrace.gateway.batches.lines import Line
    from headrace.gateway.openai.asked import Asked
    from headrace.gateway.openai.tills import Till
    from headrace.serving.door.fleet import Version
    from headrace.serving.door.link import Link
    from headrace.serving.door.side import SideDoor
    from headrace.serving.watch.logs import AccessLog

PRIORITY = 2
"""Of lines: what people wait for goes first, at doors, in replicas and in the engine."""

_LINE_S = 1800.0  # for an answer, before it is asked for again; grants outlive it
_AGAIN_S = 1.0  # until a line comes again that nobody can answer at the moment
_PATIENCE_S, _ABSENT_S = 300.0, 10.0  # for a model that is not there to appear, and until a line of it comes again
_BOOKINGS, _BOOKED_S = 30, 2.0  # attempts to book, and the time between them
_LATER = (NO_ROOM, CROWDED, MOVED)  # no replica has begun
_GUILTY = ("deadly_row",)
_REVOKED = Failed("invalid_api_key", "The key of this batch is not valid any more.")


@dataclass(slots=True)
class _Room:
    """How many lines a replica may have, as it told in `stats`; it has refused one when its link has been `busy` until later than that."""

    stats: Stats | None
    busy_until: float
    most: int


class Background:
    """What a worker of batches needs to have lines answered: `send`, `book` and `slots`. Lives on the loop of its door.

    Lines of a model that nobody knows are refused once this has been there for `patience_s`: services behind one address start one after the other.
    """

    def __init__(self, door: SideDoor, *, till: Till | None = None, patience_s: float = _PATIENCE_S) -> None:
        self._door = door
        self._till = till
        self._patient_until = asyncio.get_running_loop().time() + patience_s
        self._models = Models(door.lobby.fleets)
        self._rooms: dict[Link, _Room] = {}
        self._numbers: dict[str, int | None] = {}  # of keys in the accounts, which are the same for ever
        self._short_s: dict[str, float] = {}  # owners whose budget is held by requests under way, until when no other line tries

    def slots(self) -> int:
        """How many lines may be under way.

        A replica tells twice a second how many it would take beside all it has. Once it refuses one, no more go there until it tells again: what
        came in between came from people, and has the room. Where a version has no replica, one line waits for it: then control starts one.
        """
        most = 0
        rooms: dict[Link, _Room] = {}
        for version in [version for fleet in self._door.lobby.fleets() for version in fleet.versions.values()]:
            if version.route.weight > 0 and speech(version):
                links = version.pools[-1].usable
                rooms |= {link: self._room(link) for link in links}
                most += sum(rooms[link].most for link in links) if links else 1
        self._rooms = rooms
        return most

    def _room(self, link: Link) -> _Room:
        busy_until, room = link.busy_until[PRIORITY], self._rooms.get(link)
        if room is None or room.stats is not link.stats:
            figures = (link.stats.engine if link.stats is not None else None) or {}
            return _Room(link.stats, busy_until, len(link.hops) + int(figures.get("background_room", 0)))
        if busy_until > room.busy_until:
            room.busy_until, room.most = busy_until, min(room.most, len(link.hops))
        return room

    async def send(self, line: Line) -> Outcome:
        """Have a line answered; see `batches.run.Engine`."""
        try:
            return await self._send(line)
        except Refused as refused:
            if refused.code == "model_not_found" and asyncio.get_running_loop().time() < self._patient_until:
                return Retry(_ABSENT_S)
            return Retry(_AGAIN_S) if refused.status == 503 else _told(refused.failure)
        except AccountsError:  # they are away
            return Retry(_AGAIN_S)

    async def book(self, charges: Sequence[Charge]) -> None:
        """Book charges in the accounts, each once however often it comes; see `batches.run.Engine`.

        Raises:
            AccountsError: the accounts were away for a minute. The charges are still noted, and come again.
        """
        if self._till is None:
            return
        for left in reversed(range(_BOOKINGS)):
            try:
                await asyncio.gather(*[self._book(charge) for charge in charges])
            except AccountsError:
                if not left:
                    raise
                await asyncio.sleep(_BOOKED_S)
            else:
                return

    async def _book(self, charge: Charge) -> None:
        assert self._till is not None
        teller, usage = self._till.teller, charge.usage
        if charge.owner not in self._numbers:  # a key that was revoked meanwhile still pays for what it was given
            self._numbers[charge.owner] = await teller.number(charge.owner)
        number = self._numbers[charge.owner]
        if number is not None:
            used = Used(prompt_tokens=usage.input_tokens, completion_tokens=usage.output_tokens, cached_tokens=usage.cached_tokens)
            await teller.book(charge.id, key=number, model=charge.model, used=used)

    async def _send(self, line: Line) -> Outcome:
        path, body = line.batch.endpoint, line.body
        found = asking.parse(body)
        name = asking.model_of(found)
        owner = line.batch.owner
        key = None if self._till is None else await self._till.teller.named(owner)
        if key is None and not self._lets_in(owner):
            return _REVOKED
        version = self._models.choose(name, path, None)
        if not version.open and version.waiting():
            return Retry(_AGAIN_S)  # one that waits for a replica is enough, and the others hold up no other model's
        asked = asking.read(path, body, found, length=length_of(version))
        if asked.stream:
            raise Refused("a request of a batch cannot be streamed", "stream")
        allowed = None if key is None else key.limits.models
        model = billed_as(name, version, allowed)
        if allowed is not None and model not in allowed:
            names = ", ".join(map(repr, allowed))
            raise Refused(f"this key may not ask the model {model!r}; ask one of {names}", "model", status=403, code="model_not_allowed")
        if key is None or key.limits.budget_usd is None:
            return await self._ask(line, version, asked, model, key)
        granted = await self._reserve(key, line, version, asked, model)
        if granted is not None and not isinstance(granted, Grant):
            return granted
        answered = False
        try:
            outcome = await self._ask(line, version, asked, model, key)
            answered = isinstance(outcome, Answered) and outcome.usage is not None
        finally:
            if granted is not None and not answered:  # otherwise it is settled when the line is booked
                assert self._till is not None
                self._till.give_back(granted)
        return outcome

    def _lets_in(self, owner: str) -> bool:
        """Whether somebody may ask who has no key in the accounts: with a key of the file, or where no key is asked for."""
        routes = self._door.fleet.routes
        keys = None if routes is None else routes.keys
        return owner in keys.values() if keys is not None else self._till is None

    async def _reserve(self, key: Key, line: Line, version: Version, asked: Asked, model: str) -> Grant | Outcome | None:
        """Set aside of the key's budget what a line may cost at most, or say what becomes of it otherwise; None if it was paid before.

        Limits per minute do not count: they keep a key from crowding out others, which lines cannot.
        """
        now_s = asyncio.get_running_loop().time()
        if (short_s := self._short_s.get(key.name, 0.0) - now_s) > 0:
            return Retry(short_s)
        assert self._till is not None
        name = Charge(line.batch.id, line.batch.owner, model, line.number, Usage()).id
        completion = asked.answer_tokens(line.batch.endpoint, length_of(version))
        reserve = partial(self._till.teller.reserve, key.id, model, max_tokens=completion, id=name, paced=False)
        result = await reserve(prompt_tokens=asked.most_prompt_tokens)
        if isinstance(result, Refusal) and result.reason == "budget":  # it may pass if its prompt is counted exactly
            exact = await count(self._journey(line, asked, priority=0), version.pools[-1], line.body)
            if exact is None:
                return Retry(_AGAIN_S)
            result = await reserve(prompt_tokens=exact)
        if isinstance(result, Grant) or result.reason == "booked":
            return result if isinstance(result, Grant) else None
        if result.reason == "revoked":
            return _REVOKED
        if result.retry_after_s is None or result.retry_after_s > HELD_S:
            return Failed("insufficient_quota" if result.reason == "budget" else "model_not_allowed", result.message)
        self._short_s[key.name] = now_s + result.retry_after_s
        return Retry(result.retry_after_s)

    async def _ask(self, line: Line, version: Version, asked: Asked, model: str, key: Key | None) -> Outcome:
        """Ask a replica."""
        path, pool = line.batch.endpoint, version.pools[-1]
        question = Question(path, PRIORITY, asked.prompt_tokens + asked.answer_tokens(path, length_of(version)))
        door = self._door.lobby.of(version)
        with door.turnstile.passing():
            journey, began_s = self._journey(line, asked), asyncio.get_running_loop().time()
            outcome = await journey.ask(pool, line.body, Whole(question))
        if outcome in _LATER:
            return Retry(max(pool.retry_after_s, _AGAIN_S if outcome is not NO_ROOM else 0.0))
        if door.log is not None:
            logged = key is not None and key.limits.log_prompts
            _note(door.log, line, version, journey, outcome, took_s=asyncio.get_running_loop().time() - began_s, model=asked.model, logged=logged)
        if not isinstance(outcome, Failure):
            said, answer = outcome
            if 200 <= said.status < 300:
                door.retries.earn()
            return _answered(said, bytes(answer), model)
        if outcome is BROKEN_OFF or outcome.code in _GUILTY:  # the replicas that were lost with it took other requests with them
            return Failed("server_error", outcome.message)
        return Lost(outcome.message) if outcome.status >= 500 else _told(outcome)

    @staticmethod
    def _journey(line: Line, asked: Asked, *, priority: int = PRIORITY) -> Journey:
        deadline = asyncio.get_running_loop().time() + _LINE_S
        return Journey(deadline, priority, request_id=request_id(line.batch, line.number), prefix=asked.prefix)


def _note(
    log: AccessLog, line: Line, version: Version, journey: Journey, outcome: tuple[Said, memoryview] | Failure, *, took_s: float, model: str, logged: bool
) -> None:
    """Log what came of a line that replicas were asked."""
    said: Said | None = None
    answer: bytes | memoryview = b""
    if isinstance(outcome, Failure):
        status, error = outcome.status, outcome.code
    else:
        said, answer = outcome
        status, error = said.status, None
    log.request(
        request_id=journey.request_id,
        method="POST",
        path=line.batch.endpoint,
        status=status,
        error=error,
        took_ms=took_s * 1e3,
        version=version.number,
        model=model,
        prompt_tokens=said.prompt_tokens if said is not None else None,
        cached_tokens=said.cached_tokens if said is not None else None,
        completion_tokens=said.completion_tokens if said is not None else None,
        bytes_in=len(line.body),
        bytes_out=len(answer),
        key=line.batch.owner if line.batch.owner != NOBODY else None,
        replica=(journey.asked.replica if journey.asked is not None else "") or None,
        attempts=1 + journey.retries,
        asked=line.body.decode("utf-8", "replace") if logged else None,
    )


def _answered(said: Said, answer: bytes, model: str) -> Outcome:
    if not answer:
        return Lost("the deadline passed before there was an answer")
    if not 200 <= said.status < 300:
        return Answered(said.status, answer)
    return Answered(said.status, answer, Usage(said.prompt_tokens, said.completion_tokens, min(said.cached_tokens, said.prompt_tokens)), model=model)


def _told(failure: Failure) -> Answered:
    """What a client would be told that asked at a door."""
    return Answered(failure.status, refusals.error(failure))
