"""Every name of Ray that depends on its version. Written against ray 2.60."""

from __future__ import annotations

import contextlib
import inspect
import os
import queue
import subprocess
import sys
import sysconfig
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray import cloudpickle
from ray._private import ray_constants
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.utils import get_num_cpus
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces.execution_options import ExecutionResources
from ray.data._internal.stats import _StatsManager
from ray.data.block import BlockAccessor
from ray.data.exceptions import ExecutionTimeoutError
from ray.experimental import internal_kv

__all__ = [
    "ActorPoolStrategy",
    "BlockAccessor",
    "DataContext",
    "Dataset",
    "ExecutionTimeoutError",
    "Finished",
    "Occupancy",
    "alone",
    "authenticated",
    "context",
    "cores",
    "fence",
    "gcs_address",
    "gpus",
    "in_job",
    "instance_types",
    "lean",
    "loopback",
    "muted",
    "node_address",
    "raylet",
    "recall",
    "remember",
    "ship",
    "ship_with_neighbours",
    "started_here",
    "stream",
]


def cores() -> int:
    """CPU cores of this machine, a container's limit respected."""
    return max(1, int(get_num_cpus()))


def gpus() -> tuple[int, str | None]:
    """NVIDIA GPUs of this machine, and their kind as Ray names it."""
    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(), NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()


def started_here() -> bool:
    """Whether the Ray that this process has joined was started by it."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def raylet() -> subprocess.Popen[bytes] | None:
    """The raylet of the Ray that this process has started, until that Ray is shut down."""
    node = ray._private.worker._global_node
    started = () if node is None else node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET, ())
    return started[0].process if started else None


def instance_types() -> dict[str, str]:
    """The cloud's type of each node's instance, by the node's id, where Ray's autoscaler told it."""
    nodes = ray._private.worker.global_worker.gcs_client.get_all_node_info()  # type: ignore[attr-defined]
    return {node.hex(): info.instance_type_name for node, info in nodes.items() if info.instance_type_name}


def in_job() -> bool:
    """Whether this process is the driver of a submitted job; Ray refuses it a runtime environment besides the job's own."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Start Ray in the block without what serves a cluster that others join: API server, autoscaler, log monitor, web part of the agent.

    They are more than half of what starting a Ray takes, and nothing of a run asks them anything. The last is how Ray
    itself behaves where the packages of its dashboard are not installed.
    """
    node, utils = ray._private.node.Node, ray._private.utils
    left_out: list[tuple[Any, str, Any]] = [(node, name, lambda *_, **__: None) for name in ("start_api_server", "start_monitor", "start_log_monitor")]
    left_out.append((utils, "get_dashboard_dependency_error", lambda: ImportError("left out")))
    with contextlib.ExitStack() as after:
        for owner, name, instead in left_out:
            after.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, instead)
        yield


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Let all of a Ray that is started or joined in the block listen on 127.0.0.1, as Ray itself has it where it cannot form clusters.

    Ray takes an address of loopback that it is given for the machine's own.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def authenticated(token: str | None) -> Iterator[None]:
    """Show `token` to the Ray that is joined in the block, or ask for it in the one that is started; None leaves all as it is."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ[name] for name in names if name in os.environ}
    if token is not None:
        os.environ |= dict(zip(names, ("token", token), strict=True)) if token else {"RAY_AUTH_MODE": "disabled"}
        _read_authentication()
    try:
        yield
    finally:
        if token is not None:
            for name in names:
                os.environ.pop(name, None)
            os.environ |= before
            _read_authentication()


def _read_authentication() -> None:
    """What the environment says now: Ray's core reads it once. The mode first, or a thread that is still ending asks for a token that is gone."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def gcs_address() -> str:
    """Where other processes join the Ray that this one has joined."""
    return str(ray.get_runtime_context().gcs_address)


def node_address() -> str:
    """The address of this machine that its Ray goes by."""
    return str(ray.util.get_node_ip_address())


def remember(key: str, value: bytes | None) -> None:
    """Keep a value in Ray's own store, which outlives every actor; None takes it away."""
    if value is None:
        internal_kv._internal_kv_del(key, namespace="headrace")
    else:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace="headrace")


def recall(key: str) -> bytes | None:
    """What `remember` kept under this key."""
    value: bytes | None = internal_kv._internal_kv_get(key, namespace="headrace")
    return value


def has_api_server() -> bool:
    """Whether Ray's API server runs, which its state API asks. A Ray that is started here has none."""
    return bool(internal_kv._internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD))


class _Whole(ClusterAutoscaler):
    """All of a cluster that does not grow and that no other job uses."""

    def get_total_resources(self) -> ExecutionResources:
        total: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())
        return total

    def try_trigger_scaling(self) -> None:
        """There is nothing to add."""

    def on_executor_shutdown(self) -> None:
        """Nothing was asked for."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep Ray Data from sharing out, for the length of the block, a Ray that no other job uses.

    It starts two actors for that, one after the other and before anything else: one that divides the cluster among jobs,
    and one that holds figures for a dashboard. Together they are 2 to 3 s of a job's start, and cores that its replicas lack.
    """
    done: list[tuple[Any, str, Any]] = [
        (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: _Whole()),
        (_StatsManager, "gen_dataset_id_from_stats_actor", lambda: uuid.uuid4().hex),
        *((_StatsManager, name, lambda *_, **__: None) for name in ("register_dataset_to_stats_actor", "update_execution_metrics")),
    ]
    with contextlib.ExitStack() as after:
        for owner, name, instead in done:
            after.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, instead if inspect.ismodule(owner) else staticmethod(instead))
        yield


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep Ray from printing its own messages for the length of the block, such as a page of text for each process that died.

    `log_to_driver=False` does that for what workers print, but not for these.
    """
    before = ray._private.worker.print_to_stdstream
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = before


def ship(call: Any, *, importable: bool) -> None:
    """Send the modules that define a stage to the workers by value, unless they are installed packages.

    The workers of a Ray that somebody else has started may not be able to import what this process can. Where they can
    (`importable`), only a file that was loaded under another name than its own is sent, such as my-pipeline.py.
    """
    for module, file in _own_modules(call):
        if not importable or file.stem not in ("__init__", module.__name__.rpartition(".")[2]):
            cloudpickle.register_pickle_by_value(module)


def ship_with_neighbours(call: Any) -> None:
    """Send the modules that define a stage by value, and all that was imported from where they lie.

    What is pickled then needs none of these files any more, and keeps its code when they change.
    """
    for module, file in _own_modules(call):
        cloudpickle.register_pickle_by_value(module)
        parts = module.__name__.split(".")
        inside = [*file.parent.parts, *([] if file.stem == "__init__" else [file.stem])]
        root = Path(*inside[: -len(parts)]) if inside[-len(parts) :] == parts else file.parent  # from where it can be imported
        for name, other in list(sys.modules.items()):
            place = getattr(other, "__file__", None)
            if place and place in (str(root.joinpath(*name.split("."))) + end for end in (".py", "/__init__.py")) and not _is_installed(other, place):
                cloudpickle.register_pickle_by_value(other)


def _own_modules(call: Any) -> Iterator[tuple[ModuleType, Path]]:
    """The user's modules that define a stage and its settings, and their files."""
    given = [] if inspect.isfunction(call) else [value for value in vars(call).values() if inspect.isclass(value) or inspect.isfunction(value)]
    for kind in [call] if inspect.isfunction(call) else [*type(call).__mro__, *given]:
        module = sys.modules.get(kind.__module__)
        file = getattr(module, "__file__", None)
        if module is not None and file and module.__name__ != "__main__" and not _is_installed(module, file):
            yield module, Path(file)


def _is_installed(module: ModuleType, file: str) -> bool:
    """Whether workers have the module anyway; headrace itself is sent to them where they lack it."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.startswith(installed) or module.__name__.partition(".")[0] == "headrace"


def fence() -> dict[str, Any]:
    """Arguments of `map_batches` that keep Ray from fusing an operator with its neighbours.

    Ray fuses a task operator into the actors after it when their remote arguments agree, which would make the expensive
    actors do the cheap work as well. An empty runtime environment changes nothing, but is an argument that they lack.
    """
    return {"runtime_env": {}}


def context(base: DataContext) -> DataContext:
    """A copy of Ray Data's context for one run: quiet, and failing at a stage's first error."""
    ctx = base.copy()
    ctx.enable_progress_bars = False
    ctx.print_on_execution_start = False
    ctx.max_errored_blocks = 0
    ctx.raise_original_map_exception = True  # else a stage's error arrives as text within an error of Ray's own
    return ctx


@dataclass(frozen=True, slots=True)
class Output:
    """A block that a dataset has finished: the reference to its table, and its weight."""

    ref: Any
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What an operator is doing: blocks that wait for it, tasks that run, and for actors how many are ready and how many are not yet."""

    queued: int
    running: int
    ready: int
    starting: int


class Finished(Exception):  # noqa: N818 - like StopIteration, it is no error
    """The dataset has given all its blocks."""


class Stream:
    """The blocks of a running dataset, as they are finished. Made by `stream`."""

    def __init__(self, bundles: Iterator[Any], executor: Any) -> None:
        self._executor = executor
        self._blocks: queue.Queue[Output | None] = queue.Queue(maxsize=4)  # Ray holds back what nobody takes
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="headrace-blocks")
        self._pulling = self._pool.submit(self._pull, bundles)

    def take(self, timeout_s: float) -> Output | None:
        """The next block, or None when there was none for so long.

        Raises:
            Finished: there are no more.
            RayError, HeadraceError, ...: whatever stopped the dataset.
        """
        try:
            block = self._blocks.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if block is None:
            self._pulling.result()
            raise Finished
        return block

    def occupancy(self) -> list[Occupancy]:
        """What each operator is doing, in the order in which rows pass; empty before the dataset runs.

        Read beside the thread that runs it, so figures of one moment may be off by a block.
        """
        found = []
        for operator, state in list((self._executor._topology or {}).items()):
            if not operator.input_dependencies:
                continue  # the list of read tasks
            actors = operator.get_actor_info()
            queued = 0 if state._finished else state.total_enqueued_input_blocks()
            found.append(Occupancy(queued, operator.num_active_tasks(), actors.running, actors.pending + actors.restarting))
        return found

    def close(self) -> None:
        """Take no more blocks."""
        self._stopped.set()
        self._pool.shutdown(wait=False)

    def _pull(self, bundles: Iterator[Any]) -> None:
        try:
            for bundle in bundles:
                for entry in bundle.blocks:
                    self._give(Output(entry.ref, entry.metadata.num_rows or 0, entry.metadata.size_bytes or 0))
                if self._stopped.is_set():
                    return
        finally:
            self._give(None)

    def _give(self, block: Output | None) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._blocks.put(block, timeout=0.2)
                return


@contextlib.contextmanager
def stream(dataset: Dataset) -> Iterator[Stream]:
    """Run a dataset for the length of the block, and give its blocks one by one. On leaving, what still runs is ended.

    Ray's own iterators can neither wait for a block for a limited time nor be stopped from another thread.
    """
    executor = dataset._create_executor()
    blocks = Stream(dataset._build_bundle_iterator(executor), executor)
    try:
        yield blocks
    finally:
        blocks.close()
        executor.shutdown(force=True)  # ends the actors as well: left to their references, they may outlive their Ray
