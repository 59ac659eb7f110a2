"""Sweeps on Ray Tune: a training with many settings, several at once; what does badly is stopped early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from headrace.errors import HardwareError, HeadraceError, OutputError, RunError, SettingError, check_number
from headrace.events import Event
from headrace.filesystems import Place, locate
from headrace.formats import Input
from headrace.ledger import HOME
from headrace.loops.result import Sums
from headrace.loops.space import Space, Trial, best, draw, parse_space
from headrace.on_ray import compat, tuners
from headrace.on_ray.cluster import connected
from headrace.on_ray.job import Connect
from headrace.on_ray.train import Fit, shape_of
from headrace.on_ray.translation import translated
from headrace.resume import Mode
from headrace.store import Folder
from headrace.training import Training

_TRIALS = f"{HOME}/trials.json"
_ABOUT = f"{HOME}/sweep.json"

Watch = Callable[[Sequence[Trial]], object]


@dataclasses.dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep came to.

    Attributes:
        trials: every trial, in the order in which they were drawn.
        best: the finished one with the best metric; None where there is none.
    """

    trials: tuple[Trial, ...]
    best: Trial | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A training, the settings to try, and where the trials go; checked, and nothing touched yet."""

    fit: Fit
    space: Space
    settings: tuple[Mapping[str, Any], ...]
    metric: str
    largest: bool

    @staticmethod
    def of(training: Training, *, input: str | Sequence[str] | Input, output: str, sweep: Sequence[str], trials: int, metric: str) -> Sweep:
        """The sweep with the errors that `sweep` raises before it uses hardware."""
        check_number(trials, "trials", whole=True)
        name, colon, way = metric.partition(":")
        if not name or (colon and way not in ("min", "max")):
            raise SettingError(f"--metric must be the name of what the loop reports, with :max where more is better, such as accuracy:max, got {metric!r}")
        space = parse_space(training, sweep)
        if not space:
            raise SettingError("a sweep needs settings to try, such as --sweep lr=1e-4..1e-2:log")
        settings = tuple(draw(space, trials=trials, seed=training.seed))
        return Sweep(fit=Fit.of(training, input=input, output=output), space=space, settings=settings, metric=name, largest=way == "max")

    def run(self, *, connect: Connect, watch: Watch = lambda trials: None) -> SweepResult:
        """Run it; see `sweep` below."""
        store = Folder(self.fit.place)
        self._begin(store)
        with connect() as cluster:
            shape, _ = shape_of(self.fit.training, cluster)
            if not isinstance(shape.workers, int):
                raise HardwareError(f"a sweep runs trials of one size: give workers= as a number, got {shape.workers}")
            at_once = max(1, min(len(self.settings), shape.choice.fits // shape.workers))
            compat.ship(self.fit.training.loop, importable=False)
            for stage in self.fit.pipeline.stages:
                compat.ship(stage.call, importable=False)
            trials = [Trial(number, settings, output=self._output(number)) for number, settings in enumerate(self.settings)]

            def note(number: int, **values: Any) -> None:
                trials[number] = dataclasses.replace(trials[number], **values)
                store.put(_TRIALS, (json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1, default=repr) + "\n").encode())
                watch(tuple(trials))

            try:
                tuners.search(
                    _trial,
                    {"sweep": self},
                    count=len(trials),
                    at_once=at_once,
                    metric=self.metric,
                    largest=self.largest,
                    home=self.fit.home,
                    note=note,
                )
            except ray.exceptions.RayError as error:
                raise translated(error) from error
        if not any(trial.state == "finished" for trial in trials):
            why = next((trial.error for trial in trials if trial.error), "none of them ended")
            raise RunError(f"no trial of {len(trials)} came to its end: {why}")
        return SweepResult(tuple(trials), best(trials, metric=self.metric, largest=self.largest))

    def _output(self, number: int) -> str:
        return self.fit.place.child(f"trials/{number:04d}").uri

    def _begin(self, store: Folder) -> None:
        """Refuse a folder that holds something else, or trials with other settings."""
        about = {"training": self.fit.training.name, "settings": [repr(settings) for settings in self.settings]}
        held = store.names("")
        try:
            before = json.loads(store.read(_ABOUT))
        except FileNotFoundError:
            if held:
                raise OutputError(f"output {store.place.uri!r} holds no sweep of headrace; choose an empty folder") from None
            before = about
        except ValueError as error:
            raise OutputError(f"{store.place.child(_ABOUT).uri!r} is damaged: {error}; choose an empty folder") from error
        few = min(len(before["settings"]), len(about["settings"]))
        if before["training"] != about["training"] or before["settings"][:few] != about["settings"][:few]:
            raise OutputError(f"output {store.place.uri!r} holds a sweep over other settings; give the same --sweep, or choose an empty folder")
        store.put(_ABOUT, json.dumps(about, indent=1).encode())


def sweep(
    training: Training,
    *,
    input: str | Sequence[str] | Input,
    output: str,
    space: Sequence[str],
    trials: int = 20,
    metric: str = "loss",
    watch: Watch = lambda trials: None,
) -> SweepResult:
    """Run a training with many settings on Ray Tune, as many at once as there is room for.

        hr.sweep(prices, input="in", output="out", space=["lr=1e-4..1e-2:log"], trials=20, metric="accuracy:max")

    The settings are drawn at random, by the training's seed. A trial that is worse than most were at the same share of its rows is stopped
    early (ASHA). Each is a training of its own, in `trials/NNNN` of the output; called again, the sweep goes on with those that had not ended.

    Args:
        input: as for `hr.train`.
        output: a folder or URI that does not exist, is empty, or holds this sweep.
        space: what to try, as `--sweep` has it: `lr=1e-4..1e-2:log`, `layers=1..8`, `kind=mean|max`.
        trials: how many; fewer where there are not so many settings.
        metric: what the loop reports and is compared by, the smallest is the best; with `:max` the largest.
        watch: called with all trials when something is known of one of them.

    Raises:
        SettingError, SourceError, OutputError, HardwareError: before any hardware is used.
        RunError: no trial came to its end.
    """
    return Sweep.of(training, input=input, output=output, sweep=space, trials=trials, metric=metric).run(connect=connected, watch=watch)


def _trial(number: int, given: Mapping[str, Any], report: Callable[[tuners.Said], None]) -> None:
    """One trial, in a process of Ray Tune's. Its metrics go to Tune together with the share of its rows."""
    whole: Sweep = given["sweep"]
    fit, sums = whole.fit, Sums()
    training = fit.training.with_settings(**whole.settings[number])
    one = dataclasses.replace(fit, training=training, place=_at(fit.place, number))

    def watch(events: Sequence[Event]) -> None:
        step = sums.step
        sums.add(events)
        if sums.step > step and whole.metric in sums.metrics and sums.started and sums.started.rows:
            share = (sums.started.before + sums.rows) / sums.started.rows
            report(tuners.Said(dict(sums.metrics), min(0.99, share)))

    try:
        result = one.run(mode=Mode.RESUME, connect=connected, watch=watch)
    except HeadraceError as error:
        report(tuners.Said({}, 1.0, error=f"{type(error).__name__}: {error}".partition("\n")[0]))
        return
    report(tuners.Said(result.metrics, 1.0, ended=True))


def _at(place: Place, number: int) -> Place:
    return locate(place.child(f"trials/{number:04d}").uri, error=OutputError)
