"""Every name of Ray that depends on its version. Written against ray 2.60."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from typing import Any

from ray import cloudpickle
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.utils import get_num_cpus
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor

__all__ = ["ActorPoolStrategy", "Block", "BlockAccessor", "DataContext", "Dataset", "Datasink", "TaskContext", "context", "cores", "fence", "gpus", "ship"]


def cores() -> int:
    """CPU cores of this machine, a container's limit respected."""
    return max(1, int(get_num_cpus()))


def gpus() -> tuple[int, str | None]:
    """NVIDIA GPUs of this machine, and their kind as Ray names it."""
    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(), NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()


def ship(call: Any) -> None:
    """Send the modules that define a stage to the workers by value, unless they are installed packages.

    For a Ray that somebody else has started: its workers may not be able to import what this process can.
    """
    kinds = [call] if inspect.isfunction(call) else type(call).__mro__
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for module in (sys.modules.get(kind.__module__) for kind in kinds):
        file = getattr(module, "__file__", None)
        if file and module.__name__ != "__main__" and not file.startswith(installed):
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
    return ctx
