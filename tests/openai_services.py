"""A service that speaks OpenAI's interface, in this process: a door on a port before one replica whose engine has no model."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from speakers import MODEL, FakeSpeaker, Parrot

import headrace as hr
from headrace.gateway.openai.opening import Opening
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "one two three"}


@dataclass
class Service:
    """The door, and the engine behind it."""

    server: DoorServer
    speaker: FakeSpeaker
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: Any, path: str = CHAT, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(self.url + path, content=content, headers={"content-type": "application/json", **(headers or {})}, timeout=20)

    def raw(self, data: bytes) -> bytes:
        """All that comes back until the door closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@contextlib.contextmanager
def speaking(limits: Limits | None = None, opening: Opening | None = None, **settings: Any) -> Iterator[Service]:
    """Such a service. `settings` are those of the engine's stage."""
    limits = limits or Limits()
    pipeline = hr.Pipeline("talk", Parrot(**settings))
    replica = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs, group="all", limits=limits, token="secret")
    server = DoorServer(Door("talk"))
    try:
        host, port = replica.start()
        group = GroupRoute("all", (Endpoint("one", host, port, token="secret", beside=replica.beside),))
        here = server.start()
        server.run((opening or Opening()).open(server.door))
        server.call(server.door.update, Routes("talk", 1, (VersionRoute(1, 1.0, (group,), contract(pipeline)),), limits))
        until(lambda: server.door.fleet.versions[1].pools[-1].usable)
        yield Service(server, replica._talks.speaker, here)
    finally:
        server.stop(timeout_s=0.5)
        replica.close()


def until(holds: Callable[[], Any], *, within_s: float = 10.0) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.002)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "one two three", **more}
