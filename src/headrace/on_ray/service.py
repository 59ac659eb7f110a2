"""Services, from the side of a command: start one, bring a new version into one that runs, roll back, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.errors import HeadraceError, RunError, ServingError, StoppedError, listing
from headrace.hardware import Cluster
from headrace.on_ray import cluster, compat, deployments
from headrace.on_ray.backstage import Backstage
from headrace.on_ray.control import Charge, Control
from headrace.on_ray.deploying import Deployed, Deployment, Tell, get, happenings, run_together
from headrace.on_ray.doors import FrontDoor, Listening
from headrace.on_ray.following import Follower
from headrace.on_ray.intent import Face, Service, Standing, Where
from headrace.on_ray.naming import NAMESPACE, control_name, control_of, door_name
from headrace.serving import place
from headrace.serving.routes import BACKSTAGE
from headrace.serving.watch.pipes import Pipes

__all__ = ["PROMISES", "Face", "Service", "Standing", "Where", "command", "serve", "stop"]

PROMISES = 8
"""How often a Ray that is started for a service promises each core: versions run beside each other, and most replicas wait most of the time."""

_START_S = 60.0
_NARRATED_S = 2.0
_END_S = 30.0  # for processes to end that have nothing to do any more


Ready = Callable[[Standing], None]


def serve(service: Service, *others: Service, tell: Tell, ready: Ready | None = None) -> None:
    """Serve a pipeline: as the next version of the service of that name where one runs, else as a new service.

    `others` are served with it, as guests of it, or of the service that it is `behind` itself. On a Ray that is started for it, a new service
    runs until this process is told to stop (SIGINT, SIGTERM); requests that were taken are answered before it ends. On a cluster that is
    joined, or behind another service, it goes on after this returns, which it does at once, or, if it follows aliases (`Change.follow_s`), when
    told to stop. `tell` is called with a line for all that happens, and `ready` when all answer, in place of lines that say where.

    Raises:
        DeployError: a version did not take over, and why.
        HardwareError, RunError, ServingError: it cannot run here.
    """
    where, host = service.where, service.behind or service.name
    services = (service, *(dataclasses.replace(other, behind=host) for other in others))
    with _Stop() as stopped:
        if where.joins:
            with cluster.connected(where.joins, folder=where.folder, verbose=where.verbose) as has:
                stopped.listen()
                if host in (running := _running()):
                    standing, versions = _settle(services, has, tell, stopped)
                elif service.behind is not None:
                    raise place.unknown(host, running)
                else:
                    with _reserved(service.face.host, service.face.port) as port:
                        standing, versions = _begin(services, has, port, "", tell, stopped)
                _announce(standing, tell, ready)
                _follow(versions, tell, stopped)
        elif running_here := place.find(host):
            with cluster.entered(cluster.Entry(running_here.address, running_here.token), verbose=where.verbose):
                stopped.listen()
                standing, versions = _settle(services, cluster.describe(spare_cpus=(PROMISES - 1) * compat.cores()), tell, stopped)
                for one in standing.new:
                    place.write(dataclasses.replace(running_here, service=one.name, drain_s=one.limits.deadline_s, behind=host))
                _announce(standing, tell, ready)
                _follow(versions, tell, stopped)
        elif service.behind is not None:
            raise place.unknown(host, [one.service for one in place.known()])
        else:
            _stay(services, tell, ready, stopped)


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
    """End a service, and its guests: doors finish what they have, then all of its processes end.

    Raises:
        ServingError: there is no such service.
        RunError: it does not end.
    """
    running = None if where.joins else place.find(service)
    if running is not None and not running.behind:
        drain_s = max(one.drain_s for one in place.known() if service in (one.service, one.behind))
        os.kill(running.pid, signal.SIGTERM)  # it drains, ends its Ray, and takes its file away
        deadline_s = time.monotonic() + drain_s + _END_S
        while running.lives:
            if time.monotonic() > deadline_s:
                raise RunError(f"service {service!r} (process {running.pid}) was told to end {drain_s + _END_S:.0f} s ago; end the process by hand")
            time.sleep(0.1)
        tell(f"{service} has ended")
        return
    with _found(service, where):
        _drain(service, tell)
        _end(service)
        if running is not None:
            place.forget(running)
        tell(f"{service} has ended")


def _stay(services: Sequence[Service], tell: Tell, ready: Ready | None, stopped: _Stop) -> None:
    """New services on a Ray of their own, until this process is told to stop."""
    host, face = services[0], services[0].face
    with contextlib.ExitStack() as during:
        port = during.enter_context(_reserved(face.host, face.port))  # an address that is taken is told before Ray starts
        has = during.enter_context(cluster.connected(verbose=host.where.verbose, promises=PROMISES, urgent=True))
        stopped.listen()
        pipes = during.enter_context(Pipes([*map(str, range(face.doors)), BACKSTAGE], sys.stdout.buffer)) if face.log else None
        standing, versions = _begin(services, has, port, pipes.pattern if pipes else "", tell, stopped)
        entry = cluster.entry()
        for one in services:
            here = place.here(one.name, address=entry.address, token=entry.token, url=standing.url, drain_s=one.limits.deadline_s, behind=one.behind or "")
            place.write(here)
            during.callback(place.forget, here)
        during.callback(_forget_guests, host.name)
        _announce(standing, tell, ready)
        for guest in services[1:]:
            narrator = threading.Thread(target=_narrate, args=(guest.name, tell, stopped), name=f"headrace-{guest.name}", daemon=True)
            narrator.start()
            during.callback(narrator.join, _NARRATED_S)
        follower = threading.Thread(target=_follow, args=(versions, tell, stopped, False), name="headrace-aliases", daemon=True)
        follower.start()
        during.callback(follower.join, _NARRATED_S)
        for event in happenings(host.name, get(control_of(host.name).latest.remote())[1], stopped.is_set):
            tell(str(event))
        _drain(host.name, tell)


def _forget_guests(host: str) -> None:
    """Those that came later end with their host, too."""
    for one in place.known():
        if one.behind == host:
            place.forget(one)


def _narrate(guest: str, tell: Tell, stopped: _Stop) -> None:
    """Tell what happens to a guest. When nothing is heard of it any more, that is all there is to tell."""
    with contextlib.suppress(RunError, ray.exceptions.RayError, ValueError):
        for event in happenings(guest, get(control_of(guest).latest.remote())[1], stopped.is_set):
            tell(f"{guest}: {event}")


def _follow(versions: Sequence[Deployed], tell: Tell, stopped: _Stop, narrated: bool = True) -> None:
    """Follow the aliases of those that are to be followed, until told to stop. What a version goes through on its way is told unless others do that."""
    followers = [Follower(one, one.deployment.change.follow_s) for one in versions if one.deployment.change.follow_s is not None]
    threads = [threading.Thread(target=one.run, args=(tell, stopped.wait, narrated), name="headrace-alias", daemon=True) for one in followers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _begin(services: Sequence[Service], has: Cluster, port: int, logs: str, tell: Tell, stopped: _Stop) -> tuple[Standing, list[Deployed]]:
    """Start control, doors and the first version of a service, and its guests."""
    host, face = services[0], services[0].face
    url = face.url(port, compat.node_address())
    keys, ca = None if face.keys is None else str(face.keys.resolve()), None if face.tls is None else face.tls[0]
    charge = Charge(host.name, host.limits, url, keys, ca, face.guarded)
    _control(charge)
    listening = Listening(host.name, face.host, port, face.tls, logs if face.log else None, face.opening)
    doors = [_actor(FrontDoor, door_name(host.name, number), 8).remote(listening, number) for number in range(face.doors)]
    if face.opening is not None and face.opening.works:
        doors.append(_actor(Backstage, door_name(host.name, BACKSTAGE), 8).remote(listening))
    with _ended_on_failure(services):
        for guest in services[1:]:
            _control(Charge(guest.name, guest.limits, url, ca=ca, behind=host.name))
        deployments.start_serve()
        get([door.listens.remote() for door in doors], timeout_s=_START_S)
        return _deploy(services, services, charge, has, tell, stopped)


def _settle(services: Sequence[Service], has: Cluster, tell: Tell, stopped: _Stop) -> tuple[Standing, list[Deployed]]:
    """Bring versions of services to where the first one of them, or its host, runs; those that are new there, as guests."""
    host = services[0].behind or services[0].name
    charge: Charge = get(control_of(host).charged.remote())
    running, new = _running(), []
    for one in services:
        if one.behind is None:
            continue  # the next version of one that runs, whose place stays what it is
        if charge.behind is not None:
            raise ServingError(f"{host!r} has no doors of its own: it is behind {charge.behind!r}; say --behind {charge.behind}")
        if one.name in running:
            there = get(control_of(one.name).charged.remote()).behind
            if there != host:
                where = "with doors of its own" if there is None else f"behind {there!r}"
                raise ServingError(f"service {one.name!r} runs already, {where}; stop it first, or give another --name")
        elif not one.where.joins and place.find(one.name) is not None:
            raise ServingError(f"service {one.name!r} runs already, on another Ray than {host!r}; stop it first, or give another --name")
        else:
            new.append(one)
    with _ended_on_failure(new):
        for one in new:
            _control(Charge(one.name, one.limits, charge.url, ca=charge.ca, behind=host))
        return _deploy(services, new, charge, has, tell, stopped)


def _deploy(services: Sequence[Service], new: Sequence[Service], charge: Charge, has: Cluster, tell: Tell, stopped: _Stop) -> tuple[Standing, list[Deployed]]:
    """Bring all versions to where they answer."""
    versions = run_together([Deployment(one.pipeline, one.name, one.limits, one.bounds, one.change, has) for one in services], tell, over=stopped.is_set)
    return Standing(tuple(services), tuple(new), charge.url, charge.service, charge.ca, charge.keys is not None or charge.guarded), versions


def _announce(standing: Standing, tell: Tell, ready: Ready | None) -> None:
    """Say what answers, and where."""
    if ready is not None:
        ready(standing)
        return
    for line in [line for one in standing.new for line in standing.told(one)]:
        tell(line)


@contextlib.contextmanager
def _ended_on_failure(services: Sequence[Service]) -> Iterator[None]:
    """If the block fails, nothing is left of these services."""
    try:
        yield
    except (HeadraceError, ray.exceptions.RayError, KeyboardInterrupt) as error:
        for one in reversed(services):
            _end(one.name)
        if isinstance(error, StoppedError) and services:
            raise StoppedError(f"{listing(one.name for one in services)} was told to stop before it was ready") from error
        raise


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


def _control(charge: Charge) -> None:
    """Start the control of a new service. What one of this name left that was killed is forgotten."""
    Charge.forget(charge.service)
    _actor(Control, control_name(charge.service), 1000).remote(charge)


def _drain(name: str, tell: Tell) -> None:
    """Let the doors finish what they have of a service, or of a guest: no request is allowed more than its deadline."""
    tell(f"{name} is ending: no more requests are taken, those under way are finished")
    with contextlib.suppress(RunError, ray.exceptions.RayError, ValueError):
        control = control_of(name)
        charge: Charge = get(control.charged.remote())
        if charge.behind is not None:
            get(control_of(charge.behind).unseat.remote(name))
            drain_s = charge.limits.deadline_s
            get([door.dismiss.remote(name, drain_s) for door in _doors(charge.behind)], timeout_s=drain_s + 5.0)
            return
        guests = [get(control_of(guest).charged.remote()) for guest in get(control.guests.remote())]
        drain_s = max(one.limits.deadline_s for one in [charge, *guests])
        get([door.drain.remote(drain_s) for door in _doors(name)], timeout_s=drain_s + 5.0)


def _end(name: str) -> None:
    """End all of a service, and its guests, on a Ray that goes on."""
    deadline_s = time.monotonic() + _END_S
    actors = []
    with contextlib.suppress(RunError, ray.exceptions.RayError, ValueError):
        control = control_of(name)
        actors.append(control)
        charge: Charge = get(control.charged.remote())
        if charge.behind is not None:
            get(control_of(charge.behind).unseat.remote(name))
        for guest in get(control.guests.remote()):
            _end(guest)
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
