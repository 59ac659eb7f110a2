"""`headrace check` and `headrace run --gate`: real files, a real batch job, and a real door and replica."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import service

import headrace as hr
from headrace.cli.loading import load

from conftest import Run  # isort: skip

FILE = """
import headrace as hr


@hr.stage(out={"words": int, "mean": float})
class Words:
    lower: bool = True

    def __call__(self, text: hr.Column[str]):
        words = [(one.lower() if self.lower else one).split() for one in text]
        return {"words": [len(set(some)) for some in words], "mean": [sum(map(len, some)) / max(1, len(some)) for some in words]}


@hr.stage(out={"share": float})
def share(words: hr.Column[int]):
    return {"share": words / max(1, words.sum())}


words = hr.Pipeline("words", Words())
peeks = hr.Pipeline("peeks", Words(), share)
"""
TEXTS = ["a quiet room", "Loud LOUD loud", "", "The host the Host", "one two three four"] * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline file, and golden rows with one of its outputs."""
    (tmp_path / "words.py").write_text(FILE)
    expected = [len({word.lower() for word in text.split()}) for text in TEXTS]
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS, "words": expected}), tmp_path / "golden.parquet")
    return tmp_path


def pipeline(folder: Path, **settings: object) -> hr.Pipeline:
    """The pipeline of the file, in this process."""
    return load(f"{folder / 'words.py'}::words").with_settings(words=settings)


def test_equal_in_every_way(folder: Path, command: Run) -> None:
    """Local, batch and HTTP, and the file's own expected values; what was compared is said."""
    with service(pipeline(folder)) as url:
        done = command("check", "words.py::words", "--input", "golden.parquet", "--url", url)
    assert done.returncode == 0, done.stdout + done.stderr
    ways = "local reversed, local row by row, batch, HTTP row by row, HTTP in batches, HTTP concurrently"
    assert done.stdout == f"words: all values are equal (20 rows, columns words, mean; local against {ways}; expected values in the input: words)\n"
    assert {path.name for path in folder.iterdir()} >= {"words.py", "golden.parquet"} and not list(folder.glob("out*"))


def test_a_service_with_another_setting_is_caught(folder: Path, command: Run) -> None:
    """Each value that differs, with target, row and column; exit code 1."""
    with service(pipeline(folder, lower=False)) as url:
        done = command("check", "words.py::words", "--input", "golden.parquet", "--url", url, "--no-batch", "--limit", "5")
        same = command("check", "words.py::words", "--input", "golden.parquet", "--url", url, "--no-batch", "--set", "words.lower=false", "--limit", "1")
    assert done.returncode == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["HTTP", "row", "by", "row", "1", "words", "1", "3", "not", "equal"] in lines
    assert ["HTTP", "in", "batches", "3", "words", "2", "4", "not", "equal"] in lines
    assert "6 values differ, 2 in HTTP row by row, 2 in HTTP in batches, 2 in HTTP concurrently" in done.stderr
    assert same.returncode == 0, same.stdout + same.stderr


def test_a_run_can_require_it(folder: Path, command: Run) -> None:
    """A pipeline whose rows influence each other does not begin; an honest one runs as ever."""
    job = ("--input", "golden.parquet", "--output", "out", "--gate", "golden.parquet", "--keep", "id")
    refused = command("run", "words.py::peeks", *job)
    assert refused.returncode == 1 and "local row by row" in refused.stdout and not (folder / "out").exists()
    done = command("run", "words.py::words", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 rows in" in done.stdout and (folder / "out" / "_SUCCESS").exists()


def test_mistakes(folder: Path, command: Run) -> None:
    """Nobody at the address, another pipeline there, a tolerance that is none, a file without the columns."""
    check = ("check", "words.py::words", "--no-batch", "--input", "golden.parquet")
    with service(hr.Pipeline("others", *pipeline(folder).stages)) as url:
        other = command(*check, "--url", url)
    assert other.returncode == 1 and "words" in other.stderr and "others" in other.stderr
    tolerance = command(*check, "--tolerance", "relativ=1")
    assert tolerance.returncode == 2 and "relative=0.01" in tolerance.stderr
    pq.write_table(pa.table({"txt": ["a"]}), folder / "other.parquet")
    columns = command("check", "words.py::words", "--no-batch", "--input", "other.parquet")
    assert columns.returncode == 2 and "did you mean 'txt'" in columns.stderr
