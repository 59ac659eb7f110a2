"""What a process in front of replicas hears from the control of a service, and tells it. Either may be away, and start again, at any time."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from headrace.on_ray.naming import control_of
from headrace.serving.routes import DoorReport, Routes

_REPORT_S = 1.0
_LOOK_S = 0.1  # between looks whether control must know something at once
_WAIT_S = 10.0  # of one long poll
_AWAY = (ray.exceptions.RayError, ValueError)  # control is dead, starts again, or is busy; ValueError: no actor of its name yet


class Line:
    """A line to the control of one service. While that is away, its last word holds."""

    def __init__(self, service: str) -> None:
        self.service = service
        self._stopped = threading.Event()
        self._revision = -1
        self._control: Any = None

    def first(self, *, within_s: float | None = None) -> Routes | None:
        """The routes as they are now, however long that takes, or None if they are not to be had in time."""
        until_s = None if within_s is None else time.monotonic() + within_s
        while not self._stopped.is_set():
            left_s = _WAIT_S if until_s is None else until_s - time.monotonic()
            if left_s <= 0:
                break
            routes: Routes | None = self._ask("routes", -1, left_s, timeout_s=left_s + 1.0)
            if routes is not None:
                self._revision = routes.revision
                return routes
        return None

    def hear(self, heard: Callable[[Routes], None]) -> None:
        """From now on, call this with the routes whenever there are others, in a thread of its own."""

        def work() -> None:
            routes = self._ask("routes", self._revision, _WAIT_S)
            if routes is not None and not self._stopped.is_set():
                heard(routes)
                self._revision = routes.revision

        self._begin("hear", work)

    def report(
        self, report: Callable[[], DoorReport], answered: Callable[[list[str], dict[str, Any]], None], *, urgent: Callable[[], frozenset[object]]
    ) -> None:
        """From now on, tell control this each second, and at once when there is something `urgent` that was not before; in a thread of its own."""
        known: frozenset[object] = frozenset()

        def work() -> None:
            nonlocal known
            answer = self._ask("report", report())
            if answer is not None:
                answered(*answer)
            told, until_s = known, time.monotonic() + _REPORT_S
            while time.monotonic() < until_s and not self._stopped.wait(_LOOK_S):
                known = urgent()
                if known - told:
                    return

        self._begin("report", work)

    def close(self) -> None:
        """Hear and tell nothing any more."""
        self._stopped.set()

    def _begin(self, name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(work,), name=f"headrace-{name}-{self.service}", daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        """A process whose threads end would go on with old routes for ever: it ends as a whole, and Ray starts it again."""
        try:
            while not self._stopped.is_set():
                work()
        finally:
            if not self._stopped.is_set():
                traceback.print_exc()
                os._exit(1)

    def _ask(self, method: str, *arguments: Any, timeout_s: float = _WAIT_S + 5.0) -> Any:
        """What control answers, or None after a short pause when it does not."""
        try:
            self._control = self._control or control_of(self.service)
            return ray.get(getattr(self._control, method).remote(*arguments), timeout=timeout_s)
        except _AWAY:
            self._control = None
            self._stopped.wait(0.2)
            return None
