"""What folders tell of runs: found, told in a line, and compared."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace import heartbeat
from headrace.cli import app
from headrace.console.runs import differences, find, told
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.ledger import Ledger
from headrace.report import Report
from headrace.state import Change, DataFile, State
from headrace.store import Folder
from headrace.tally import Tally
from headrace.units import Unit, write_units

REPORT = Report.of(Tally(), output="out", state=None).to_dict()


def run(output: Path, *, token: str = "a", rows: int = 60, report: dict | None = None) -> Ledger:
    """An output in which `rows` of 100 rows are committed; `report` is what its run had to say at the end, if it came to one."""
    store = Folder(locate(str(output), error=OutputError))
    held, _ = Ledger.claim(store, token=token)
    units = (Unit(0, ("in.parquet",), 0, 0, 100, 1, 1),)
    store.put("_headrace/units-x.parquet", write_units(units))
    held.begin(State(request={"pipeline": "reviews.py::reviews"}, facts={}, units="units-x.parquet"))
    if rows:
        held.commit(Change(done={0: [(0, rows)]}, files=(DataFile("part-1.parquet", rows, 10, at_s=1e9),)))
    if report is not None:
        store.put("_headrace/report.json", json.dumps(REPORT | {"run": held.run, "rows_in": rows, "rows_out": rows} | report).encode())
    return held


def sign(output: Path, run: str, *, host: str | None = None, process: str | None = None) -> None:
    values = {"run": run, "beat": 1, "host": host or heartbeat._host(), "process": process or heartbeat._process(os.getpid())}
    (output / "_headrace/alive.json").write_text(json.dumps(values))


def test_every_state_is_told(tmp_path: Path) -> None:
    """By the report of the latest run; without one, by whether its process is there."""
    run(tmp_path / "good", report={"state": "succeeded", "started_s": 50.0, "wall_s": 10.0, "rows_per_s": 6.0, "cost": {"usd": 1.5}})
    run(tmp_path / "bad", report={"state": "failed", "started_s": 70.0, "error": "StageError: no"})
    run(tmp_path / "killed", report=None)
    sign(tmp_path / "killed", "000001-a", process="1@0")
    sign(tmp_path / "deep/er/lives", run(tmp_path / "deep/er/lives").run)
    run(tmp_path / "again", report={"state": "succeeded"})
    run(tmp_path / "again", token="b")  # a later run died
    (tmp_path / "empty/_headrace").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    found = {Path(one.output).name: one for one in find([str(tmp_path)])}
    states = {"good": "succeeded", "bad": "failed", "killed": "interrupted", "lives": "running", "again": "interrupted", "empty": "damaged"}
    assert {name: one.state for name, one in found.items()} == states
    assert list(found)[:1] == ["killed"] or found["good"].started_s == 50.0
    good, killed = found["good"], found["killed"]
    assert (good.rows_out, good.wall_s, good.rows_per_s, good.usd) == (60, 10.0, 6.0, 1.5)
    assert (killed.rows, killed.rows_out, killed.dead_letters, killed.pipeline, killed.started_s) == (100, 60, 0, "reviews.py::reviews", 1e9)
    assert found["bad"].error == "StageError: no"


@pytest.mark.parametrize("damage", ["report", "record", "units"])
def test_a_damaged_folder_is_a_line(tmp_path: Path, damage: str) -> None:
    """And the others are listed as ever."""
    run(tmp_path / "a", report={"state": "succeeded"})
    held = run(tmp_path / "b", report={} if damage == "report" else None)
    path = {"report": "report.json", "record": f"ledger/{held.run}/record-000000", "units": "units-x.parquet"}[damage]
    (tmp_path / "b/_headrace" / path).write_bytes(b"[1]")
    states = {Path(one.output).name: (one.state, one.error) for one in find([str(tmp_path)])}
    assert states["a"] == ("succeeded", "")
    assert states["b"][0] == "damaged" and states["b"][1]


def test_an_output_itself_may_be_named(tmp_path: Path) -> None:
    run(tmp_path / "a", report={"state": "succeeded"})
    assert [one.output for one in find([str(tmp_path / "a"), str(tmp_path)])] == [str(tmp_path / "a")]
    with pytest.raises(OutputError, match="cannot list '.*nowhere'"):
        find([str(tmp_path / "nowhere")])


def test_the_command_lists_runs(tmp_path: Path) -> None:
    """A line each, the latest first; or JSON."""
    run(tmp_path / "old", report={"state": "succeeded", "started_s": 1e9, "wall_s": 125.0, "pipeline": "reviews"})
    run(tmp_path / "new", rows=0, report={"state": "failed", "started_s": 2e9, "rows": 100, "error": "StageError: stage 'embed' failed"})
    lines = CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout.splitlines()
    assert lines[0].split() == ["Output", "Pipeline", "State", "Rows", "Dead", "Began", "Time", "Rows/s", "Cost"]
    assert [line.split()[0] for line in lines[1:]] == [str(tmp_path / name) for name in ("new", "old")]
    assert "failed: StageError: stage 'embed' failed" in lines[1] and "0 of 100" in lines[1]
    assert "reviews" in lines[2] and "2 min 5 s" in lines[2]
    listed = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).stdout)
    assert [one["state"] for one in listed] == ["failed", "succeeded"]
    assert "no runs in" in CliRunner().invoke(app, ["runs", str(tmp_path / "new/_headrace")]).stdout


def group(name: str, **values: object) -> dict[str, object]:
    shares = {"computing": 0.9, "starved": 0.1, "blocked": 0.0, "between": 0.0}
    return {"name": name, "kind": "model", "cpus": 1.0, "gpus": 0.0, "rules": ["32 rows"], "rows": 60, "rows_per_s": 10.0, "shares": shares} | values


def test_two_runs_are_compared(tmp_path: Path) -> None:
    """Only what differs is told, with ratios of figures; a folder and its report are the same."""
    facts, groups = {"embed.batch": "32", "stages": "embed"}, [group("embed"), group("old")]
    run(tmp_path / "a", report={"rows_per_s": 10.0, "groups": groups, "bottleneck": "x", "facts": facts})
    more = {"rows_per_s": 25.0, "causes": {"ValueError in embed": 3}, "groups": [group("embed", rows_per_s=30.0)], "bottleneck": "y"}
    run(tmp_path / "b", report=more | {"versions": {"ray": "2.60.0"}, "facts": facts | {"embed.batch": "64"}})
    found = differences(told(str(tmp_path / "a")), told(str(tmp_path / "b/_headrace/report.json")))
    assert {(one.about, one.what): (one.first, one.second, one.ratio) for one in found} == {
        ("versions", "ray"): (None, "2.60.0", None),
        ("what was run", "embed.batch"): ("32", "64", None),
        ("the run", "rows_per_s"): (10.0, 25.0, 2.5),
        ("dead letters", "ValueError in embed"): (None, 3, None),
        ("groups", "old"): ("there", None, None),
        ("embed", "rows_per_s"): (10.0, 30.0, 3.0),
        ("what held it back", ""): ("x", "y", None),
    }
    assert differences(*[told(str(tmp_path / "a"))] * 2) == []


def test_the_command_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a", report={"wall_s": 100.0, "bottleneck": "it was slow"})
    run(tmp_path / "b", report={"wall_s": 50.0})
    lines = CliRunner().invoke(app, ["diff", "a", "b"]).stdout.splitlines()
    assert lines[0].split() == ["a", "b", "Ratio"]
    assert lines[1:3] == ["the run", "  wall_s  1 min 40 s  50 s   0.50"]
    assert lines[-3:] == ["what held it back", "  a: it was slow", "  b: nothing in particular"]
    assert CliRunner().invoke(app, ["diff", "a", "a"]).stdout == "no difference\n"
    only, _ = json.loads(CliRunner().invoke(app, ["diff", "a", "b", "--json"]).stdout)
    assert only == {"about": "the run", "what": "wall_s", "first": 100.0, "second": 50.0, "ratio": 0.5}


@pytest.mark.parametrize(("content", "said"), [(None, "has no report of a run"), ("{", "cannot be read"), ("{}", "it has no 'run'")])
def test_what_cannot_be_compared(tmp_path: Path, content: str | None, said: str) -> None:
    (tmp_path / "_headrace").mkdir()
    if content is not None:
        (tmp_path / "_headrace/report.json").write_text(content)
    with pytest.raises(OutputError, match=said):
        told(str(tmp_path))


def test_a_sign_of_another_machine_is_believed(tmp_path: Path) -> None:
    """Whether its run lives cannot be told from here by one look."""
    held = run(tmp_path / "a")
    sign(tmp_path / "a", held.run, host=f"{socket.gethostname()}-elsewhere//", process="17@1")
    assert [one.state for one in find([str(tmp_path)])] == ["running"]
