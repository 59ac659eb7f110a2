"""A door without HTTP: it routes to a service's replicas what the service itself has them do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from headrace.serving.door.app import CLOSING, TICK_S
from headrace.serving.door.fleet import Fleet
from headrace.serving.door.lobby import Lobby
from headrace.serving.door.retries import AskWords, Retries
from headrace.serving.door.turnstile import Turnstile
from headrace.serving.routes import DoorReport, Routes

if TYPE_CHECKING:
    from headrace.serving.watch.logs import AccessLog


class SideDoor:
    """What routes background work. It lives on one event loop, on which all its methods are called.

    It reports what it hears of replicas, and which groups it waits for, so that one is started where the last has ended while nothing was asked,
    and no more than one. It counts no requests: versions are judged, and replicas added, by what people wait for. `lobby` has those of other
    services behind the same address. What replicas answer goes into `log`.
    """

    def __init__(self, service: str, *, name: str, ask_words: AskWords | None = None, log: AccessLog | None = None) -> None:
        self.service = service
        self.name = name
        self.log = log
        self.retries = Retries(ask_words=ask_words, retried=lambda version, why: None)
        self.fleet = Fleet(retries=self.retries, answered=lambda pool, done: None)
        self.lobby: Lobby[SideDoor] = Lobby(self, lambda guest: SideDoor(guest, name=name, ask_words=ask_words))
        self.turnstile = Turnstile()
        self._ticking: asyncio.Task[None] | None = None

    def update(self, routes: Routes) -> None:
        """Route like this from now on."""
        self.fleet.update(routes)
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick())

    def report(self) -> DoorReport:
        """What control is to know."""
        return DoorReport(self.name, {}, self.fleet.replicas(), self.fleet.hung(), dict.fromkeys(self.fleet.waiting(), 1))

    def told(self, peers: list[str], snapshot: dict[str, Any]) -> None:
        """What control tells doors in return; there is nobody here to be shown it."""

    async def close(self, *, timeout_s: float) -> None:
        """Finish what is under way, for so long at most, and let go of all replicas. What is left then ends without an answer."""
        await self.turnstile.empty(timeout_s=timeout_s)
        for guest in self.lobby.guests.values():
            await guest.close(timeout_s=0.0)
        if self._ticking is not None:
            self._ticking.cancel()
        self.fleet.abort(CLOSING)
        if self.log is not None:
            await asyncio.to_thread(self.log.close)

    async def _tick(self) -> None:
        while True:
            self.fleet.tick()
            await asyncio.sleep(TICK_S)
