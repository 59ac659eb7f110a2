"""What a sweep tries: ranges and choices for settings, and the trials drawn from them. Pure: the same seed draws the same trials."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.errors import SettingError, listing, nearest
from headrace.settings import setting_value
from headrace.training import Training

_RANGE = re.compile(r"(?P<low>[^.]*(?:\.(?!\.)[^.]*)?)\.\.(?P<high>[^:]+?)(?P<log>:log)?")
_FORMS = "lr=1e-4..1e-2:log, lr=0.1..0.5, layers=1..8, or kind=mean|max"


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both of them among these; evenly in their logarithm with `log`, whole ones with `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, random: np.random.Generator) -> float | int:
        """One of them."""
        if self.whole:
            low, high = self.low - 0.5, self.high + 0.5
            value = math.exp(random.uniform(math.log(max(low, 0.5)), math.log(high))) if self.log else random.uniform(low, high)
            return int(min(self.high, max(self.low, round(value))))
        return float(math.exp(random.uniform(math.log(self.low), math.log(self.high))) if self.log else random.uniform(self.low, self.high))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values, each as likely as the others."""

    values: tuple[Any, ...]

    def draw(self, random: np.random.Generator) -> Any:
        """One of them."""
        return self.values[random.integers(len(self.values))]


Space = Mapping[str, Range | Choice]


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of settings, and what came of it. `state` is `finished`, `stopped` early, `failed` with an `error`, or `waiting`."""

    number: int
    settings: Mapping[str, Any]
    state: str = "waiting"
    metrics: Mapping[str, float] = field(default_factory=dict)
    output: str = ""
    error: str = ""


def parse_space(training: Training, assignments: Sequence[str]) -> Space:
    """What `--sweep` says, held to the annotations of the training's settings.

    Raises:
        SettingError: not of one of the forms, no such setting, or values that its annotation forbids.
    """
    space: dict[str, Range | Choice] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name, said = name.strip(), f"--sweep {assignment!r}"
        if not (equals and name and text):
            raise SettingError(f"{said} must have a form such as {_FORMS}")
        if name not in training.values:
            known = f"it has {listing(training.values)}" if training.values else "it has no settings"
            raise SettingError(f"{said}: training {training.name!r} has no setting {name!r}; {known}" + nearest(name, training.values))
        if (found := _RANGE.fullmatch(text)) is None:
            if "|" not in text:
                raise SettingError(f"{said} names one value; a sweep needs several: {_FORMS}")
            space[name] = Choice(tuple(setting_value(type(training.settings), name, one, said=said) for one in text.split("|")))
            continue
        low, high = (setting_value(type(training.settings), name, found[end], said=said) for end in ("low", "high"))
        if not all(isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end) for end in (low, high)):
            raise SettingError(f"{said}: a range is of numbers, and the setting takes others; name them: {name}=a|b")
        log = found["log"] is not None
        if low >= high or (log and low <= 0):
            raise SettingError(f"{said}: a range goes from the smaller number to the larger" + (", and with :log both are above 0" if log else ""))
        space[name] = Range(low, high, log, isinstance(low, int) and isinstance(high, int))
    return space


def draw(space: Space, *, trials: int, seed: int) -> list[dict[str, Any]]:
    """The settings of so many trials, none of them twice as long as there are others."""
    random = np.random.default_rng((seed, 0x5EED))
    found: list[dict[str, Any]] = []
    for _ in range(20 * trials):
        one = {name: domain.draw(random) for name, domain in space.items()}
        if one not in found:
            found.append(one)
        if len(found) == trials:
            break
    return found


def ranked(trials: Sequence[Trial], metric: str, *, largest: bool) -> list[Trial]:
    """The trials by the value of a metric, the best first: those that finished before those that did not, those without the metric last."""

    def key(trial: Trial) -> tuple[bool, bool, float]:
        value = trial.metrics.get(metric, math.nan)
        return trial.state != "finished", math.isnan(value), 0.0 if math.isnan(value) else -value if largest else value

    return sorted(trials, key=key)


def best(trials: Sequence[Trial], *, metric: str, largest: bool) -> Trial | None:
    """The finished trial with the best value of a metric; of equal ones the first. One without the metric, or with NaN there, is none."""
    known = [trial for trial in trials if trial.state == "finished" and not math.isnan(trial.metrics.get(metric, math.nan))]
    return ranked(known, metric, largest=largest)[0] if known else None
