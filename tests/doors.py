"""A service in this process, without Ray: a door and one replica for each of some stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import headrace as hr
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute


@contextlib.contextmanager
def service(pipeline: hr.Pipeline, *, limits: Limits | None = None) -> Iterator[str]:
    """Serve `pipeline`, all of it in one replica, for the length of the block; the address."""
    limits = limits or Limits()
    replica = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs, group="all", limits=limits, token="secret")
    server = DoorServer(Door(pipeline.name))
    try:
        host, port = replica.start()
        group = GroupRoute("all", (Endpoint("one", host, port, token="secret"),))
        address = f"http://127.0.0.1:{server.start()}"
        server.call(server.door.update, Routes(pipeline.name, 1, (VersionRoute(1, 1.0, (group,), contract(pipeline)),), limits))
        yield address
    finally:
        server.stop(timeout_s=0.5)
        replica.close()
