"""Settings from the command line: `embed.model=small` becomes a checked value of the stage's field."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any

from headrace.errors import SettingError, listing, nearest
from headrace.pipeline import Pipeline
from headrace.stage import Stage
from headrace.training import Training


def override(pipeline: Pipeline, assignments: Sequence[str]) -> Pipeline:
    """The pipeline with `stage.setting=value` applied in order; values are checked against the field's annotation.

    Text stays text; other types are read as JSON (`true`, `3`, `[1, 2]`, `null`), then held to the annotation by pydantic.

    Raises:
        SettingError: not of that form, no such stage or setting, or a value that the annotation forbids.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        name, dot, setting = path.strip().partition(".")
        if not (equals and dot and name and setting):
            raise SettingError(f"--set {assignment!r} must have the form stage.setting=value, such as embed.model=small")
        stage = pipeline.stage(name)
        if setting not in stage.settings:
            known = f"it has {listing(stage.settings)}" if stage.settings else "it has no settings"
            raise SettingError(f"--set {assignment!r}: stage {name!r} has no setting {setting!r}; {known}" + nearest(setting, stage.settings))
        pipeline = pipeline.replace(stage.with_settings({setting: _value(stage, setting, text)}))
    return pipeline


def override_training(training: Training, assignments: Sequence[str]) -> Training:
    """The training with `setting=value` applied to its settings, and `stage.setting=value` to those of its pipeline's stages, in order.

    Raises:
        SettingError: as of `override`.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not (equals and name):
            raise SettingError(f"--set {assignment!r} must have the form setting=value, such as lr=3e-4, or stage.setting=value")
        if "." in name:
            if training.data is None:
                raise SettingError(
                    f"--set {assignment!r} is about a stage, and training {training.name!r} has no pipeline; of its own it has {listing(training.values)}"
                )
            training = dataclasses.replace(training, data=override(training.data, [assignment]))
            continue
        if name not in training.values:
            known = f"it has {listing(training.values)}" if training.values else "it has no settings"
            raise SettingError(f"--set {assignment!r}: training {training.name!r} has no setting {name!r}; {known}" + nearest(name, training.values))
        training = training.with_settings(**{name: setting_value(type(training.settings), name, text, said=f"--set {name}={text!r}")})
    return training


def _value(stage: Stage, setting: str, text: str) -> Any:
    return setting_value(type(stage.call), setting, text, said=f"--set {stage.name}.{setting}={text!r}")


def setting_value(owner: type, setting: str, text: str, *, said: str) -> Any:
    """What the text says, as the class that has the setting annotates it."""
    import pydantic  # a third of a second to import, and only --set needs it

    try:
        hint = typing.get_type_hints(owner, include_extras=True)[setting]
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint)
    except (NameError, pydantic.errors.PydanticUserError) as error:
        raise SettingError(
            f"{said}: its annotation is nothing that text can be checked against ({error}); "
            "use str, bool, int, float, list, dict, a Literal or an Enum, or set it in Python with with_settings"
        ) from error
    problems = []
    for candidate in _candidates(text):
        try:
            return adapter.validate_python(candidate)
        except pydantic.ValidationError as error:
            problems.append(error.errors()[0]["msg"])
    shown = getattr(hint, "__name__", None) or str(hint)
    raise SettingError(f"{said}: {problems[0]}; the setting is declared as {shown}")


def _candidates(text: str) -> list[Any]:
    """What the text may mean: first itself, then the JSON value that it spells."""
    try:
        return [text, json.loads(text)]
    except ValueError:
        return [text]
