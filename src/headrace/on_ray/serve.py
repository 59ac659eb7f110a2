"""The online lowering: a plan becomes a native application of Ray Serve, with a deployment for each group.

Each Serve replica runs a `ReplicaServer`, to which a service's doors connect. Where there are no doors, Serve's own proxy and handles reach the
same stations through the first deployment, and between deployments go Arrow streams, whose arrays nobody takes apart on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from starlette.requests import Request
from starlette.responses import Response

from headrace import expendable
from headrace import plan as planning
from headrace.arrays import table, to_rows
from headrace.client.attempts import error_from
from headrace.errors import DefinitionError, RowError, StageError
from headrace.hardware import Hardware
from headrace.on_ray import cluster, compat, deployments
from headrace.on_ray.naming import control_of
from headrace.on_ray.operators import limit_threads
from headrace.pipeline import Pipeline
from headrace.plan import Group, Plan
from headrace.scaling.policy import Scale
from headrace.serving import words
from headrace.serving.bodies import openapi
from headrace.serving.bodies.streams import write_stream
from headrace.serving.door import heads
from headrace.serving.door.journey import EXPIRED
from headrace.serving.replica.caller import Caller
from headrace.serving.replica.jobs import Busy
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, Limits
from headrace.serving.wire import Content, Failure, Work

_ANNOUNCED_EACH_S = 2.0
_LIMITS = Limits()
_GRACE_S = 10.0  # beyond the longest request
_MOST_ONGOING = 100_000  # calls by handle that a replica takes at once: its own queue bounds them, and says how long to wait


@dataclass(frozen=True, slots=True)
class Task:
    """What a replica runs, as plain data: `code` is pickled, and looked into by replicas alone, so that nobody else needs the user's modules."""

    group: str
    code: bytes
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for a whole application. `service` and `version` are given where a control waits for its replicas.

    `warm_up` is a row for the first group, whose replicas show the `contract` to Serve's proxy.
    """

    limits: Limits
    service: str | None = None
    version: int = 0
    warm_up: Mapping[str, Any] | None = None
    contract: Mapping[str, Any] = field(default_factory=dict)


def serve(
    pipeline: Pipeline | Plan, *, target_in_flight: float = 8, limits: Limits = _LIMITS, warm_up: Mapping[str, Any] | None = None
) -> deployments.Application:
    """A pipeline as a native application of Ray Serve, a deployment for each group of the plan, for `ray.serve.run` and all that takes one.

        handle = ray.serve.run(hr.serve(reviews))
        handle.remote([{"text": "Good"}]).result()          # and POST {"text": "Good"} to Serve's own port

    Behind Serve's own proxy it answers as a service of `headrace serve` does, but without what that adds in front: keys, priorities,
    retries, NDJSON, answers that are sent as they are written, and rollbacks.

    Args:
        pipeline: the pipeline, planned for the Ray that is connected, else for this machine; or a plan that was resolved with `online=True`.
        target_in_flight: requests a replica, by which Serve adds replicas within the plan's bounds.
        limits: bounds of a request.
        warm_up: a row that each new replica of the first group computes before it counts as ready; a made-up one when left out.

    Raises:
        DefinitionError: the plan is for a batch job, or a stage's `ray` has arguments that Serve does not take.
        HardwareError: no node can hold a stage.
    """
    plan = pipeline
    if isinstance(plan, Pipeline):
        plan = planning.resolve(plan.pinned(), cluster.describe() if ray.is_initialized() else cluster.here(), online=True)

    def scaled(deployment: Any, group: Group) -> Any:
        least, most = group.replicas or (1, 1)
        if least == most:
            return deployment.options(num_replicas=least)
        return deployment.options(autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target_in_flight})

    return _bound(plan, Terms(limits, warm_up=warm_up, contract=openapi.contract(plan.pipeline)), scaled)


def application(plan: Plan, *, service: str, version: int, limits: Limits, scales: Mapping[str, Scale]) -> deployments.Application:
    """The plan as one version of a service: deployments whose replicas tell the service's control that they are there.

    Each begins with the least replicas of its scale, one at least; control sets their number from then on.

    Raises:
        DefinitionError: the plan is for a batch job, or a stage's `ray` has arguments that Serve does not take.
    """

    def scaled(deployment: Any, group: Group) -> Any:
        return deployment.options(num_replicas=max(1, scales[group.name].least))

    return _bound(plan, Terms(limits, service, version), scaled)


def _bound(plan: Plan, terms: Terms, scaled: Callable[[Any, Group], Any]) -> deployments.Application:
    """A deployment for each group, all of them bound to the first."""
    if not plan.online:
        raise DefinitionError("this plan is for a batch job; resolve it with online=True")
    for stage in plan.pipeline.stages:
        compat.ship_with_neighbours(stage.call)  # a version keeps its code, whatever becomes of the files
    later: list[Any] = []
    for group, reads in reversed(list(zip(plan.groups, plan.arrivals, strict=True))):
        code = ray.cloudpickle.dumps((group.stages, dict(reads), dict(group.carries), dict(plan.columns)))
        try:
            made = deployments.serve.deployment(name=group.name, **_options(group, terms.limits))(GroupReplica)
            deployment = scaled(made, group)
        except (ValueError, TypeError) as error:
            raise DefinitionError(f"group {group.name!r} cannot be deployed: {error}") from error
        task = Task(group.name, code, group.choice.hardware)
        if group is plan.groups[0]:
            break
        later.insert(0, deployment.bind(task, dataclasses.replace(terms, warm_up=None)))
    first: deployments.Application = deployment.bind(task, terms, *later)
    return first


def _options(group: Group, limits: Limits) -> dict[str, Any]:
    hardware = group.choice.hardware
    actor: dict[str, Any] = {"num_cpus": hardware.cpus}
    if hardware.gpus:
        actor["num_gpus"] = hardware.gpus
    if group.choice.kind:
        actor["accelerator_type"] = group.choice.kind
    if hardware.memory_gb:
        actor["memory"] = hardware.memory_gb * 1e9
    for stage in group.stages:
        actor |= dict(stage.ray)
    return {
        "ray_actor_options": actor,
        "max_ongoing_requests": _MOST_ONGOING,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": limits.deadline_s + _GRACE_S,  # until Serve kills a replica that is still at work
        "health_check_period_s": 1.0,  # by which Serve sees that a process has died
        "health_check_timeout_s": 3.0,  # three times in a row, until it takes one that does not answer for dead
    }


class GroupReplica:
    """A Serve replica: the stages of one group, behind a socket for doors and behind Serve's own calls."""

    def __init__(self, task: Task, terms: Terms, *later: deployments.DeploymentHandle[Any]) -> None:
        words.install()
        expendable.declare()
        deployments.listen_narrowly()
        self.task, self.terms, self.later = task, terms, later
        self._leaving = threading.Event()
        stages, self.reads, carries, self.writes = ray.cloudpickle.loads(task.code)
        threads = max(1, int(task.hardware.cpus))
        limit_threads(threads)
        lone = 1 if any(stage.is_model for stage in stages) else threads  # beside a model, which has all of them, functions have one
        token = secrets.token_hex(32)
        try:
            self.server = ReplicaServer(
                stages,
                reads=self.reads,
                carries=carries,
                group=task.group,
                device=task.hardware.device,
                limits=terms.limits,
                threads=lone,
                token=token,
            )
            self._warm_up()
        except StageError as error:
            raise RuntimeError(f"{deployments.OPEN}{error.frames}{error}{deployments.CLOSE}") from None
        limit_threads(threads)  # again, for the libraries that were loaded meanwhile
        # Where doors may be on other machines; a Ray of our own has loopback for its only address.
        host, port = self.server.start("127.0.0.1" if terms.service is None else compat.node_address())
        self.endpoint = Endpoint(deployments.own_id(), host, port, ray.get_runtime_context().get_node_id(), os.getpid(), token, self.server.beside)
        self.caller = Caller(host, port, token)
        if terms.service is not None:
            threading.Thread(target=self._announce, args=(terms.service,), name="headrace-announce", daemon=True).start()

    def _warm_up(self) -> None:
        """A given row must pass. A made-up one may mean nothing to the stages: then they are warm, and their log says what they made of it."""
        try:
            self.server.warm_up(self.terms.warm_up)
        except StageError as error:
            if self.terms.warm_up is not None:
                raise
            print(f"{self.task.group}: the made-up row of the warm-up failed: {error}", file=sys.stderr)

    def _announce(self, service: str) -> None:
        """Tell control that this replica is there, again and again: control, its actor and its machine may be others by then."""
        while True:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # there is none at the moment
                control_of(service).joined.remote(self.terms.version, self.task.group, self.endpoint)
            if self._leaving.wait(_ANNOUNCED_EACH_S):
                return

    def check_health(self) -> None:
        """Whether the replica can still answer, for Serve, which ends it and starts another if not."""
        if not self.server.alive:
            raise RuntimeError("the thread of the replica's sockets has died")

    def __del__(self) -> None:
        """Serve calls this before it ends the process, and waits: all that was taken is answered."""
        server: ReplicaServer | None = getattr(self, "server", None)
        if server is not None and not self._leaving.is_set():
            self._leaving.set()
            server.drain(self.terms.limits.deadline_s)
            server.close()

    async def __call__(self, asked: Any) -> Any:
        """A request of Serve's proxy, or rows that came by handle: one mapping, or several in a list.

        Raises:
            ServiceError: to a caller by handle, of the kind that `hr.Client` raises.
        """
        if isinstance(asked, Request):
            return await self._http(asked)
        rows = [asked] if isinstance(asked, Mapping) else list(asked)
        try:
            body = write_stream(table(rows, self.reads))
        except ValueError as error:
            raise RowError(str(error), 422, "invalid_row") from error
        outcome = await self._through(Work(Content.ARROW, Content.ARROW, left_s=self.terms.limits.deadline_s), body)
        if isinstance(outcome, Failure | Busy):
            failure = _failure(outcome)
            raise error_from(heads.failure_fields(failure), failure.status, "")
        answers = to_rows(pa.ipc.open_stream(outcome).read_all(), self.writes)
        return answers[0] if isinstance(asked, Mapping) else answers

    async def compute(self, work: Work, body: Any) -> pa.Buffer | Failure | Busy:
        """What this group makes of the body of a request or of an Arrow stream: an Arrow stream, or as the last one the body of the answer."""
        outcome = await self.caller.ask(work, memoryview(body))
        return outcome if isinstance(outcome, Failure | Busy) else pa.py_buffer(outcome)  # which travels without being copied by pickle

    async def _through(self, work: Work, body: bytes | memoryview) -> pa.Buffer | Failure | Busy:
        """The request's way through this group and all later ones."""
        assert work.left_s is not None
        until_s = time.monotonic() + work.left_s
        steps: list[Any] = [self.compute, *(handle.compute.remote for handle in self.later)]
        outcome: Any = body
        try:
            async with asyncio.timeout(work.left_s):
                for at, step in enumerate(steps):
                    part = dataclasses.replace(
                        work,
                        content=Content.ARROW if at else work.content,
                        accept=Content.ARROW if step is not steps[-1] else work.accept,
                        left_s=until_s - time.monotonic(),
                    )
                    outcome = await step(part, outcome)
                    if isinstance(outcome, Failure | Busy):
                        break
        except TimeoutError:
            outcome = EXPIRED
        answer: pa.Buffer | Failure | Busy = outcome
        return answer

    async def _http(self, request: Request) -> Response:
        """A request of Serve's proxy: the rows of a POST, as at a door, or the contract's schema to a GET."""
        found = heads.scan(request.headers.raw)
        request_id = heads.request_id(found) or uuid.uuid4().hex
        outcome = await self._answer(request, found, request_id)
        if isinstance(outcome, pa.Buffer):
            kind = heads.ARROW_TYPE if heads.ARROW_TYPE in found.get(b"accept", b"").lower() else heads.JSON_TYPE
            return Response(bytes(outcome), 200, {"x-request-id": request_id}, kind.decode())
        failure = _failure(outcome)
        more = {"retry-after": str(math.ceil(max(1.0, outcome.retry_after_s)))} if isinstance(outcome, Busy) else {}
        return Response(heads.failure_body(failure, request_id), failure.status, {"x-request-id": request_id, **more}, heads.JSON_TYPE.decode())

    async def _answer(self, request: Request, found: dict[bytes, bytes], request_id: str) -> pa.Buffer | Failure | Busy:
        if request.method == "GET" and request.url.path.rstrip("/").endswith("/schema"):
            return pa.py_buffer(json.dumps(openapi.schema(self.terms.contract)).encode())
        if request.method != "POST":
            return Failure(405, "method_not_allowed", f'{request.method} is not answered here; POST one row, or {{"rows": [...]}}')
        try:
            head = heads.read(found)
        except heads.HeadError as error:
            return error.failure
        if head.content is None:
            return Failure(415, "unsupported_media_type", "NDJSON is answered by headrace serve; send JSON or Arrow here")
        if head.events:
            return Failure(406, "not_acceptable", "text/event-stream is answered by headrace serve; ask for JSON or Arrow here")
        limits = self.terms.limits
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > limits.body_bytes:
                return Failure(413, "too_large", f"the body has more than {limits.body_bytes} bytes")
        left_s = limits.deadline_s if head.timeout_s is None else min(head.timeout_s, limits.deadline_s)
        return await self._through(Work(head.content, head.accept, left_s, head.priority, trace=head.trace, request_id=request_id), body)


def _failure(outcome: Failure | Busy) -> Failure:
    return Failure(429, "overloaded", "the queue of every replica that was asked is full") if isinstance(outcome, Busy) else outcome
