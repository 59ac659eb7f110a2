"""A door's end of the Unix socket over which it hands clients' sockets to a replica on the same machine; see `replica.outlets`."""

from __future__ import annotations

import secrets
import socket
import struct

_NUMBER = struct.Struct("!Q")


class Handover:
    """The socket to one replica. `key` is what the replica is told over the connection of frames, to know whose it is."""

    def __init__(self, beside: socket.socket, key: str) -> None:
        self._socket = beside
        self.key = key

    @staticmethod
    def connect(name: str, token: str) -> Handover | None:
        """One to the replica that listens on that name; None where that cannot be had, as on another machine."""
        key = secrets.token_hex(16)
        beside = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            beside.setblocking(False)
            beside.connect(f"\0{name}")
            beside.send(f"{key} {token}".encode())
        except OSError:
            beside.close()
            return None
        return Handover(beside, key)

    def send(self, number: int, handle: int) -> bool:
        """Hand over a socket for a request; False if that is not possible now."""
        try:
            return socket.send_fds(self._socket, [_NUMBER.pack(number)], [handle]) > 0
        except OSError:
            return False

    def close(self) -> None:
        """Close it."""
        self._socket.close()
