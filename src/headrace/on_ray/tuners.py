"""Every name of Ray Tune that depends on its version. Written against ray 2.60."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from headrace.filesystems import Place

_PERCENT = "percent"  # of a trial's rows: how far it is
_RUNGS = (10, 4)  # the first look at a trial, and how much later each next one is: the best quarter goes on
_VARIABLES = {
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints tables whatever is asked for
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True, slots=True)
class Said:
    """What a trial says of itself: its metrics, and the share of its rows that it was given, 0 to 1; at its end that it `ended`, or with what `error`."""

    metrics: Mapping[str, float]
    share: float
    ended: bool = False
    error: str = ""

    def told(self) -> dict[str, Any]:
        """As Tune is told, beside the metrics."""
        return {_PERCENT: int(100 * self.share), "ended": self.ended, "error": self.error}


class Trial(Protocol):
    """What a process of Tune's runs: trial `number`, with what all trials are given, telling its metrics and its share."""

    def __call__(self, number: int, given: Mapping[str, Any], report: Callable[[Said], None]) -> None:
        """Run it to its end."""


def search(
    trial: Trial,
    given: Mapping[str, Any],
    *,
    count: int,
    at_once: int,
    metric: str,
    largest: bool,
    home: Place,
    note: Callable[..., None],
) -> None:
    """Run so many trials, some at once, and stop early what does worse than most. `note(number, ...)` is told of each."""
    shared, worst = ray.put(given), -math.inf if largest else math.inf

    def run(config: dict[str, Any]) -> None:
        trial(
            config["number"],
            ray.get(shared),
            lambda said: tune.report({"reported": dict(said.metrics), metric: said.metrics.get(metric, worst), **said.told()}),
        )

    first, factor = _RUNGS
    scheduler = ASHAScheduler(time_attr=_PERCENT, max_t=100, grace_period=first, reduction_factor=factor)
    with _environment():
        tuner = tune.Tuner(
            tune.with_resources(run, {"CPU": 0.01}),
            param_space={"number": tune.grid_search(list(range(count)))},
            tune_config=tune.TuneConfig(metric=metric, mode="max" if largest else "min", scheduler=scheduler, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(name="tune", storage_path=home.path, storage_filesystem=home.filesystem, callbacks=[_Notes(note)], verbose=0),
        )
        tuner.fit()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ |= {name: value for name, value in _VARIABLES.items() if before[name] is None}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


class _Notes(tune.Callback):
    """Tells what becomes of each trial."""

    def __init__(self, note: Callable[..., None]) -> None:
        self.note = note

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """See Ray Tune."""
        self.note(trial.config["number"], state="running", metrics=_metrics(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray Tune."""
        result = trial.last_result or {}
        state = "failed" if result.get("error") else "finished" if result.get("ended") else "stopped"
        self.note(trial.config["number"], state=state, metrics=_metrics(result), error=str(result.get("error", "")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Ray Tune."""
        self.note(trial.config["number"], state="failed", error="its process died; the log of Ray Tune says more")


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What the loop reported, beside what Tune adds."""
    return dict(result.get("reported") or {})
