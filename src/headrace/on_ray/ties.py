"""What ties an actor that routes requests to control. It goes on with what it was told last while control is away."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.on_ray.naming import control_of
from headrace.serving import words
from headrace.serving.door.fleet import Fleet
from headrace.serving.routes import DoorReport, Endpoint, Routes

_REPORT_S = 1.0
_LOOK_S = 0.1  # between looks whether control must know something at once
_WAIT_S = 10.0  # of one long poll
_AWAY = (ray.exceptions.RayError, ValueError)  # control is dead, starts again, or is busy; ValueError: no actor of its name yet


class Routed(Protocol):
    """What control tells of routes: a door. Its methods are called on its loop."""

    fleet: Fleet

    def update(self, routes: Routes) -> None:
        """Route requests like this from now on."""

    def report(self) -> DoorReport:
        """What control is to know."""

    def told(self, peers: list[str], snapshot: dict[str, Any]) -> None:
        """What control answers to a report: the metrics of the other doors, and what `/status` shows."""


class Ties:
    """The ties of an actor's process; making them waits until there are routes. Two threads hold them: one hears of new routes, one reports.

    `stopped` lets go of them. An actor whose threads end before that would go on with old routes for ever: it ends as a whole, and Ray starts it
    again.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.stopped = threading.Event()
        self._urgent: frozenset[object] = frozenset()
        self._control: Any = None
        routes: Routes | None = None
        while routes is None:  # a door that knows no routes would answer 404
            routes = self._ask(lambda control: control.routes.remote(-1))
        self._routes = routes

    def hold(self, routed: Routed, call: Callable[..., Any], *more: Callable[[], None]) -> None:
        """Tell it of routes from now on, and have it report; `call` calls a function on its loop. `more` is done in threads that may not end either."""
        self._routed, self._call = routed, call
        call(routed.update, self._routes)
        for work in (self._hear, self._report, *more):
            threading.Thread(target=self._run, args=(work,), name=f"headrace-{work.__name__.strip('_')}", daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self.stopped.is_set():
                work()
        finally:
            if not self.stopped.is_set():
                traceback.print_exc()
                os._exit(1)

    def _hear(self) -> None:
        routes = self._ask(lambda control: control.routes.remote(self._routes.revision, _WAIT_S))
        if routes is not None:
            self._routes = routes
            self._call(self._routed.update, routes)

    def _report(self) -> None:
        report = self._call(self._routed.report)
        answer = self._ask(lambda control: control.report.remote(report))
        if answer is not None:
            self._call(self._routed.told, *answer)
        told, until_s = self._urgent, time.monotonic() + _REPORT_S
        while time.monotonic() < until_s and not self.stopped.wait(_LOOK_S):
            self._urgent = self._call(self._needs)
            if self._urgent - told:
                return

    def _needs(self) -> frozenset[object]:
        """What control is to know at once: requests wait where there is no replica, or a replica hangs."""
        fleet = self._routed.fleet
        return frozenset({*fleet.waiting(), *fleet.hung()})

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What control answers, or None after a short pause when it does not."""
        try:
            self._control = self._control or control_of(self.service)
            return ray.get(question(self._control), timeout=_WAIT_S + 5.0)
        except _AWAY:
            self._control = None
            self.stopped.wait(0.2)
            return None


async def ask_words(endpoint: Endpoint) -> str | None:
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
