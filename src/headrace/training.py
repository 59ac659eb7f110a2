"""Trainings: a loop in plain Python, the pipeline that prepares its data, and how many workers run it on what."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import DefinitionError, SettingError, check_number, listing, nearest
from headrace.hardware import Hardware, cpu
from headrace.pipeline import Pipeline
from headrace.stage import NAME

if TYPE_CHECKING:
    from headrace.loops.result import Result

FRAMEWORKS = ("torch", "lightgbm", "xgboost")
_SPAN = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Training:
    """A loop, its data and its scale: run in this process by `local`, on Ray by `hr.train` and `headrace train`.

        def fit(shard, settings, run):
            weights = np.zeros(2)
            if folder := run.resume():
                weights = np.load(folder / "weights.npy")

            def save(folder):
                np.save(folder / "weights.npy", weights)

            for batch in shard.batches(64):
                error = batch["x"] @ weights - batch["y"]
                weights -= settings.lr * batch["x"].T @ error / len(error)
                run.report(loss=(error**2).mean())
                run.checkpoint(save)

        prices = hr.Training("prices", fit, data=prepare, keep=["y"], settings=Settings(lr=0.1), epochs=3)

    Args:
        name: an identifier.
        loop: `loop(shard, settings, run)`, see `headrace.loops.shard.Shard` and `headrace.loops.run.Run`. Every worker calls it.
        data: the pipeline that prepares the rows, beside the workers; rows as they are when left out.
        keep: input columns that reach the loop untouched, beside the pipeline's outputs; `"all"` for every one, which is what a
            training without a pipeline gets when it is left out.
        settings: an instance of a dataclass, which the loop receives; `--set lr=0.01` overrides its fields.
        workers: how many run the loop at once, each on a part of the rows; (least, most) to go on with fewer when nodes go, and with more when they come.
        on: acceptable hardware of a worker, best first; one CPU core when left out.
        epochs: how often every row is given.
        shuffle: the order of the rows is another in every epoch, by `seed`: parts of the input change places, and rows within a block do.
        seed: see `shuffle`.
        framework: `"torch"`, `"lightgbm"` or `"xgboost"` has the workers connected in the way of that library before the loop begins.
        checkpoint_every: how often `run.checkpoint` saves: a number of its calls, or a time such as `"60s"`, `"5min"`, `"1h"`.
        retries: how often the workers are started again, from the last checkpoint, after one of them died.

    Raises:
        DefinitionError: the training is written wrongly; says where.
    """

    name: str
    loop: Callable[[Any, Any, Any], Any]
    _: KW_ONLY
    data: Pipeline | None = None
    keep: str | Sequence[str] = ()
    settings: Any = None
    workers: int | tuple[int, int] = 1
    on: Hardware | Sequence[Hardware] = ()
    epochs: int = 1
    shuffle: bool = True
    seed: int = 0
    framework: str | None = None
    checkpoint_every: int | str = "60s"
    retries: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise DefinitionError(f"the first argument of hr.Training is its name, an identifier such as 'prices', got {self.name!r}")
        what = f"training {self.name!r}"
        _check_loop(self.loop, what)
        if self.data is not None and not isinstance(self.data, Pipeline):
            raise DefinitionError(f"{what}: data must be an hr.Pipeline, got {self.data!r}; what is read is said by input=, or --input")
        if self.settings is not None and (isinstance(self.settings, type) or not dataclasses.is_dataclass(self.settings)):
            raise DefinitionError(f"{what}: settings must be an instance of a dataclass, such as Settings(lr=0.1), got {self.settings!r}")
        set_(self, on=_hardware(self.on, what), workers=_range(self.workers, what))
        if not isinstance(self.keep, str):
            set_(self, keep=tuple(self.keep))
        elif self.keep != "all":
            raise DefinitionError(f"{what}: keep is a list of columns, such as keep=[{self.keep!r}], or 'all', got {self.keep!r}")
        check_number(self.epochs, f"{what}: epochs", whole=True)
        check_number(self.retries, f"{what}: retries", whole=True, zero=True)
        check_number(self.seed, f"{what}: seed", whole=True, zero=True)
        if self.framework is not None and self.framework not in FRAMEWORKS:
            raise DefinitionError(f"{what}: framework must be one of {listing(FRAMEWORKS)}, got {self.framework!r}" + nearest(str(self.framework), FRAMEWORKS))
        cadence(self.checkpoint_every, what)

    @property
    def hardware(self) -> tuple[Hardware, ...]:
        """Acceptable hardware of a worker, best first."""
        return _hardware(self.on, f"training {self.name!r}")

    @property
    def least_workers(self) -> int:
        """The fewest workers that it goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The most workers that run at once."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def every(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` as (calls, seconds), one of which is None."""
        return cadence(self.checkpoint_every, f"training {self.name!r}")

    @property
    def values(self) -> dict[str, Any]:
        """The settings and their values."""
        return {} if self.settings is None else {field.name: getattr(self.settings, field.name) for field in dataclasses.fields(self.settings) if field.init}

    def kept(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the input's columns `names` that reach the loop untouched."""
        if self.keep != "all" and (self.keep or self.data is not None):
            return tuple(self.keep)
        return tuple(name for name in names if self.data is None or name not in self.data.outputs)

    def with_settings(self, **values: Any) -> Training:
        """The same training with other values for some settings (already of the right types).

        Raises:
            SettingError: there is no such setting.
        """
        if unknown := [name for name in values if name not in self.values]:
            known = f"it has {listing(self.values)}" if self.values else "it has none"
            raise SettingError(f"training {self.name!r} has no setting {unknown[0]!r}; {known}" + nearest(unknown[0], self.values))
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **values)) if values else self

    def local(self, rows: Any, *, settings: Mapping[str, Any] | None = None, folder: Any = None) -> Result:
        """Run the loop in this process, without Ray: over rows, an Arrow table, or anything that `pyarrow.table` takes.

        One worker, the same batches in the same order as one worker on Ray gets of one block. What this gives is what the loop means.

        Args:
            rows: the input, before the pipeline.
            settings: values for some of the settings.
            folder: where checkpoints go, and from where the loop resumes if one is there; a new temporary folder when left out.

        Raises:
            SettingError, WiringError: before the loop begins. What the loop raises is raised as it is.
        """
        from headrace.loops.local import local  # loops stand on training: imported late, for the sake of this one method

        return local(self.with_settings(**(settings or {})), rows, folder=folder)


def set_(training: Training, **values: Any) -> None:
    """Fields of a training that is being made, in the form in which they are kept."""
    for name, value in values.items():
        object.__setattr__(training, name, value)


def cadence(every: int | str, what: str) -> tuple[int | None, float | None]:
    """How often to save, as (calls, seconds), one of which is None.

    Raises:
        DefinitionError: it is neither a number of at least 1 nor a time.
    """
    if isinstance(every, int) and not isinstance(every, bool) and every >= 1:
        return every, None
    said = _SPAN.fullmatch(every) if isinstance(every, str) else None
    if said is None or not float(said[1]):
        raise DefinitionError(f"{what}: checkpoint_every must be a number of steps of at least 1, or a time such as '60s', '5min' or '1h', got {every!r}")
    return None, float(said[1]) * _UNIT_S[said[2]]


def _check_loop(loop: Any, what: str) -> None:
    if not inspect.isfunction(loop):
        raise DefinitionError(f"{what}: loop must be a function, def fit(shard, settings, run), got {loop!r}")
    given = inspect.signature(loop)
    try:
        given.bind(None, None, None)
    except TypeError:
        raise DefinitionError(f"{what}: loop must take (shard, settings, run), got {loop.__name__}{given}") from None


def _hardware(on: Any, what: str) -> tuple[Hardware, ...]:
    entries = (on,) if isinstance(on, Hardware) else tuple(on) or (cpu(1),)
    if wrong := [entry for entry in entries if not isinstance(entry, Hardware)]:
        raise DefinitionError(f"{what}: on must list hr.gpu(...) and hr.cpu(...), got {wrong[0]!r}")
    return entries


def _range(workers: Any, what: str) -> int | tuple[int, int]:
    match workers:
        case bool():
            pass
        case int(fixed) if fixed >= 1:
            return fixed
        case (int(least), int(most)) if 1 <= least <= most:
            return least if least == most else (least, most)
    raise DefinitionError(f"{what}: workers must be a number of at least 1, or (least, most) with 1 <= least <= most, got {workers!r}")
