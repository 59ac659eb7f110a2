"""Streams that a replica writes to clients itself: a door on the same machine hands it their sockets.

A door begins every answer. Of one that goes on it then offers the client's socket, over a Unix socket beside the connection of frames; the
replica holds back what comes, says when it has sent its last piece through the door, and writes when the door has passed that on. From there
on a token makes one hop less. All is decided anew for each answer, and where no socket can be handed over, the door goes on in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable

MOST_UNREAD_BYTES = 4 << 20  # that a client has not read

_NUMBER = struct.Struct("!Q")
_KEY_BYTES = 32


class Outlet:
    """A client's socket, to which the rest of its answer is written in chunks of HTTP/1.1. Lives on the loop."""

    def __init__(self, handle: int, *, overfull: Callable[[], None]) -> None:
        self._socket = socket.socket(fileno=handle)
        self._overfull = overfull
        self._loop = asyncio.get_running_loop()
        self._left: deque[bytes] = deque()
        self._left_bytes = 0
        self._empty: asyncio.Future[None] | None = None
        self._lost = False

    def write(self, piece: bytes) -> None:
        """Send a piece, or keep what the client does not take now. One that has gone is no fault: its door sees that, too."""
        data = b"%x\r\n%b\r\n" % (len(piece), piece)
        if not self._left:
            data = self._send(data)
        if data and not self._lost:
            if not self._left:
                self._loop.add_writer(self._socket, self._write_left)
            self._left.append(data)
            self._left_bytes += len(data)
            if self._left_bytes > MOST_UNREAD_BYTES:
                self._overfull()

    async def drained(self) -> None:
        """Wait until the client has taken all of it, or has gone."""
        if self._left:
            self._empty = self._loop.create_future()
            await self._empty

    def close(self) -> None:
        """Give the socket back. If the client has not taken all, its connection ends: a piece may be cut in two."""
        if self._left:
            self._loop.remove_writer(self._socket)
            self._left.clear()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, data: bytes) -> bytes:
        """What is left of it."""
        try:
            return data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
        except (BlockingIOError, InterruptedError):
            return data
        except OSError:  # the client has gone
            self._lost = True
            return b""

    def _write_left(self) -> None:
        while self._left:
            data = self._left.popleft()
            rest = self._send(data)
            self._left_bytes -= len(data) - len(rest)
            if rest:
                self._left.appendleft(rest)
                return
        self._loop.remove_writer(self._socket)
        if self._empty is not None and not self._empty.done():
            self._empty.set_result(None)


class Channel:
    """The Unix socket beside one door's connection: sockets come over it, each with the number of its request."""

    def __init__(self, beside: socket.socket) -> None:
        self._socket = beside
        self._got: dict[int, int] = {}

    def take(self, number: int) -> int | None:
        """The client's socket for a request. It was sent before the frame that tells of it: it is there by now, if it ever was."""
        with contextlib.suppress(OSError):  # nothing more is there
            while True:
                data, handles, _, _ = socket.recv_fds(self._socket, _NUMBER.size, 1)
                if not data:
                    break
                (offered,) = _NUMBER.unpack(data)
                for handle in handles:
                    self._got[offered] = handle
        return self._got.pop(number, None)

    def close(self) -> None:
        """Close it, and what came over it and was not asked for."""
        for handle in self._got.values():
            os.close(handle)
        self._got.clear()
        self._socket.close()


class Anteroom:
    """Where doors connect their Unix sockets, on a name of its own: by the keys that they tell over their connections of frames.

    `name` is "" where there are no such sockets. `token` is what a door must name first.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._keyed: dict[str, socket.socket] = {}
        self._listening: socket.socket | None = None
        self.name = f"headrace-{secrets.token_hex(16)}"
        try:
            self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listening.bind(f"\0{self.name}")
            self._listening.listen(64)
            self._listening.setblocking(False)
        except (OSError, AttributeError):  # not Linux
            self.name = ""

    def channel(self, key: str) -> Channel | None:
        """The one of the door that has told this key."""
        self._accept()
        beside = self._keyed.pop(key, None)
        return None if beside is None else Channel(beside)

    def close(self) -> None:
        """Close all that nobody has asked for."""
        for beside in self._keyed.values():
            beside.close()
        if self._listening is not None:
            self._listening.close()

    def _accept(self) -> None:
        if self._listening is None or not self.name:
            return
        with contextlib.suppress(OSError):  # nobody more waits
            while True:
                beside, _ = self._listening.accept()
                beside.setblocking(False)
                said = b""
                with contextlib.suppress(OSError):  # a door says it at once: whoever has not is none
                    said = beside.recv(512)
                key, _, token = said.partition(b" ")
                if len(key) == _KEY_BYTES and hmac.compare_digest(token, self._token):
                    self._keyed[key.decode("latin-1")] = beside
                else:
                    beside.close()
