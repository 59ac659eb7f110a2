"""Every name of Ray that depends on its version. Written against ray 2.60."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.utils import get_num_cpus
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor

__all__ = [
    "ActorPoolStrategy",
    "Block",
    "BlockAccessor",
    "DataContext",
    "Dataset",
    "Datasink",
    "TaskContext",
    "context",
    "cores",
    "fence",
    "gpus",
    "in_job",
    "ship",
    "started_here",
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


def in_job() -> bool:
    """Whether this process is the driver of a submitted job; Ray refuses it a runtime environment besides the job's own."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def ship(call: Any, *, importable: bool) -> None:
    """Send the modules that define a stage to the workers by value, unless they are installed packages.

    The workers of a Ray that somebody else has started may not be able to import what this process can. Where they can
    (`importable`), only a file that was loaded under another name than its own is sent, such as my-pipeline.py.
    """
    kinds = [call] if inspect.isfunction(call) else type(call).__mro__
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for module in (sys.modules.get(kind.__module__) for kind in kinds):
        file = getattr(module, "__file__", None)
        if module is None or not file or module.__name__ == "__main__" or file.startswith(installed):
            continue
        if not importable or Path(file).stem not in ("__init__", module.__name__.rpartition(".")[2]):
            cloudpickle.register_pickle_by_value(module)


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
