"""Stages: plain functions and classes that read named columns and return named columns, one value per row."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from headrace.batching import BatchRule, Rows, Tokens
from headrace.columns import Column, ColumnType, types_of
from headrace.errors import DefinitionError, SettingError, listing, nearest
from headrace.hardware import Hardware, cpu

T = TypeVar("T", bound=Callable[..., Any])

MARK = "__headrace_stage__"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The frozen spec of one step. `@stage` makes it; `Stage.of` finds it on a decorated function or instance.

    `call` is the function itself, or the instance whose fields are the settings. `replicas` is (least, most); a most of
    None means as many as the cluster holds. `ray` goes to Ray's remote arguments as it stands. `apart` keeps it from sharing
    a replica with its neighbours online. `concurrency` is how many calls one instance takes at a time, from as many threads.
    """

    name: str
    call: Callable[..., Any]
    reads: Mapping[str, ColumnType]
    writes: Mapping[str, ColumnType]
    on: tuple[Hardware, ...]
    batch: BatchRule
    replicas: tuple[int, int | None]
    ray: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False
    concurrency: int = 1

    @property
    def is_model(self) -> bool:
        """Whether the stage is a class, which is set up once per replica and kept."""
        return not inspect.isfunction(self.call)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings and their values; empty for a function."""
        if not self.is_model:
            return {}
        return {f.name: getattr(self.call, f.name) for f in dataclasses.fields(self.call) if f.init}  # type: ignore[arg-type]

    def with_settings(self, values: Mapping[str, Any]) -> Stage:
        """The same stage with other values for some settings (already of the right types).

        Raises:
            SettingError: there is no such setting, or the stage would read or write other columns with that value.
        """
        for name in values:
            if name not in self.settings:
                raise SettingError(f"stage {self.name!r} has no setting {name!r}; it has {listing(self.settings)}" + nearest(name, self.settings))
        call = dataclasses.replace(self.call, **values)  # type: ignore[type-var]
        changed = Stage.of(call)  # of a ready stage, whose columns may follow from its settings
        if changed.reads.keys() != self.reads.keys() or changed.writes != self.writes:
            raise SettingError(
                f"stage {self.name!r}: with {', '.join(map(repr, values))} set to that it would read {listing(changed.reads)} and write "
                f"{listing(changed.writes)}, and the pipeline is wired for {listing(self.reads)} and {listing(self.writes)}; change it in the pipeline's file"
            )
        return dataclasses.replace(self, call=call)

    @staticmethod
    def of(step: Any) -> Stage:
        """The stage behind a decorated function or an instance of a decorated class.

        Raises:
            DefinitionError: it is neither, or the class itself was given in place of an instance.
        """
        if isinstance(step, Stage):
            return step
        spec = getattr(step, MARK, None)
        if not isinstance(spec, Stage):
            name = getattr(step, "__name__", None) or repr(step)
            raise DefinitionError(f"{name} is not a stage; decorate it with @hr.stage(out={{...}})")
        if inspect.isclass(step):
            raise DefinitionError(f"{step.__name__} is a class; a pipeline takes an instance with its settings: {step.__name__}()")
        return dataclasses.replace(spec, call=step) if spec.is_model else spec


def stage(
    *,
    out: Mapping[str, Any],
    on: Sequence[Hardware] | Hardware = (),
    batch: int | BatchRule | None = None,
    replicas: int | tuple[int, int | None] | None = None,
    name: str | None = None,
    ray: Mapping[str, Any] | None = None,
    apart: bool = False,
    concurrency: int = 1,
) -> Callable[[T], T]:
    """Make a stage of a function, or of a class with `setup(self, device)` and `__call__`.

    The parameters, each annotated `hr.Column[T]`, are the columns read. A class becomes a dataclass whose fields are the
    settings. Both stay plain Python: a decorated function is called as before. Text that `setup` returns is shown in the report.

    Args:
        out: the columns returned and their types; a name that is also read is replaced.
        on: acceptable hardware, best first; one CPU core when left out.
        batch: rows per call, `hr.rows(n)` or `hr.tokens(budget, of=...)`; 1,024 rows for a function, 32 for a class.
        replicas: (least, most) replicas of a class; a single number fixes it; as many as fit when left out.
        name: the function's name, or the class's in snake case, when left out.
        ray: passed through to Ray's remote arguments.
        apart: online, give the stage replicas of its own, which it shares with no neighbour.
        concurrency: calls that an instance of the class takes at a time, each in a thread of its own: for one that mostly waits,
            for an engine that batches by itself or for another service.

    Raises:
        DefinitionError: the stage is written wrongly; says where.
    """

    def decorate(target: T) -> T:
        is_class, is_function = inspect.isclass(target), inspect.isfunction(target)
        if not (is_class or is_function):
            raise DefinitionError(f"@hr.stage goes on a function or a class, got {target!r}; write def or class")
        label = name or (_snake(target.__name__) if is_class else target.__name__)
        if not isinstance(label, str) or not NAME.fullmatch(label):
            raise DefinitionError(f"stage name {label!r} must be an identifier such as 'clean_text'")
        if replicas is not None and is_function:
            raise DefinitionError(f"stage {label!r}: replicas={replicas!r} is for classes; a function runs as tasks, as many as there is room for")
        call: Any = _as_settings(target, label) if is_class else target
        if not isinstance(apart, bool):
            raise DefinitionError(f"stage {label!r}: apart must be True or False, got {apart!r}")
        spec = Stage(
            name=label,
            call=call,
            reads=MappingProxyType(_reads(call.__call__ if is_class else call, label)),
            writes=MappingProxyType(_writes(out, label)),
            on=_hardware(on, label),
            batch=_rule(batch, 32 if is_class else 1024, label),
            replicas=_range(replicas, label),
            ray=_arguments(ray, label),
            apart=apart,
            concurrency=_concurrency(concurrency, label, is_class=is_class),
        )
        if isinstance(spec.batch, Tokens):
            _check_measured(spec)
        setattr(target, MARK, spec)
        return target

    return decorate


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _as_settings(target: Any, label: str) -> Any:
    """The class as a dataclass, in place; its fields are the settings."""
    if not any("__call__" in vars(base) for base in target.__mro__):
        raise DefinitionError(f"stage {label!r} has no __call__; add def __call__(self, text: hr.Column[str])")
    is_dataclass = "__dataclass_fields__" in vars(target)  # of its own: a subclass of a stage has settings to add
    if "__init__" in vars(target) and not is_dataclass:
        raise DefinitionError(f"stage {label!r} has an __init__; write settings as fields (model: str = '...') and load in setup(self, device)")
    setup = getattr(target, "setup", None)
    if setup is not None and len(inspect.signature(setup).parameters) != 2:
        raise DefinitionError(f"stage {label!r}: setup must take (self, device), got {inspect.signature(setup)}")
    try:
        return target if is_dataclass else dataclasses.dataclass(kw_only=True)(target)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"stage {label!r}: its settings cannot be fields of a dataclass: {error}") from error


def _reads(function: Any, label: str) -> dict[str, ColumnType]:
    """Columns read, from the annotated parameters."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # annotations are the user's code, and may raise anything
        raise DefinitionError(f"stage {label!r}: an annotation cannot be evaluated: {error}; write it as text: hr.Column[str]") from error
    reads: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        hint = hints.get(parameter.name)
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise DefinitionError(f"stage {label!r}: parameter {str(parameter)!r} cannot be given by name; name each column that is read")
        origin = typing.get_origin(hint)
        if origin is typing.Annotated:
            reads[parameter.name] = hint
        elif hint is Column or origin is Column:
            reads[parameter.name] = typing.get_args(hint)[0] if origin else Any
        else:
            raise DefinitionError(
                f"stage {label!r}: parameter {parameter.name!r} must be annotated as a column, such as "
                f"{parameter.name}: hr.Column[str], got {'no annotation' if hint is None else hint!r}"
            )
    if not reads:
        raise DefinitionError(f"stage {label!r} reads no column; give it a parameter such as text: hr.Column[str]")
    return types_of(reads, f"stage {label!r}")


def _writes(out: Mapping[str, Any], label: str) -> dict[str, ColumnType]:
    writes = types_of(out, f"stage {label!r}: out")
    if not writes:
        raise DefinitionError(f"stage {label!r}: out must name at least one column and its type, such as out={{'text': str}}, got {out!r}")
    for name, column in writes.items():
        if not isinstance(name, str) or not name or name.startswith("__headrace"):
            raise DefinitionError(f"stage {label!r}: out: {name!r} is no column name; use a text that does not start with __headrace")
        if column.kind == "any":
            raise DefinitionError(f"stage {label!r}: out: column {name!r} needs a type, such as str or hr.Vector(384)")
    return writes


def _hardware(on: Sequence[Hardware] | Hardware, label: str) -> tuple[Hardware, ...]:
    entries = tuple(on) or (cpu(1),) if isinstance(on, Iterable) else (on,)
    if wrong := [entry for entry in entries if not isinstance(entry, Hardware)]:
        raise DefinitionError(f"stage {label!r}: on must list hr.gpu(...) and hr.cpu(...), got {wrong[0]!r}")
    return entries


def _rule(batch: int | BatchRule | None, default: int, label: str) -> BatchRule:
    if batch is None or isinstance(batch, int):
        return Rows(default if batch is None else batch)
    if not isinstance(batch, BatchRule):
        raise DefinitionError(f"stage {label!r}: batch must be a number, hr.rows(n) or hr.tokens(budget, of=...), got {batch!r}")
    return batch


def _range(replicas: int | tuple[int, int | None] | None, label: str) -> tuple[int, int | None]:
    match (1, None) if replicas is None else replicas:
        case (int(least), int() | None as most) if least >= 1 and (most is None or most >= least):
            return least, most
        case int(fixed) if fixed >= 1:
            return fixed, fixed
        case _:
            raise DefinitionError(f"stage {label!r}: replicas must be (least, most) with 1 <= least <= most, or one number, got {replicas!r}")


def _arguments(ray: Mapping[str, Any] | None, label: str) -> Mapping[str, Any]:
    if ray is not None and not isinstance(ray, Mapping):
        raise DefinitionError(f"stage {label!r}: ray must map Ray's remote arguments to values, such as {{'max_retries': 3}}, got {ray!r}")
    return MappingProxyType(dict(ray or {}))


def _concurrency(count: int, label: str, *, is_class: bool) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DefinitionError(f"stage {label!r}: concurrency must be a whole number from 1 on, got {count!r}")
    if count > 1 and not is_class:
        raise DefinitionError(f"stage {label!r}: concurrency={count} is for classes; a function runs as tasks, as many as there is room for")
    return count


def _check_measured(spec: Stage) -> None:
    """A token budget measures a column that the stage itself reads, and that has a length."""
    assert isinstance(spec.batch, Tokens)
    column = spec.reads.get(spec.batch.of)
    if column is None:
        raise DefinitionError(
            f"stage {spec.name!r}: batch=hr.tokens(of={spec.batch.of!r}) measures a column that the stage does not read; "
            f"it reads {listing(spec.reads)}" + nearest(spec.batch.of, spec.reads)
        )
    if column.kind not in ("str", "bytes", "list", "vector", "any"):
        raise DefinitionError(f"stage {spec.name!r}: hr.tokens cannot measure {spec.batch.of!r} of type {column}; it measures text, vectors and lists")
