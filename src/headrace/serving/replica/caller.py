"""A caller of one replica: asks over a socket, as a door does, without choosing among replicas or asking again."""

from __future__ import annotations

import asyncio
import itertools
from typing import cast

from headrace.serving.replica.jobs import Busy
from headrace.serving.wire import Decoder, Failure, Frame, Kind, Work, encode

LOST = Failure(503, "unavailable", "the replica ended before it had answered")


class Caller(asyncio.Protocol):
    """Asks the replica that listens at an address. It connects when it is first asked, and again when the connection is lost; lives on one loop."""

    def __init__(self, host: str, port: int, token: str = "") -> None:
        self._address, self._token = (host, port), token
        self._asked: dict[int, asyncio.Future[memoryview | Failure | Busy]] = {}
        self._numbers = itertools.count(1)
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._connecting = asyncio.Lock()

    async def ask(self, work: Work, body: bytes | memoryview) -> memoryview | Failure | Busy:
        """What becomes of a request. One that is cancelled is cancelled there, too."""
        async with self._connecting:
            if self._transport is None:
                try:
                    await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
                except OSError:
                    return LOST
        number = next(self._numbers)
        future: asyncio.Future[memoryview | Failure | Busy] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        head = (work.content, work.accept, work.left_s, work.priority, work.alone, work.trace, work.request_id)
        self._send(encode(Kind.WORK, number, head, body))
        try:
            return await future
        finally:
            if self._asked.pop(number, None) is not None and not future.done():
                self._send(encode(Kind.CANCEL, number))

    def close(self) -> None:
        """Hang up. What was asked has no answer then."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio has it."""
        self._transport, self._decoder = cast(asyncio.Transport, transport), Decoder()  # uvloop's is no subclass
        if self._token:
            self._send(encode(Kind.HELLO, head=(self._token,)))

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        self._transport = None
        for future in self._asked.values():
            if not future.done():
                future.set_result(LOST)

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        for frame in self._decoder.feed(data):
            future = self._asked.get(frame.number)
            if future is not None and not future.done() and (outcome := _outcome(frame)) is not None:
                future.set_result(outcome)

    def _send(self, pieces: list[bytes | memoryview]) -> None:
        if self._transport is not None:
            self._transport.writelines(pieces)


def _outcome(frame: Frame) -> memoryview | Failure | Busy | None:
    """What an answer says; None if the frame is none."""
    if frame.kind is Kind.DONE:
        return frame.body
    if frame.kind is Kind.FAIL:
        status, code, message, details = frame.head
        return Failure(status, code, message, tuple(details))
    return Busy(float(frame.head[0])) if frame.kind is Kind.BUSY else None
