"""Pipelines: wiring by column name, checked where the pipeline is written."""

import typing

import pytest

import headrace as hr
from headrace.columns import ANY, type_of
from headrace.errors import DefinitionError, SettingError, WiringError


def step(name, reads, writes):
    """A stage that reads and writes columns of those types."""
    call = eval(f"lambda {', '.join(reads)}: None")
    call.__annotations__ = {column: annotation if annotation is hr.Column else hr.Column[annotation] for column, annotation in reads.items()}
    return hr.stage(out=writes, name=name)(call)


@hr.stage(out={"y": float})
class Scale:
    by: float = 2.0

    def __call__(self, x: hr.Column[float]):
        return {"y": x * self.by}


@hr.stage(out={"text": str})
def upper(text: hr.Column[str]):
    return {"text": [value.upper() for value in text]}


CLEAN = step("clean", {"text": str}, {"text": str})
EMBED = step("embed", {"text": str}, {"vector": hr.Vector(3)})
SCORE = step("score", {"vector": hr.Vector(), "bias": float}, {"score": float})


def test_an_untyped_reader_gets_the_writers_type():
    """A stage that reads any type is wired with the type that is written, so that values arrive as that type's do."""
    pipeline = hr.Pipeline("p", EMBED, step("use", {"vector": hr.Column, "other": hr.Column}, {"n": int}))
    assert spelled(pipeline.stage("use").reads) == {"vector": "Vector(3)", "other": "any"}


def spelled(columns):
    """Columns with their types as text, to compare with."""
    return {name: str(column) for name, column in columns.items()}


@pytest.mark.parametrize(
    ("steps", "options", "inputs", "outputs"),
    [
        ([CLEAN, EMBED], {}, {"text": "str"}, {"text": "str", "vector": "Vector(3)"}),
        ([CLEAN, EMBED, SCORE], {"outputs": ["score"]}, {"text": "str", "bias": "float"}, {"score": "float"}),
        ([EMBED], {"inputs": {"text": str, "id": int}}, {"text": "str", "id": "int"}, {"vector": "Vector(3)"}),
        ([hr.Pipeline("tidy", CLEAN), EMBED], {}, {"text": "str"}, {"text": "str", "vector": "Vector(3)"}),
        ([step("a", {"x": typing.Any}, {"y": int}), step("b", {"x": int}, {"z": int})], {}, {"x": "int"}, {"y": "int", "z": "int"}),
        ([step("a", {"x": int | None}, {"y": int}), step("b", {"x": int}, {"z": int})], {}, {"x": "int"}, {"y": "int", "z": "int"}),
        ([step("a", {"v": hr.Vector() | None}, {"y": int}), step("b", {"v": hr.Vector(3)}, {"z": int})], {}, {"v": "Vector(3)"}, {"y": "int", "z": "int"}),
        ([step("a", {"v": hr.Vector(3) | None}, {"y": int}), step("b", {"v": hr.Vector()}, {"z": int})], {}, {"v": "Vector(3)"}, {"y": "int", "z": "int"}),
        ([step("a", {"v": hr.Vector()}, {"y": int}), step("b", {"v": hr.Vector(3) | None}, {"z": int})], {}, {"v": "Vector(3)"}, {"y": "int", "z": "int"}),
    ],
)
def test_inputs_and_outputs_follow_from_the_stages(steps, options, inputs, outputs):
    """What no stage before writes is an input, of the type that satisfies every reader; what is written is an output."""
    pipeline = hr.Pipeline("p", *steps, **options)
    assert (spelled(pipeline.inputs), spelled(pipeline.outputs)) == (inputs, outputs)


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: hr.Pipeline("a b", CLEAN), DefinitionError, ["first argument", "identifier such as 'reviews'", "got 'a b'"]),
        (lambda: hr.Pipeline(CLEAN), DefinitionError, ["first argument", "name", "got <function"]),
        (lambda: hr.Pipeline("p"), DefinitionError, ["'p' has no stage", "hr.Pipeline('p', clean)"]),
        (lambda: hr.Pipeline("p", CLEAN, CLEAN), DefinitionError, ["two stages named 'clean'", "@hr.stage(name=...)"]),
        (lambda: hr.Pipeline("p", Scale), DefinitionError, ["Scale is a class", "Scale()"]),
        (lambda: hr.Pipeline("p", EMBED, outputs="vector"), DefinitionError, ["outputs is a list", "outputs=['vector']", "got 'vector'"]),
        (lambda: hr.Pipeline("p", EMBED, outputs=["vectr"]), WiringError, ["'vectr'", "they write 'vector'", "did you mean 'vector'?"]),
        (lambda: hr.Pipeline("p", EMBED, inputs={"txt": str}), WiringError, ["'embed' reads 'text'", "there are 'txt'", "did you mean 'txt'?"]),
        (lambda: hr.Pipeline("p", EMBED, inputs=["text"]), DefinitionError, ["'p': inputs", "{'text': str}", "got ['text']"]),
        (lambda: hr.Pipeline("p", EMBED, inputs={"text": dict}), DefinitionError, ["'p': inputs", "column 'text'", "<class 'dict'>"]),
        (lambda: hr.Pipeline("p", EMBED, inputs={"text": int}), WiringError, ["'embed' reads input 'text' as str", "declared as int", "declare both alike"]),
        (
            lambda: hr.Pipeline("p", step("write", {"a": int}, {"text": int}), EMBED),
            WiringError,
            ["'embed' reads 'text' as str", "'write' writes it as int", "declare the parameter as int", "change what 'write' returns"],
        ),
        (
            lambda: hr.Pipeline("p", step("a", {"x": int}, {"y": int}), step("b", {"x": str}, {"z": int})),
            WiringError,
            ["'b' reads input 'x' as str", "declared as int", "declare both alike"],
        ),
        (lambda: hr.Pipeline("p", CLEAN).stage("claen"), SettingError, ["'p' has no stage 'claen'", "it has 'clean'", "did you mean 'clean'?"]),
        (lambda: hr.Pipeline("p", Scale()).with_settings(scal={}), SettingError, ["no stage 'scal'", "did you mean 'scale'?"]),
        (lambda: hr.Pipeline("p", Scale()).with_settings(scale={"bye": 1.0}), SettingError, ["no setting 'bye'", "'by'"]),
        (lambda: hr.Pipeline("p", CLEAN, EMBED, outputs=["vector"]).kept(["text"]), WiringError, ["keep 'text'", "'clean' writes", "another name"]),
        (lambda: hr.Pipeline("p", EMBED).kept("id"), WiringError, ["keep is a list", "keep=['id']", "got 'id'"]),
    ],
)
def test_a_mistake_is_refused(make, error, parts):
    """What does not fit fails where the pipeline is written, with what is missing, what is there, and the nearest match."""
    with pytest.raises(error) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(("keep", "kept"), [([], {}), (["id"], {"id": ANY}), (["bias", "id"], {"bias": type_of(float), "id": ANY}), (["score"], {})])
def test_kept_columns(keep, kept):
    """A kept column has the type that a stage reads it as, and is not needed where an output has its name."""
    assert hr.Pipeline("p", EMBED, SCORE).kept(keep) == kept


def test_settings_make_a_variant():
    """A variant has its settings, the original keeps its own, and everything else is shared."""
    pipeline = hr.Pipeline("p", upper, Scale(by=3.0))
    other = pipeline.with_settings(scale={"by": 5.0})
    assert [p.local([{"text": "a", "x": 2.0}])[0]["y"] for p in (pipeline, other)] == [6.0, 10.0]
    assert (other.name, other.inputs, other.stages[0]) == (pipeline.name, pipeline.inputs, pipeline.stages[0])
    assert pipeline.stage("scale").settings == {"by": 3.0}


def test_text():
    """A pipeline is printed as its columns and stages."""
    assert repr(hr.Pipeline("p", CLEAN, EMBED)) == "Pipeline('p': text -> clean -> embed -> text, vector)"
