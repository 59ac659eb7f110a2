"""Stages: what @stage makes of a function and of a class, and which mistakes it refuses."""

import dataclasses
import typing

import pytest

import headrace as hr
from headrace.batching import Rows, Tokens
from headrace.errors import DefinitionError, SettingError
from headrace.stage import Stage


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"vector": hr.Vector(4)}, on=[hr.gpu(1, "L4"), hr.cpu(4)], batch=hr.tokens(64, of="text"), replicas=(1, 8), ray={"max_restarts": 2})
class TextEmbedder:
    model: str = "small"
    scale: float = 1.0
    limit = 3  # no annotation: a constant of the class, not a setting

    def setup(self, device):
        self.device = device

    def __call__(self, text: hr.Column[str]):
        return {"vector": [[self.scale] * 4 for _ in text]}


def plain(text: hr.Column[str]):
    return {"y": text}


def starred(*text):
    return {"y": text}


def positional(text, /):
    return {"y": text}


def nothing():
    return {"y": []}


def reading(annotation):
    """A function whose parameter has that annotation."""

    def probe(text):
        return {"y": text}

    probe.__annotations__ = {} if annotation is None else {"text": annotation}
    return probe


def holding(**members):
    """A class with those members, named Probe."""
    return type("Probe", (), {"__module__": __name__, "__call__": plain_method} | members)


def plain_method(self, text: hr.Column[str]):
    return {"y": text}


def test_a_function_is_a_stage_with_defaults():
    """A function stays callable as before, and its spec has one core, 1,024 rows and its own name."""
    spec = Stage.of(clean)
    assert clean(["  A  b "]) == {"text": ["A b"]}
    assert (spec.name, spec.on, spec.batch, spec.replicas, dict(spec.ray)) == ("clean", (hr.cpu(1),), Rows(1024), (1, None), {})
    assert ({name: str(c) for name, c in spec.reads.items()}, {name: str(c) for name, c in spec.writes.items()}) == ({"text": "str"}, {"text": "str"})
    assert (spec.is_model, spec.settings, spec.call) == (False, {}, clean)


def test_a_class_is_a_stage_with_settings():
    """A class becomes a dataclass; its annotated fields are the settings, and its spec is the decorator's."""
    spec = Stage.of(TextEmbedder(scale=2.0))
    assert (spec.name, spec.is_model, spec.settings) == ("text_embedder", True, {"model": "small", "scale": 2.0})
    assert (spec.on, spec.batch, spec.replicas) == ((hr.gpu(1, "L4"), hr.cpu(4)), Tokens(64, "text"), (1, 8))
    assert (dict(spec.ray), spec.apart) == ({"max_restarts": 2}, False)
    assert Stage.of(hr.stage(out={"y": str}, apart=True)(holding())()).apart
    assert Stage.of(hr.stage(out={"y": str}, concurrency=16)(holding())()).concurrency == 16
    assert Stage.of(spec) is spec
    assert Stage.of(hr.stage(out={"y": str})(holding())()).batch == Rows(32)


def test_a_subclass_of_a_stage_adds_settings():
    """A decorated subclass has the settings of its base and its own."""

    @hr.stage(out={"vector": hr.Vector(4)})
    class Longer(TextEmbedder):
        size: int = 4

    spec = Stage.of(Longer(size=8))
    assert (spec.name, spec.settings) == ("longer", {"model": "small", "scale": 1.0, "size": 8})


def test_a_dataclass_of_the_users_own_is_taken_as_it_is():
    """A class that is a dataclass already keeps its own way of being made."""
    made = hr.stage(out={"y": str})(dataclasses.dataclass(frozen=True)(holding(__annotations__={"n": int})))
    assert Stage.of(made(3)).settings == {"n": 3}


@pytest.mark.parametrize(("replicas", "span"), [(None, (1, None)), (3, (3, 3)), ((2, 5), (2, 5)), ((2, None), (2, None)), ([1, 1], (1, 1))])
def test_replicas(replicas, span):
    """Replicas are a range, a fixed number, or as many as fit."""
    assert Stage.of(hr.stage(out={"y": str}, replicas=replicas)(holding())()).replicas == span


@pytest.mark.parametrize(("batch", "rule"), [(None, Rows(1024)), (8, Rows(8)), (hr.rows(4), Rows(4)), (hr.tokens(9, of="text"), Tokens(9, "text"))])
def test_batch(batch, rule):
    """A batch rule may be a number, a rule, or the default."""
    assert Stage.of(hr.stage(out={"y": str}, batch=batch)(reading(hr.Column[str]))).batch == rule


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (hr.Column, "any"),
        (hr.Column[typing.Any], "any"),
        (hr.Column[int | None], "int | None"),
        (hr.Column[hr.Vector(3) | None], "Vector(3) | None"),
        ("hr.Column[hr.Vector(3)]", "Vector(3)"),
        (typing.Annotated[hr.Column[list], hr.Vector(3)], "Vector(3)"),
    ],
)
def test_columns_read(annotation, text):
    """A parameter's annotation, evaluated or still text, is the type of the column read."""
    assert str(Stage.of(hr.stage(out={"y": str})(reading(annotation))).reads["text"]) == text


@pytest.mark.parametrize(
    ("target", "options", "parts"),
    [
        (plain, {"out": {}}, ["'plain'", "at least one column", "out={'text': str}", "got {}"]),
        (plain, {"out": ["y"]}, ["'plain': out", "{'text': str}", "got ['y']"]),
        (plain, {"out": {"y": dict}}, ["'plain': out", "column 'y'", "<class 'dict'>", "allowed are str"]),
        (plain, {"out": {"y": [str]}}, ["'plain': out", "column 'y'", "[<class 'str'>]", "list[T]"]),
        (plain, {"out": {"y": typing.Any}}, ["'plain': out", "column 'y' needs a type"]),
        (plain, {"out": {3: str}}, ["'plain': out", "3 is no column name"]),
        (plain, {"out": {"__headrace_row": str}}, ["'__headrace_row' is no column name", "does not start with"]),
        (plain, {"name": "a b"}, ["stage name 'a b'", "identifier such as"]),
        (plain, {"name": 3}, ["stage name 3", "identifier such as"]),
        (lambda text: text, {}, ["stage name '<lambda>'", "identifier such as"]),
        (len, {}, ["function or a class", "built-in function len"]),
        (plain, {"on": [hr.gpu(1), "cpu"]}, ["'plain': on", "hr.cpu(...)", "got 'cpu'"]),
        (plain, {"on": 4}, ["'plain': on", "hr.cpu(...)", "got 4"]),
        (plain, {"batch": 0}, ["hr.rows(n)", "at least 1", "got 0"]),
        (plain, {"batch": 2.5}, ["'plain': batch", "hr.tokens(budget, of=...)", "got 2.5"]),
        (plain, {"batch": hr.tokens(8, of="txt")}, ["'txt'", "does not read", "it reads 'text'", "did you mean 'text'?"]),
        (reading(hr.Column[int]), {"batch": hr.tokens(8, of="text")}, ["cannot measure 'text' of type int", "text, vectors and lists"]),
        (plain, {"replicas": 2}, ["'plain': replicas=2", "for classes"]),
        (holding(), {"replicas": 0}, ["'probe': replicas", "1 <= least <= most", "got 0"]),
        (holding(), {"replicas": (3, 2)}, ["'probe': replicas", "got (3, 2)"]),
        (holding(), {"replicas": (1, 2, 3)}, ["'probe': replicas", "got (1, 2, 3)"]),
        (holding(), {"replicas": "2"}, ["'probe': replicas", "got '2'"]),
        (plain, {"apart": 1}, ["'plain': apart", "True or False", "got 1"]),
        (holding(), {"concurrency": 0}, ["concurrency", "whole number from 1 on", "got 0"]),
        (holding(), {"concurrency": True}, ["concurrency", "got True"]),
        (plain, {"concurrency": 4}, ["'plain': concurrency=4", "for classes"]),
        (plain, {"ray": "max_retries"}, ["'plain': ray", "{'max_retries': 3}", "got 'max_retries'"]),
        (reading(None), {}, ["'probe'", "parameter 'text'", "text: hr.Column[str]", "no annotation"]),
        (reading(str), {}, ["'probe'", "parameter 'text'", "text: hr.Column[str]", "got <class 'str'>"]),
        (reading(hr.Column[dict]), {}, ["'probe'", "column 'text'", "<class 'dict'>", "allowed are"]),
        (reading("hr.Colum[str]"), {}, ["'probe'", "cannot be evaluated", "Colum", "hr.Column[str]"]),
        (reading("Missing"), {}, ["'probe'", "cannot be evaluated", "Missing", "hr.Column[str]"]),
        (starred, {}, ["'*text' cannot be given by name", "name each column"]),
        (positional, {}, ["'text' cannot be given by name", "name each column"]),
        (nothing, {}, ["'nothing' reads no column", "text: hr.Column[str]"]),
        (type("Probe", (), {}), {}, ["'probe' has no __call__", "add def __call__"]),
        (holding(__init__=lambda self: None), {}, ["'probe' has an __init__", "write settings as fields", "setup(self, device)"]),
        (holding(setup=lambda self: None), {}, ["setup must take (self, device)", "got (self)"]),
        (holding(names=[], __annotations__={"names": list}), {}, ["'probe'", "settings", "mutable default"]),
    ],
)
def test_a_mistake_is_refused(target, options, parts):
    """A stage that is written wrongly fails at its definition, with the stage, the value, and what to write instead."""
    with pytest.raises(DefinitionError) as caught:
        hr.stage(**({"out": {"y": str}} | options))(target)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (plain, ["plain is not a stage", "@hr.stage(out={...})"]),
        (3, ["3 is not a stage", "@hr.stage(out={...})"]),
        (TextEmbedder, ["TextEmbedder is a class", "an instance", "TextEmbedder()"]),
    ],
)
def test_what_is_no_stage_is_refused(step, parts):
    """An undecorated function, and a class in place of an instance, are told how to become a stage."""
    with pytest.raises(DefinitionError) as caught:
        Stage.of(step)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (TextEmbedder(), ["'text_embedder'", "no setting 'modle'", "'model', 'scale'", "did you mean 'model'?"]),
        (clean, ["'clean'", "no setting 'modle'", "it has nothing"]),
    ],
)
def test_an_unknown_setting_is_refused(step, parts):
    """A setting that does not exist is refused with those that do."""
    with pytest.raises(SettingError) as caught:
        Stage.of(step).with_settings({"modle": "large"})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_stage_cannot_be_changed():
    """A spec is frozen, and so are its columns."""
    spec = Stage.of(clean)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"
    with pytest.raises(TypeError):
        spec.reads["text"] = None
