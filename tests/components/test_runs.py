"""`headrace runs`: every run is found once and told as it stands, whatever lies in the folders."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reports
from rich.console import Console

from headrace import heartbeat
from headrace.cli.runs import runs as command
from headrace.cli.tables import clean, show
from headrace.console.runs import Run, runs
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.heartbeat import Heartbeat
from headrace.ledger import Ledger
from headrace.state import Change, DataFile, State
from headrace.store import Folder
from headrace.units import Unit, write_units

UNITS = [Unit(at, (f"in/{at}.parquet",), 0, 0, 50, 1000, 1) for at in range(2)]
BEAT_S = 0.01


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are looked at a hundred times a second."""
    monkeypatch.setattr(heartbeat, "BEAT_S", BEAT_S)
    monkeypatch.setattr(heartbeat.at_work, "__kwdefaults__", {"beat_s": BEAT_S})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store_of(output: str) -> Folder:
    return Folder(locate(output, error=OutputError))


def begun(output: str, *, units: list[Unit] = UNITS) -> Ledger:
    """An output of which 40 of 100 rows are done, and 3 dead."""
    store = store_of(output)
    held, before = Ledger.claim(store)
    name = "_headrace/units-1.parquet"
    store.put(name, write_units(units))
    held.begin(before or State(request={"pipeline": "reviews"}, facts={}, units=name))
    if before is None:
        held.commit(Change(files=[DataFile(held.new_name("part", ".parquet"), 40, 1000)], done={0: [(0, 40)]}, dead={1: [(0, 3)]}))
    return held


def ended(output: str, **changed: Any) -> Ledger:
    """An output with a report of its last run."""
    held = begun(output)
    report = {**reports.usual().to_dict(), "run": held.run, "output": output, **changed}
    held.store.put("_headrace/report.json", json.dumps(report).encode())
    return held


def sign(held: Ledger, **changed: Any) -> None:
    """Leave a sign of life."""
    now = time.time()
    whole = {"run": held.run, "beat": 0, "host": heartbeat._host(), "process": heartbeat._process(os.getpid()), "began_s": now - 60, "at_s": now}
    held.store.put("_headrace/alive.json", json.dumps({**whole, **changed}).encode())


def only(*uris: str) -> Run:
    found = runs(uris)
    assert len(found) == 1, found
    return found[0]


def test_a_run_that_ended() -> None:
    """All is in its report."""
    ended("out")
    one = only("out")
    assert (one.output, one.state, one.pipeline, one.rows, one.total, one.dead_letters) == ("out", "succeeded", "reviews", 1_855_026, 2_000_000, 232)
    assert (one.began_s, one.wall_s, round(one.usd or 0, 2), one.why) == (reports.BEGAN_S, 840.0, 0.75, "")


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_run_that_ended_early(state: str) -> None:
    """With the reason."""
    ended("out", state=state, error="StorageError: disk full", cost=None, rows=None)
    one = only("out")
    assert (one.state, one.why, one.usd, one.total) == (state, "StorageError: disk full", None, None)


def test_a_run_at_work() -> None:
    """Its sign of life is there, and the ledger says how far it is, though the last run left a report."""
    ended("out")
    held = begun("out")
    with Heartbeat(held.store, held.run):
        while heartbeat.read(held.store) is None:
            time.sleep(0.001)
        one = only("out")
    assert (one.state, one.run, one.pipeline, one.rows, one.total, one.dead_letters) == ("running", held.run, "reviews", 43, 100, 3)
    assert one.began_s is not None and abs(one.began_s - time.time()) < 60 and one.wall_s is not None


def test_a_run_that_died() -> None:
    """The process is gone, the sign is of another run, or there is none; when it began is known all the same."""
    held = begun("out")
    sign(held, process=f"{os.getpid()}@1")
    one = only("out")
    assert (one.state, one.rows, one.total, round(one.wall_s or 0)) == ("interrupted", 43, 100, 60)
    sign(held, run="000000-other")
    assert only("out").state == "interrupted"
    held.store.delete("_headrace/alive.json")
    one = only("out")
    assert one.state == "interrupted" and one.began_s is not None and abs(one.began_s - time.time()) < 60
    assert one.wall_s is None, "nobody knows when it died"


def test_runs_on_other_machines_are_watched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that beats is at work, one that does not is dead; one that beat an hour ago is not waited for."""
    elsewhere = {"host": "elsewhere/boot/pid", "process": "1@1"}
    held = {name: begun(name) for name in ("beats", "silent", "old")}
    for one in held.values():
        sign(one, **elsewhere)
    sign(held["old"], **elsewhere, at_s=time.time() - 7200)
    beats = [0]

    def sleep(_: float) -> None:
        beats[0] += 1
        sign(held["beats"], **elsewhere, beat=beats[0])

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    assert {one.output: one.state for one in runs(["."])} == {"beats": "running", "silent": "interrupted", "old": "interrupted"}
    assert beats[0] == 8, "four beats, for all of them"
    beats[0] = 0
    assert only("old").state == "interrupted" and not beats[0]


def test_a_run_that_ends_while_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as it ended."""
    held = begun("out")
    sign(held, host="elsewhere/boot/pid", process="1@1")

    def sleep(_: float) -> None:
        report = {**reports.usual().to_dict(), "run": held.run}
        held.store.put("_headrace/report.json", json.dumps(report).encode())
        held.store.delete("_headrace/alive.json")

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    assert only("out").state == "succeeded"


def test_a_run_that_died_after_its_last_file() -> None:
    """Its output is whole, and so it succeeded."""
    held = begun("out")
    for file in held.state.files:
        held.store.put(f"_headrace/staging/{held.run}/{file}", b"x")
    held.finish()
    assert only("out").state == "succeeded"


def test_rows_that_only_reading_counts() -> None:
    """There is no total until all is read."""
    begun("out", units=[Unit(0, ("in.csv",), None, 0, None, 1000, 1)])
    assert only("out").total is None


def test_where_outputs_are_found() -> None:
    """In a folder, below it, by a glob; each once, though links lead to it twice or in circles; nothing below an output, nothing hidden."""
    for name in ("all/a", "all/b/c/d", "other", ".hidden/x", "all/a/inside"):
        ended(name)
    os.symlink("a", "all/link")
    os.symlink("..", "all/b/up")
    Path("all/empty").mkdir()
    names = [
        (["all"], ["all/a", "all/b/c/d"]),
        (["all/a"], ["all/a"]),
        (["all", "all/a/", "./all"], ["all/a", "all/b/c/d"]),
        (["*"], ["all/a", "all/b/c/d", "other"]),
        (["."], ["all/a", "all/b/c/d", "other"]),
        (["al?/[ab]"], ["all/a", "all/b/c/d"]),
        (["all/empty"], []),
    ]
    for uris, outputs in names:
        assert sorted(one.output for one in runs(uris)) == outputs, uris
    root = str(Path.cwd())
    assert [one.output for one in runs([f"{root}/oth*"])] == [f"{root}/other"]


def test_on_a_remote_file_system() -> None:
    """URIs and their globs do as well."""
    import fsspec

    remote = fsspec.filesystem("memory")
    try:
        for name in ("out-1", "out-2"):
            ended(f"memory://runs/{name}")
        assert sorted(one.output for one in runs(["memory://runs"])) == ["memory://runs/out-1", "memory://runs/out-2"]
        assert only("memory://runs/*-2").output == "memory://runs/out-2"
    finally:
        remote.rm("/runs", recursive=True)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("rusn", r"there is no folder 'rusn'; did you mean 'runs'\?"),
        ("x/y*", "there is no folder 'x/y\\*'"),
        ("nope://x", "cannot open 'nope://x'"),
    ],
)
def test_a_folder_that_is_not_there(uri: str, message: str) -> None:
    """Said, with the nearest."""
    Path("runs").mkdir()
    with pytest.raises(OutputError, match=message):
        runs([uri])


def test_damaged_outputs_are_lines_of_their_own() -> None:
    """They say why, come last, and hide nobody else."""
    ended("good")
    for name, report in {"cut": b'{"run": "0000', "list": b"[]", "empty": b"{}", "binary": b"\xff\xfe"}.items():
        ended(name).store.put("_headrace/report.json", report)
    for name, changed in {"time": {"started_s": 1e300}, "nan": {"wall_s": float("nan")}, "text": {"rows_in": "many"}, "cost": {"cost": 3}}.items():
        ended(name, **changed)
    held = begun("ledger")
    record = Path("ledger/_headrace/ledger", held.run, "record-000000")
    record.write_bytes(record.read_bytes()[:-3])
    Path("units/_headrace").mkdir(parents=True)
    begun("units").store.delete("_headrace/units-1.parquet")
    begun("table").store.put("_headrace/units-1.parquet", b"no table")
    Path("old/_headrace").mkdir(parents=True)
    found = runs(["."])
    assert found[0].output == "good" and found[0].state == "succeeded"
    damaged = {one.output: one.why for one in found if one.state == "damaged"}
    assert damaged.keys() == {"cut", "list", "empty", "binary", "time", "nan", "text", "cost", "ledger", "units", "table", "old"}
    assert "is no report of a run" in damaged["list"] and "checksum" in damaged["ledger"]
    assert damaged["units"] == "its table of units is gone" and damaged["old"] == "it has no ledger; headrace 0.1.0 kept none"


def test_a_folder_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told of, and the others are listed."""
    from headrace.console import runs as module

    ended("good")
    Path("closed").mkdir()
    below = module._below

    def refuse(folder: Any) -> Any:
        if folder.path.endswith("closed"):
            raise PermissionError("not allowed")
        return below(folder)

    monkeypatch.setattr(module, "_below", refuse)
    assert [(one.output, one.state) for one in runs(["."])] == [("good", "succeeded"), ("closed", "damaged")]


def test_the_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    """As a table that is aligned, and as JSON."""
    ended("first", started_s=reports.BEGAN_S - 86_400)
    ended("second", state="failed", error="RunError: \x1b[31mgone\u202e", cost=None)
    command(["."])
    assert capsys.readouterr().out.splitlines() == [
        "output  pipeline  state                     rows  dead letters  began (UTC)             time      cost  why",
        "second  reviews   failed     1,855,026/2,000,000           232  2026-09-21 14:13  14 min 0 s            RunError: \ufffd[31mgone\ufffd",
        "first   reviews   succeeded  1,855,026/2,000,000           232  2026-09-20 14:13  14 min 0 s  0.75 USD",
    ]
    command(["."], json=True)
    assert [(one["output"], one["state"], one["rows"]) for one in json.loads(capsys.readouterr().out)] == [
        ("second", "failed", 1_855_026),
        ("first", "succeeded", 1_855_026),
    ]


def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing on standard output, which other programs read."""
    command([])
    told = capsys.readouterr()
    assert told.out == "" and told.err == "no runs of headrace in or below .\n"
    command([], json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_a_table_on_a_terminal() -> None:
    """Columns that may wrap do, the others stay whole; nothing of a name reaches the terminal that would move its cursor."""
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    show(console, ("output", "state", "n rows"), [["x" * 60, "failed", "1,000/2,000"], ["\x1b[2J", "running", "1"]], wrap=(0,), styles={"failed": "red"})
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "failed" in drawn and "1,000/2,000" in drawn and "\x1b[2J" not in drawn
    assert all(len(line) <= 40 for line in drawn.splitlines())
    assert clean("é中 \u202e\n\x07") == "é中 \ufffd\ufffd\ufffd"


def test_the_command_loads_no_engine() -> None:
    """Neither Ray nor pandas nor Arrow's datasets: it is asked for often, and answers at once."""
    ended("out")
    begun("dead")
    code = (
        "import sys; from headrace.cli import app; app(['runs', '.'], standalone_mode=False); print({'ray', 'pandas', 'pyarrow.dataset'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout
