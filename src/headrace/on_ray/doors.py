"""A front door as a Ray actor: it goes on with what it was told last while control is away, and starts again by itself after a kill."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.on_ray.naming import control_of
from headrace.serving import words
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.routes import Endpoint, Routes
from headrace.serving.watch.logs import AccessLog
from headrace.serving.watch.pipes import writer
from headrace.serving.watch.traces import Traces

_REPORT_S = 1.0
_LOOK_S = 0.1  # between looks whether control must know something at once
_WAIT_S = 10.0  # of one long poll
_AWAY = (ray.exceptions.RayError, ValueError)  # control is dead, starts again, or is busy; ValueError: no actor of its name yet


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
    """The actor. Two threads beside the server's own: one hears of new routes, the other reports."""

    def __init__(self, listening: Listening, number: int) -> None:
        self.service = listening.service
        self.name = str(number)
        self._stopped = threading.Event()
        self._urgent: frozenset[object] = frozenset()
        self._control: Any = None
        routes: Routes | None = None
        while routes is None:  # a door that knows no routes would answer 404
            routes = self._ask(lambda control: control.routes.remote(-1))
        log = None if listening.logs is None else AccessLog(writer(listening.logs, number) or sys.stdout, service=self.service, door=self.name)
        self.door = Door(self.service, name=self.name, ask_words=_ask_words, log=log)
        self.door.traces = Traces.from_environment(self.service, door=self.name)
        self.server = DoorServer(self.door, host=listening.host, port=listening.port, tls=listening.tls)
        self.port = self.server.start()
        if listening.opening is not None:
            self.server.run(listening.opening.open(self.door))
        self.server.call(self.door.update, routes)
        self._revision = routes.revision
        for work in (self._hear, self._report):
            threading.Thread(target=self._run, args=(work,), name=f"headrace-{work.__name__.strip('_')}", daemon=True).start()

    def listens(self) -> tuple[int, int]:
        """The port, and the process."""
        return self.port, os.getpid()

    def drain(self, timeout_s: float) -> None:
        """Take no more connections, and finish what was taken."""
        self._stopped.set()
        self.server.stop(timeout_s)
        if self.door.log is not None:
            self.door.log.close()

    def _run(self, work: Callable[[], None]) -> None:
        """A door whose threads end would go on with old routes for ever: it ends as a whole, and Ray starts it again."""
        try:
            while not self._stopped.is_set():
                work()
        finally:
            if not self._stopped.is_set():
                traceback.print_exc()
                os._exit(1)

    def _hear(self) -> None:
        routes = self._ask(lambda control: control.routes.remote(self._revision, _WAIT_S))
        if routes is not None:
            self._revision = routes.revision
            self.server.call(self.door.update, routes)

    def _report(self) -> None:
        report = self.server.call(self.door.report)
        answer = self._ask(lambda control: control.report.remote(report))
        if answer is not None:
            self.server.call(self._take, *answer)
        told, until_s = self._urgent, time.monotonic() + _REPORT_S
        while time.monotonic() < until_s and not self._stopped.wait(_LOOK_S):
            self._urgent = self.server.call(self._needs)
            if self._urgent - told:
                return

    def _needs(self) -> frozenset[object]:
        """What control is to know at once: requests wait where there is no replica, or a replica hangs."""
        return frozenset({*self.door.fleet.waiting(), *self.door.fleet.hung()})

    def _take(self, peers: list[str], snapshot: dict[str, Any]) -> None:
        self.door.peers = peers
        self.door.snapshot = snapshot

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What control answers, or None after a short pause when it does not."""
        try:
            self._control = self._control or control_of(self.service)
            return ray.get(question(self._control), timeout=_WAIT_S + 5.0)
        except _AWAY:
            self._control = None
            self._stopped.wait(0.2)
            return None


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
