"""Every name of Ray Serve that depends on its version: applications deployed, scaled, watched and ended. Written against ray 2.60.

Part of `compat`, and apart from it because Ray Serve is an extra, and slow to load. All functions block for at most `_PATIENCE_S` but where
they say otherwise, and raise `OutOfReach` while Serve's controller is dead or busy: it is started again by Ray, so ask again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private import replica as replica_module
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.api import RunTarget, _run_many
from ray.serve.deployment import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.errors import RunError

__all__ = [
    "Application",
    "Deployed",
    "DeploymentHandle",
    "OutOfReach",
    "RayServeException",
    "Replica",
    "delete",
    "deploy",
    "deployed",
    "end_process",
    "end_serve",
    "kill",
    "listen_narrowly",
    "own_id",
    "scale",
    "serve",
    "start_serve",
]

_PATIENCE_S = 10.0
OPEN, CLOSE = "[headrace]", "[/headrace]"
"""What a replica that cannot start puts around its reason: Serve reports a page of its own frames with it."""


class OutOfReach(RunError):  # noqa: N818 - it says where the controller is; it is back soon
    """Serve's controller does not answer at the moment."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica as Serve sees it. `id` is what it calls itself, in `Endpoint.replica` too.

    `state` is Serve's word: STARTING, RUNNING, STOPPING, RECOVERING, ... `pid` is None until its process has started.
    """

    id: str
    state: str
    actor: str
    node: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class Deployed:
    """A group as Serve sees it: how many replicas it is to have, and those that there are.

    `failed` says why none can start, once Serve has given up on it (three tries a replica), `trouble` why the last try failed
    while it goes on trying, or that there has been no room for half a minute.
    """

    target: int
    replicas: tuple[Replica, ...]
    failed: str = ""
    trouble: str = ""


def start_serve() -> None:
    """Start Serve on the connected Ray if it does not run there, without proxies: nothing of ours passes through them.

    A Serve that runs already stays as it is.
    """
    with _reached():
        serve.start(proxy_location="Disabled")


def end_serve() -> None:
    """End all applications of this Ray, and Serve itself. Waits half a minute at most for replicas to drain."""
    there = [replica for groups in deployed().values() for group in groups.values() for replica in group.replicas]
    with _reached():
        ended = _controller().graceful_shutdown.remote()
        deadline_s = time.monotonic() + 3 * _PATIENCE_S
        while not ray.wait([ended], timeout=0.5)[0]:
            if time.monotonic() > deadline_s:
                return
            for replica in there:
                if replica.pid is None:  # it waits for room, and Serve for it as if it had work to finish
                    kill(replica)
        serve.shutdown()


def deploy(application: Application, name: str) -> None:
    """Deploy an application under `name`, and return once Serve has taken it, before any replica runs. `start_serve` comes first.

    The replicas get the runtime environment of the process that calls this.
    """
    with _reached():
        _run_many(
            [RunTarget(target=application, name=name, route_prefix=None, external_scaler_enabled=True)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def scale(name: str, group: str, replicas: int) -> None:
    """Set how many replicas a group of an application has, from 0 on. Running ones go on as they are; surplus ones drain and end.

    Raises:
        LookupError: Serve has no such application or group, or not yet: it takes a moment after `deploy`.
    """
    with _reached():
        controller = _controller()
        try:
            ray.get(controller.update_deployment_replicas.remote(DeploymentID(name=group, app_name=name), replicas), timeout=_PATIENCE_S)
        except ValueError as error:
            raise LookupError(f"no group {group!r} in application {name!r}") from error


def delete(name: str) -> None:
    """End an application: its replicas drain and end. Returns at once, and does nothing where there is none of that name."""
    with _reached():
        ray.get(_controller().delete_apps.remote([name]), timeout=_PATIENCE_S)


def deployed() -> dict[str, dict[str, Deployed]]:
    """All applications and their groups. An application that is being deleted is there until its last replica has ended."""
    with _reached():
        details = ray.get(_controller().get_serve_instance_details.remote(), timeout=_PATIENCE_S)
    return {name: {group: _deployed(name, group, found) for group, found in one["deployments"].items()} for name, one in details["applications"].items()}


def own_id() -> str:
    """Inside a replica: what it calls itself."""
    return str(serve.get_replica_context().replica_id.unique_id)


def listen_narrowly() -> None:
    """Inside a replica that is being made: let Serve's own server in it listen on its node's address alone, instead of on all that the machine has."""
    bind = replica_module.add_port_to_grpc_server  # type: ignore[attr-defined]
    address = f"{ray.util.get_node_ip_address()}:0"
    replica_module.add_port_to_grpc_server = lambda server, _: bind(server, address)  # type: ignore[attr-defined]


def kill(replica: Replica) -> None:
    """End a replica's process at once, even one that is stopped (SIGSTOP) or hangs; Serve starts another in its place.

    Ray itself first asks a process to end, and waits 5 s for one that cannot answer: so it gets a SIGKILL beside that, on its own node.
    """
    if replica.pid is not None and replica.node:
        title = "ray::ServeReplica:" + replica.actor.partition("::")[2].rpartition("#")[0].replace("#", ":")
        if replica.node == ray.get_runtime_context().get_node_id():
            end_process(replica.pid, title)
        else:
            pinned = NodeAffinitySchedulingStrategy(replica.node, soft=False)
            ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=pinned).remote(replica.pid, title)
    with contextlib.suppress(ValueError):  # no such actor: it has ended by itself
        ray.kill(ray.get_actor(replica.actor, namespace=SERVE_NAMESPACE))


def end_process(pid: int, title: str) -> None:
    """SIGKILL for a process of this node, if it still is the one that Ray has given that title: numbers of processes are used again."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
            os.kill(pid, signal.SIGKILL)


def _controller() -> Any:
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError as error:
        raise OutOfReach("Serve does not run on this Ray") from error


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ray.exceptions.RaySystemError, RayServeException, TimeoutError) as error:
        raise OutOfReach(f"Serve's controller does not answer: {type(error).__name__}: {error}") from error


def _deployed(name: str, group: str, found: Mapping[str, Any]) -> Deployed:
    status, message = found["status"].value, found["message"]
    replicas = tuple(  # Serve leaves out what it does not know while the process has not started
        Replica(
            one["replica_id"],
            one["state"].value,
            ReplicaID(one["replica_id"], DeploymentID(group, name)).to_full_id_str(),
            one.get("node_id") or "",
            one.get("pid"),
        )
        for one in found["replicas"]
    )
    failed = status == "DEPLOY_FAILED"
    trouble = bool(message) and not failed and "health check" not in message  # the end of one that ran is another matter
    return Deployed(found["target_num_replicas"], replicas, _reason(message) if failed else "", _reason(message) if trouble else "")


def _reason(message: str) -> str:
    """Why a replica did not start: what it said itself, else the last line of what it raised, else Serve's own words."""
    if OPEN in message and CLOSE in message:
        return message.rpartition(OPEN)[2].partition(CLOSE)[0]
    lines = message.partition("Error:\n")[2].strip().splitlines()
    if not lines:
        return message
    return "its process ended while it started: a crash, os._exit, or out of memory" if lines[-1].startswith("ActorDiedError") else lines[-1]
