"""A front door's connection to one replica, and the requests that are under way on it."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from headrace.serving.door.handover import Handover
from headrace.serving.wire import Decoder, Done, Failure, Frame, Kind, Said, Stats, encode

if TYPE_CHECKING:
    from headrace.serving.door.journey import Hop, Speaking
    from headrace.serving.routes import Endpoint

CONNECT_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts to connect
LEAST_BUSY_S, MOST_BUSY_S = 0.005, 0.25
CLASSES = 3  # of priority

_PING = encode(Kind.PING)


class Owner(Protocol):
    """Who is told what happens on a link."""

    def changed(self, link: Link) -> None:
        """It may be used now, or no longer."""

    def answered(self, link: Link, done: Done | Said) -> None:
        """A request of its was computed."""

    def refused(self, link: Link, hop: Hop, retry_after_s: float) -> None:
        """Its replica has no room for this request."""

    def lost(self, link: Link, hops: list[Hop]) -> None:
        """The connection is gone, and these were under way."""


class Link(asyncio.Protocol):
    """The connection to one replica. It is made again when it is lost, until `retire` is called.

    What is sent within one turn of the loop is written at once. `elsewhere` is how many requests of other doors the replica had
    when it was last heard of, `unanswered` how many PINGs went out since; `local` says whether it is on this machine. A `slow` replica is
    at a call that takes far too long; one that is `hung` is given up.
    """

    __slots__ = (
        "_busy_hops", "_closed", "_decoder", "_ending", "_handover",
        "_loop", "_next", "_out", "_owner", "_task", "_transport", "busy_until", "clogged", "draining", "elsewhere",
        "endpoint", "hops", "hung", "local", "ready", "retired", "seed", "slow", "stats", "unanswered",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, owner: Owner) -> None:
        self.endpoint = endpoint
        self.seed = int.from_bytes(hashlib.blake2b(endpoint.replica.encode(), digest_size=8).digest())
        self.hops: dict[int, Hop] = {}
        self.stats: Stats | None = None
        self.busy_until = [0.0] * CLASSES
        self.elsewhere = 0
        self.unanswered = 0
        self.ready = self.draining = self.slow = self.hung = self.retired = self.clogged = self.local = False
        self._busy_hops = 0
        self._handover: Handover | None = None
        self._ending: dict[int, Speaking] = {}  # cancelled, and not yet told what they have come to
        self._next = 1
        self._out: list[bytes | memoryview] = []
        self._owner = owner
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[None] | None = None
        self._task = self._loop.create_task(self._keep())

    @property
    def usable(self) -> bool:
        """Whether requests may be sent to it."""
        return self.ready and not (self.draining or self.slow or self.hung or self.retired)

    def load(self) -> int:
        """How many requests the replica has, as far as this door knows."""
        return len(self.hops) + self.elsewhere + (1_000 if self.clogged else 0)

    def send(self, hop: Hop) -> None:
        """Send a request. Its outcome comes to the hop, or to the owner."""
        journey = hop.journey
        left_s = journey.deadline - self._loop.time()
        number = hop.number = self._next
        self._next = number + 1
        hop.link = self
        hop.replica = self.endpoint.replica
        hop.started = False
        hop.attempts += 1
        self.hops[number] = hop
        if (speaking := hop.speaking) is not None:
            asked = speaking.question
            hop.sent_s = time.monotonic()
            ask = (asked.path, max(left_s, 0.0), asked.priority, asked.tokens, journey.request_id, journey.trace)
            self._write(encode(Kind.ASK, number, ask, hop.body))
            return
        head = (hop.content, hop.accept, left_s if left_s > 0 else 0.0, journey.priority, hop.alone, journey.trace, journey.request_id)
        self._write(encode(Kind.WORK, number, head, hop.body))

    def cancel(self, hop: Hop) -> None:
        """Nobody waits for this request any more."""
        if self.hops.pop(hop.number, None) is not None:
            hop.link = None
            self._write(encode(Kind.CANCEL, hop.number))
            if hop.speaking is not None:
                self._ending[hop.number] = hop.speaking

    def hand_over(self, hop: Hop, handle: int) -> None:
        """Offer the replica a client's socket, so that it writes the rest of an answer itself. `Speaking.ready` is asked when it can."""
        if self._handover is not None and self._handover.send(hop.number, handle):
            self._write(encode(Kind.OFFER, hop.number))

    def take(self) -> list[Hop]:
        """All requests under way, which are cancelled here in order to be sent elsewhere."""
        hops = list(self.hops.values())
        for hop in hops:
            self.cancel(hop)
        return hops

    def ping(self) -> None:
        """Ask the replica whether it is there."""
        if self._transport is not None:
            self.unanswered += 1
            self._write(_PING)

    def turn_away(self, priority: int, until: float) -> None:
        """Requests of this class of priority, and of those after it, have no room there until then."""
        self._busy_hops = len(self.hops)
        for each in range(priority, CLASSES):
            self.busy_until[each] = until

    def retire(self) -> None:
        """Send nothing more; close when what is under way is done."""
        self.retired = True
        if not self.hops:
            self.close()

    def close(self) -> None:
        """Close now. What is still under way is told to the owner as lost."""
        self.retired = True
        self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for a sign of life: a connection alone is made by the kernel, even to a process that hangs."""
        if self.retired:
            cast(asyncio.Transport, transport).abort()
            return
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._decoder = Decoder()
        self._out = []
        self.stats = None
        self.unanswered = 0
        here, there = (transport.get_extra_info(name) for name in ("sockname", "peername"))
        self.local = bool(here and there and here[0] == there[0])
        if self.endpoint.token:
            self._write(encode(Kind.HELLO, head=(self.endpoint.token,)))
        if self.local and self.endpoint.beside:
            self._handover = Handover.connect(self.endpoint.beside, self.endpoint.token)
            if self._handover is not None:
                self._write(encode(Kind.BESIDE, head=(self._handover.key,)))
        self.ping()

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand everything that was under way back to the owner."""
        self._transport = None
        self._out = []
        if self._handover is not None:
            self._handover.close()
            self._handover = None
        self.ready = self.draining = self.slow = self.hung = self.clogged = False
        self.busy_until = [0.0] * CLASSES
        self.elsewhere = self.unanswered = 0
        hops = list(self.hops.values())
        self.hops.clear()
        for hop in hops:
            hop.link = None
        for speaking in self._ending.values():
            speaking.ended(None)
        self._ending.clear()
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)
        self._owner.lost(self, hops)

    def data_received(self, data: bytes) -> None:
        """Take what the replica says."""
        self.unanswered = 0
        try:
            for frame in self._decoder.feed(data):
                self._heard(frame)
        except (ValueError, TypeError):  # it does not speak our language: whatever it has is sent elsewhere
            if self._transport is not None:
                self._transport.abort()
            return
        if self.retired and not self.hops:
            self.close()

    def eof_received(self) -> None:
        """Close."""

    def pause_writing(self) -> None:
        """The replica takes in less than is sent."""
        self.clogged = True

    def resume_writing(self) -> None:
        """It has taken it in."""
        self.clogged = False

    def _heard(self, frame: Frame) -> None:
        take = _TAKES.get(frame.kind)
        if take is None:
            raise ValueError(f"a replica does not send {frame.kind.name}")
        take(self, frame)

    def _heard_drain(self, _: Frame) -> None:
        self.draining = True
        self._owner.changed(self)

    def _heard_started(self, frame: Frame) -> None:
        if (hop := self.hops.get(frame.number)) is not None:
            hop.started = True

    def _heard_busy(self, frame: Frame) -> None:
        (retry_after_s,) = frame.head
        if (hop := self.hops.pop(frame.number, None)) is not None:
            hop.link = None
            self._owner.refused(self, hop, float(retry_after_s))
        else:
            self._parted(frame.number, Said(0))  # it was never begun

    def _heard_fail(self, frame: Frame) -> None:
        status, code, message, details = frame.head
        if (hop := self.hops.pop(frame.number, None)) is not None:
            hop.settle(Failure(status, code, message, tuple(details)))
        else:
            self._parted(frame.number, None)

    def _heard_part(self, frame: Frame) -> None:
        if (hop := self.hops.get(frame.number)) is not None and hop.speaking is not None:
            prompt_tokens, cached_tokens, completion_tokens = frame.head
            hop.speaking.part(prompt_tokens, cached_tokens, completion_tokens, frame.body)

    def _heard_ready(self, frame: Frame) -> None:
        hop = self.hops.get(frame.number)
        if hop is not None and hop.speaking is not None:
            self._write(encode(Kind.GO, frame.number, (hop.speaking.ready(),)))

    def _heard_said(self, frame: Frame) -> None:
        said = Said(*frame.head)
        if (hop := self.hops.pop(frame.number, None)) is not None:
            hop.settle((said, frame.body))
            self._eased()
            self._owner.answered(self, said)
        else:
            self._parted(frame.number, said)

    def _parted(self, number: int, said: Said | None) -> None:
        """A request that was cancelled has come to this."""
        if (speaking := self._ending.pop(number, None)) is not None:
            speaking.ended(said)

    def _heard_done(self, frame: Frame) -> None:
        done = Done(*frame.head)
        if (hop := self.hops.pop(frame.number, None)) is not None:
            hop.settle((done, frame.body))
        self._eased()
        self._owner.answered(self, done)

    def _eased(self) -> None:
        if self.busy_until[-1] and len(self.hops) * 2 <= self._busy_hops:
            self.busy_until = [0.0] * CLASSES  # half of what kept it busy is done

    def _heard_pong(self, frame: Frame) -> None:
        self.stats = stats = Stats(**frame.head)
        self.elsewhere = max(0, stats.in_flight - len(self.hops))
        if not self.ready or stats.draining != self.draining:
            self.ready = True
            self.draining = stats.draining
            self._owner.changed(self)

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += pieces

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(out)

    async def _keep(self) -> None:
        """Hold a connection for as long as the replica is served from."""
        pause_s = FIRST_PAUSE_S
        while not self.retired:
            closed = self._closed = self._loop.create_future()
            try:
                async with asyncio.timeout(CONNECT_S):
                    await self._loop.create_connection(lambda: self, self.endpoint.host, self.endpoint.port)
                connected = True
            except (OSError, TimeoutError):  # a replica that comes back is found again, one that does not is taken off the routes
                connected = False
            if connected:
                await closed
                if self.stats is not None:
                    pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


_TAKES: dict[Kind, Callable[[Link, Frame], None]] = {
    Kind.DONE: Link._heard_done,  # noqa: SLF001 - of this module
    Kind.PART: Link._heard_part,  # noqa: SLF001
    Kind.READY: Link._heard_ready,  # noqa: SLF001
    Kind.SAID: Link._heard_said,  # noqa: SLF001
    Kind.PONG: Link._heard_pong,  # noqa: SLF001
    Kind.DRAIN: Link._heard_drain,  # noqa: SLF001
    Kind.STARTED: Link._heard_started,  # noqa: SLF001
    Kind.BUSY: Link._heard_busy,  # noqa: SLF001
    Kind.FAIL: Link._heard_fail,  # noqa: SLF001
}
