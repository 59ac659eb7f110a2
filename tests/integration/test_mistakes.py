"""Mistakes at the command line: each says what is wrong and the nearest fix, in the user's terms, with the right exit code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import Run  # isort: skip

PIPELINE = """
import headrace as hr


@hr.stage(out={"length": int})
def length(text: hr.Column[str]):
    return {"length": [len(t) for t in text]}


@hr.stage(out={"score": float})
class Score:
    factor: float = 1.0
    model: str = "small"

    def __call__(self, length: hr.Column[int]):
        return {"score": length * self.factor}


"""
ONE = PIPELINE + "reviews = hr.Pipeline('reviews', length, Score())\n"
FILES = {
    "reviews.py": ONE,
    "two.py": ONE + "others = hr.Pipeline('others', length)\n",
    "none.py": PIPELINE,
    "syntax.py": "import headrace as hr\n\ndef f(:\n    pass\n",
    "raises.py": "import os\n\nTOKEN = os.environ['NOT_THERE_AT_ALL']\n",
    "wired.py": PIPELINE + "reviews = hr.Pipeline('reviews', Score(), length)\n",
    "typed.py": ONE.replace("Column[str]", "Column[int]"),
    "nobody.py": ONE.replace('{"score": float}', '{"score": float}, on=hr.gpu(64, "H100")'),
    "short.py": PIPELINE.replace("for t in text]", "for t in text][1:]") + "reviews = hr.Pipeline('reviews', length)\n",
    "setup.py": ONE.replace("    def __call__", "    def setup(self, device):\n        raise RuntimeError('no weights')\n\n    def __call__"),
    "divide.py": PIPELINE.replace("len(t) for", "1 // (len(t) - 6) for") + "reviews = hr.Pipeline('reviews', length)\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files above, inputs, and an output that is in use."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "in").mkdir()
    (tmp_path / "nulls").mkdir()
    pq.write_table(pa.table({"id": range(20), "text": [f"text {n}" for n in range(20)], "stars": [n % 5 for n in range(20)]}), tmp_path / "in/a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "nulls/a.parquet")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.csv").write_text("text\nx\n")
    (tmp_path / "mixed/b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    return tmp_path


def told(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """Hold what a command said to the rules of this file."""
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and "src/headrace" not in done.stderr and "/headrace/" not in done.stderr.replace("/_headrace/", "")
    assert done.stdout == ""


INPUT, OUTPUT = ["-i", "in"], ["-o", "out"]
USUAL = [*INPUT, *OUTPUT]

MISTAKES: list[tuple[str, Sequence[str], str]] = [
    ("no such file", ["reviws.py", *USUAL], r"error: no file 'reviws.py'; did you mean 'reviews.py'\?"),
    ("one colon", ["reviews.py:reviews", *USUAL], r"did you mean reviews.py::reviews\?"),
    ("an unknown name", ["two.py::other", *USUAL], r"two.py has no pipeline 'other'; it has 'reviews', 'others'; did you mean 'others'\?"),
    ("two pipelines", ["two.py", *USUAL], r"two.py has 2 pipelines, 'reviews', 'others'; say which: two.py::reviews"),
    ("no pipeline", ["none.py", *USUAL], r"none.py has no pipelines; define one, such as"),
    ("a syntax error", ["syntax.py", *USUAL], r"error: syntax.py, line 3: invalid syntax\n    def f\(:"),
    ("an error at import", ["raises.py", *USUAL], r"raises.py, line 3: TOKEN = os.environ\['NOT_THERE_AT_ALL'\]: KeyError: 'NOT_THERE_AT_ALL'"),
    ("a wrong type between columns", ["typed.py", *USUAL], r"reads column 'text' as int, but in the input it is string; declare it as str"),
    ("an unknown stage", ["reviews.py", *USUAL, "--set", "scor.factor=2"], r"has no stage 'scor'; it has 'length', 'score'; did you mean 'score'\?"),
    ("an unknown setting", ["reviews.py", *USUAL, "--set", "score.facter=2"], r"has no setting 'facter'; it has 'factor', 'model'; did you mean 'factor'\?"),
    (
        "a bad value of a setting",
        ["reviews.py", *USUAL, "--set", "score.factor=big"],
        r"score.factor='big': .*valid number.*; the setting is declared as float",
    ),
    ("no setting at all", ["reviews.py", *USUAL, "--set", "factor=2"], r"must have the form stage.setting=value"),
    ("an empty glob", ["reviews.py", "-i", "in/*.csv", *OUTPUT], r"no file matches 'in/\*\.csv'; check the path, and quote a glob"),
    (
        "mixed formats",
        ["reviews.py", "-i", "mixed", *OUTPUT],
        r"the input mixes formats: .*a\.csv' is csv, .*b\.jsonl' is jsonl; narrow the glob or say --format",
    ),
    ("an unreadable bucket", ["reviews.py", "-i", "s3://reviews/day", *OUTPUT], r"cannot list 's3://reviews/day': "),
    ("an unknown scheme", ["reviews.py", "-i", "nope://x", *OUTPUT], r"cannot open 'nope://x': .*nope"),
    ("a missing column", ["reviews.py", *USUAL, "--columns", "id,stars"], r"'reviews' reads column 'text', which the input lacks; it has 'id', 'stars'"),
    ("unknown --columns", ["reviews.py", *USUAL, "--columns", "txt"], r"--columns names 'txt', which the input lacks; it has .*; did you mean 'text'\?"),
    ("unknown --keep", ["reviews.py", *USUAL, "--keep", "star"], r"'star', which the input lacks; it has 'id', 'text', 'stars'; did you mean 'stars'\?"),
    ("nulls", ["reviews.py", "-i", "nulls", *OUTPUT], r"has 1 nulls there; declare it as str \| None, or leave them out with --where 'text is not None'"),
    ("a bad --where", ["reviews.py", *USUAL, "--where", "stars >"], r"--where 'stars >' is not an expression: .*allowed are columns compared with"),
    ("--where of no column", ["reviews.py", *USUAL, "--where", "star > 3"], r"no column 'star' in the input; .*did you mean 'stars'\?"),
    ("--where of a wrong type", ["reviews.py", *USUAL, "--where", "stars > 'many'"], r"'many' does not fit column 'stars' of type int64"),
    ("--where that nothing fits", ["reviews.py", *USUAL, "--where", "stars > 100"], r"the input has no rows for which --where 'stars > 100' holds"),
    ("a bad --limit", ["reviews.py", *USUAL, "--limit", "0"], r"--limit must be at least 1, got 0"),
    ("an unknown input format", ["reviews.py", *USUAL, "--format", "parqet"], r"no input format 'parqet'; there are .*did you mean 'parquet'\?"),
    (
        "an unknown output format",
        ["reviews.py", *USUAL, "--sink", "json"],
        r"no output format 'json'; there are 'parquet', 'jsonl', 'delta'; did you mean 'jsonl'\?",
    ),
    ("a bad share", ["reviews.py", *USUAL, "--max-dead-letters", "1.5"], r"--max-dead-letters must be a share such as 1% .* or a number .*, got '1.5'"),
    ("two wishes at once", ["reviews.py", *USUAL, "--restart", "--accept-change"], r"--restart throws away what --accept-change would keep"),
    ("an output with something in it", ["reviews.py", *INPUT, "-o", "full"], r"output 'full' holds no run of headrace: it has 'notes.txt'; choose an empty"),
    ("the same, with --restart", ["reviews.py", *INPUT, "-o", "full", "--restart"], r"output 'full' holds no run of headrace: it has 'notes.txt'"),
    ("an unknown option", ["reviews.py", *USUAL, "--model", "x"], r"No such option"),
    ("no output", ["reviews.py", *INPUT], r"Missing option"),
]


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_told_before_ray_starts(folder: Path, command: Run, arguments: Sequence[str], message: str) -> None:
    """Exit code 2, one message, no traceback, and nothing written."""
    unreachable = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    told(command("run", *arguments, **unreachable), 2, message)
    assert not (folder / "out").exists()


def test_mistakes_of_a_replay(folder: Path, command: Run) -> None:
    """A folder without a run, or none at all."""
    told(command("replay", "in"), 2, r"'in' holds no run of headrace; name the folder that a run wrote to")
    told(command("replay", "none"), 2, r"'none' holds no run of headrace")
    assert not (folder / "none").exists() and os.listdir(folder / "in") == ["a.parquet"]


def test_mistakes_in_the_definition_are_placed(folder: Path, command: Run) -> None:
    """`explain` needs no Ray, and finds what is wrong with a file as `run` does."""
    told(command("explain", "reviews.py", "-i", "in", "--set", "score.factor=x"), 2, r"valid number")
    told(command("explain", "two.py"), 2, r"has 2 pipelines")
    told(command("explain", "nobody.py"), 2, r"stage 'score' asks for gpu\(64, H100\), and no node has it; the cluster has this machine: ")


def test_explain(folder: Path, command: Run) -> None:
    """The plan of a sound file, with its input, is drawn."""
    done = command("explain", "reviews.py", "-i", "in", "--keep", "id")
    assert done.returncode == 0, done.stderr
    assert "length" in done.stdout and "score" in done.stdout and "1 units, 20 rows" in done.stdout


@pytest.fixture(scope="module")
def address(shared_ray: None) -> str:
    """The address of a Ray that several commands can join, so that each does not start its own."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


RUNNING: list[tuple[str, Sequence[str], int, str]] = [
    ("hardware that nobody has", ["nobody.py", *USUAL], 2, r"stage 'score' asks for gpu\(64, H100\), and no node has it; the cluster has .*CPUs"),
    ("a set-up that fails", ["setup.py", *USUAL], 1, r"(?s)line 16, in setup.*error: stage 'score' setup failed: RuntimeError: no weights"),
    ("a stage that returns too few rows", ["short.py", *USUAL], 3, r"20 rows of 20 failed.* allows 1. length: ContractError: .* 0 values for 1 rows"),
    ("a stage that raises", ["divide.py", *USUAL], 3, r"(?s)10 rows of 20 failed.* allows 1. length: ZeroDivisionError: .*line 7, in length"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), [case[1:] for case in RUNNING], ids=[case[0] for case in RUNNING])
def test_a_mistake_that_only_a_run_finds(folder: Path, command: Run, address: str, arguments: Sequence[str], code: int, message: str) -> None:
    """2 for what can be mended before anything runs, 1 for a stage that cannot be set up, 3 for rows that fail, with the user's own frames."""
    told(command("run", *arguments, "-q", "--address", address), code, message)
    assert not (folder / "out/_SUCCESS").exists()


def test_a_run(folder: Path, command: Run, address: str) -> None:
    """The same command without a mistake."""
    done = command("run", "reviews.py", *USUAL, "--keep", "id", "--set", "score.factor=2", "--address", address)
    assert done.returncode == 0 and done.stdout.startswith("20 rows in "), done.stderr
    assert sum(pq.read_metadata(path).num_rows for path in (folder / "out").glob("part-*")) == 20


def test_any_file_name_runs_on_a_ray_of_its_own(folder: Path, command: Run) -> None:
    """Without an address Ray starts here; a file whose name no worker could import runs as any other, and imports its neighbours."""
    (folder / "neighbour.py").write_text("def count(text):\n    return len(text)\n")
    (folder / "my-reviews.py").write_text("from neighbour import count\n" + ONE.replace("len(t)", "count(t)"))
    done = command("run", "my-reviews.py", *USUAL)
    assert done.returncode == 0 and done.stdout.startswith("20 rows in "), done.stderr


def test_an_address_that_does_not_answer(folder: Path, command: Run) -> None:
    """It is a failure of the run, and what an address looks like is said."""
    told(command("run", "reviews.py", *USUAL, "--address", "nowhere"), 1, r"cannot join Ray at 'nowhere': .*It must be the head's host:6379")
    assert os.listdir(folder / "in") == ["a.parquet"]
