"""The services behind one address: the host, whose doors these are, and its guests, which have none of their own.

Who asks, connections, memory, files and accounts are matters of the address, and the host's door sees to them. Versions, retries, metrics and
what control is told are each service's own: a guest has a door of its own for them in each of the host's, to which only that one passes requests.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.serving.door.app import Door
    from headrace.serving.door.fleet import Fleet, Version


class Lobby:
    """The doors behind one address, in one process. Lives on their loop."""

    def __init__(self, host: Door) -> None:
        self.host = host
        self.guests: dict[str, Door] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}

    @property
    def doors(self) -> list[Door]:
        """The host's, and those of its guests."""
        return [self.host, *self.guests.values()]

    @property
    def starting(self) -> bool:
        """Whether there is a service of which nothing is known yet: what is asked for may be its."""
        return any(door.fleet.routes is None for door in self.doors)

    def fleets(self) -> list[Fleet]:
        """The versions of each service."""
        return [door.fleet for door in self.doors]

    def of(self, version: Version) -> Door:
        """The door of the service that a version belongs to."""
        return self.guests.get(version.service, self.host)

    def at(self, path: str) -> Door | None:
        """The guest that has rows under this path, or their schema."""
        return next((guest for guest in self.guests.values() if guest.has(path)), None)

    def peers(self) -> list[str]:
        """The metrics of all doors of all services, but for the host's own here."""
        return [*self.host.peers, *(text for guest in self.guests.values() for text in (guest.metrics.text().decode(), *guest.peers))]

    async def dismiss(self, service: str, *, timeout_s: float) -> None:
        """Take no more requests for a guest, and finish those under way, for so long at most."""
        if (guest := self.guests.pop(service, None)) is not None:
            task = self._leaving[service] = asyncio.get_running_loop().create_task(guest.close(timeout_s=timeout_s))
            task.add_done_callback(lambda done: self._leaving.pop(service) if self._leaving.get(service) is done else None)
        if (leaving := self._leaving.get(service)) is not None:  # somebody else may have asked for it before
            await asyncio.wait({leaving}, timeout=timeout_s)
