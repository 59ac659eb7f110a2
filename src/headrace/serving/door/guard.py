"""A client's connection to a door, guarded: what one client does, or leaves undone, costs the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.serving.door.app import Door

HEAD_BYTES = 64 << 10
CORK_BYTES = 16 << 10
IDLE_S = 75.0  # between requests
LINGER_S = 5.0  # for a client to notice an answer that came before it had sent its body
LEAVING_S = 1.0  # for a request that is on its way while the door closes
STALLED_S = 30.0  # for a client to read the end of an answer

_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 21\r\nretry-after: 1\r\nconnection: close\r\n\r\ntoo many connections\n"
)
_LARGE_HEAD = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Corked:
    """A transport that sends what is written within one turn of the loop at once: the head of an answer with its body."""

    __slots__ = ("_loop", "_out", "_transport", "abort", "get_extra_info", "get_write_buffer_size", "is_closing", "pause_reading", "resume_reading")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._out: list[bytes] = []
        self.abort, self.is_closing = transport.abort, transport.is_closing
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.get_extra_info, self.get_write_buffer_size = transport.get_extra_info, transport.get_write_buffer_size

    def write(self, data: bytes) -> None:
        """Send it together with what else is written now. What is large is sent at once, so that the transport can say that it is full."""
        out = self._out
        out.append(data)
        if len(data) > CORK_BYTES:
            self.flush()
        elif len(out) == 1:
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        """Close once all is sent."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send what waits for the end of the turn."""
        if self._out:
            out, self._out = self._out, []
            self._transport.writelines(out)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on connections, on the time and size of a request's head, and on what is discarded or left unread.

    The app gets it in its scope as `headrace.connection`; see `exchange.Connection`.
    """

    app: Door

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.on_lost: Callable[[], None] | None = None
        self._answering: Any = None
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._leaving = False
        self._left_bytes = 0

    @property
    def whole(self) -> bool:
        """Whether the body of the request that is answered is there."""
        return not self.cycle.more_body

    @property
    def paused(self) -> bool:
        """Whether the client has not read what was sent before."""
        return bool(self.flow.write_paused)

    async def drained(self) -> None:
        """Wait until it has, or has gone."""
        await self.flow.drain()

    def abort(self) -> None:
        """Close at once."""
        self.transport.abort()

    def cut(self, last: bytes) -> None:
        """Send a last piece, as far as the client takes it now, and close the connection, whoever else writes to it."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as held:
            try:
                held.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            finally:
                held.shutdown(socket.SHUT_WR)  # another process may have it, too, and `close` alone would end nothing
        self._answering.disconnected = True
        self.transport.abort()

    @property
    def handle(self) -> int | None:
        """The socket, where what is written to it goes to the client as it is, in chunks; None over TLS."""
        transport = self.transport
        if transport.get_extra_info("ssl_object") is not None or not self._answering.chunked_encoding:
            return None
        return int(transport.get_extra_info("socket").fileno())

    @property
    def written(self) -> bool:
        """Whether all of the answer so far is with the system."""
        self.transport.flush()  # type: ignore[attr-defined]
        return not self.transport.get_write_buffer_size() and not self.transport.is_closing()

    def write_piece(self, piece: bytes | memoryview) -> int:
        """Send a piece of an answer of unknown length; the bytes that the client has not read."""
        if self._answering.chunked_encoding:  # `cycle` may be a later request's, which came with this one
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), bytes(piece)))
        else:
            self.transport.write(bytes(piece))
        return self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or refuse it where there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport = Corked(cast(asyncio.Transport, transport), self.loop)  # type: ignore[assignment]
        number = self.app.connections = len(self.connections)
        if number > min(self.app.limits.connections, self.app.most_connections):
            self._refused = True
            self.transport.write(_TOO_MANY)
            self.transport.close()
        else:
            self._arm(self.app.limits.header_s, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self.app.connections = len(self.connections)
        self._disarm()
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._refused:
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refused = True
                self.transport.write(_LARGE_HEAD)
                self.transport.close()
            elif self._timer is None:
                self._arm(self.app.limits.header_s, self.abort)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self.scope["headrace.connection"] = self  # type: ignore[typeddict-unknown-key]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_headers_complete(self) -> None:
        """The request's head is there."""
        self._in_head = False
        if self._timer is not None:
            self._disarm()
        super().on_headers_complete()
        if self._leaving:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """The request is there, whether or not it was answered already."""
        super().on_message_complete()
        if self.cycle.response_complete:
            self._disarm()
            if not self.transport.is_closing():
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        """A request is answered. What the client still sends of it, or has not read of the answer, is bounded in time."""
        super().on_response_complete()
        if self.transport.is_closing():
            if self.transport.get_write_buffer_size():
                self._watch_reading()
        elif self.cycle.response_complete and self.cycle.more_body:  # otherwise another request was begun, which came with this one
            self._unset_keepalive_if_required()
            self._arm(LINGER_S, self.transport.close)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long: close, unless the client is still reading."""
        if not self.transport.is_closing():
            self.transport.close()
            self._watch_reading()

    def shutdown(self) -> None:
        """The door closes: whoever is about to send a request may do so, once."""
        if self.cycle is None or self.cycle.response_complete:
            self._leaving = True
            self.loop.call_later(LEAVING_S, super().shutdown)
        else:
            super().shutdown()

    def _watch_reading(self) -> None:
        """Of a connection that closes: cut it off when the client takes in nothing any more."""
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes == self._left_bytes and left_bytes:
            self.transport.abort()
        elif left_bytes:
            self._left_bytes = left_bytes
            self._arm(STALLED_S, self._watch_reading)

    def _arm(self, delay_s: float, act: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(delay_s, act)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
