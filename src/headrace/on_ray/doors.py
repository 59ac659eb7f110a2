"""A front door as a Ray actor: it goes on with what it was told last while control is away, and starts again by itself after a kill."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.on_ray.lines import Line
from headrace.serving import words
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.routes import Endpoint, Routes
from headrace.serving.watch.logs import AccessLog, Shared
from headrace.serving.watch.pipes import writer
from headrace.serving.watch.traces import Traces

_GUESTS_S = 5.0  # for the routes of guests to come before a door opens without


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


class Opening(Protocol):
    """What has a door speak more than rows, of plain data: each door's process opens everything for itself."""

    async def open(self, door: Door) -> None:
        """Set the door's `edge` and `doorman`; called on its loop."""


class FrontDoor:
    """The actor: a door of a service, and behind it one of each of that service's guests. Each has a line to its own control."""

    def __init__(self, listening: Listening, number: int) -> None:
        self.service, self.name = listening.service, str(number)
        self._log = None if listening.logs is None else Shared(writer(listening.logs, number) or sys.stdout)
        self._line = Line(self.service)
        self._guests: dict[str, tuple[Line, Door]] = {}
        routes = self._line.first()  # a door that knows no routes would answer 404
        assert routes is not None
        until_s = time.monotonic() + _GUESTS_S
        lines = {guest: Line(guest) for guest in routes.guests}
        known = {guest: line.first(within_s=until_s - time.monotonic()) for guest, line in lines.items()}
        self.door = self._door(self.service)
        self.server = DoorServer(self.door, host=listening.host, port=listening.port, tls=listening.tls)

        async def prepare() -> None:
            if listening.opening is not None:
                await listening.opening.open(self.door)
            for guest in lines:
                self._seat(guest, known[guest])
            self.door.update(routes)

        self.port = self.server.start(prepare)
        for line in lines.values():
            self._attend_guest(line)
        self._attend(self._line, self.door, self._heard)

    def listens(self) -> tuple[int, int]:
        """The port, and the process."""
        return self.port, os.getpid()

    def drain(self, timeout_s: float) -> None:
        """Take no more connections, and finish what was taken."""
        there = [(self._line, self.door), *self._guests.values()]
        for line, _ in there:
            line.close()
        self.server.stop(timeout_s)
        for _, door in there:
            if door.log is not None:
                door.log.close()

    def dismiss(self, guest: str, timeout_s: float) -> None:
        """Take no more requests for a guest, which is none any more, and finish those that were taken."""
        self.server.run(self.door.lobby.dismiss(guest, timeout_s=timeout_s))

    def _heard(self, routes: Routes) -> None:
        """There are other routes, and maybe other guests."""
        for guest in set(self._guests) - set(routes.guests):
            line, door = self._guests.pop(guest)
            line.close()
            threading.Thread(target=self._part, args=(door,), name=f"headrace-part-{guest}", daemon=True).start()
        for guest in routes.guests:
            if guest not in self._guests:
                self.server.call(self._seat, guest, None)
                self._attend_guest(Line(guest))
        self.server.call(self.door.update, routes)

    def _seat(self, guest: str, routes: Routes | None) -> None:
        """Let requests for a guest in; called on the loop. While its routes are not known, nobody is told that it has nothing of some name."""
        door = self.door.lobby.guests[guest] = self._door(guest)
        if routes is not None:
            door.update(routes)

    def _attend_guest(self, line: Line) -> None:
        guests = self.door.lobby.guests
        door = guests[line.service]

        def update(routes: Routes) -> None:
            if guests.get(line.service) is door:  # and was not dismissed meanwhile
                door.update(routes)

        self._guests[line.service] = line, door
        self._attend(line, door, lambda routes: self.server.call(update, routes))

    def _part(self, door: Door) -> None:
        """Finish what was taken for a guest that is none any more."""
        self.dismiss(door.service, door.limits.deadline_s)
        if door.log is not None:
            door.log.close()

    def _door(self, service: str) -> Door:
        log = None if self._log is None else AccessLog(self._log, service=service, door=self.name)
        door = Door(service, name=self.name, ask_words=_ask_words, log=log, guest=service != self.service)
        door.traces = Traces.from_environment(service, door=self.name)
        return door

    def _attend(self, line: Line, door: Door, heard: Callable[[Routes], None]) -> None:
        """Hear what a service's control says to its door, and tell it what that counts."""

        def needs() -> frozenset[object]:
            """What control is to know at once: requests wait where there is no replica, or a replica hangs."""
            return frozenset({*door.fleet.waiting(), *door.fleet.hung()})

        def take(peers: list[str], snapshot: dict[str, Any]) -> None:
            door.peers, door.snapshot = peers, snapshot

        line.hear(heard)
        line.report(lambda: self.server.call(door.report), lambda *answer: self.server.call(take, *answer), urgent=lambda: self.server.call(needs))


async def _ask_words(endpoint: Endpoint) -> str | None:
    """The last words of a replica on another node, where anybody there can still read them."""
    task = _read_words.options(scheduling_strategy=NodeAffinitySchedulingStrategy(endpoint.node, soft=False))
    try:
        answer: str | None = await asyncio.wait_for(_outcome(task.remote(endpoint.pid)), timeout=3.0)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return answer


async def _outcome(reference: Any) -> Any:
    return await reference


@ray.remote(num_cpus=0, max_retries=0)
def _read_words(pid: int) -> str | None:
    return words.read(pid)
