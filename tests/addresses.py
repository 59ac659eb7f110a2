"""Several services behind one address, without Ray: a door for each in one server, and one replica of each."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

from speakers import FakeSpeaker

import headrace as hr
from headrace.gateway.openai.opening import Opening
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.speech import CHAT, COMPLETIONS, Speech


@hr.stage(out={"answer": str}, concurrency=4)
class Named:
    """A speaker under a model's name of its own."""

    model: str = "acme/parrot"
    words: int = 4
    word_s: float = 0.0

    def setup(self, device: str) -> None:
        self._speaker = FakeSpeaker(words=self.words, word_s=self.word_s)
        weakref.finalize(self, self._speaker.close)

    def speaks(self) -> Speech:
        return Speech(self.model, (CHAT, COMPLETIONS))

    def speaker(self) -> FakeSpeaker:
        return self._speaker

    def __call__(self, text: hr.Column[str]) -> dict[str, list[str]]:
        return {"answer": [f"{self.model} says {each}" for each in text]}


@dataclasses.dataclass(eq=False)
class Standing:
    """A service in this process: its replicas by version, and what its door is told."""

    address: Address
    door: Door
    limits: Limits
    versions: dict[int, tuple[ReplicaServer, VersionRoute]] = dataclasses.field(default_factory=dict)
    revision: int = 0
    keys: dict[str, str] | None = None

    def serve(self, number: int, pipeline: hr.Pipeline) -> None:
        """This version answers everything from now on; others are there without a share."""
        replica = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs, group="all", limits=self.limits, token="secret")
        host, port = replica.start()
        route = VersionRoute(number, 1.0, (GroupRoute("all", (Endpoint(f"{pipeline.name}-{number}", host, port, token="secret"),)),), contract(pipeline))
        self.versions = {at: (there, dataclasses.replace(old, weight=0.0)) for at, (there, old) in self.versions.items()}
        self.versions[number] = replica, route
        self.publish()
        self.address.until(lambda: self.door.fleet.versions[number].open)

    def speaker(self, number: int = 1) -> Any:
        """The speaker of a version."""
        return self.versions[number][0]._talks.speaker

    def retire(self, number: int) -> None:
        """Take a version out; its replica goes on with what it has."""
        replica, _ = self.versions.pop(number)
        self.publish()
        replica.drain(10)
        replica.close()

    def publish(self) -> None:
        self.revision += 1
        routes = Routes(self.door.service, self.revision, tuple(route for _, route in self.versions.values()), self.limits, self.keys)
        self.address.server.call(self.door.update, routes)


class Address:
    """The first service has the doors."""

    def __init__(self, name: str, *, limits: Limits | None = None, opening: Opening | None = None) -> None:
        door = Door(name)
        self.server = DoorServer(door)
        self.url = f"http://127.0.0.1:{self.server.start()}"
        self.server.run((opening or Opening()).open(door))
        self.services = {name: Standing(self, door, limits or Limits())}
        self.lobby = door.lobby

    def __getitem__(self, name: str) -> Standing:
        return self.services[name]

    def seat(self, name: str, *, limits: Limits | None = None) -> Standing:
        """Let another service in, of which nothing is known yet."""
        door = self.server.call(self.lobby.seat, name)
        self.services[name] = Standing(self, door, limits or Limits())
        return self.services[name]

    def until(self, holds: Any, *, within_s: float = 10.0) -> None:
        """Wait for what is about to hold on the door's loop."""

        async def wait() -> None:
            import asyncio

            async with asyncio.timeout(within_s):
                while not holds():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

        self.server.run(wait())


@contextlib.contextmanager
def address(*pipelines: hr.Pipeline, limits: Limits | None = None, opening: Opening | None = None) -> Iterator[Address]:
    """A service of each pipeline, by its name; the first one has the doors."""
    there = Address(pipelines[0].name, limits=limits, opening=opening)
    try:
        for pipeline in pipelines:
            standing = there.services.get(pipeline.name) or there.seat(pipeline.name)
            standing.serve(1, pipeline)
        yield there
    finally:
        there.server.stop(timeout_s=0.5)
        for standing in there.services.values():
            for replica, _ in standing.versions.values():
                replica.close()
