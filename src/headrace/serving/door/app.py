"""The front door of a service: an ASGI app that takes requests over HTTP and has replicas compute them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from headrace.serving.door import heads
from headrace.serving.door.callers import ANYBODY, Caller, Doorman, admitted
from headrace.serving.door.exchange import CLOSE, Exchange, Memory, Message, Receive, Send
from headrace.serving.door.fleet import Fleet
from headrace.serving.door.lobby import Lobby
from headrace.serving.door.pairs import Mirror
from headrace.serving.door.retries import AskWords, Retries
from headrace.serving.door.routing import Pool
from headrace.serving.door.rows import Rows
from headrace.serving.door.turnstile import Turnstile
from headrace.serving.door.views import OPEN, Views
from headrace.serving.routes import DoorReport, Limits, Routes
from headrace.serving.watch.metrics import DoorMetrics
from headrace.serving.wire import Done, Failure

if TYPE_CHECKING:
    from headrace.serving.watch.logs import AccessLog
    from headrace.serving.watch.traces import Traces

TICK_S = 0.5

CLOSING = Failure(503, "unavailable", "the service shuts down")
NO_ROWS = Failure(403, "forbidden", "this key has limits that only requests under /v1/ count in, and may not ask here")
_TEXT = (b"content-type", b"text/plain")
_SOON = (b"retry-after", b"1")
_CHALLENGE = (b"www-authenticate", b"Bearer")
_NOTHING_YET = Failure(503, "unavailable", "the service starts; no version of it is known yet")


class Edge(Protocol):
    """What answers a door's paths below `/v1/`: OpenAI's interface."""

    @property
    def keeps_files(self) -> bool:
        """Whether it has files and batches."""

    async def answer(self, exchange: Exchange, method: str, path: str, caller: Caller | Failure) -> None:
        """Answer a request; `caller` is who asks, or why that is nobody."""

    async def close(self) -> None:
        """Write down what is still to be written."""


class Door:
    """A front door of a service. It lives on one event loop, on which all its methods are called.

    `peers` are the Prometheus texts of the other doors, `snapshot` is what `/status` says beside this door's own figures, `traces` where
    spans go, if anywhere, `connections` how many clients are connected, of `most_connections` that this process can have, and `leaving` whether new ones
    are better taken elsewhere, `edge` what answers below `/v1/`, and `doorman` who knows keys beside those of the routes; whoever runs the
    door sets them. `lobby` has the doors of other services behind the same address; one of those is made as a `guest`.
    """

    def __init__(self, service: str, *, name: str = "0", ask_words: AskWords | None = None, log: AccessLog | None = None, guest: bool = False) -> None:
        self.service = service
        self.name = name
        self.log = log
        self.traces: Traces | None = None
        self.edge: Edge | None = None
        self.doorman: Doorman | None = None
        self.lobby: Lobby[Door] = Lobby(self, lambda guest: Door(guest, name=name, ask_words=ask_words, guest=True))
        self.turnstile = Turnstile()
        self.metrics = DoorMetrics(service, name, process=not guest)
        self.retries = Retries(ask_words=ask_words, retried=self._retried)
        self.fleet = Fleet(retries=self.retries, answered=self._answered)
        self.mirror = Mirror(paired=self.metrics.paired)
        self.memory = Memory()
        self.leaving = self.closing = False
        self.connections = 0
        self.most_connections = sys.maxsize
        self.peers: list[str] = []
        self.snapshot: dict[str, Any] = {}
        self._rows = Rows(self)
        self._views = Views(self)
        self._prefix = os.urandom(10).hex()
        self._number = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticking: asyncio.Task[None] | None = None

    @property
    def limits(self) -> Limits:
        """The bounds of the service."""
        return self.fleet.limits

    @property
    def keys(self) -> Mapping[str, str] | None:
        """The hashes of valid keys, or None while none are asked for."""
        return self.fleet.routes.keys if self.fleet.routes is not None else None

    def now(self) -> float:
        """The time of the loop, finer than uvloop tells it, which counts the same clock in whole milliseconds."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return time.monotonic()

    def update(self, routes: Routes) -> None:
        """Route requests like this from now on."""
        self.now()
        assert self._loop is not None
        self.fleet.update(routes)
        self.metrics.keep(self.fleet.versions.keys())
        if self._ticking is None and not self.closing:
            self._ticking = self._loop.create_task(self._tick())

    def report(self) -> DoorReport:
        """What control is to know."""
        fleet = self.fleet
        self._gauge()
        metrics = self.metrics
        return DoorReport(
            self.name,
            fleet.reports(),
            fleet.replicas(),
            fleet.hung(),
            fleet.waiting(),
            metrics=metrics.text().decode(),
            hops=metrics.hops(),
            paces=metrics.paces(),
        )

    def told(self, peers: list[str], snapshot: dict[str, Any]) -> None:
        """Take what control answers to a report: the Prometheus texts of the other doors, and what `/status` says of the whole service."""
        self.peers, self.snapshot = peers, snapshot

    def status(self) -> dict[str, Any]:
        """What `/status` answers: what the snapshot says of the whole service, and this door's own figures."""
        versions = []
        for number, version in self.fleet.versions.items():
            counts = dataclasses.asdict(version.report)
            del counts["latencies"]
            groups = [{"name": pool.group, "ready": len(pool.usable), "waiting": pool.waiting()} for pool in version.pools]
            versions.append({"version": number, "weight": version.route.weight, "shadow": version.route.shadow, "counts": counts, "groups": groups})
        door = {"name": self.name, "in_flight": self.turnstile.inside, "connections": self.connections, "held_bytes": self.memory.held_bytes}
        guests = [guest.status() for guest in self.lobby.guests.values()]
        mine = {"door": door, **({"guests": guests} if guests else {})}
        return {"service": self.service, "versions": versions, "doors": [{"name": self.name, "silent_s": 0.0}], **self.snapshot, **mine}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            raise ValueError(f"a door speaks HTTP, not {scope['type']}")
        began = self.now()
        found = heads.scan(scope["headers"])
        request_id = heads.request_id(found)
        if request_id is None:
            self._number += 1
            request_id = f"{self._prefix}{self._number:012x}"
        exchange = Exchange(scope, receive, send, memory=self.memory, request_id=request_id, found=found, began=began)
        with self.turnstile.passing():
            try:
                await self._answer(exchange, scope["method"], scope["path"])
            except heads.HeadError as error:
                await self._refuse(exchange, error.failure)
            finally:
                exchange.release()
                exchange.watch(None)

    def all_peers(self) -> list[str]:
        """The metrics of all doors of all services behind this address, but for this door's own."""
        return [*self.peers, *(text for guest in self.lobby.guests.values() for text in (guest.metrics.text().decode(), *guest.peers))]

    @property
    def keeps_files(self) -> bool:
        """Whether files and batches are kept here."""
        return self.edge is not None and self.edge.keeps_files

    def has(self, path: str) -> bool:
        """Whether this service has rows under a path, or their schema."""
        return path.removesuffix("/schema") in self.fleet.mixes

    async def close(self, *, timeout_s: float) -> None:
        """Finish what is under way, for so long at most; then end. New requests are refused."""
        for door in self.lobby.doors:
            door.closing = True
        await self.turnstile.empty(timeout_s=timeout_s)
        if self._ticking is not None:
            self._ticking.cancel()
        self.mirror.close()
        self.fleet.abort(CLOSING)
        for guest in self.lobby.guests.values():
            await guest.close(timeout_s=0.0)
        if self.edge is not None:
            await self.edge.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)
        if self.log is not None:
            await asyncio.to_thread(self.log.close)

    async def _answer(self, exchange: Exchange, method: str, path: str) -> None:
        caller: Caller | Failure
        if path in OPEN:
            caller = ANYBODY
        elif self.fleet.routes is None:  # nor is it known whether keys are asked for
            caller = _NOTHING_YET
        else:
            caller = await admitted(exchange.found, self.keys, self.doorman)
        if self.edge is not None and path.startswith("/v1/"):
            await self.edge.answer(exchange, method, path, caller)
        elif isinstance(caller, Failure):
            await self._refuse(exchange, caller, _CHALLENGE if caller.status == 401 else _SOON)
        else:
            await self.answer(exchange, method, path, caller)

    async def answer(self, exchange: Exchange, method: str, path: str, caller: Caller) -> None:
        """Answer a request, but for those that `edge` does. Who asks has been let in."""
        guest = next((guest for guest in self.lobby.guests.values() if guest.has(path)), None)
        if guest is not None:
            with guest.turnstile.passing():
                await guest.answer(exchange, method, path, caller)
        elif path in self.fleet.mixes:
            if method != "POST":
                await self._other_method(exchange, method, "POST, OPTIONS")
            elif self.closing:
                await self._refuse(exchange, CLOSING, CLOSE, _SOON)
            elif not caller.rows:
                await self._refuse(exchange, NO_ROWS)
            else:
                await self._rows.answer(exchange, path, caller.name)
        elif self._views.knows(path):
            if method in ("GET", "HEAD"):
                await self._show(exchange, path)
            else:
                await self._other_method(exchange, method, "GET, HEAD, OPTIONS")
        elif not self.fleet.mixes or self.lobby.starting:
            await self._refuse(exchange, _NOTHING_YET, _SOON)
        else:
            there = ", ".join(f"POST {each}" for fleet in self.lobby.fleets() for each in sorted(fleet.mixes))
            await self._refuse(exchange, Failure(404, "not_found", f"there is nothing at {path[:200]}; there is {there}"))

    async def _show(self, exchange: Exchange, path: str) -> None:
        page = self._views.page(path)
        if isinstance(page, Failure):
            await self._refuse(exchange, page, _SOON)
        else:
            status, body, kind = page
            await exchange.reply(status, body, (b"content-type", kind), (b"cache-control", b"no-cache"))

    async def _other_method(self, exchange: Exchange, method: str, allowed: str) -> None:
        allow = (b"allow", allowed.encode())
        if method == "OPTIONS":
            await exchange.reply(204, b"", _TEXT, allow)
        else:
            await self._refuse(exchange, Failure(405, "method_not_allowed", f"{method} is not allowed here; allowed: {allowed}"), allow)

    async def _refuse(self, exchange: Exchange, failure: Failure, *more: tuple[bytes, bytes]) -> None:
        """Answer with an error before any version has seen the request."""
        self.metrics.answered(0, failure.status, self.now() - exchange.began)
        await exchange.fail(failure, *more)
        if self.log is not None:
            self.log.request(
                request_id=exchange.request_id,
                method=exchange.scope["method"],
                path=exchange.scope["path"],
                status=failure.status,
                error=failure.code,
                took_ms=(self.now() - exchange.began) * 1e3,
            )

    def _answered(self, pool: Pool, done: Done) -> None:
        self.metrics.group(pool.version, pool.group, done)

    def _retried(self, version: int, why: str) -> None:
        self.metrics.retried(why)
        if version in self.fleet.versions:
            self.fleet.versions[version].report.retries += 1

    async def _tick(self) -> None:
        while True:
            self.fleet.tick()
            self._gauge()
            await asyncio.sleep(TICK_S)

    def _gauge(self) -> None:
        """Note how full everything is."""
        for version in self.fleet.versions.values():
            report = version.report
            report.queued = version.waiting()
            self.metrics.occupancy(version.number, report.in_flight, report.queued)
            for pool in version.pools:
                self.metrics.replicas(version.number, pool.group, len(pool.usable))
        self.metrics.connections(self.connections)
        self.metrics.engines(self.fleet.engines())
        self.metrics.lookups(self.fleet.lookups())
