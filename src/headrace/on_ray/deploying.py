"""A version of a service on its way: into Ray Serve, through its gate, until it has taken over or has not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from headrace import parity, registry
from headrace.client import Client
from headrace.errors import DeployError, HeadraceError, RegistryError, RunError, ServingError, StoppedError, listing, nearest
from headrace.formats import Input
from headrace.hardware import Cluster
from headrace.on_ray import cluster, deployments
from headrace.on_ray.control import Charge
from headrace.on_ray.naming import application_name, control_of
from headrace.on_ray.serve import application
from headrace.pipeline import Pipeline
from headrace.plan import Plan, resolve
from headrace.scaling.policy import Scale
from headrace.serving.bodies import openapi
from headrace.serving.release.guests import names_of
from headrace.serving.release.steering import Release
from headrace.serving.release.versions import How, Rolling, Shadow, Version
from headrace.serving.routes import Limits

_CALL_S = 30.0
_AWAY_S = 60.0  # how long control may be away until it counts as gone for good
Tell = Callable[[str], None]
Over = Callable[[], bool]

_alone = threading.Lock()  # of deploying: modules are looked through, and Serve is told


@dataclass(frozen=True, slots=True)
class Change:
    """How a version takes over: by and by, as a canary or as a shadow, and the golden rows that it must get right first.

    With `follow_s`, whoever deploys it stays, and looks so often whether aliases that its settings name have moved.
    """

    how: How = field(default_factory=Rolling)
    gate: Path | None = None
    follow_s: float | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Replicas of each group, least and most, where they are not those of its stages: by its name, or under an empty one for all.

    `target_in_flight` is the number of requests for each, `idle_s` how long nothing must have been asked for until the last one ends,
    where there may be none.
    """

    replicas: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    target_in_flight: float = 8.0
    idle_s: float = 300.0

    def scales(self, plan: Plan) -> dict[str, Scale]:
        """The bounds of each group of a plan.

        Raises:
            ServingError: there is no such group.
        """
        names = [group.name for group in plan.groups]
        if unknown := [name for name in self.replicas if name and name not in names]:
            raise ServingError(f"--replicas {unknown[0]}=... names no group of {plan.pipeline.name!r}; it has {listing(names)}" + nearest(unknown[0], names))
        everywhere = self.replicas.get("")
        return {
            group.name: Scale(
                *(self.replicas.get(group.name) or everywhere or group.replicas or (1, 1)), target_in_flight=self.target_in_flight, idle_s=self.idle_s
            )
            for group in plan.groups
        }


@dataclass(frozen=True, slots=True)
class Deployment:
    """A pipeline that is to become a version of a service, and the cluster that it is planned for."""

    pipeline: Pipeline
    service: str
    limits: Limits
    bounds: Bounds
    change: Change
    cluster: Cluster

    def run(self, tell: Tell, *, over: Over) -> Deployed:
        """Deploy it, and follow it until it answers, or until `over`.

        Raises:
            DeployError: it did not take over.
            HardwareError, ServingError: it cannot run there, or not so.
            StoppedError: it was over before.
        """
        pipeline = self.pipeline.pinned()
        number = self._deploy(pipeline, tell, over)
        try:
            registry.deployed(pipeline, self.service, number)
        except RegistryError as error:
            tell(f"it answers; but the registry could not note that, and headrace lineage will not show it: {error}")
        return Deployed(self, pipeline, number)

    def _deploy(self, pipeline: Pipeline, tell: Tell, over: Over) -> int:
        """The number of the version that answers."""
        plan = resolve(pipeline, self.cluster, online=True)
        scales = self.bounds.scales(plan)
        golden = None if self.change.gate is None else parity.golden(Input([str(self.change.gate)]), pipeline)
        gate = None if golden is None else functools.partial(self._gate, pipeline, golden, tell)
        contract = openapi.contract(pipeline)
        control = control_of(self.service)
        charge: Charge = get(control.charged.remote())
        latest, told = get(control.latest.remote())
        number: int = latest + 1
        with _alone:
            made = application(plan, service=self.service, version=number, limits=self.limits, scales=scales)
        if charge.behind is not None:
            names = (*get(control.names.remote()), *names_of(contract))
            get(control_of(charge.behind).seat.remote(self.service, names))
        get(control.deploy.remote(Release(Version(number, scales), contract, self.change.how, gate=gate is not None)))
        try:
            with _alone:
                deployments.deploy(made, application_name(self.service, number))
            self._follow(number, told, gate, tell, over)
        except (DeployError, StoppedError):
            raise
        except (HeadraceError, ray.exceptions.RayError, KeyboardInterrupt) as error:  # nobody is left to bring the version on
            why = str(error).partition("\n")[0] or type(error).__name__
            with contextlib.suppress(HeadraceError, ray.exceptions.RayError):  # superseded meanwhile, or control is away: `error` says what was wrong
                get(control.command.remote("abort", why=why, version=number))
            raise
        return number

    def _follow(self, number: int, told: int, gate: Callable[[int], None] | None, tell: Tell, over: Over) -> None:
        for event in happenings(self.service, told, over):
            tell(str(event))
            if event.version != number:
                continue
            if event.what == "ready" and gate is not None:
                gate(number)
            elif event.what == "promoted":
                return
            elif isinstance(self.change.how, Shadow) and event.what == ("gate passed" if gate else "ready"):
                tell(f"it shadows the version that answers; headrace top {self.service} compares them, headrace rollback {self.service} takes it away")
                return
            elif event.what in ("failed", "rolled back"):
                raise DeployError(f"version {number} of {self.service} did not take over: {event.why}")
        raise StoppedError(f"version {number} of {self.service} goes on by itself; headrace rollback {self.service} takes it back")

    def _gate(self, pipeline: Pipeline, golden: parity.Golden, tell: Tell, number: int) -> None:
        """Let the candidate compute the golden rows over HTTP, and tell control what came of it."""
        control = control_of(self.service)
        charge: Charge = get(control.charged.remote())
        key = lent_key(charge.behind or self.service)
        with Client(charge.url, key=key, version=number, ca=charge.ca) as client:
            verdict = parity.gate(pipeline, golden, parity.over_http(client, pipeline.name))
        what, *differences = str(verdict).splitlines()
        for line in differences:
            tell(line)
        get(control.command.remote("gate_failed" if verdict.differences else "gate_passed", version=number, why=what))


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment, its pipeline with the versions that aliases meant at that time, and the number that it has in its service."""

    deployment: Deployment
    pipeline: Pipeline
    number: int


def run_together(deployments: Sequence[Deployment], tell: Tell, *, over: Over) -> list[Deployed]:
    """Deploy several at once, and follow them until all answer, or until `over`.

    Raises:
        DeployError, HardwareError, ServingError: one of them did not take over, or cannot run; the others are not followed any more.
        StoppedError: it was over before.
    """
    failed = threading.Event()

    def run(one: Deployment) -> Deployed:
        said = tell if len(deployments) == 1 else functools.partial(_tell_of, one.service, tell)
        try:
            return one.run(said, over=lambda: over() or failed.is_set())
        finally:
            if sys.exception() is not None:
                failed.set()

    with concurrent.futures.ThreadPoolExecutor(len(deployments)) as pool:
        runs = [pool.submit(run, one) for one in deployments]
    if errors := [error for one in runs if (error := one.exception()) is not None]:
        raise min(errors, key=lambda error: isinstance(error, StoppedError))  # those that stopped because another one failed come last
    return [one.result() for one in runs]


def _tell_of(service: str, tell: Tell, text: str) -> None:
    tell(f"{service}: {text}")


def lent_key(service: str) -> str:
    """A key that a service with doors lets in for an hour, as soon as they have heard of it."""
    key = "hr_" + secrets.token_urlsafe(32)
    get(control_of(service).lend.remote(hashlib.sha256(key.encode()).hexdigest()))
    return key


def happenings(service: str, told: int, over: Over) -> Any:
    """What happens to a service after event number `told`, as it happens, until it is `over`.

    Raises:
        RunError: control, or its Ray, has been away for too long, or the Ray that this process has started has died.
    """
    heard_s = time.monotonic()
    while not over():
        if cluster.died():
            raise RunError(f"service {service!r} has ended: the raylet of its Ray has died, and all of its processes end with it")
        try:
            news = get(control_of(service).events.remote(told, 1.0))
        except (RunError, ray.exceptions.RayError, ValueError) as error:
            if time.monotonic() - heard_s > _AWAY_S or not ray.is_initialized():
                raise RunError(f"nothing is heard of service {service!r} any more: {error}") from error
            time.sleep(0.5)
            continue
        heard_s = time.monotonic()
        for number, event in news:
            told = number
            yield event


def get(reference: Any, *, timeout_s: float = _CALL_S) -> Any:
    """What an actor answers; an error of ours that it raised is raised as it was there."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeadraceError):
            raise error.cause from error
        raise
    except ray.exceptions.ActorDiedError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunError(f"a process of the service does not start: {told[-1]}") from error
    except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError) as error:
        raise RunError("the service's control does not answer at the moment; it starts again by itself: try again in a few seconds") from error
