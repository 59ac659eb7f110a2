"""What a version of a model has to pass before an alias names it: golden rows, a bound on a metric, the time of a call on this machine."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace import parity
from headrace.errors import SettingError, check_number, listing, nearest
from headrace.formats import Input
from headrace.local import prepare
from headrace.parity import Golden, Target, Tolerance
from headrace.pipeline import Pipeline
from headrace.registry.address import Address, is_address
from headrace.registry.catalog import Version, figures, version
from headrace.registry.releases import Outcome

_SIGNS: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_METRIC = re.compile(r"\s*(?P<name>[^<>=]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>.+?)\s*")
_SHOWN = 3  # differences in an outcome
_WARM_CALLS = 10


@dataclass(frozen=True, slots=True)
class Metric:
    """A bound on what the run that made the version measured, on rows that it was not trained on: `auc >= 0.8`, or `auc >= @prod`, no worse than another."""

    name: str
    sign: str
    bound: float | str

    def __post_init__(self) -> None:
        if self.sign not in _SIGNS:
            raise SettingError(f"metric {self.name!r}: {self.sign!r} is no comparison; there are {listing(_SIGNS)}")

    @staticmethod
    def parse(text: str) -> Metric:
        """The gate that `auc>=0.8` or `loss<=@prod` spells.

        Raises:
            SettingError: it spells none.
        """
        found = _METRIC.fullmatch(text)
        if found and found["bound"].startswith("@") and len(found["bound"]) > 1:
            return Metric(found["name"], found["sign"], found["bound"])
        try:
            if found:
                return Metric(found["name"], found["sign"], float(found["bound"]))
        except ValueError:
            pass
        raise SettingError(f"--metric {text!r} must be a metric, a comparison ({', '.join(_SIGNS)}) and a number or an alias: auc>=0.8, loss<=@prod")

    @property
    def title(self) -> str:
        """What outcomes call it."""
        return f"{self.name} {self.sign} {self.bound}" if isinstance(self.bound, str) else f"{self.name} {self.sign} {self.bound:g}"

    def __call__(self, chosen: Version) -> Outcome:
        """Whether the last value of the metric keeps to the bound. One that is not there does not, nor does NaN."""
        value = _metric(chosen, self.name)
        if isinstance(self.bound, str):
            other = version(f"models:/{chosen.name}{self.bound}")
            bound, at = _metric(other, self.name), f", and of version {other.version} "
            return Outcome(self.title, _SIGNS[self.sign](value, bound), f"it is {value:g}{at}{bound:g}")
        return Outcome(self.title, _SIGNS[self.sign](value, self.bound), f"it is {value:g}")


@dataclass(frozen=True, slots=True)
class Parity:
    """The parity gate of `headrace check`, of a pipeline with this version in it: rows alone, together and reversed, and through `targets`; see `parity`.

    Where `rows` have columns that the pipeline writes, these are expected values. `targets` are made of the pipeline, such as by `on_ray.trial.batch`.
    """

    pipeline: Pipeline
    rows: Golden
    targets: Mapping[str, Callable[[Pipeline], Target]] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)
    title: str = "golden rows"

    def __call__(self, chosen: Version) -> Outcome:
        """Whether all values are equal."""
        pipeline = using(self.pipeline, chosen)
        targets = {name: make(pipeline) for name, make in self.targets.items()}
        verdict = parity.gate(pipeline, self.rows, targets, tolerance=self.tolerance)
        wrong = [f"{one.target}{'' if one.row is None else f', row {one.row}'}: {one.column} {one.expected} became {one.found}" for one in verdict.differences]
        return Outcome(self.title, not wrong, "; ".join([str(verdict), *wrong[:_SHOWN]]))


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a call of the pipeline with one row may take on this machine, on `device`: the 99th percentile of `calls` calls, after some to warm up."""

    pipeline: Pipeline
    rows: Sequence[Mapping[str, Any]]
    p99_s: float
    calls: int = 300
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        check_number(self.p99_s, "the latency gate: p99_s")
        check_number(self.calls, "the latency gate: calls", whole=True)
        if not self.rows:
            raise SettingError("the latency gate has no rows to call the pipeline with; give it golden rows")

    @property
    def title(self) -> str:
        """What outcomes call it."""
        return f"p99 <= {self.p99_s * 1000:g} ms"

    def __call__(self, chosen: Version) -> Outcome:
        """Whether 99 of 100 calls are as fast as that."""
        run = prepare(using(self.pipeline, chosen), device=self.device)
        rows = [self.rows[at % len(self.rows)] for at in range(_WARM_CALLS + self.calls)]
        took_s = np.array(list(self._timed(run, rows))[_WARM_CALLS:])
        p50_s, p99_s = np.percentile(took_s, [50, 99], method="higher")
        said = f"{p99_s * 1000:.3g} ms on this machine ({self.device}), and half of {self.calls} calls within {p50_s * 1000:.3g} ms"
        return Outcome(self.title, bool(p99_s <= self.p99_s), said)

    def _timed(self, run: Callable[[Sequence[Mapping[str, Any]]], Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[float]:
        for row in rows:
            began_s = self.clock()
            run([row])
            yield self.clock() - began_s


def golden(path: str, pipeline: Pipeline, *, limit: int | None = None) -> Golden:
    """Rows of a file for `Parity` and `Latency`; see `parity.golden`."""
    return parity.golden(Input(path, limit=limit), pipeline)


def using(pipeline: Pipeline, chosen: Version) -> Pipeline:
    """The pipeline with a version of a model in all settings that name any version of it.

    Raises:
        SettingError: none does.
    """
    named = []
    for stage in pipeline.stages:
        addresses = {name: Address.of(value, name) for name, value in stage.settings.items() if is_address(value)}
        named += [address.name for address in addresses.values()]
        if mine := {name: str(chosen) for name, address in addresses.items() if address.name == chosen.name}:
            pipeline = pipeline.replace(stage.with_settings(mine))
    if chosen.name not in named:
        has = f"it names {listing(dict.fromkeys(named))}" + nearest(chosen.name, named) if named else "its settings name no model of a registry"
        raise SettingError(f"no stage of pipeline {pipeline.name!r} uses model {chosen.name!r}, as model='models:/{chosen.name}@prod' would; {has}")
    return pipeline.pinned()


def _metric(of: Version, name: str) -> float:
    """The last value of a metric of the run that made a version.

    Raises:
        SettingError: there is no run, or it has no such metric.
    """
    found = figures(of)
    if found is None:
        raise SettingError(f"{of} was made by no run that is known, so nothing is known of its {name!r}; register it with run=log_run(..., metrics=...)")
    if name not in found.metrics:
        raise SettingError(f"the run that made {of} has no metric {name!r}; it has {listing(sorted(found.metrics))}" + nearest(name, found.metrics))
    return found.metrics[name]
