"""How far a sweep is, and the table of its trials."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from headrace.cli.tables import show
from headrace.loops.result import told
from headrace.loops.space import Trial, ranked

if TYPE_CHECKING:
    from headrace.on_ray.sweep import SweepResult

_STYLES = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


class SweepProgress:
    """Watches the trials of a sweep; a line for each that has come to an end."""

    def __init__(self, metric: str, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self.metric, self.told = metric, set[int]()

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is to be put away."""

    def update(self, trials: Sequence[Trial]) -> None:
        """Tell of trials that have ended since the last call."""
        for trial in trials:
            if trial.state in ("finished", "stopped", "failed") and trial.number not in self.told:
                self.told.add(trial.number)
                came = f": {trial.error or told(trial.metrics)}" if trial.error or trial.metrics else ""
                self.console.print(
                    f"trial {trial.number} {settings(trial)} {trial.state}{came} ({len(self.told)} of {len(trials)})", markup=False, soft_wrap=True
                )


def tell(result: SweepResult, *, metric: str, largest: bool, quiet: bool, as_json: bool) -> None:
    """Print the table of trials, the best first."""
    if as_json:
        best = result.best.number if result.best else None
        print(json.dumps({"best": best, "trials": [dataclasses.asdict(trial) for trial in result.trials]}, default=repr))
    elif not quiet:
        states = Counter(trial.state for trial in result.trials)
        print(", ".join(f"{number} {state}" for state, number in states.items()))
        rows = [
            [str(trial.number), settings(trial), trial.state, _value(trial, metric), trial.error] for trial in ranked(result.trials, metric, largest=largest)
        ]
        show(Console(highlight=False, emoji=False), ("n trial", "settings", "state", f"n {metric}", "why"), rows, wrap=(1, 4), styles=_STYLES)
        if result.best:
            print(f"the best is saved in {result.best.output}/checkpoint")


def settings(trial: Trial) -> str:
    """`lr=0.001 layers=3`."""
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in trial.settings.items())


def _value(trial: Trial, metric: str) -> str:
    return f"{trial.metrics[metric]:.4g}" if metric in trial.metrics else ""
