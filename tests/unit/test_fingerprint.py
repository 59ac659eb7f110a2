"""Fingerprint: what counts as another program, and what does not."""

from __future__ import annotations

import linecache
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import headrace as hr
from headrace.cli.loading import load
from headrace.fingerprint import code_of, differences, facts, refuse

CODE = '''"""A page of a user."""
import headrace as hr
import near
from far import LIMIT


@hr.stage(out={"length": int})
def length(text: hr.Column[str]):
    return {"length": [near.count(t) + LIMIT for t in text]}


@hr.stage(out={"score": float})
class Score:
    factor: float = 1.0
    model: str = "small"

    def __call__(self, length: hr.Column[int]):
        return {"score": length * self.factor}


reviews = hr.Pipeline("reviews", length, Score())
'''
NEAR = "def count(text):\n    return len(text)\n"
REQUEST = {"origin": {"file": "x"}, "pipeline": "reviews", "input": ["/in"], "format": None, "where": None, "limit": None, "keep": ["id"], "sink": "parquet"}

Facts = Callable[..., dict[str, str]]


@pytest.fixture
def facts_of(tmp_path: Path) -> Iterator[Facts]:
    """The facts of a pipeline file in a folder of its own, loaded as a new process would load it."""
    before, path = set(sys.modules), list(sys.path)

    def clear() -> None:
        for name in set(sys.modules) - before:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        sys.path[:] = path

    def make(code: str = CODE, *, near: str = NEAR, far: str = "LIMIT = 3\n", folder: str = "one", settings: Any = None, **request: Any) -> dict[str, str]:
        clear()
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, content in (("reviews.py", code), ("near.py", near), ("far.py", far)):
            (tmp_path / folder / name).write_text(content)
        sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
        try:
            pipeline = load(str(tmp_path / folder / "reviews.py"))
            pipeline = pipeline.with_settings(score=settings) if settings else pipeline
        finally:
            sys.dont_write_bytecode = kept
        return facts(pipeline, {**REQUEST, **request})

    yield make
    clear()


@pytest.mark.parametrize(
    "change",
    [
        {
            "code": CODE.replace("factor: float = 1.0", "# a comment\n\n    factor: float = 1.0  # one").replace(
                '"""A page of a user."""', '"""Another page."""'
            )
        },
        {"code": CODE.replace("hr.Column[str]):", 'hr.Column[str]):\n    """Count."""').replace('{"length": [', '{\n        "length": [')},
        {"near": '"""Counting."""\n' + NEAR.replace("    return", "    '''Count.'''\n    return")},
        {"folder": "two"},
        {"input": ["/elsewhere"], "origin": {"file": "y"}, "pipeline": "renamed"},
        {"code": CODE.replace('Pipeline("reviews"', "Pipeline('reviews'")},
    ],
    ids=["comments", "docstrings and layout", "a docstring of a module that is imported", "a moved file", "paths and names", "quotes"],
)
def test_what_is_no_change(facts_of: Facts, change: dict[str, Any]) -> None:
    """The rows would be the same."""
    assert differences(facts_of(), facts_of(**change)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"code": CODE.replace("near.count(t)", "2 * near.count(t)")}, ["code of reviews.py: changed"]),
        ({"near": NEAR.replace("len(text)", "len(text) + 1")}, ["code of near.py: changed"]),
        ({"far": "LIMIT = 4\n"}, ["code of far.py: changed"]),
        ({"settings": {"factor": 2.0}}, ["score.factor: was 1.0, is 2.0"]),
        ({"where": "id > 3"}, ["--where: was absent, is id > 3"]),
        ({"limit": 10}, ["--limit: was absent, is 10"]),
        ({"columns": ["id", "text"]}, ["--columns: was absent, is ['id', 'text']"]),
        ({"keep": []}, ["--keep: was ['id'], is []"]),
        ({"format": "csv", "sink": "jsonl"}, ["--format: was absent, is csv", "--sink: was parquet, is jsonl"]),
    ],
    ids=["code", "code that is imported", "a constant that is imported", "a setting", "where", "limit", "columns", "keep", "formats"],
)
def test_what_is_a_change(facts_of: Facts, change: dict[str, Any], told: list[str]) -> None:
    """Each is told in words."""
    assert differences(facts_of(), facts_of(**change)) == told


def test_stages_and_columns(facts_of: Facts) -> None:
    """Another wiring is told as such, beside the code."""
    told = differences(facts_of(), facts_of(CODE.replace('"reviews", length, Score()', '"reviews", length').replace("str]", "str | None]")))
    assert "columns of length: was text: str -> length: int, is text: str | None -> length: int" in told
    assert "stages: was length, score, is length" in told and "score.factor: was 1.0, is absent" in told


def test_two_modules_of_one_name(facts_of: Facts, tmp_path: Path) -> None:
    """Neither hides a change of the other."""
    code = CODE.replace("import near\n", "import near\nimport a.part\nfrom b import part\n")

    def made(**parts: str) -> dict[str, str]:
        for package in ("a", "b"):
            (tmp_path / "one" / package).mkdir(parents=True, exist_ok=True)
            (tmp_path / "one" / package / "__init__.py").touch()
            (tmp_path / "one" / package / "part.py").write_text(parts.get(package, "X = 1\n"))
        return facts_of(code)

    same = made()
    assert [differences(same, made(**{package: "X = 2\n"})) for package in ("a", "b")] == [["code of part.py: changed"]] * 2
    assert differences(same, made()) == []


def test_a_local_model(facts_of: Facts, tmp_path: Path) -> None:
    """A setting that names a model's folder or file counts with its state; any other folder does not."""
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    plain = facts_of(settings={"model": str(model)})
    (model / "deep/weights.bin").write_bytes(b"1")
    assert differences(plain, facts_of(settings={"model": str(model)})) == []
    (model / "config.json").touch()
    as_model = facts_of(settings={"model": str(model)})
    os.utime(model / "deep/weights.bin", ns=(1, 1))
    assert differences(as_model, facts_of(settings={"model": str(model)})) == ["version of score.model: changed"]
    one = facts_of(settings={"model": str(model / "deep/weights.bin")})
    (model / "deep/weights.bin").write_bytes(b"22")
    assert differences(one, facts_of(settings={"model": str(model / "deep/weights.bin")})) == ["version of score.model: changed"]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_model_in_hugging_faces_cache(facts_of: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """It counts with the commit that its main branch points to."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "hub" if variable == "HF_HUB_CACHE" else tmp_path))
    reference = tmp_path / "hub/models--org--small/refs/main"
    absent = facts_of(settings={"model": "org/small"})
    reference.parent.mkdir(parents=True)
    reference.write_text("c0ffee\n")
    one = facts_of(settings={"model": "org/small"})
    assert differences(absent, one) == ["version of score.model: was absent, is c0ffee"]
    reference.write_text("decade\n")
    assert differences(one, facts_of(settings={"model": "org/small"})) == ["version of score.model: changed"]
    assert differences(facts_of(settings={"model": "other/small"}), facts_of(settings={"model": "other/small"})) == []


NOTEBOOK = """
@hr.stage(out={"y": int})
def plus(x: hr.Column[int]):
    return {"y": x + 1}


@hr.stage(out={"z": int})
class Times:
    factor: int = 2

    def __call__(self, y: hr.Column[int]):
        return {"z": y * self.factor}
"""


def test_code_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts stage by stage, since there is no file."""

    def typed(code: str) -> dict[str, str]:
        cell, notebook = f"<cell {hash(code)}>", types.ModuleType("notebook")
        linecache.cache[cell] = (len(code), None, code.splitlines(keepends=True), cell)
        monkeypatch.setitem(sys.modules, "notebook", notebook)
        notebook.hr = hr
        exec(compile(code, cell, "exec", dont_inherit=True), vars(notebook))
        return facts(hr.Pipeline("p", notebook.plus, notebook.Times()), REQUEST)

    same = typed(NOTEBOOK)
    assert differences(same, typed(NOTEBOOK.replace("x + 1", "x  +  1"))) == []
    assert differences(same, typed(NOTEBOOK.replace("x + 1", "x + 2"))) == ["code of plus: changed"]
    assert differences(same, typed(NOTEBOOK.replace("y * self", "self.factor + self"))) == ["code of times: changed"]


def test_code_of_a_function_that_is_no_stage() -> None:
    def fit() -> int:
        return 1

    assert list(code_of(fit)) == ["code of test_fingerprint.py"] and code_of(fit) == code_of(test_what_is_told)


def test_what_is_told() -> None:
    """Long values are cut, and the choices are said."""
    (line,) = differences({"--where": "a" * 100}, {"--where": "b"})
    assert line == f"--where: was {'a' * 57}..., is b"
    text = str(refuse("out", [line]))
    assert text.startswith("output 'out' was begun with something else:\n  --where: was ") and "--accept-change goes on" in text and "--restart" in text


ASKING = """import near, pydantic
import headrace as hr

class Answer(pydantic.BaseModel):
    good: bool

score = hr.LLM(name="score", model="m", messages=near.ask, schema=Answer)
reviews = hr.Pipeline("reviews", score)
"""
ASK = 'def ask(text: str):\n    return [{"role": "user", "content": text}]\n'


def test_functions_and_classes_among_the_settings_count_by_their_code(facts_of: Facts) -> None:
    """Not by their addresses, which are never the same."""
    first = facts_of(ASKING, near=ASK)
    assert first["score.messages"] == "near.ask" and first["score.schema"] == "reviews.Answer"
    assert facts_of(ASKING, near=ASK, folder="two") == first
    assert differences(first, facts_of(ASKING, near=ASK.replace("user", "system"))) == ["code of near.py: changed"]
    assert differences(first, facts_of(ASKING.replace("good", "bad"), near=ASK))[0] == "code of reviews.py: changed"
