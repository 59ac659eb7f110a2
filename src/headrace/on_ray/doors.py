"""A front door as a Ray actor: it goes on with what it was told last while control is away, and starts again by itself after a kill."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Protocol

from headrace.on_ray.ties import Ties, ask_words
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.door.side import SideDoor
from headrace.serving.watch.logs import AccessLog, Shared
from headrace.serving.watch.pipes import writer
from headrace.serving.watch.traces import Traces


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a service's doors listen, on which node they run, and where they log: `logs` is the pattern of the pipes that are read (`serving.watch.pipes`).

    Where nobody reads, doors log to their own standard output, which Ray keeps in files; None is for no log of requests. `opening` has
    each door speak more than rows.
    """

    service: str
    host: str
    port: int
    tls: tuple[str, str] | None = None
    logs: str | None = ""
    opening: Opening | None = None

    def log_of(self, door: str) -> Shared | None:
        """Where one of its processes writes what is logged, for all services; None where nothing is."""
        return None if self.logs is None else Shared(writer(self.logs, door) or sys.stdout)


class Opening(Protocol):
    """What has a service speak more than rows, of plain data: each process that has it opens everything for itself."""

    async def open(self, door: Door) -> None:
        """Set the door's `edge` and `doorman`; called on its loop."""

    @property
    def works(self) -> bool:
        """Whether there is work in the background."""

    async def work(self, door: SideDoor, stopping: asyncio.Event) -> None:
        """Do the work in the background until `stopping` is set, and then finish what is at replicas. It may be cancelled, and its process killed."""


class FrontDoor:
    """The actor: a door of a service, and behind it one of each of that service's guests."""

    def __init__(self, listening: Listening, number: int) -> None:
        stream = listening.log_of(str(number))

        def make(service: str) -> Door:
            log = None if stream is None else AccessLog(stream, service=service, door=str(number))
            made = Door(service, name=str(number), ask_words=ask_words, log=log, guest=service != listening.service)
            made.traces = Traces.from_environment(service, door=str(number))
            return made

        async def prepare() -> None:
            if listening.opening is not None:
                await listening.opening.open(self.door)
            self._ties.introduce(self.door.lobby)

        self._ties: Ties[Door] = Ties(listening.service)
        self.door = make(listening.service)
        self.door.lobby.make = make
        self.server = DoorServer(self.door, host=listening.host, port=listening.port, tls=listening.tls)
        self.port = self.server.start(prepare)
        self._ties.hold(self.server.run)

    def listens(self) -> tuple[int, int]:
        """The port, and the process."""
        return self.port, os.getpid()

    def drain(self, timeout_s: float) -> None:
        """Take no more connections, and finish what was taken."""
        self._ties.close()
        self.server.stop(timeout_s)

    def dismiss(self, guest: str, timeout_s: float) -> None:
        """Take no more requests for a guest, which is none any more, and finish those that were taken."""
        self.server.run(self.door.lobby.dismiss(guest, timeout_s=timeout_s))
