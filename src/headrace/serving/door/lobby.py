"""The services behind one address: the host, whose doors these are, and its guests, which have none of their own.

Who asks, connections, memory, files and accounts are matters of the address, and the host's door sees to them. Versions, retries, metrics and
what control is told are each service's own: a guest has a door of its own for them in each of the host's, to which only that one passes requests.
The same holds of the door without HTTP, through which work in the background goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from headrace.serving.routes import DoorReport, Routes

if TYPE_CHECKING:
    from headrace.serving.door.fleet import Fleet, Version


class Routed(Protocol):
    """The door of one service, as control tells it of routes. Its methods are called on its loop."""

    service: str
    fleet: Fleet

    def update(self, routes: Routes) -> None:
        """Route requests like this from now on."""

    def report(self) -> DoorReport:
        """What control is to know."""

    def told(self, peers: list[str], snapshot: dict[str, Any]) -> None:
        """What control answers to a report: the metrics of the other doors, and what `/status` shows."""

    async def close(self, *, timeout_s: float) -> None:
        """Finish what is under way, for so long at most; then end."""


AnyDoor = TypeVar("AnyDoor", bound=Routed)


class Lobby(Generic[AnyDoor]):
    """The doors behind one address, in one process; `make` makes one for a guest. Lives on their loop."""

    def __init__(self, host: AnyDoor, make: Callable[[str], AnyDoor]) -> None:
        self.host = host
        self.make = make
        self.guests: dict[str, AnyDoor] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}

    @property
    def doors(self) -> list[AnyDoor]:
        """The host's, and those of its guests."""
        return [self.host, *self.guests.values()]

    @property
    def starting(self) -> bool:
        """Whether there is a service of which nothing is known yet: what is asked for may be its."""
        return any(door.fleet.routes is None for door in self.doors)

    def fleets(self) -> list[Fleet]:
        """The versions of each service."""
        return [door.fleet for door in self.doors]

    def of(self, version: Version) -> AnyDoor:
        """The door of the service that a version belongs to."""
        return self.guests.get(version.service, self.host)

    def seat(self, guest: str, routes: Routes | None = None) -> AnyDoor:
        """Let a guest in. While its routes are not known, nobody is told that it has nothing of some name."""
        door = self.guests[guest] = self.make(guest)
        if routes is not None:
            door.update(routes)
        return door

    def update(self, door: AnyDoor, routes: Routes) -> None:
        """Tell a door of its service's routes, unless it was dismissed meanwhile."""
        if door is self.host or self.guests.get(door.service) is door:
            door.update(routes)

    async def dismiss(self, guest: str, *, timeout_s: float) -> None:
        """Take no more requests for a guest, and finish those under way, for so long at most."""
        if (door := self.guests.pop(guest, None)) is not None:
            task = self._leaving[guest] = asyncio.get_running_loop().create_task(door.close(timeout_s=timeout_s))
            task.add_done_callback(lambda done: self._leaving.pop(guest) if self._leaving.get(guest) is done else None)
        if (leaving := self._leaving.get(guest)) is not None:  # somebody else may have asked for it before
            await asyncio.wait({leaving}, timeout=timeout_s)
