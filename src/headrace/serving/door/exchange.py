"""One HTTP request at a door and its answer: the body read within bounds, the answer sent, the client watched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from headrace.serving.door import heads
from headrace.serving.door.journey import EXPIRED, GONE, Journey
from headrace.serving.wire import Failure

MOST_HELD_BYTES = 512 << 20  # of all bodies and answers that a door holds
PIECE_BYTES = 256 << 10  # of a large answer, sent one after the other as the client reads
STALLED_S = 60.0  # for a client to read one
MOST_UNREAD_BYTES = 4 << 20  # of a language model's answer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

FULL = Failure(429, "overloaded", "the service holds as many bytes of requests as it may; try again later")
CLOSE = (b"connection", b"close")

_JSON = (b"content-type", heads.JSON_TYPE)


class Connection(Protocol):
    """What a door knows of a client's connection beside ASGI; the scope has it as `headrace.connection`."""

    on_lost: Callable[[], None] | None
    """Called once when the client has gone."""

    @property
    def whole(self) -> bool:
        """Whether the request's body is there already."""

    @property
    def paused(self) -> bool:
        """Whether the client has not read what was sent before."""

    async def drained(self) -> None:
        """Wait until it has, or has gone."""

    def abort(self) -> None:
        """Close at once."""

    def cut(self, last: bytes) -> None:
        """Send a last piece, as far as the client takes it now, and close the connection, whoever else writes to it."""

    @property
    def handle(self) -> int | None:
        """The client's socket, if another process may write pieces of the answer to it."""

    @property
    def written(self) -> bool:
        """Whether all of the answer so far is with the system."""

    def write_piece(self, piece: bytes | memoryview) -> int:
        """Send a piece of an answer of unknown length, which was begun, at once; how many bytes the client has not read."""


class Memory:
    """How many bytes of bodies and answers a door holds."""

    __slots__ = ("held_bytes",)

    def __init__(self) -> None:
        self.held_bytes = 0

    def fits(self, more_bytes: int) -> bool:
        """Whether there is room for so much more."""
        return self.held_bytes + more_bytes <= MOST_HELD_BYTES


class Exchange:
    """A request and its answer. What it holds of the door's memory is given back by `release`."""

    __slots__ = (
        "_also",
        "_connection",
        "_held_bytes",
        "_memory",
        "_receive",
        "_send",
        "began",
        "bytes_in",
        "bytes_out",
        "found",
        "request_id",
        "scope",
        "status",
        "unread",
    )

    def __init__(self, scope: Message, receive: Receive, send: Send, *, memory: Memory, request_id: str, found: dict[bytes, bytes], began: float) -> None:
        self.scope = scope
        self.found = found
        self.request_id = request_id
        self.began = began
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.unread = True
        self._receive = receive
        self._send = send
        self._memory = memory
        self._held_bytes = 0
        self._also: list[tuple[bytes, bytes]] = []
        self._connection: Connection | None = scope.get("headrace.connection")

    @property
    def whole(self) -> bool:
        """Whether the body is known to be there."""
        return self._connection is not None and self._connection.whole

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Call this when the client has gone; None ends it."""
        if self._connection is not None:
            self._connection.on_lost = on_lost

    def stop_with_client(self, journey: Journey) -> None:
        """End the journey when the client has gone."""
        if self._connection is not None:
            self._connection.on_lost = partial(journey.stop, GONE)

    def hold(self, more_bytes: int) -> None:
        """Count bytes that are held for this request."""
        self._held_bytes += more_bytes
        self._memory.held_bytes += more_bytes

    def release(self) -> None:
        """Nothing is held any more."""
        self._memory.held_bytes -= self._held_bytes
        self._held_bytes = 0

    async def body(self, *, length: int | None, most_bytes: int, until: float, expires: float) -> bytes | Failure:
        """The whole body, or why there is none. Times are of the loop: `until` a body must be there, `expires` the request."""
        if length is not None and length > most_bytes:
            return too_large(most_bytes)
        if not self._memory.fits(length or 0):
            return FULL
        if self.whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return GONE
            data: bytes = message["body"]
            self.bytes_in = len(data)
            self.unread = False
            if len(data) > most_bytes:
                return too_large(most_bytes)
            self.hold(len(data))
            return data
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout_at(min(until, expires)):
                while (piece := await self.piece()) is not None:
                    pieces.append(piece)
                    self.hold(len(piece))
                    if self.bytes_in > most_bytes:
                        return too_large(most_bytes)
                    if not self._memory.fits(0):
                        return FULL
        except TimeoutError:
            return EXPIRED if expires < until else Failure(408, "timeout_reading", f"the body was not there in time; {self.bytes_in} bytes of it came")
        return GONE if self.unread else b"".join(pieces)

    async def piece(self) -> bytes | None:
        """The next piece of the body; None at its end, and when the client has gone: then `unread` stays true."""
        if not self.unread:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        piece: bytes = message["body"]
        self.bytes_in += len(piece)
        self.unread = message.get("more_body", False)
        return piece

    def also(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Send these headers with whatever the answer is."""
        self._also += headers

    async def fail(self, failure: Failure, *more: tuple[bytes, bytes]) -> None:
        """Answer with an error. One who has gone is answered nothing."""
        if failure is GONE:
            self.status = failure.status
            return
        if failure.status == 408 or (self.unread and (failure is EXPIRED or b"expect" in self.found)):
            more = (*more, CLOSE)
        await self.reply(failure.status, heads.failure_body(failure, self.request_id), _JSON, *more)

    async def reply(self, status: int, body: bytes | memoryview, kind: tuple[bytes, bytes], *more: tuple[bytes, bytes]) -> None:
        """Send the answer. A large one is sent piece by piece as the client reads; a client that reads nothing for long is cut off."""
        size = len(body)
        self.status = status
        send = self._send
        headers = [kind, (b"content-length", b"%d" % size), (b"x-request-id", self.request_id.encode()), *self._also, *more]
        await self._read()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if size <= PIECE_BYTES:
            self.bytes_out = size
            await send({"type": "http.response.body", "body": body})
            return
        view = memoryview(body)
        self.hold(size)
        for at in range(0, size, PIECE_BYTES):
            if not await self.send_piece(view[at : at + PIECE_BYTES], more=at + PIECE_BYTES < size):
                return

    async def begin(self, kind: tuple[bytes, bytes], *more: tuple[bytes, bytes]) -> None:
        """Begin an answer of unknown length."""
        self.status = 200
        await self._read()
        await self._send({"type": "http.response.start", "status": 200, "headers": [kind, (b"x-request-id", self.request_id.encode()), *self._also, *more]})

    async def _read(self) -> None:
        """Wait for a client that has not read the answers before this one; one that reads nothing for long is cut off."""
        connection = self._connection
        if connection is None or not connection.paused:
            return
        try:
            async with asyncio.timeout(STALLED_S):
                await connection.drained()
        except TimeoutError:
            connection.abort()  # what is sent after that goes nowhere
            self.status = GONE.status

    async def send_piece(self, piece: bytes | memoryview, *, more: bool = True) -> bool:
        """Send a piece of an answer once the client has read what went before; False if it reads nothing, and has been cut off."""
        self.bytes_out += len(piece)
        try:
            async with asyncio.timeout(STALLED_S):
                await self._send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:
            if self._connection is not None:
                self._connection.abort()
            self.status = GONE.status
            return False
        return True

    def pass_on(self, piece: bytes | memoryview) -> bool:
        """Send a piece of an answer that was begun without waiting for anything; False if the client has not read far too much, and was cut off."""
        connection = self._connection
        assert connection is not None
        self.bytes_out += len(piece)
        if connection.write_piece(piece) > MOST_UNREAD_BYTES:
            connection.abort()
            self.status = GONE.status
            return False
        return True

    @property
    def handle(self) -> int | None:
        """The client's socket, if another process may go on with the answer that was begun."""
        return self._connection.handle if self._connection is not None else None

    @property
    def written(self) -> bool:
        """Whether all of the answer so far is with the system."""
        return self._connection is not None and self._connection.written

    def cut_off(self, last: bytes) -> None:
        """End an answer that another process writes with a last piece, and close the connection."""
        self.bytes_out += len(last)
        if self._connection is not None:
            self._connection.cut(last)


@dataclass(slots=True)
class Ask:
    """A request for rows: its exchange, the path and head, the name of its key, and when it ends (a time of the loop)."""

    exchange: Exchange
    path: str
    head: heads.Head
    key: str | None
    deadline: float


def too_large(most_bytes: int) -> Failure:
    """Why a body of more bytes is refused."""
    return Failure(
        413, "too_large", f"the body has more than {most_bytes:,} bytes, which is the most; send it in parts, or as a stream of {heads.NDJSON_TYPE.decode()}"
    )
