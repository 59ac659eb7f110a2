"""A pipeline: an ordered tuple of stages whose column names are the edges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from headrace.columns import ANY, ColumnType, types_of
from headrace.errors import DefinitionError, SettingError, WiringError, listing, nearest
from headrace.stage import NAME, Stage


class Pipeline:
    """Stages with checked wiring.

        reviews = hr.Pipeline("reviews", clean, Embed())

    Attributes:
        name: an identifier; names the service and the run.
        stages: the stages, in order; another pipeline among the steps stands for its stages.
        inputs: columns that the source must have, and their types. Derived from the stages; give `inputs` to state them,
            and a name that no stage writes and that is not among them is refused here.
        outputs: columns written by the stages, or those of them named in `outputs`, and their types.
    """

    __slots__ = ("inputs", "name", "outputs", "stages")

    def __init__(self, name: str, *steps: Any, inputs: Mapping[str, Any] | None = None, outputs: Sequence[str] | None = None) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise DefinitionError(f"the first argument of hr.Pipeline is its name, an identifier such as 'reviews', got {name!r}")
        self.name = name
        self.stages = tuple(_flatten(steps))
        if not self.stages:
            raise DefinitionError(f"pipeline {name!r} has no stage; give it at least one, such as hr.Pipeline({name!r}, clean)")
        names = [stage.name for stage in self.stages]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise DefinitionError(f"pipeline {name!r} has two stages named {twice!r}; tell them apart with @hr.stage(name=...)")
        declared = None if inputs is None else types_of(inputs, f"pipeline {name!r}: inputs")
        self.inputs, written, self.stages = _wire(self.stages, declared)
        if isinstance(outputs, str):
            raise DefinitionError(f"pipeline {name!r}: outputs is a list of columns, such as outputs=[{outputs!r}], got {outputs!r}")
        if unknown := [column for column in outputs or () if column not in written]:
            raise WiringError(
                f"pipeline {name!r}: outputs names {unknown[0]!r}, which no stage writes; they write {listing(written)}" + nearest(unknown[0], written)
            )
        self.outputs: Mapping[str, ColumnType] = MappingProxyType({column: written[column] for column in outputs or written})

    @staticmethod
    def without_stages(name: str) -> Pipeline:
        """A pipeline that lets rows pass as they are: what a training without preparation reads through."""
        bare = object.__new__(Pipeline)
        bare.name, bare.stages, bare.inputs, bare.outputs = name, (), MappingProxyType({}), MappingProxyType({})
        return bare

    def stage(self, name: str) -> Stage:
        """The stage of that name; `SettingError` with the nearest name when there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise SettingError(f"pipeline {self.name!r} has no stage {name!r}; it has {listing(names)}" + nearest(name, names))

    def replace(self, stage: Stage) -> Pipeline:
        """The same pipeline with `stage` in place of the one of its name."""
        other = object.__new__(Pipeline)
        other.name, other.inputs, other.outputs = self.name, self.inputs, self.outputs
        other.stages = tuple(stage if old.name == stage.name else old for old in self.stages)
        return other

    def with_settings(self, **settings: Mapping[str, Any]) -> Pipeline:
        """A variant: `reviews.with_settings(embed={"model": "..."})`."""
        pipeline = self
        for name, values in settings.items():
            pipeline = pipeline.replace(pipeline.stage(name).with_settings(values))
        return pipeline

    def pinned(self) -> Pipeline:
        """The same pipeline, where settings that name models of a registry by aliases, `models:/name@alias`, name the versions that these mean now.

        Batch jobs and services do this at their beginning: all of their replicas have the same versions, whatever becomes of an alias.

        Raises:
            SettingError: the registry is out of reach, or holds no such model, alias or version.
        """
        from headrace.registry import pinned  # which stands on pipelines, too: imported late, for the sake of this one method

        pipeline = self
        for stage in self.stages:
            if now := pinned(stage.settings, f"stage {stage.name!r}"):
                pipeline = pipeline.replace(stage.with_settings(now))
        return pipeline

    def kept(self, keep: Sequence[str]) -> dict[str, ColumnType]:
        """Those columns of `keep` that pass unchanged from the source to the result, with types; an output is in it anyway.

        Raises:
            WiringError: a stage overwrites one of them.
        """
        if isinstance(keep, str):
            raise WiringError(f"keep is a list of columns, such as keep=[{keep!r}], got {keep!r}")
        for stage in self.stages:
            if lost := [name for name in keep if name in stage.writes and name not in self.outputs]:
                raise WiringError(f"cannot keep {lost[0]!r} as it was: stage {stage.name!r} writes a column of that name; write to another name")
        return {name: self.inputs.get(name, ANY) for name in keep if name not in self.outputs}

    def local(self, rows: Sequence[Mapping[str, Any]], *, keep: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Run in this process; the definition of correct for every target. See `headrace.local.local`."""
        from headrace.local import local  # local stands on pipeline: imported late, for the sake of this one method

        return local(self, rows, keep=keep)

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r}: {', '.join(self.inputs)} -> {' -> '.join(s.name for s in self.stages)} -> {', '.join(self.outputs)})"


def _flatten(steps: Sequence[Any]) -> Iterator[Stage]:
    for step in steps:
        if isinstance(step, Pipeline):
            yield from step.stages
        else:
            yield Stage.of(step)


def _wire(stages: Sequence[Stage], declared: Mapping[str, ColumnType] | None) -> tuple[Mapping[str, ColumnType], dict[str, ColumnType], tuple[Stage, ...]]:
    """The columns that the source must have, those that the stages write, and the stages, with every type known that can be."""
    inputs = dict(declared or {})
    written: dict[str, ColumnType] = {}
    writer: dict[str, str] = {}
    wired = []
    for stage in stages:
        reads = dict(stage.reads)
        for name, wanted in stage.reads.items():
            if name not in written:
                if declared is not None and name not in declared:
                    known = [*inputs, *written]
                    raise WiringError(
                        f"stage {stage.name!r} reads {name!r}, which is no input and no stage before it writes; there are {listing(known)}"
                        + nearest(name, known)
                    )
                inputs[name] = _narrower(inputs.get(name, ANY), wanted, name, stage.name)
            elif not written[name].feeds(wanted):
                raise WiringError(
                    f"stage {stage.name!r} reads {name!r} as {wanted}, but stage {writer[name]!r} writes it as {written[name]}; "
                    f"declare the parameter as {written[name]}, or change what {writer[name]!r} returns"
                )
            elif wanted.kind == "any":
                reads[name] = written[name]  # the writer knows: a ragged vector of int32 arrives as one, not as a list
        wired.append(replace(stage, reads=MappingProxyType(reads)))
        written |= stage.writes
        writer |= dict.fromkeys(stage.writes, stage.name)
    return MappingProxyType(inputs), written, tuple(wired)


def _narrower(known: ColumnType, wanted: ColumnType, name: str, stage: str) -> ColumnType:
    """Of two declarations of one input column, the one that satisfies both readers."""
    if known.kind == "any" or (wanted.kind != "any" and wanted.feeds(known)):
        return wanted
    if known.feeds(wanted):
        return known
    for both, other in ((replace(known, optional=False), wanted), (replace(wanted, optional=False), known)):
        if both.feeds(other):
            return both
    raise WiringError(f"stage {stage!r} reads input {name!r} as {wanted}, but it is declared as {known} before; declare both alike")
