"""Join a Ray cluster, or start one in this process, and say what it has."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

import headrace
from headrace.errors import RunError
from headrace.hardware import Cluster, Node
from headrace.on_ray import compat

_SPARE_CPUS = 1  # of a cluster that is joined: for reading, preparing and writing beside replicas that take all the rest


@dataclass(frozen=True, slots=True)
class Entry:
    """How another process of this machine comes into a Ray: its address, and the token that it asks for, empty where it asks for none."""

    address: str
    token: str


@contextlib.contextmanager
def connected(address: str | None = None, *, folder: Path | None = None, verbose: bool = False, promises: int = 2, urgent: bool = False) -> Iterator[Cluster]:
    """A connection for the length of the block: `address`, `RAY_ADDRESS`, the Ray that this process has joined, or a new one.

    A Ray that is started here promises each core `promises` times: once to a batch job's replicas and once to reading, preparing
    and writing, or to versions of a service that run beside each other. On one machine the operating system shares the cores out
    better than reservations do, and neither side waits while the other is idle. Its workers give way to other processes, as Ray has it,
    unless they are `urgent`. It listens on loopback alone, asks for a token,
    has no dashboard, and unless `verbose` nothing else that only other processes would ask. On a cluster that is joined, one CPU
    is left to others; it is sent headrace itself and the files of `folder`, where the pipeline file lies.

    Raises:
        RunError: the address does not answer.
    """
    if ray.is_initialized():
        yield describe(spare_cpus=_SPARE_CPUS)
        return
    if where := address or os.environ.get("RAY_ADDRESS"):
        with _joined({"address": where, "runtime_env": code(folder) if folder and not compat.in_job() else None}, verbose=verbose):
            yield describe(spare_cpus=_SPARE_CPUS)
        return
    with contextlib.ExitStack() as during:
        during.enter_context(compat.authenticated(_token()))
        with (
            # What this process can import, its workers can.
            _environment({"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)} | ({"RAY_worker_niceness": "0"} if urgent else {})),
            compat.loopback(),
            contextlib.nullcontext() if verbose else compat.lean(),
        ):
            # "local", or Ray would join a cluster that happens to run on this machine.
            during.enter_context(_joined({"address": "local", "num_cpus": promises * compat.cores(), "include_dashboard": False}, verbose=verbose))
        _reap_raylet()
        if not verbose:
            during.enter_context(compat.alone())
        yield describe(spare_cpus=(promises - 1) * compat.cores())


@contextlib.contextmanager
def entered(entry: Entry, *, verbose: bool = False) -> Iterator[None]:
    """A connection to a Ray that another process of this machine has started with `connected`, for the length of the block.

    Raises:
        RunError: it does not answer, or asks for another token.
    """
    with compat.authenticated(entry.token), compat.loopback(), _joined({"address": entry.address}, verbose=verbose):
        yield


def died() -> bool:
    """Whether the Ray that this process has started with `connected` has died: its raylet has ended, and nothing starts that again."""
    raylet = compat.raylet()
    return raylet is not None and raylet.returncode is not None


def entry() -> Entry:
    """By what `entered` comes into the Ray that this process is connected to."""
    return Entry(compat.gcs_address(), os.environ.get("RAY_AUTH_TOKEN", "") if os.environ.get("RAY_AUTH_MODE") == "token" else "")


def _reap_raylet() -> None:
    """Have the raylet of the Ray that was started reaped as soon as it ends, whoever ends it.

    Workers look every second whether there is a process of their raylet's number, and end when there is none. Ray only waits for a raylet
    that it has ended itself; any other would stay a zombie, which still has its number, for as long as this process lives.
    """
    raylet = compat.raylet()
    assert raylet is not None
    threading.Thread(target=raylet.wait, name="headrace-raylet", daemon=True).start()


def _token() -> str | None:
    """What a new Ray is to ask for: a token of its own, unless the environment gives one, or None where it turns authentication off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


@contextlib.contextmanager
def _joined(options: dict[str, Any], *, verbose: bool) -> Iterator[None]:
    where = options["address"]
    options |= {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    # Ray's C++ core writes to the terminal itself.
    try:
        with _environment({} if verbose else {"RAY_BACKEND_LOG_LEVEL": "fatal"}), contextlib.nullcontext() if verbose else _no_stderr():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        if where == "local":
            raise RunError(f"cannot start Ray: {error}; headrace doctor tells what this machine lacks") from error
        raise RunError(f"cannot join Ray at {where!r}: {error}. It must be the head's host:6379; without an address, Ray starts here") from error
    try:
        with (
            contextlib.nullcontext() if verbose else compat.muted(),
            contextlib.nullcontext() if verbose else _quiet(ray=logging.ERROR, **{"ray.data": logging.CRITICAL, "ray.serve": logging.CRITICAL}),
        ):
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the length of the block; those that the user has set stay as they are, but for PYTHONPATH."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in variables.items() if name == "PYTHONPATH" or name not in before})
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in variables if name in before})


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what C++ code writes to the terminal during the block: Ray's core announces there that its log level was set."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _quiet(**levels: int) -> Iterator[None]:
    """Loggers held to a level for the length of the block. What Ray Data logs as an error is raised by the run as well."""
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def code(folder: Path) -> dict[str, Any]:
    """Ray's runtime environment that ships headrace and the files of `folder` to the workers, without an image build."""
    return {"working_dir": str(folder), "py_modules": [str(Path(headrace.__file__).parent)], "excludes": [".git", ".venv", "__pycache__"]}


def here() -> Cluster:
    """This machine as a cluster, without starting Ray."""
    count, kind = compat.gpus()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Cluster((Node("this machine", compat.cores(), count, (kind,) if kind else (), memory_gb),))


def describe(*, spare_cpus: float = 0) -> Cluster:
    """What the connected cluster has, less `spare_cpus` of its largest node."""
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has = node["Resources"]
        kinds = tuple(name.partition(":")[2] for name in has if name.startswith("accelerator_type:"))
        nodes.append(Node(node["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0), kinds, has.get("memory", 0) / 1e9))
    largest = max(range(len(nodes)), key=lambda at: nodes[at].cpus, default=0)
    return Cluster(
        tuple(
            Node(node.name, max(1.0, node.cpus - spare_cpus) if at == largest else node.cpus, node.gpus, node.kinds, node.memory_gb)
            for at, node in enumerate(nodes)
        )
    )
