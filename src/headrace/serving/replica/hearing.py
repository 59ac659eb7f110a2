"""The replica's end of a connection to a front door."""

from __future__ import annotations

import array
import asyncio
import dataclasses
import fcntl
import hmac
import os
import socket
import termios
import threading
import time
from collections.abc import Callable
from typing import Protocol, cast

from headrace.serving.replica.jobs import LEAST_PRIORITY, Answer, Busy, Job
from headrace.serving.replica.outlets import Channel
from headrace.serving.replica.talks import Talk
from headrace.serving.wire import Content, Decoder, Failure, Frame, Kind, Question, Said, Stats, encode

_HIGH_BYTES = 4 << 20  # of answers that a door has not taken: from there on nothing more is read from it
_DEAF_S = 30.0  # a door that takes no answers for so long is cut off
_UNKNOWN_S, _UNKNOWN_BYTES = 5.0, 1024  # how long, and for how much, who has not named the token is listened to
_TOLD_S = 2.0  # a door that does not take even this for so long is cut off, too

_REFUSED = (ValueError, TypeError, AttributeError)  # what a frame that makes no sense raises


class Owner(Protocol):
    """The replica. `token` is what a door must name before anything else, "" if it need not."""

    token: str

    def take(self, job: Job, body: memoryview, content: Content) -> None:
        """A request came. It ends with `Connection.answer`."""

    def ask(self, connection: Connection, number: int, question: Question, body: bytes, left_s: float, request_id: str) -> None:
        """A request of OpenAI's interface came. It ends with `Connection.said`, or `Connection.refuse`."""

    def channel(self, key: str) -> Channel | None:
        """The Unix socket of the door that has told this key."""

    def taken(self) -> None:
        """All requests that came at once were given to `take`."""

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more."""

    def stats(self) -> Stats:
        """What it is doing."""

    def opened(self, connection: Connection) -> None:
        """A door has connected."""

    def closed(self, connection: Connection) -> None:
        """The connection is gone."""


class Connection(asyncio.Protocol):
    """A connection to a door, and the requests that came over it; lives on the replica's loop.

    A door that sends what is no frame, or does not name the replica's token first, is cut off. What is sent within one step is written at once.
    """

    def __init__(self, owner: Owner) -> None:
        self.jobs: dict[int, Job] = {}
        self.talks: dict[int, Talk] = {}
        self.channel: Channel | None = None
        self.open = False
        self._owner = owner
        self._decoder = Decoder()
        self._out: list[bytes | memoryview] = []
        self._pinged = False
        self._deaf: asyncio.TimerHandle | None = None
        self._known = not owner.token
        self._unknown: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio has it."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.transport.set_write_buffer_limits(high=_HIGH_BYTES)
        self.open = True
        if self._known:
            self._owner.opened(self)
        else:
            self._unknown = asyncio.get_running_loop().call_later(_UNKNOWN_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        self.open = False
        for timer in (self._deaf, self._unknown):
            if timer is not None:
                timer.cancel()
        jobs = list(self.jobs.values())
        self.jobs.clear()
        self._owner.cancel(jobs)
        for talk in list(self.talks.values()):
            talk.cancel()
        self.talks.clear()
        if self.channel is not None:
            self.channel.close()
        self._owner.closed(self)

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        try:
            for frame in self._decoder.feed(data):
                self._hear(frame)
            if not self._known and self._decoder.pending > _UNKNOWN_BYTES:
                raise ValueError("a stranger that begins a large frame")
        except _REFUSED:
            self.transport.abort()
        self._owner.taken()
        if self._pinged:
            self._pinged = False
            self.pong()
        self.flush()

    def pause_writing(self) -> None:
        """As asyncio has it."""
        self.transport.pause_reading()
        self._deaf = asyncio.get_running_loop().call_later(_DEAF_S, self.transport.abort)

    def resume_writing(self) -> None:
        """As asyncio has it."""
        if self._deaf is not None:
            self._deaf.cancel()
            self._deaf = None
        if self.open:
            self.transport.resume_reading()

    def send(self, kind: Kind, number: int, head: object, body: bytes | memoryview = b"") -> None:
        """Send a frame with the next `flush`."""
        self._out += encode(kind, number, head, body)

    def flush(self) -> None:
        """Write what was sent."""
        if self._out:
            out, self._out = self._out, []
            if self.open:
                self.transport.writelines(out)

    def pong(self) -> None:
        """Tell what the replica is doing."""
        stats = self._owner.stats()
        self.send(Kind.PONG, 0, {name: getattr(stats, name) for name in Stats.__dataclass_fields__})

    def answer(self, job: Job, answer: Answer) -> bool:
        """Send what became of a request; false if nobody waits for it any more."""
        if self.jobs.get(job.number) is not job:
            return False
        del self.jobs[job.number]
        if isinstance(answer, Failure):
            self.send(Kind.FAIL, job.number, dataclasses.astuple(answer))
        elif isinstance(answer, Busy):
            self.send(Kind.BUSY, job.number, (answer.retry_after_s,))
        else:
            self.send(Kind.DONE, job.number, (job.rows, job.queue_s, job.wait_s, job.compute_s, job.batch_rows), answer)
        return True

    def said(self, number: int, said: Said, body: bytes = b"") -> None:
        """Send the answer to a request of OpenAI's interface, or the end of one that was streamed, with the next `flush`."""
        self.talks.pop(number, None)
        self.send(Kind.SAID, number, dataclasses.astuple(said), body)

    def refuse(self, number: int, why: Failure | Busy) -> None:
        """Send that a request of OpenAI's interface has no answer."""
        self.talks.pop(number, None)
        if isinstance(why, Failure):
            self.send(Kind.FAIL, number, dataclasses.astuple(why))
        else:
            self.send(Kind.BUSY, number, (why.retry_after_s,))

    def start(self, job: Job, told: threading.Event, until_s: float | None = None) -> None:
        """Say that a computation begins, and set the event as soon as the door's machine has it, whatever becomes of this process."""
        now_s = time.perf_counter()
        if until_s is None:
            until_s = now_s + _TOLD_S
            self.send(Kind.STARTED, job.number, ())
            self.flush()
        if self.open and now_s > until_s:
            self.transport.abort()
        if not self.open or now_s > until_s or self._all_arrived():
            told.set()
        else:
            asyncio.get_running_loop().call_later(0.001, self.start, job, told, until_s)

    def written(self) -> bool:
        """Whether all that was sent is with the system."""
        return not self.open or not self.transport.get_write_buffer_size()

    def _all_arrived(self) -> bool:
        if self.transport.get_write_buffer_size():
            return False
        pending = array.array("i", [0])
        with_system: socket.socket = self.transport.get_extra_info("socket")
        fcntl.ioctl(with_system.fileno(), termios.TIOCOUTQ, pending)  # bytes that the other side has not acknowledged
        return not pending[0]

    def _hear(self, frame: Frame) -> None:
        if not self._known:
            (token,) = frame.head
            if frame.kind is not Kind.HELLO or not hmac.compare_digest(token.encode(), self._owner.token.encode()):
                raise ValueError("a stranger")
            assert self._unknown is not None
            self._unknown.cancel()
            self._known = True
            self._owner.opened(self)
        elif (take := _TAKES.get(frame.kind)) is None:
            raise ValueError(f"a door does not send {frame.kind.name}")
        else:
            take(self, frame)

    def _hear_work(self, frame: Frame) -> None:
        content, accept, left_s, priority, alone, _, _ = frame.head
        self._check_number(frame.number)
        now_s = time.perf_counter()
        job = Job(self, frame.number, len(frame.body), Content(accept), min(max(int(priority), 0), LEAST_PRIORITY), bool(alone), arrived_s=now_s)
        if left_s is not None:
            job.deadline_s = now_s + float(left_s)
        self.jobs[frame.number] = job
        self._owner.take(job, frame.body, Content(content))

    def _hear_ask(self, frame: Frame) -> None:
        path, left_s, priority, tokens, request_id, _ = frame.head
        self._check_number(frame.number)
        question = Question(str(path), min(max(int(priority), 0), LEAST_PRIORITY), int(tokens))
        self._owner.ask(self, frame.number, question, bytes(frame.body), float(left_s), str(request_id))

    def _hear_cancel(self, frame: Frame) -> None:
        if frame.number in self.jobs:
            self._owner.cancel([self.jobs.pop(frame.number)])
        elif (talk := self.talks.get(frame.number)) is not None:
            talk.cancel()

    def _hear_ping(self, _: Frame) -> None:
        self._pinged = True

    def _hear_beside(self, frame: Frame) -> None:
        (key,) = frame.head
        self.channel = self._owner.channel(str(key))

    def _hear_offer(self, frame: Frame) -> None:
        handle = None if self.channel is None else self.channel.take(frame.number)
        talk = self.talks.get(frame.number)
        if talk is not None and handle is not None:
            talk.offered(handle)
        elif handle is not None:
            os.close(handle)

    def _hear_go(self, frame: Frame) -> None:
        (alone,) = frame.head
        if (talk := self.talks.get(frame.number)) is not None:
            talk.go(alone=bool(alone))

    def _check_number(self, number: int) -> None:
        if number in self.jobs or number in self.talks:
            raise ValueError(f"two requests of the number {number}")


_TAKES: dict[Kind, Callable[[Connection, Frame], None]] = {
    Kind.WORK: Connection._hear_work,  # noqa: SLF001 - of this module
    Kind.ASK: Connection._hear_ask,  # noqa: SLF001
    Kind.CANCEL: Connection._hear_cancel,  # noqa: SLF001
    Kind.PING: Connection._hear_ping,  # noqa: SLF001
    Kind.BESIDE: Connection._hear_beside,  # noqa: SLF001
    Kind.OFFER: Connection._hear_offer,  # noqa: SLF001
    Kind.GO: Connection._hear_go,  # noqa: SLF001
}
