"""One request to a language model on its way through a door: to a replica, and piece by piece back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from headrace.serving.door.journey import GONE
from headrace.serving.wire import Failure, Question, Said
from headrace.speech import TOKENIZE

if TYPE_CHECKING:
    from headrace.serving.door.exchange import Exchange
    from headrace.serving.door.journey import Journey, Place
    from headrace.serving.watch.speech import Spoken

_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
_UNCACHED = (b"cache-control", b"no-cache")
_OFFERED = (2, 32, 256)
"""After so many pieces the replica is offered to go on by itself: short answers are not worth it, and a client may have been slow before."""


class Talk:
    """A request, and what has come of it so far. `broken` writes the end of a stream that fails after it had begun.

    `begun` says whether a piece of a streamed answer has come, and `first_s` is the time from the request's first byte to it; it and the times
    between pieces that bring tokens are counted in `spoken` as they come, as long as they come through here. `parting` is what the replica says
    of a request that was given up.
    """

    __slots__ = (
        "_began_s", "_broken", "_direct", "_exchange", "_journey", "_last_s", "_pieces", "_said", "_so_far", "_spoken", "_started",
        "_streams", "_waiting", "begun", "first_s", "parting", "question",
    )  # fmt: skip

    def __init__(self, question: Question, exchange: Exchange, *, broken: Callable[[Failure], bytes], spoken: Spoken | None = None) -> None:
        self.question = question
        self._broken = broken
        self.begun = False
        self.first_s: float | None = None
        self.parting: asyncio.Future[Said | None] = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        self._spoken = spoken
        self._said: Said | None = None
        self._so_far = 0, 0, 0
        self._began_s = exchange.began
        self._last_s = 0.0
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: list[bytes] = []
        self._streams = self._direct = False
        self._pieces = 0
        self._journey: Journey | None = None

    @property
    def said(self) -> Said | None:
        """What the replica told at the end, or what the pieces so far have come to, with status 0; None before that."""
        return self._said or (Said(0, *self._so_far) if self.begun else None)

    # For the link

    def part(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int, text: memoryview) -> None:
        """A piece came."""
        now_s, spoken = time.monotonic(), self._spoken
        if not self.begun:
            self.begun = True
            self.first_s = now_s - self._began_s
            self._last_s = now_s
            if spoken is not None:
                spoken.first.add(self.first_s)
            if not self._started.done():
                self._started.set_result(None)
        elif completion_tokens > self._so_far[2]:  # others only say who speaks, or why it ends
            if spoken is not None:
                spoken.gaps.add(now_s - self._last_s)
            self._last_s = now_s
        self._so_far = prompt_tokens, cached_tokens, completion_tokens
        if self._streams:
            self._exchange.pass_on(text)
            self._pieces += 1
            if self._pieces in _OFFERED:
                self._offer()
        else:
            self._waiting.append(bytes(text))

    def ready(self) -> bool:
        """The replica could write the rest itself."""
        self._direct = self._streams and self._exchange.written
        return self._direct

    def ended(self, said: Said | None) -> None:
        """It was given up, and has come to this."""
        if not self.parting.done():
            self.parting.set_result(said)

    # For who answers the client

    async def run(self, journey: Journey, place: Place, body: bytes | memoryview, *headers: tuple[bytes, bytes]) -> tuple[Said, memoryview] | Failure:
        """Ask, and stream what comes in pieces; the outcome, and for an answer that is not streamed its body, which is still to be sent."""
        self._exchange.stop_with_client(journey)
        self._journey = journey
        asking = asyncio.ensure_future(journey.ask(place, body, self))
        try:
            await asyncio.wait((asking, self._started), return_when=asyncio.FIRST_COMPLETED)
            if self.begun:
                await self._exchange.begin(_EVENTS, _UNCACHED, *headers)
                self._streams = True
                if self._waiting:
                    self._exchange.pass_on(b"".join(self._waiting))
            outcome = await asking
        finally:
            asking.cancel()
            self._exchange.watch(None)
        if isinstance(outcome, Failure):
            await self._break_off(outcome)
        else:
            said, self._direct = outcome[0], False  # the replica has given the socket back
            self._said = said
            self._exchange.bytes_out += said.written
            if self.begun:
                if said.status != 200:
                    await self._break_off(failure_of(*outcome))
                else:
                    await self._exchange.send_piece(b"", more=False)
        return outcome

    async def settled(self, *, timeout_s: float) -> Said | None:
        """What a request that was given up had come to; None if nobody says in time."""
        await asyncio.wait((self.parting,), timeout=timeout_s)
        return self.parting.result() if self.parting.done() else None

    def count(self, model: str, status: int, *, read_s: float, now_s: float) -> None:
        """Count what it came to for this model, once it was answered with this status; of one that was given up, the rest once its replica tells it.

        Before `read_s` there was nothing to ask yet, `now_s` is its end: times of the loop.
        """
        spoken, journey = self._spoken, self._journey
        if spoken is None:
            return
        known = self.said or Said(0)
        spoken.used(model, known)
        if status == 200 and known.status == 200 and journey is not None and journey.asked is not None:
            first_s = None if self.first_s is None else self.first_s - (read_s - self._began_s)
            spoken.answered(known, took_s=now_s - read_s, waited_s=journey.asked.waited_s, first_s=first_s)
        if status == GONE.status:
            spoken.cancelled(model, begun=self.begun)

        def parted(parting: asyncio.Future[Said | None]) -> None:
            if (told := parting.result()) is not None:
                spoken.used(model, told, before=known)

        if not known.status:
            self.parting.add_done_callback(parted)

    def _offer(self) -> None:
        """Let the replica write the rest itself, if it is on this machine."""
        hop = self._journey.hop if self._journey is not None else None
        handle = self._exchange.handle
        if hop is not None and hop.link is not None and handle is not None:
            hop.link.hand_over(hop, handle)

    async def _break_off(self, failure: Failure) -> None:
        """End a stream that had begun with what went wrong."""
        if not self.begun or failure is GONE:
            return
        last = self._broken(failure)
        if self._direct:  # the replica may have been in the middle of a piece, which no client takes for a whole one then
            self._exchange.cut_off(last)
        else:
            await self._exchange.send_piece(last, more=False)


def failure_of(said: Said, answer: memoryview) -> Failure:
    """Why an answer that had begun was not finished, as its replica says it."""
    if not answer:
        return Failure(said.status, "deadline_exceeded", "the deadline passed before the answer was complete")
    code, message = orjson.loads(answer)
    return Failure(said.status, code, message)


class Whole:
    """A request whose answer is not streamed."""

    __slots__ = ("begun", "question")

    def __init__(self, question: Question) -> None:
        self.question = question
        self.begun = False

    def part(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int, text: memoryview) -> None:
        """Nothing comes in pieces."""

    def ready(self) -> bool:
        """Nor does the replica write to anybody itself."""
        return False

    def ended(self, said: Said | None) -> None:
        """Nobody asks what one that was given up had come to."""


async def count(journey: Journey, place: Place, body: bytes) -> int | None:
    """How many tokens the prompt of a body has exactly, as a replica counts it; None where none can be asked."""
    outcome = await journey.ask(place, body, Whole(Question(TOKENIZE, 0, 0)))
    if isinstance(outcome, Failure) or outcome[0].status != 200:
        return None
    return int(orjson.loads(outcome[1])["count"])
