"""What ties an actor that routes requests to the control of a service, and of its guests. It goes on with what it was told last while one is away."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.on_ray.naming import control_of
from headrace.serving import words
from headrace.serving.door.lobby import AnyDoor, Lobby
from headrace.serving.routes import Endpoint, Routes

T = TypeVar("T")

_REPORT_S = 1.0
_LOOK_S = 0.1  # between looks whether control must know something at once
_WAIT_S = 10.0  # of one long poll
_GUESTS_S = 5.0  # for the routes of guests, before an actor begins without them
_AWAY = (ray.exceptions.RayError, ValueError)  # control is dead, starts again, or is busy; ValueError: no actor of its name yet


class Tie:
    """To the control of one service."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.stopped = threading.Event()
        self.routes: Routes | None = None
        self._control: Any = None

    def first(self, *, within_s: float | None = None) -> Routes | None:
        """The routes as they are now, however long that takes, or None if they are not to be had in time."""
        until_s = None if within_s is None else time.monotonic() + within_s
        while self.routes is None and not self.stopped.is_set():
            left_s = _WAIT_S if until_s is None else until_s - time.monotonic()
            if left_s <= 0:
                break
            self.routes = self.ask("routes", -1, left_s, timeout_s=left_s + 1.0)
        return self.routes

    def ask(self, method: str, *arguments: Any, timeout_s: float = _WAIT_S + 5.0) -> Any:
        """What control answers, or None after a short pause when it does not."""
        try:
            self._control = self._control or control_of(self.service)
            return ray.get(getattr(self._control, method).remote(*arguments), timeout=timeout_s)
        except _AWAY:
            self._control = None
            self.stopped.wait(0.2)
            return None

    def begin(self, work: Callable[[], None]) -> None:
        """Do this again and again in a thread of its own. A process whose threads end would go on with old routes for ever: it ends as a whole."""
        name = f"headrace-{work.__name__.strip('_')}-{self.service}"
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self.stopped.is_set():
                work()
        finally:
            if not self.stopped.is_set():  # Ray starts it again
                traceback.print_exc()
                os._exit(1)


class Ties(Generic[AnyDoor]):
    """The ties of an actor's process; making them waits until there are routes. Of each service, a thread hears of new ones, and one reports.

    First `introduce` tells the doors of a lobby what is known, on their loop; from `hold` on they are told what is new, `close` ends that.
    """

    def __init__(self, service: str) -> None:
        self._host = Tie(service)
        routes = self._host.first()
        assert routes is not None
        until_s = time.monotonic() + _GUESTS_S
        self._guests = {guest: Tie(guest) for guest in routes.guests}
        for tie in self._guests.values():
            tie.first(within_s=until_s - time.monotonic())

    def introduce(self, lobby: Lobby[AnyDoor]) -> None:
        """Seat the guests, and tell all doors of their routes."""
        self._lobby = lobby
        for guest, tie in self._guests.items():
            lobby.seat(guest, tie.routes)
        assert self._host.routes is not None
        lobby.host.update(self._host.routes)

    def hold(self, run: Callable[[Coroutine[Any, Any, Any]], Any], *more: Callable[[], None]) -> None:
        """Tell the doors of routes from now on, and have them report; `run` runs a coroutine on their loop. `more` is done in threads, too."""
        self._run = run
        self._hold(self._host, self._lobby.host)
        for guest, tie in self._guests.items():
            self._hold(tie, self._lobby.guests[guest])
        for work in more:
            self._host.begin(work)

    @property
    def closed(self) -> bool:
        """Whether they are let go of."""
        return self._host.stopped.is_set()

    def close(self) -> None:
        """Let go of all of them."""
        for tie in (self._host, *self._guests.values()):
            tie.stopped.set()

    def _hold(self, tie: Tie, door: AnyDoor) -> None:
        urgent: frozenset[object] = frozenset()

        def hear() -> None:
            routes: Routes | None = tie.ask("routes", -1 if tie.routes is None else tie.routes.revision, _WAIT_S)
            if routes is not None and not tie.stopped.is_set():
                if tie is self._host:
                    self._attend(routes)
                self._call(self._lobby.update, door, routes)
                tie.routes = routes

        def report() -> None:
            nonlocal urgent
            answer = tie.ask("report", self._call(door.report))
            if answer is not None:
                self._call(door.told, *answer)
            known, until_s = urgent, time.monotonic() + _REPORT_S
            while time.monotonic() < until_s and not tie.stopped.wait(_LOOK_S):
                urgent = self._call(needs)
                if urgent - known:
                    return

        def needs() -> frozenset[object]:
            """What control is to know at once: requests wait where there is no replica, or a replica hangs."""
            return frozenset({*door.fleet.waiting(), *door.fleet.hung()})

        tie.begin(hear)
        tie.begin(report)

    def _attend(self, routes: Routes) -> None:
        """See to other guests than before."""
        for guest in set(self._guests) - set(routes.guests):
            self._guests.pop(guest).stopped.set()
            threading.Thread(target=self._part, args=(guest,), name=f"headrace-part-{guest}", daemon=True).start()
        for guest in routes.guests:
            if guest not in self._guests:
                tie = self._guests[guest] = Tie(guest)
                self._hold(tie, self._call(self._lobby.seat, guest))

    def _part(self, guest: str) -> None:
        """Finish what was taken for a guest that is none any more."""
        door = self._lobby.guests.get(guest)
        if door is not None:
            self._run(self._lobby.dismiss(guest, timeout_s=door.fleet.limits.deadline_s))

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that is called on the doors' loop."""

        async def called() -> T:
            return function(*arguments)

        found: T = self._run(called())
        return found


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
