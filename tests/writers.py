"""Services whose last stage is an `hr.LLM` with an engine that only says the words of its prompt again: a door and replicas over sockets, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from speakers import FakeSpeaker, prompt_of

import headrace as hr
from headrace.hardware import Cluster, Node
from headrace.plan import Plan, resolve
from headrace.serving.bodies.events import Events
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.speech import Reply, Spent


class Parroting(FakeSpeaker):
    """The engine, as a stage calls it. A prompt that begins with `break` breaks off after two words."""

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def speak(
        self, path: str, body: bytes | Mapping[str, Any], *, priority: int = 1, request_id: str | None = None, spent: Spent
    ) -> Reply | AsyncIterator[str]:
        said = await super().speak(path, body, priority=priority, request_id=request_id, spent=spent)
        return _broken(said) if not isinstance(said, Reply) and isinstance(body, Mapping) and prompt_of(body).startswith("break") else said


async def _broken(events: AsyncIterator[str]) -> AsyncIterator[str]:
    yield await anext(events)
    yield await anext(events)
    yield 'data: {"error": {"message": "out of ideas", "code": 500}}\n\n'
    yield "data: [DONE]\n\n"
    await events.aclose()  # type: ignore[attr-defined]


SETTINGS: dict[str, Any] = {}
"""Of the engines that are set up from now on."""


class Summary(hr.LLM):
    """`hr.LLM` with such an engine."""

    def setup(self, device: str) -> None:
        self._engine: Any = Parroting(**SETTINGS)
        weakref.finalize(self, self._engine.close)


def summary(**settings: Any) -> Summary:
    given = {"model": "acme/parrot", "prompt": "{text}", "out": "summary", "on": hr.cpu(1), "concurrency": 8, "sampling": hr.Sampling(max_tokens=6)}
    return Summary(**{**given, **settings})


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    if any("boom" in each for each in text):
        raise ValueError("boom")
    return {"text": [" ".join(each.split()) for each in text]}


@hr.stage(out={"length": int})
class Measure:
    """A model before the one that writes."""

    def __call__(self, text: hr.Column[str]) -> dict[str, list[int]]:
        return {"length": [len(each) for each in text]}


class Service:
    """A door before `replicas` of each group."""

    def __init__(self, pipeline: hr.Pipeline, *, replicas: int = 1, direct: bool = True, limits: Limits | None = None, **settings: Any) -> None:
        SETTINGS.clear()
        SETTINGS.update(settings)
        self.limits = limits or Limits()
        self.pipeline = pipeline
        self.replicas: list[list[ReplicaServer]] = []
        self.opened: list[http.client.HTTPConnection] = []
        groups = [self._group(plan_of(pipeline), at, replicas, direct) for at in range(len(plan_of(pipeline).groups))]
        self.server = DoorServer(Door(pipeline.name))
        self.port = self.server.start()
        self.url = f"http://127.0.0.1:{self.port}"
        version = VersionRoute(1, 1.0, tuple(groups), contract(pipeline))
        self.server.call(self.server.door.update, Routes(pipeline.name, 1, (version,), self.limits))
        soon(lambda: self.server.call(lambda: all(len(pool.usable) == replicas for pool in self.server.door.fleet.versions[1].pools)))

    def _group(self, plan: Plan, at: int, replicas: int, direct: bool) -> GroupRoute:
        group, endpoints = plan.groups[at], []
        self.replicas.append([])
        for number in range(replicas):
            server = ReplicaServer(group.stages, reads=plan.arrivals[at], carries=group.carries, group=group.name, limits=self.limits, token="secret")
            host, port = server.start()
            self.replicas[-1].append(server)
            endpoints.append(Endpoint(f"{group.name}-{number}", host, port, token="secret", beside=server.beside if direct else ""))
        return GroupRoute(group.name, tuple(endpoints))

    @property
    def engine(self) -> Parroting:
        return engine_of(self.replicas[-1][0])

    def post(self, row: Any, *, connection: http.client.HTTPConnection | None = None, **headers: str) -> http.client.HTTPResponse:
        """The answer to a row, as events unless `accept` says otherwise."""
        connection = connection or self.connection()
        named = {"content-type": "application/json", "accept": "text/event-stream", **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request("POST", f"/{self.pipeline.name}", row if isinstance(row, bytes) else json.dumps(row).encode(), named)
        return connection.getresponse()

    def connection(self) -> http.client.HTTPConnection:
        self.opened.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30))
        return self.opened[-1]

    def in_flight(self) -> int:
        return self.server.call(lambda: self.server.door.fleet.versions[1].report.in_flight)

    def close(self) -> None:
        for connection in self.opened:
            connection.close()
        self.server.stop(timeout_s=0.5)
        for replica in [replica for group in self.replicas for replica in group]:
            replica.close()
            if replica._talks is not None:
                engine_of(replica).close()


def engine_of(replica: ReplicaServer) -> Parroting:
    assert replica._talks is not None and isinstance(replica._talks.speaker, Parroting)
    return replica._talks.speaker


def plan_of(pipeline: hr.Pipeline) -> Plan:
    return resolve(pipeline, Cluster((Node("one", 16),)), online=True)


@contextlib.contextmanager
def serving(pipeline: hr.Pipeline, **options: Any) -> Iterator[Service]:
    """Serve `pipeline` for the length of the block."""
    service = Service(pipeline, **options)
    try:
        yield service
    finally:
        service.close()


def soon(true: Callable[[], Any]) -> None:
    """Wait for what another thread is about to do."""
    until_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until_s, "it never became so"
        time.sleep(0.002)


def events(text: bytes) -> list[tuple[str, Any]]:
    return [(name, json.loads(data)) for name, data in Events().feed(text)]
