"""`headrace diff`: what is not the same in two runs, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reports

from headrace.advice import bottleneck
from headrace.cli.diff import diff as command
from headrace.console.diff import Difference, compare, read
from headrace.errors import OutputError
from headrace.report import Report

ABOUT: dict[str, Any] = {
    "request": {"pipeline": "reviews", "input": ["s3://reviews/in"]},
    "facts": {"stages": "clean, tokenise, embed", "embed.model": "'small'", "code of reviews.py": "1f3c", "--limit": "10"},
    "units": "_headrace/units-1.parquet",
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"},
}


def stored(report: Report, **changed: Any) -> dict[str, Any]:
    """A report as it lies beside its output."""
    return json.loads(json.dumps({**report.to_dict(), "bottleneck": bottleneck(report), **copy.deepcopy(ABOUT), **changed}))


@pytest.fixture
def pair() -> tuple[dict[str, Any], dict[str, Any]]:
    """A run, and the same job with other settings, slower, and with a failure of another kind."""
    before, after = stored(reports.usual()), stored(reports.usual(wall_s=1500, speed=0.5), units="_headrace/units-2.parquet")
    after["facts"] |= {"embed.model": "'large'", "code of reviews.py": "9b0e", "code of words.py": "77aa"}
    del after["facts"]["--limit"]
    after["versions"] |= {"ray": "2.61.0"}
    after["causes"] = {"ValueError in clean+tokenise": 290, "TypeError in embed": 3}
    after["request"]["input"].append("s3://reviews/more")
    after["run"] = "000002-77ab"
    return before, after


def named(found: list[Difference]) -> dict[tuple[str, str], Difference]:
    return {(one.part, one.name): one for one in found}


def test_a_run_and_itself() -> None:
    """Nothing differs."""
    assert compare(stored(reports.usual()), stored(reports.usual())) == []


@pytest.mark.parametrize("name", reports.ALL)
def test_any_run_with_any_other(name: str) -> None:
    """Whatever a report says, it compares, both ways round, and as JSON."""
    for other in reports.ALL.values():
        one, two = stored(reports.ALL[name]()), stored(other())
        there, back = compare(one, two), compare(two, one)
        assert {(found.part, found.name) for found in there} == {(found.part, found.name) for found in back}
        json.dumps([found.to_dict() for found in there])


def test_what_differs(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Settings, code, versions and input; rows, dead letters by cause, rates, time shares and cost, with ratios; the advice."""
    found = named(compare(*pair))
    assert found["input", "paths"].after == "s3://reviews/in, s3://reviews/more"
    assert found["input", "files"].shown == ("", "changed")
    assert found["settings", "embed.model"].shown == ("'small'", "'large'")
    assert found["settings", "code of reviews.py"].shown == ("", "changed"), "a digest says nothing to a person"
    assert found["settings", "code of words.py"].shown == ("absent", "there")
    assert found["settings", "--limit"].shown == ("10", "-")
    assert found["versions", "ray"].shown == ("2.60.0", "2.61.0")
    assert ("versions", "torch") not in found and ("rows", "rows of the input") not in found and ("run", "state") not in found
    assert found["rows", "dead letters"].ratio == found["rows", "dead letters"].after / 232
    causes = {name: one for (part, name), one in found.items() if part == "dead letters"}
    assert list(causes) == ["ValueError in clean+tokenise", "UnicodeDecodeError in clean+tokenise", "TypeError in embed", "ProcessDied in embed"]
    assert (causes["TypeError in embed"].shown, causes["TypeError in embed"].ratio) == (("0", "3"), None)
    assert found["time", "time"].shown == ("14 min 0 s", "25 min 0 s") and round(found["time", "time"].ratio or 0, 2) == 1.79
    assert 0.4 < (found["time", "rows/s"].ratio or 0) < 0.6
    assert found["group embed", "rows/s"].ratio and ("group embed", "replicas") not in found
    assert found["money", "cost"].shown[0] == "0.75 USD"


def test_figures_that_look_the_same_are_the_same() -> None:
    """No two runs take the same microseconds."""
    before, after = stored(reports.usual()), stored(reports.usual())
    after["wall_s"] += 0.001
    after["groups"][2]["shares"]["computing"] += 1e-4
    assert compare(before, after) == []


def test_a_group_that_one_of_them_lacks() -> None:
    """It is named, and not compared."""
    before, after = stored(reports.usual()), stored(reports.usual())
    before["groups"][1]["name"], before["groups"][2]["shares"] = "clean", None
    found = named(compare(before, after))
    assert found["group clean", "the group"].shown == ("there", "absent")
    assert found["group clean+tokenise", "the group"].shown == ("absent", "there")
    assert found["group embed", "computing"].shown == ("-", "58%")


def test_what_an_older_report_does_not_tell_is_not_compared() -> None:
    """Nor taken for a change."""
    before = stored(reports.usual())
    for name in ABOUT:
        del before[name]
    assert compare(before, stored(reports.usual())) == []


def test_reports_that_are_none() -> None:
    """One line, whatever they hold."""
    for damage in ({"causes": 3}, {"groups": [{}]}, {"rows_in": "many"}, {"cost": "much"}, {"cost": {"usd": "x"}}, {"groups": None}):
        with pytest.raises(OutputError, match="cannot be compared; one is damaged, or was written by another version"):
            compare({**stored(reports.usual()), **damage}, stored(reports.usual()))


def write(folder: Path, report: dict[str, Any]) -> str:
    (folder / "_headrace").mkdir(parents=True)
    (folder / "_headrace/report.json").write_text(json.dumps(report))
    return str(folder)


def test_a_run_is_named_by_its_folder_or_its_report(tmp_path: Path) -> None:
    """A copy of a report does as well."""
    folder = write(tmp_path / "out", stored(reports.usual()))
    (tmp_path / "copy.json").write_bytes((tmp_path / "out/_headrace/report.json").read_bytes())
    names = (folder, f"{folder}/", f"{folder}/_headrace/report.json", str(tmp_path / "copy.json"), f"file://{folder}")
    assert {json.dumps(read(name)) for name in names} == {json.dumps(stored(reports.usual()))}


def test_no_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there instead, and the nearest."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "vectors", stored(reports.usual()))
    write(tmp_path / "torn", {})
    (tmp_path / "live/_headrace").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.parquet").touch()
    for uri, message in {
        "vector": "there is no run in 'vector': the folder is empty, or not there; did you mean 'vectors'?",
        "live": "the run in 'live' has no report: it has not ended, or was killed. headrace runs live says which; run it to its end",
        "data": "'data' holds no run of headrace; headrace runs data lists those below it",
        "a.json": "there is no file 'a.json'; name the folder that a run wrote to, or its _headrace/report.json",
        "torn": "'torn/_headrace/report.json' is damaged: it is no report of a run",
        "torn/_headrace/report.json": "'torn/_headrace/report.json' cannot be compared: it is no report of a run",
    }.items():
        with pytest.raises(OutputError) as raised:
            read(uri)
        assert str(raised.value) == message


def test_as_text(pair: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    """Aligned, a part once, with the ratio of the second to the first."""
    names = [write(tmp_path / name, report) for name, report in zip(("a", "b"), pair, strict=True)]
    command(*names)
    golden("diff.txt", capsys.readouterr().out.replace(str(tmp_path), "runs"))
    command(names[0], names[0])
    assert capsys.readouterr().out.splitlines()[-1] == "nothing differs"


def test_as_json(pair: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The values themselves, beside what is shown."""
    command(*(write(tmp_path / name, report) for name, report in zip(("a", "b"), pair, strict=True)), json=True)
    told = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in told["runs"]] == ["000001-5f2c", "000002-77ab"]
    wall = next(one for one in told["differences"] if (one["part"], one["name"]) == ("time", "time"))
    assert (wall["before"], wall["after"], wall["shown"]) == (840.0, 1500.0, ["14 min 0 s", "25 min 0 s"])
