"""A request on its way through the groups of a version: what it asks, when it must end, and what became of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from headrace.serving.wire import Content, Done, Failure, Question, Said

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace.serving.watch.traces import Span

EXPIRED = Failure(504, "deadline_exceeded", "the request's deadline passed before there was an answer")
GONE = Failure(499, "client_closed", "the client closed the connection before there was an answer")
MOVED = Failure(503, "unavailable", "the version that was to answer is no longer served")

_order = itertools.count()


class Place(Protocol):
    """Where a group computes: the pool of its replicas."""

    @property
    def group(self) -> str:
        """The group's name."""

    def submit(self, hop: Hop) -> None:
        """Take a request. Its outcome comes to the hop."""


class Carrier(Protocol):
    """What a request is under way on: the connection to a replica."""

    def cancel(self, hop: Hop) -> None:
        """Nobody waits for this request any more."""

    def hand_over(self, hop: Hop, handle: int) -> None:
        """Offer the replica a client's socket, so that it writes the rest of an answer itself."""


@dataclass(frozen=True, slots=True)
class Leg:
    """What one group did with a request: its figures, by which replica, and at which attempt."""

    group: str
    done: Done
    replica: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a version answered: the last group's body, and what each group did for it."""

    body: memoryview
    legs: tuple[Leg, ...]

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self.legs[-1].done.rows


@dataclass(slots=True, eq=False)
class Journey:
    """A request on its way.

    `deadline` is a time of the loop. One that is `patient` waits while all replicas are busy instead of being shed;
    one that is a `shadow` neither waits nor is tried twice. Requests of the same `prefix` go to the same replica where that has room.
    `asked` is its hop at a language model, also when that has ended.
    """

    deadline: float
    priority: int = 1
    trace: str | None = None
    span: Span | None = None
    request_id: str = ""
    prefix: int | None = None
    patient: bool = False
    shadow: bool = False
    stopped: Failure | None = None
    hop: Hop | None = None
    asked: Hop | None = None
    retries: int = 0

    def stop(self, failure: Failure) -> None:
        """End the journey now, wherever it is: nobody waits for it any more."""
        if self.stopped is None:
            self.stopped = failure
            if self.hop is not None:
                self.hop.withdraw(failure)

    async def through(self, pools: Sequence[Place], body: bytes | memoryview, *, content: Content, accept: Content) -> Answer | Failure:
        """Go through the groups one after the other, with Arrow between them; returns when the deadline is over at the latest."""
        last = len(pools) - 1
        legs: list[Leg] = []
        span = self.span
        timer = asyncio.get_running_loop().call_at(self.deadline, self.stop, EXPIRED)
        try:
            for at, pool in enumerate(pools):
                if self.stopped is not None:
                    return self.stopped
                if at:
                    self.patient = True  # work was done for it, which is not thrown away
                hop = self.hop = Hop(self, body, content, accept if at == last else Content.ARROW)
                sent_s = span.offset_s() if span is not None else 0.0
                pool.submit(hop)
                outcome = await hop.future
                self.hop = None
                if isinstance(outcome, Failure):
                    if span is not None:
                        span.group(pool.group, sent_s, None, attempt=hop.attempts, replica=hop.replica, error=outcome.code)
                    return outcome
                done, body = outcome
                assert isinstance(done, Done)
                legs.append(Leg(pool.group, done, hop.replica, hop.attempts))
                if span is not None:
                    span.group(pool.group, sent_s, done, attempt=hop.attempts, replica=hop.replica)
                content = Content.ARROW
        finally:
            timer.cancel()
            if self.hop is not None:  # the task was cancelled
                self.hop.withdraw(GONE)
        return Answer(memoryview(body), tuple(legs))

    async def ask(self, place: Place, body: bytes | memoryview, speaking: Speaking) -> tuple[Said, memoryview] | Failure:
        """Ask a language model; pieces of a streamed answer go to `speaking` meanwhile. Returns when the deadline is over at the latest."""
        if self.stopped is not None:
            return self.stopped
        timer = asyncio.get_running_loop().call_at(self.deadline, self.stop, EXPIRED)
        now_s = time.monotonic()
        hop = self.hop = self.asked = Hop(self, body, Content.JSON, Content.JSON, speaking=speaking, came_s=now_s, sent_s=now_s)
        span = self.span
        begun_s = span.offset_s() if span is not None else 0.0
        try:
            place.submit(hop)
            outcome = await hop.future
            self.hop = None
        finally:
            timer.cancel()
            if self.hop is not None:  # the task was cancelled
                self.hop.withdraw(GONE)
        if isinstance(outcome, Failure):
            if span is not None:
                span.talk(place.group, begun_s, None, attempt=hop.attempts, replica=hop.replica, error=outcome.code)
            return outcome
        said, answer = outcome
        assert isinstance(said, Said)
        if span is not None:
            span.talk(place.group, begun_s, said, waited_s=hop.waited_s, attempt=hop.attempts, replica=hop.replica)
        return said, answer


class Speaking(Protocol):
    """What a request of OpenAI's interface is to a hop: what is asked, and where pieces of its answer go."""

    question: Question
    begun: bool
    """Whether a piece of the answer has come: then no other replica can go on with it."""

    def part(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int, text: memoryview, /) -> None:
        """A piece came, and these are the tokens so far."""

    def ready(self) -> bool:
        """The replica has sent its last piece, and could write the rest itself; whether it may: if all before is with the client."""

    def ended(self, said: Said | None) -> None:
        """A request that was cancelled has come to this; None if nobody can say."""


@dataclass(slots=True, eq=False)
class Hop:
    """A request at one group, from when it is to be computed there until it is known what came of it.

    `deaths` counts the replicas that died with it on board, not counting those that had not begun on it though it was sent `alone`;
    `hangs` those that were given up meanwhile. `twin` is the same request at another replica, sent while this one took far too long; of the
    two, one may be `dropped`. One that has `speaking` is answered with `Said`; `came_s` and `sent_s` are when it came to the group and was last sent
    to a replica, by `time.monotonic`.
    """

    journey: Journey
    body: bytes | memoryview
    content: Content
    accept: Content
    link: Carrier | None = None
    number: int = 0
    replica: str = ""
    alone: bool = False
    started: bool = False
    attempts: int = 0
    refusals: int = 0
    deaths: int = 0
    hangs: int = 0
    twin: Hop | None = None
    speaking: Speaking | None = None
    dropped: bool = False
    came_s: float = 0.0
    sent_s: float = 0.0
    order: int = field(default_factory=_order.__next__)
    future: asyncio.Future[tuple[Done | Said, memoryview] | Failure] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def waited_s(self) -> float:
        """How long it took until a replica had room for it."""
        return self.sent_s - self.came_s

    def drop(self) -> bool:
        """Leave it to its twin, if there is one that is still at it; whether there is."""
        twin = self.twin
        self.dropped = twin is not None and not twin.dropped and not twin.failed
        return self.dropped

    @property
    def failed(self) -> bool:
        """Whether it ended without an answer. One that has its answer has it also before anybody was told."""
        return self.future.done() and (self.future.cancelled() or isinstance(self.future.result(), Failure))

    def settle(self, outcome: tuple[Done | Said, memoryview] | Failure) -> None:
        """Say what came of it. What is said later is not heard."""
        self.link = None
        if not self.future.done():
            self.future.set_result(outcome)

    def withdraw(self, outcome: tuple[Done | Said, memoryview] | Failure) -> None:
        """Settle it otherwise, and tell the replica that computes it, if any, to stop."""
        link = self.link
        if link is not None:
            link.cancel(self)
        self.settle(outcome)
