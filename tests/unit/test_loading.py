"""From FILE or FILE::name to a pipeline, and everything that can be wrong with the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli.loading import load
from headrace.cli.options import names
from headrace.cli.run import _for_the_cluster
from headrace.errors import HeadraceError, PipelineFileError, WiringError

STAGE = """
import headrace as hr

@hr.stage(out={"y": int})
def double(x: hr.Column[int]):
    return {"y": [2 * value for value in x]}
"""
ONE = STAGE + "doubled = hr.Pipeline('twice', double)\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("target", ["p.py", "p.py::doubled", "p.py::twice", "./p.py"])
def test_a_file_with_one_pipeline(here: Path, target: str) -> None:
    """It is found without its name, and by its variable or its own name."""
    (here / "p.py").write_text(ONE)
    assert load(target).local([{"x": 2}]) == [{"y": 4}]


@pytest.mark.parametrize("stem", ["a-b", "json", "2024"])
def test_any_file_name_will_do(here: Path, stem: str) -> None:
    """A name that is no identifier, or that of a module in use, takes nobody's place."""
    module = sys.modules.get(stem)
    (here / f"{stem}.py").write_text(ONE)
    assert load(f"{stem}.py").name == "twice"
    assert sys.modules.get(stem) is module


def test_neighbours_can_be_imported(here: Path) -> None:
    """A pipeline file imports the files beside it, as `python FILE` would."""
    (here / "headrace_test_neighbour.py").write_text(STAGE)
    (here / "p.py").write_text("import headrace as hr\nfrom headrace_test_neighbour import double\np = hr.Pipeline('p', double)\n")
    assert load("p.py").name == "p"


def test_one_pipeline_under_two_names_is_one(here: Path) -> None:
    """An alias does not make a second pipeline."""
    (here / "p.py").write_text(ONE + "alias = doubled\n")
    assert load("p.py").name == "twice"


REFUSALS = {
    "no such file": ("reviws.py", ONE, "no file 'reviws.py'; did you mean 'reviews.py'"),
    "no such folder": ("nowhere/x.py", ONE, "no file 'nowhere/x.py'; there is no folder 'nowhere'"),
    "one colon": ("reviews.py:doubled", ONE, r"no file 'reviews.py:doubled'; did you mean reviews.py::doubled\?"),
    "an unknown name": ("reviews.py::doubed", ONE, "has no pipeline 'doubed'; it has 'twice', 'doubled'; did you mean 'doubled'"),
    "no pipeline": ("reviews.py", STAGE, r"reviews.py has no pipelines; define one, such as reviews = hr.Pipeline\('reviews', clean\)"),
    "two": ("reviews.py", ONE + "other = hr.Pipeline('other', double)\n", "has 2 pipelines, 'doubled', 'other'; say which: reviews.py::doubled"),
    "a syntax error": ("reviews.py", "x = 1\ndef f(:\n", r"reviews.py, line 2: invalid syntax\n    def f\(:"),
    "an error at import": ("reviews.py", "import os\n\nos.environ['NOT_THERE_AT_ALL']\n", r"reviews.py, line 3: os.environ\['NOT_THERE_AT_ALL'\]: KeyError"),
    "an exit at import": ("reviews.py", "import sys\nsys.exit(3)\n", r"reviews.py, line 2: sys.exit\(3\): SystemExit: 3"),
    "a missing module": ("reviews.py", "import not_there_at_all\n", "line 1: import not_there_at_all: ModuleNotFoundError"),
    "no Python": ("data.txt", "", "is no Python file; its name must end in .py"),
}


@pytest.mark.parametrize(("target", "content", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(here: Path, target: str, content: str, message: str) -> None:
    """Each says where, what, and the nearest thing that would work."""
    (here / ("data.txt" if target == "data.txt" else "reviews.py")).write_text(content)
    with pytest.raises(PipelineFileError, match=message):
        load(target)


def test_a_mistake_in_a_definition_is_placed(here: Path) -> None:
    """Our own errors keep their type and gain the line of the user's file."""
    (here / "p.py").write_text(STAGE + "p = hr.Pipeline('p', double, inputs={'z': int})\n")
    with pytest.raises(WiringError, match=r"(?s)reads 'x'.*\n    at p.py, line 7: p = hr.Pipeline") as caught:
        load("p.py")
    assert isinstance(caught.value, HeadraceError)


@pytest.mark.parametrize(
    ("arguments", "file", "kept"),
    [
        (["run", "d/p.py", "--submit", "http://h", "-o", "out"], "d/p.py", ["run", "p.py", "-o", "out"]),
        (["run", "--submit=http://h", "d/p.py::x", "-o", "out"], "d/p.py::x", ["run", "p.py::x", "-o", "out"]),
        (["run", "p.py", "-i", "--submit-me", "--submit", "u"], "p.py", ["run", "p.py", "-i", "--submit-me"]),
    ],
)
def test_what_is_sent_to_a_cluster(arguments: list[str], file: str, kept: list[str]) -> None:
    """The same command without --submit, with the file's name as it is in the folder that travels."""
    assert _for_the_cluster(arguments, file) == kept


@pytest.mark.parametrize(("text", "found"), [("all", "all"), ("", ()), ("a", ("a",)), (" a, b ,,", ("a", "b"))])
def test_names(text: str, found: object) -> None:
    """A list of columns as it is typed."""
    assert names(text) == found
