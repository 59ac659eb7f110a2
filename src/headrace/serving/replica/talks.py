"""Requests of OpenAI's interface at a replica: which are let into the engine, and how their answers go out, piece by piece.

They live on the engine's own loop, where the replica's sockets are, too: between an engine's step and the write of its tokens no thread
waits for another. What one step brings goes out in one write for each door.
"""

from __future__ import annotations

import array
import asyncio
import dataclasses
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

import orjson

from headrace.errors import EngineLostError
from headrace.serving.bodies.codec import Refused
from headrace.serving.replica.jobs import LEAST_PRIORITY, Busy
from headrace.serving.replica.outlets import Outlet
from headrace.serving.replica.scribe import Scribe
from headrace.serving.wire import ROW_PATHS, Failure, Kind, Question, Said
from headrace.speech import FILLER, RIDER, Reply, Speaker, Spent

EXPIRED = Failure(504, "deadline_exceeded", "the deadline passed before the answer was complete")
LOST = Failure(503, "unavailable", "the engine was lost")
UNWRITTEN = Failure(406, "not_acceptable", "the last stage of this pipeline is no language model that writes text")
BROKEN = Failure(500, "internal", "the request met a mistake in the service; its log says why")
CANCELLED = 499

_OVER = 4.0  # tokens let in, over what the engine has room for: what waits is short of none when others end
_LEAST_S, _MOST_S = 0.05, 30.0  # to ask again in
_RECENT = 64  # ends of requests, from which their rate is read
_SPARE = 8  # of so many places one is kept free of background requests
_CALM_S = 1.0  # after the last better request has ended
_FULL = 0.8  # of the engine's memory for tokens in use: no background requests beyond that
_PATIENCE = 0.5  # of the time a request has, how much of it may pass in waiting


class Connection(Protocol):
    """The connection to the door that asks. `talks` are its requests under way, by their numbers."""

    talks: dict[int, Talk]

    def send(self, kind: Kind, number: int, head: object, body: bytes | memoryview = b"") -> None:
        """Send a frame with the next `flush`."""

    def said(self, number: int, said: Said, body: bytes = b"") -> None:
        """Send the answer, or the end of one that was streamed, with the next `flush`."""

    def refuse(self, number: int, why: Failure | Busy) -> None:
        """Send that there is no answer, with the next `flush`."""

    def flush(self) -> None:
        """Write what was sent."""


def speaker_of(stations: Iterable[Iterable[Any]]) -> Speaker | None:
    """What speaks OpenAI's interface among the objects of the stages, which are set up: the last one that does."""
    speaking = [call for calls in stations for call in calls if hasattr(call, "speaker")]
    speaker: Speaker | None = speaking[-1].speaker() if speaking else None
    return speaker


class Talk:
    """A request under way. A streamed answer goes through its door, or, once that has agreed, by an outlet of its own."""

    __slots__ = (
        "_gaps", "_held", "_last_s", "_outlet", "_own", "_task", "_timed", "_written", "began_s", "begun", "connection", "given_back", "left_s", "number",
        "question", "request_id", "rides", "spent",
    )  # fmt: skip

    def __init__(self, connection: Connection, number: int, question: Question, left_s: float, request_id: str) -> None:
        self.connection, self.number, self.question = connection, number, question
        self.left_s, self.request_id = left_s, request_id
        self.spent = Spent()
        self.began_s = time.perf_counter()
        self._task: asyncio.Task[None] | None = None
        self.begun = self.given_back = self.rides = False
        self._outlet: Outlet | None = None
        self._own = False  # the outlet is written to
        self._gaps, self._last_s, self._timed = array.array("f"), 0.0, 0
        self._written = 0
        self._held: list[bytes] = []  # while the door passes on what came before

    def begin(self, work: Any) -> asyncio.Task[None]:
        """Carry it out."""
        self._task = asyncio.get_running_loop().create_task(work)
        return self._task

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._task is not None:
            self._task.cancel()

    def piece(self, text: bytes) -> bool:
        """Send a piece of the answer; whether it goes through the door."""
        self.begun = True
        if self._own:
            assert self._outlet is not None
            self._outlet.write(text)
            self._written += len(text)
            if self.spent.completion_tokens > self._timed:  # other pieces only say why it ends
                now_s = time.perf_counter()
                self._gaps.append(now_s - self._last_s)
                self._last_s, self._timed = now_s, self.spent.completion_tokens
        elif self._outlet is not None:
            self._held.append(text)
        else:
            self._through_door(text)
            return True
        return False

    def offered(self, handle: int) -> None:
        """The door offers the client's socket."""
        if self._outlet is None:
            self._outlet = Outlet(handle, overfull=self.cancel)
            self.connection.send(Kind.READY, self.number, ())
            self.connection.flush()
        else:
            os.close(handle)

    def go(self, *, alone: bool) -> None:
        """All that was sent before is with the client."""
        held, self._held = b"".join(self._held), []
        outlet = self._outlet
        if outlet is None or self._own:
            return
        if alone:
            self._own, self._last_s, self._timed = True, time.perf_counter(), self.spent.completion_tokens
            if held:
                outlet.write(held)
                self._written += len(held)
        else:
            outlet.close()
            self._outlet = None
            if held:
                self._through_door(held)
                self.connection.flush()

    async def finish(self) -> None:
        """Wait until all that was sent has gone out."""
        if self._outlet is None:
            return
        if self._own:
            await self._outlet.drained()
        else:  # the door has not answered yet
            self.go(alone=False)

    def leave(self) -> None:
        """Give the client's socket back."""
        if self._outlet is not None:
            self._outlet.close()
            self._outlet = None

    def _through_door(self, text: bytes) -> None:
        spent = self.spent
        self.connection.send(Kind.PART, self.number, (spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens), text)

    def give_back(self) -> None:
        """Others go first: it is not computed here."""
        if not self.given_back:
            self.given_back = True
            self.cancel()

    def said(self, status: int) -> Said:
        """What it has come to."""
        spent = self.spent
        took_s = time.perf_counter() - self.began_s
        tokens = spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens
        return Said(status, *tokens, spent.queue_s, min(spent.first_s, took_s), took_s, self._gaps.tobytes(), self._written)


class Talks:
    """All requests of OpenAI's interface of a replica. Lives on the speaker's loop.

    A request is let in while the engine has a free place; beyond that, as long as it can expect to begin before half of its time is over, and
    the tokens of all together are at most `_OVER` times what the engine has room for. Others are refused at once, with the time to ask again.

    Background requests, those of the last class, have nearly all places while nothing better is asked, and none more while better ones wait or
    memory is short. Of an engine that yields, the share `background` of the places is for riders and the others are for fillers, which wait in the
    engine while there are better ones (see `headrace.speech`). Of another, background requests have that share alone while something better is
    asked and shortly after. Those that are too many when a better one comes are given back, the last ones first: whoever asks for them asks again.
    """

    def __init__(self, speaker: Speaker, *, background: float, scribe: Scribe | None = None) -> None:
        self.speaker = speaker
        self._scribe = scribe
        self._under_way: dict[Talk, None] = {}  # in the order in which they came
        self._background = self._riders = 0  # of these, those of the last class; and of those, the ones that step on beside better ones
        self._calm_at = 0.0  # when nothing better will have been asked for a while
        self._names: set[str] = set()
        self._tokens = 0
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._touched: set[Connection] = set()
        bounds = speaker.figures()
        self._places, self._room = int(bounds["sequences"]), int(bounds["capacity"])
        self._beside = max(1, round(background * self._places))  # background requests, while there are better ones
        self._alone = max(1, self._places - self._places // _SPARE)
        self._yields = bool(bounds.get("yields"))

    def figures(self) -> dict[str, float]:
        """The engine's figures, and how many background requests there are, and more it would take. May be called from any thread."""
        return {**self.speaker.figures(), "background": float(self._background), "background_room": float(self._background_room())}

    def take(self, connection: Connection, number: int, question: Question, body: bytes, *, left_s: float, request_id: str) -> None:
        """A request came: let it in, or refuse it."""
        if question.path in ROW_PATHS.values():
            if self._scribe is None:
                connection.refuse(number, UNWRITTEN)
                return
            question = dataclasses.replace(question, tokens=question.tokens + self._scribe.tokens)
        full_s = self._full_s(question, left_s)
        if full_s is not None:
            connection.refuse(number, Busy(full_s))
            return
        while request_id in self._names:  # clients name requests as they like; the engine must not see a name twice
            request_id = f"{request_id}-{number}"
        talk = Talk(connection, number, question, left_s, request_id)
        connection.talks[number] = talk
        self._under_way[talk] = None
        if question.priority == LEAST_PRIORITY:
            self._background += 1
            talk.rides = not self._yields or self._riders < self._beside
            self._riders += talk.rides
        else:
            self._calm_at = math.inf
            self._make_way()
        self._names.add(request_id)
        self._tokens += question.tokens
        talk.begin(self._carry(talk, body)).add_done_callback(lambda task: self._end(talk, task))

    async def _carry(self, talk: Talk, body: bytes) -> None:
        try:
            async with asyncio.timeout(talk.left_s):
                path = talk.question.path
                speak = self._scribe.speak if self._scribe is not None and path in ROW_PATHS.values() else self.speaker.speak
                priority = talk.question.priority if talk.question.priority < LEAST_PRIORITY else RIDER if talk.rides else FILLER
                answer = await speak(path, body, priority=priority, request_id=talk.request_id, spent=talk.spent)
                if isinstance(answer, Reply):
                    talk.connection.said(talk.number, talk.said(answer.status), answer.body)
                else:
                    broken = await self._stream(talk, answer)
                    if broken is None:
                        talk.connection.said(talk.number, talk.said(200))
                    else:
                        talk.connection.said(talk.number, talk.said(broken.status), orjson.dumps((broken.code, broken.message)))
        except Refused as refused:
            talk.connection.refuse(talk.number, refused.failure)
        except TimeoutError:
            talk.connection.said(talk.number, talk.said(EXPIRED.status))
        except EngineLostError:
            talk.connection.refuse(talk.number, LOST)
        except asyncio.CancelledError:  # by who asked, or in favour of others
            self._part(talk)

    async def _stream(self, talk: Talk, answer: AsyncIterator[str]) -> Failure | None:
        """Send an answer as it comes; why it has no end, if it has none."""
        connection, broken = talk.connection, None
        try:
            async with aclosing(answer) as texts:  # type: ignore[type-var]
                try:
                    async for text in texts:
                        if talk.piece(text.encode()):
                            self._touch(connection)
                except Refused as refused:
                    broken = refused.failure
            await talk.finish()
        finally:
            talk.leave()
        return broken

    def _touch(self, connection: Connection) -> None:
        """Have it write what it was given, when all that is ready now has given it."""
        if not self._touched:
            asyncio.get_running_loop().call_soon(self._flush)
        self._touched.add(connection)

    def _flush(self) -> None:
        touched, self._touched = self._touched, set()
        for connection in touched:
            connection.flush()

    def _end(self, talk: Talk, task: asyncio.Task[None]) -> None:
        del self._under_way[talk]
        if talk.question.priority == LEAST_PRIORITY:
            self._background -= 1
            self._riders -= talk.rides
        elif len(self._under_way) == self._background:
            self._calm_at = time.perf_counter() + _CALM_S
        self._names.discard(talk.request_id)
        self._tokens -= talk.question.tokens
        self._ends.append(time.perf_counter())
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error, file=sys.stderr)
            talk.connection.refuse(talk.number, BROKEN)
        elif talk.number in talk.connection.talks:  # cancelled before its first step
            self._part(talk)
        self._touch(talk.connection)

    def _part(self, talk: Talk) -> None:
        """Tell what became of a request that was cancelled."""
        if talk.given_back:
            talk.connection.refuse(talk.number, Busy(_LEAST_S))
        else:
            talk.connection.said(talk.number, talk.said(CANCELLED))

    def _make_way(self) -> None:
        """Give background requests back that are too many beside better ones. One that has begun to answer stays."""
        excess = self._background - self._beside
        if excess > 0 and not (self._yields and self._roomy()):
            last = [talk for talk in reversed(self._under_way) if talk.question.priority == LEAST_PRIORITY and not talk.begun]
            for talk in last[:excess]:
                talk.give_back()

    def _full_s(self, question: Question, left_s: float) -> float | None:
        """How long until there may be room for a request; None if there is."""
        if question.priority == LEAST_PRIORITY:
            return None if self._background_room() > 0 else _LEAST_S
        waiting = len(self._under_way) - self._fillers() - self._places + 1
        if waiting <= 0 and self._fits(question.tokens):
            return None
        wait_s = max(waiting, 1) / self._rate() if self._rate() else 0.0
        if self._fits(question.tokens) and wait_s <= _PATIENCE * left_s and (wait_s or waiting <= self._places):
            return None
        return min(max(wait_s, _LEAST_S), _MOST_S)

    def _fits(self, tokens: int) -> bool:
        """Whether so many tokens more are within bounds. One request alone always is: the engine itself says if it is too long."""
        return not self._under_way or not self._room or self._tokens + tokens <= _OVER * self._room

    def _rate(self) -> float:
        """Requests that end each second; 0 while that is not known."""
        if len(self._ends) < 2:
            return 0.0
        return (len(self._ends) - 1) / max(time.perf_counter() - self._ends[0], 1e-6)

    def _background_room(self) -> int:
        """How many background requests it would take beside what it has."""
        better = len(self._under_way) - self._background
        if better >= self._places:
            return 0  # some of them wait
        most = self._alone if self._yields or (not better and time.perf_counter() >= self._calm_at) else self._beside
        room = min(most - self._background, self._places - len(self._under_way))
        return room if room > 0 and self._roomy() else 0

    def _fillers(self) -> int:
        return self._background - self._riders

    def _roomy(self) -> bool:
        return self.speaker.figures().get("kv_cache", 0.0) < _FULL
