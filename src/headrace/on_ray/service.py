"""Services, from the side of a command: start one, bring a new version into one that runs, roll back, stop."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.errors import HeadraceError, RunError, ServingError, StoppedError
from headrace.hardware import Cluster
from headrace.on_ray import cluster, compat, deployments
from headrace.on_ray.backstage import Backstage
from headrace.on_ray.control import Charge, Control
from headrace.on_ray.deploying import Bounds, Change, Deployment, Tell, get, happenings
from headrace.on_ray.doors import FrontDoor, Listening, Opening
from headrace.on_ray.naming import BACKSTAGE, NAMESPACE, control_name, control_of, door_name
from headrace.pipeline import Pipeline
from headrace.serving import place
from headrace.serving.bodies import openapi
from headrace.serving.routes import Limits
from headrace.serving.watch.pipes import Pipes

PROMISES = 8
"""How often a Ray that is started for a service promises each core: versions run beside each other, and most replicas wait most of the time."""

_START_S = 60.0
_END_S = 30.0  # for processes to end that have nothing to do any more


@dataclass(frozen=True, slots=True)
class Where:
    """Which Ray: the one at `address`, or a service's own on this machine. `folder` is where the pipeline file lies."""

    address: str | None = None
    folder: Path | None = None
    verbose: bool = False

    @property
    def joins(self) -> str | None:
        """The cluster to join, if any."""
        return self.address or os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Face:
    """What a service shows: where its doors listen, how many there are, TLS, the file with its keys, and whether requests are logged.

    `opening` has the doors speak OpenAI's interface; `guarded` is whether it knows keys, and lets nobody in without one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    doors: int = 2
    tls: tuple[str, str] | None = None
    keys: Path | None = None
    log: bool = True
    opening: Opening | None = None
    guarded: bool = False

    def url(self, port: int, machine: str) -> str:
        """Where it answers, seen from this machine, whose own address is `machine`."""
        host = machine if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared, not bound
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True, slots=True)
class Service:
    """A service as a command means it: its pipeline and name, where it is to run, and how."""

    pipeline: Pipeline
    name: str
    where: Where = field(default_factory=Where)
    face: Face = field(default_factory=Face)
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    change: Change = field(default_factory=Change)


def serve(service: Service, *, tell: Tell) -> None:
    """Serve a pipeline: as the next version of the service of that name where one runs, else as a new service.

    On a Ray that is started for it, a new service runs until this process is told to stop (SIGINT, SIGTERM); requests that were taken are
    answered before it ends. On a cluster that is joined it goes on after this returns. `tell` is called with a line for all that happens.

    Raises:
        DeployError: the version did not take over, and why.
        HardwareError, RunError, ServingError: it cannot run here.
    """
    where = service.where
    with _Stop() as stopped:
        if where.joins:
            with cluster.connected(where.joins, folder=where.folder, verbose=where.verbose) as has:
                stopped.listen()
                if service.name in _running():
                    _update(service, has, tell, stopped)
                else:
                    with _reserved(service.face.host, service.face.port) as port:
                        _begin(service, has, port, "", tell, stopped)
        elif running := place.find(service.name):
            with cluster.entered(cluster.Entry(running.address, running.token), verbose=where.verbose):
                stopped.listen()
                _update(service, cluster.describe(spare_cpus=(PROMISES - 1) * compat.cores()), tell, stopped)
        else:
            _stay(service, tell, stopped)


def command(service: str, name: Literal["promote", "rollback"], *, where: Where, tell: Tell) -> None:
    """Let the version that is being brought in answer everything, or take it back; without one, a rollback lets the version before answer again.

    Raises:
        ServingError: there is no such service, or no such version.
    """
    with _found(service, where):
        control = control_of(service)
        _, told = get(control.latest.remote())
        get(control.command.remote(name))
        for _, event in get(control.events.remote(told, 3.0)):
            tell(str(event))


def stop(service: str, *, where: Where, tell: Tell) -> None:
    """End a service: doors finish what they have, then all of its processes end.

    Raises:
        ServingError: there is no such service.
        RunError: it does not end.
    """
    running = None if where.joins else place.find(service)
    if running is not None:
        os.kill(running.pid, signal.SIGTERM)  # it drains, ends its Ray, and takes its file away
        deadline_s = time.monotonic() + running.drain_s + _END_S
        while running.lives:
            if time.monotonic() > deadline_s:
                raise RunError(f"service {service!r} (process {running.pid}) was told to end {running.drain_s + _END_S:.0f} s ago; end the process by hand")
            time.sleep(0.1)
        tell(f"{service} has ended")
        return
    with _found(service, where):
        charge: Charge = get(control_of(service).charged.remote())
        _drain(service, charge.limits.deadline_s, tell)
        _end(service)
        tell(f"{service} has ended")


def _stay(service: Service, tell: Tell, stopped: _Stop) -> None:
    """A new service on a Ray of its own, until this process is told to stop."""
    face, drain_s = service.face, service.limits.deadline_s
    with contextlib.ExitStack() as during:
        port = during.enter_context(_reserved(face.host, face.port))  # an address that is taken is told before Ray starts
        has = during.enter_context(cluster.connected(verbose=service.where.verbose, promises=PROMISES, urgent=True))
        stopped.listen()
        pipes = during.enter_context(Pipes(face.doors, sys.stdout.buffer)) if face.log else None
        url = _begin(service, has, port, pipes.pattern if pipes else "", tell, stopped)
        entry = cluster.entry()
        here = place.here(service.name, address=entry.address, token=entry.token, url=url, drain_s=drain_s)
        place.write(here)
        during.callback(place.forget, here)
        for event in happenings(service.name, get(control_of(service.name).latest.remote())[1], stopped):
            tell(str(event))
        _drain(service.name, drain_s, tell)


def _begin(service: Service, has: Cluster, port: int, logs: str, tell: Tell, stopped: _Stop) -> str:
    """Start control, doors and the first version; where they answer."""
    name, face = service.name, service.face
    url = face.url(port, compat.node_address())
    keys, ca = None if face.keys is None else str(face.keys.resolve()), None if face.tls is None else face.tls[0]
    Charge.forget(name)  # what a service of this name left that was killed
    _actor(Control, control_name(name), 1000).remote(Charge(name, service.limits, url, keys, ca, face.guarded))
    listening = Listening(name, face.host, port, face.tls, logs if face.log else None, face.opening)
    doors = [_actor(FrontDoor, door_name(name, number), 4).remote(listening, number) for number in range(face.doors)]
    if face.opening is not None and face.opening.works:
        doors.append(_actor(Backstage, door_name(name, BACKSTAGE), 4).remote(name, BACKSTAGE, face.opening))
    try:
        deployments.start_serve()
        get([door.listens.remote() for door in doors], timeout_s=_START_S)
        Deployment(service.pipeline, name, service.limits, service.bounds, service.change, has).run(tell, stopped=stopped)
    except StoppedError as error:
        _end(name)
        raise StoppedError(f"{name} was told to stop before it was ready") from error
    except (HeadraceError, ray.exceptions.RayError, KeyboardInterrupt):
        _end(name)
        raise
    key = " -H 'Authorization: Bearer hr_...'" if face.keys or face.guarded else ""
    contract = openapi.contract(service.pipeline)
    sample = shlex.quote(json.dumps(contract["sample"]))
    tell(f"{name} answers at {url}/{service.pipeline.name} and is documented at {url}/docs")
    tell(f"  curl {url}/{service.pipeline.name} -H 'Content-Type: application/json'{key} -d {sample}")
    if face.opening is not None and (speech := contract.get("speech")):
        asked = {"/v1/embeddings": {"input": "Good"}}.get(speech["paths"][0], {"messages": [{"role": "user", "content": "Hello"}]})
        body = shlex.quote(json.dumps({"model": speech["model"], **asked}))
        tell(f"{name} speaks OpenAI's interface at {url}/v1, as the model {speech['model']}")
        tell(f"  curl {url}{speech['paths'][0]} -H 'Content-Type: application/json'{key} -d {body}")
    return url


def _update(service: Service, has: Cluster, tell: Tell, stopped: _Stop) -> None:
    Deployment(service.pipeline, service.name, service.limits, service.bounds, service.change, has).run(tell, stopped=stopped)


@contextlib.contextmanager
def _found(name: str, where: Where) -> Iterator[None]:
    """A connection to the Ray of a running service.

    Raises:
        ServingError: there is none of that name.
    """
    if where.joins:
        with cluster.connected(where.joins, verbose=where.verbose):
            if name not in (running := _running()):
                raise place.unknown(name, running)
            yield
        return
    there = place.find(name)
    if there is None:
        raise place.unknown(name, [one.service for one in place.known()])
    with cluster.entered(cluster.Entry(there.address, there.token), verbose=where.verbose):
        yield


def _running() -> list[str]:
    """The services of the connected cluster."""
    first = control_name("")
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(first) for name in names if name.startswith(first) and "-door-" not in name)


def _doors(name: str) -> list[Any]:
    first = door_name(name, 0)[:-1]
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    return [ray.get_actor(door, namespace=NAMESPACE) for door in names if door.startswith(first)]


def _actor(kind: type, name: str, calls: int) -> Any:
    """One of a service's own actors: on this node if it can be, outliving this process, started again whenever it dies."""
    return ray.remote(kind).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=calls,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    )


def _drain(name: str, drain_s: float, tell: Tell) -> None:
    """Let the doors finish what they have: no request is allowed more than `drain_s`."""
    tell(f"{name} is ending: no more requests are taken, those under way are finished")
    with contextlib.suppress(RunError, ray.exceptions.RayError, ValueError):
        get([door.drain.remote(drain_s) for door in _doors(name)], timeout_s=drain_s + 5.0)


def _end(name: str) -> None:
    """End all of a service on a Ray that goes on."""
    deadline_s = time.monotonic() + _END_S
    actors = []
    with contextlib.suppress(RunError, ray.exceptions.RayError, ValueError):
        control = control_of(name)
        actors.append(control)
        get(control.command.remote("stop"))
        while not get(control.ended.remote()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        actors += _doors(name)
    for actor in actors:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor)
    Charge.forget(name)
    if not _running() and not deployments.deployed():
        deployments.end_serve()


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """A port that is free now, held for the length of the block in a way that lets the doors, and nobody else, share it.

    Raises:
        ServingError: something listens there, or there is no such address here.
    """
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as alone, socket.socket(kind) as shared:
        try:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))  # without SO_REUSEPORT: another service of this user would share its port
            number = int(alone.getsockname()[1])
            alone.close()
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind((host, number))
        except OSError as error:
            raise ServingError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port, or --port 0 for any free one") from error
        yield number


class _Stop(threading.Event):
    """Set by SIGINT and SIGTERM for the length of the block. A second one ends the process as it would have."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Hear the signals, again where Ray has taken them for itself, as it does when it is joined."""
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def _note(self, number: int, _: object) -> None:
        if self.is_set():
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        self.set()
