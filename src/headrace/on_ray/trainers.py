"""Every name of Ray Train that depends on its version. Written against ray 2.60, Ray Train v2."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
import ray.train
from ray._private.thirdparty import pynvml
from ray.data import DataContext, Dataset
from ray.train import Checkpoint, DataConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.api.report_config import CheckpointUploadMode
from ray.util import placement_group, remove_placement_group

from headrace.errors import HeadraceError, OutputError, RunError
from headrace.filesystems import Place
from headrace.hardware import Choice
from headrace.on_ray import compat
from headrace.store import Folder

__all__ = [
    "EXPERIMENT",
    "Load",
    "Shape",
    "TrainingFailedError",
    "agree",
    "doomed",
    "fit",
    "flush",
    "innermost",
    "keep",
    "latest",
    "mend",
    "restored",
    "stream",
    "whoami",
]

EXPERIMENT = "train"  # the folder in which Ray Train keeps checkpoints
_POINTER = "checkpoint.json"  # beside it, the name of the last complete one
_KEPT = 2  # checkpoints
_SPARE_CPUS = 1  # that workers of an elastic number leave
_HOLD_S = 10  # to wait for them
_BACKENDS = {
    "torch": ("ray.train.torch", "TorchConfig"),
    "lightgbm": ("ray.train.lightgbm", "LightGBMConfig"),
    "xgboost": ("ray.train.xgboost", "XGBoostConfig"),
}
_SHARD = "rows"
_POLL_S = "0.5"  # between looks of Ray Train at its workers
_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _POLL_S,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # until there is room; then an elastic number is found anew
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a loop's relative paths are the user's
    "RAY_TRAIN_METRICS_ENABLED": "0",
}

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # an actor that looks for machines about to be taken away; of a Ray that was started here there is one

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers, what each needs, how often they are started again, and which library connects them."""

    workers: int | tuple[int, int]
    choice: Choice
    retries: int
    framework: str | None


def fit(loop: Callable[[dict[str, Any]], None], config: dict[str, Any], *, home: Place, shape: Shape, rows: Callable[[], Dataset]) -> None:
    """Run `loop(config)` on the workers until it has returned on all of them. `rows` makes the dataset that they share, whenever they start.

    `home` is the folder in which the folder `EXPERIMENT` is: what is there already is gone on from.

    Raises:
        TrainingFailedError: it came to nothing; see `innermost`.
    """
    hardware = shape.choice.hardware
    resources = {"CPU": hardware.cpus, "GPU": hardware.gpus} | ({"memory": hardware.memory_gb * 1e9} if hardware.memory_gb else {})
    ordered = DataContext.get_current().copy().execution_options
    ordered.preserve_order = True  # the rows come in the order in which they were asked for
    spare = _Spare(rows)
    elastic = not isinstance(shape.workers, int)
    callbacks: list[Any] = [_Pointer(home), *([spare] if elastic else [])]
    with _environment():
        trainer = _Trainer(
            loop,
            train_loop_config=config,
            backend_config=_backend(shape.framework),
            scaling_config=ScalingConfig(
                num_workers=shape.workers,
                use_gpu=bool(hardware.gpus),
                resources_per_worker={name: amount for name, amount in resources.items() if amount},
                accelerator_type=shape.choice.kind,
            ),
            run_config=RunConfig(  # type: ignore[arg-type]  # Ray declares that of Train v1
                name=EXPERIMENT,
                storage_path=home.path,
                storage_filesystem=home.filesystem,
                failure_config=FailureConfig(max_failures=shape.retries),
                checkpoint_config=CheckpointConfig(num_to_keep=_KEPT),
                callbacks=callbacks,
                logging_config=LoggingConfig("ERROR"),
            ),
            datasets={_SHARD: spare.rows if elastic else rows},
            dataset_config=DataConfig(execution_options=ordered),
        )
        trainer.fit()


def _backend(framework: str | None) -> Any:
    if framework is None:
        return None
    module, name = _BACKENDS[framework]
    try:
        return getattr(importlib.import_module(module), name)()
    except ImportError as error:
        raise RunError(f"framework={framework!r} needs {framework}, which cannot be imported: {error}; pip install {framework}") from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    wanted = _VARIABLES | ({_WATCHER: "0"} if compat.started_here() else {})
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= {name: value for name, value in wanted.items() if before[name] is None}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


class _Trainer(DataParallelTrainer):
    """Ray's trainer, which does not start workers again for a mistake that they would make again."""

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = _Policy(cast(FailureConfig, self.run_config.failure_config))
        if isinstance(given["scaling_policy"], ElasticScalingPolicy):
            given["scaling_policy"] = _Leaving(given["scaling_policy"].scaling_config)
        return super()._initialize_and_run_controller(**given)

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's own. What cleans up after a controller asks Ray's API server whether that lives: where there is none, each training would end 13 s later."""
        made: list[Any] = super()._create_default_callbacks()
        return made if compat.has_api_server() else [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]


class _Policy(DefaultFailurePolicy):
    """Ray's own, but for what the loop or a stage raised."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = list(training_failed_error.worker_failures.values()) if isinstance(training_failed_error, WorkerGroupError) else []
        died = any(isinstance(_bare(one), ray.exceptions.RayActorError) or "HealthCheck" in type(one).__name__ for one in failures)
        mistakes = [one for one in failures if isinstance(_bare(one), HeadraceError) and not isinstance(_bare(one), RunError)]
        if mistakes and not died:  # when one dies, the others may fail in whatever connects them
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Leaving(ElasticScalingPolicy):
    """Ray's own, but it leaves a core to what prepares the rows: workers on all cores would wait for them for ever."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible: int = super()._count_possible_workers(reserved_resources)
        cpus = self.scaling_config._resources_per_worker_not_none.get("CPU", 0)
        return min(possible, int((ray.cluster_resources().get("CPU", 0) - _SPARE_CPUS) // cpus)) if cpus else possible


class _Spare(WorkerGroupCallback):
    """Holds a core while workers get theirs, and lets go of it when their rows are made: what is known of a cluster may be older than its loss of a node."""

    def __init__(self, rows: Callable[[], Dataset]) -> None:
        self._rows = rows
        self._held: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """See Ray."""
        self._release()
        self._held = placement_group([{"CPU": _SPARE_CPUS}])
        self._held.wait(_HOLD_S)

    def rows(self) -> Dataset:
        """The dataset; workers have their places by now."""
        self._release()
        return self._rows()

    def _release(self) -> None:
        if self._held is not None:
            remove_placement_group(self._held)
        self._held = None


class _Pointer(UserCallback):
    """Notes the name of the last complete checkpoint, in a file that is written whole; Ray's own may be cut off by a crash."""

    def __init__(self, home: Place) -> None:
        self.home = home

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """See Ray."""
        if checkpoint is not None:
            Folder(self.home).put(_POINTER, json.dumps({"name": os.path.basename(checkpoint.path.rstrip("/"))}).encode())


def _bare(error: BaseException) -> BaseException:
    """What a worker raised, out of Ray Train's wrapping."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error
    cause = getattr(inner, "cause", None)
    return cause if isinstance(cause, HeadraceError) else inner


def innermost(error: TrainingFailedError) -> BaseException:
    """The error of a worker or of Ray's controller that a training came to its end with: a mistake of the user's before all others."""
    found = [_bare(one) for one in error.worker_failures.values()] if isinstance(error, WorkerGroupError) else []
    mistakes = [one for one in found if isinstance(one, HeadraceError)]
    return (mistakes or found or [getattr(error, "controller_failure", error)])[0]


# Checkpoints, as the driver sees them


def latest(home: Place) -> Place | None:
    """The last checkpoint that is complete, None where there is none."""
    try:
        values = json.loads(Folder(home).read(f"{EXPERIMENT}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"))
        last = values["latest_checkpoint_result"]
        return None if last is None else home.child(f"{EXPERIMENT}/{last['checkpoint_dir_name']}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"what Ray Train keeps in {home.uri!r} cannot be read: {error}; begin again with --restart") from error


def mend(home: Place) -> None:
    """Put Ray Train's list of checkpoints in order after a crash in the middle of its writing: it is not written whole or not at all."""
    store, name = Folder(home), f"{EXPERIMENT}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    try:
        json.loads(store.read(name))
    except FileNotFoundError:
        return
    except ValueError:
        with contextlib.suppress(FileNotFoundError):
            last = json.loads(store.read(_POINTER))["name"]
            if store.names(f"{EXPERIMENT}/{last}"):
                store.put(name, _snapshot(last))
                return
        store.delete(name)


def _snapshot(last: str) -> bytes:
    """Ray Train's list of checkpoints with one in it."""
    result = {"version": 0, "checkpoint_dir_name": last, "metrics": {}}
    states = ("validated", "timed_out_validation", "failed_validation")
    lists = ("pending_training_results", "pending_validation_specs", *(f"{state}_checkpoint_dir_names" for state in states))
    none: dict[str, Any] = {name: [] for name in lists}
    one = {"checkpoint_results": [result], "checkpoint_report_indices": [0], "latest_checkpoint_result": result, "current_report_index": 1}
    return json.dumps({"ray_version": ray.__version__, **one, **none}).encode()


# What a worker asks for


def whoami() -> tuple[int, int]:
    """The number of this worker, and how many there are."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def stream() -> Iterator[pa.Table]:
    """The blocks of this worker's part of the dataset; the next ones are fetched meanwhile."""
    shard = ray.train.get_dataset_shard(_SHARD)
    yield from shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


@contextlib.contextmanager
def restored() -> Iterator[Path | None]:
    """The folder of the checkpoint that this worker goes on from, for the length of the block."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def agree(mine: T) -> T:
    """What the first worker says; all workers meet here."""
    said: T = broadcast_from_rank_zero(mine)
    return said


def doomed() -> bool:
    """Whether a machine of the workers is about to be taken away; all workers meet here."""
    return os.environ.get(_WATCHER) != "0" and ray.train.get_preemption_info() is not None


class Load:
    """How busy this worker's accelerators are, 0 to 1, as their driver has it; None if there are none, or it does not say (MIG)."""

    def __init__(self) -> None:
        self.devices: list[Any] = []
        names = ray.get_runtime_context().get_accelerator_ids().get("GPU")
        if not names:
            return
        with contextlib.suppress(pynvml.NVMLError):  # the accelerator is not NVIDIA's
            pynvml.nvmlInit()
            self.devices = [pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]

    def __call__(self) -> float | None:
        """The share of the last second or so in which a kernel ran, on average over the devices."""
        try:
            shares = [pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100 for device in self.devices]
        except pynvml.NVMLError:
            return None
        return sum(shares) / len(shares) if shares else None


def keep(write: Callable[[Path], object], metrics: dict[str, float], *, wait: bool) -> None:
    """A checkpoint of what `write` puts into a folder, on every worker. It is sent off; with `wait`, it has arrived."""
    folder = tempfile.mkdtemp(prefix="headrace-checkpoint-")
    write(Path(folder))
    mode = CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), checkpoint_upload_mode=mode, delete_local_checkpoint_after_upload=True)


def flush() -> None:
    """Wait for checkpoints that were sent off; there can be no more of them. Ray does so itself where the loop returns."""
    get_train_context().checkpoint_upload_threadpool.shutdown()
