"""Exactly once on a local Ray: a job goes on where it stopped, is left alone when it is done, and keeps what failed apart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import ledger
from headrace.errors import ChangedError, DeadLetterError, LedgerError, SettingError, StageError, StoppedError
from headrace.events import Committed, Event, ProcessDied, RunStarted
from headrace.on_ray import commits
from headrace.on_ray.commits import Driver
from headrace.report import Report

pytestmark = pytest.mark.usefixtures("shared_ray")

Watch = Callable[[Sequence[Event], int | None], None]


@hr.stage(out={"y": int}, replicas=1, batch=16)
class Double:
    """A model that waits after its first rows until a gate is opened, fails where it is told to, and notes what it was called with.

    What it is told lies in `folder`, so that the job is the same job when that changes.
    """

    folder: str = ""
    factor: int = 2

    def setup(self, device: str) -> None:
        """Fail as long as there is a file named `broken`."""
        if os.path.exists(f"{self.folder}/broken"):
            raise OSError("no weights")
        self.seen: set[int] = set()

    def __call__(self, id: hr.Column[int]) -> dict[str, Any]:
        """Twice the id."""
        calls = Path(self.folder, f"calls-{os.getpid()}")
        with calls.open("a") as file:
            file.writelines(f"{one}\n" for one in id)
        while len(self.seen) >= 200 and not self.seen.issuperset(id) and os.path.exists(f"{self.folder}/gate"):
            time.sleep(0.02)
        self.seen.update(id)
        found = [fail(self.folder, int(one)) for one in id]
        return {"y": [one * self.factor if isinstance(one, int) else one for one in found]}


@hr.stage(out={"z": int}, batch=16)
def follow(y: hr.Column[int]) -> dict[str, Any]:
    """A function behind the model."""
    return {"z": y + 1}


@hr.stage(out={"y": int}, batch=16)
def poison(id: hr.Column[int], folder: hr.Column[str]) -> dict[str, Any]:
    """A function that fails as the model does."""
    return {"y": [fail(one, int(row)) * 2 for row, one in zip(id, folder, strict=True)]}


def fail(folder: str, row: int) -> Any:
    """The row's number, unless the folder has a file that says how this one fails."""
    try:
        how = Path(folder, f"row-{row}").read_text()
    except FileNotFoundError:
        return row
    if how == "dies":
        os._exit(1)
    if how == "raises":
        raise LookupError(f"row {row} has no luck")
    return {"none": None, "nan": float("nan"), "text": "text"}[how]


class Bench:
    """A folder with input, output, and what the stages are told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.told = folder, folder / "out", folder / "told"
        self.told.mkdir()

    def write(self, name: str, start: int, stop: int, *, group: int = 50) -> Path:
        """An input file with these ids."""
        (self.folder / "in").mkdir(exist_ok=True)
        path = self.folder / "in" / f"{name}.parquet"
        data = {"id": range(start, stop), "folder": [str(self.told)] * (stop - start)}
        pq.write_table(pa.table(data), path, row_group_size=group, compression="none", use_dictionary=False)
        return path

    def run(self, *, factor: int = 2, format: str = "parquet", pipeline: hr.Pipeline | None = None, **options: Any) -> Report:
        """The job."""
        pipeline = pipeline or hr.Pipeline("double", Double(folder=str(self.told), factor=factor), follow)
        options = {"input": str(self.folder / "in/*"), "keep": "id", **options}
        if connect := options.pop("connect", None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("headrace.on_ray.job.connected", connect)
                return hr.run(pipeline, output=hr.Output(str(self.out), format=format), **options)
        return hr.run(pipeline, output=hr.Output(str(self.out), format=format), **options)

    def stopped(self, **options: Any) -> int:
        """Begin the job, and stop it after a first commit; returns how many rows were committed."""
        (self.told / "gate").touch()
        rows: list[int] = []

        def watch(events: Sequence[Event], total: int | None) -> None:
            first = not rows
            rows.extend(event.rows for event in events if isinstance(event, Committed) and event.rows)
            if first and rows:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(StoppedError, match="stop"):
            self.run(watch=watch, **options)
        (self.told / "gate").unlink()
        assert not (self.out / "_SUCCESS").exists()
        state = self.state()
        assert state.rows_done >= sum(rows) > 0 and not state.finished
        return state.rows_done

    def tell(self, row: int, how: str) -> None:
        """Let a row fail."""
        (self.told / f"row-{row}").write_text(how)

    def mend(self) -> None:
        """Let no row fail."""
        for path in self.told.glob("row-*"):
            path.unlink()

    def called(self) -> list[int]:
        """The rows that the model was called with since this was last asked, each once."""
        rows: set[int] = set()
        for path in self.told.glob("calls-*"):
            rows |= set(map(int, path.read_text().split()))
            path.unlink()
        return sorted(rows)

    def state(self) -> ledger.State:
        """What the ledger says."""
        from headrace.sinks import open_sink

        state = ledger.load(open_sink(hr.Output(str(self.out))).store)
        assert state is not None
        return state

    def rows(self) -> list[dict[str, Any]]:
        """The output by id; its folder must hold exactly the files that are committed."""
        names = sorted(path.name for path in self.out.glob("part-*"))
        state = self.state()
        assert names == sorted(state.files) and state.finished and (self.out / "_SUCCESS").exists()
        assert not list((self.out / "_headrace").glob("staging/*/*")), "nothing is left in the staging folders"
        rows = [row for name in names for row in self.read(self.out / name)]
        assert len(rows) == state.rows_done
        return sorted(rows, key=lambda row: row["id"])

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """The rows of one file."""
        return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else [json.loads(line) for line in path.read_text().splitlines()]

    def letters(self) -> list[dict[str, Any]]:
        """The dead letters by unit and row."""
        rows = [row for path in (self.out / "_headrace/dead_letters").glob("*") for row in pq.read_table(path).to_pylist()]
        return sorted(rows, key=lambda row: (row["unit"], row["row"]))

    def whole(self, ids: Sequence[int], *, without: Sequence[int] = ()) -> None:
        """Hold the output to what it must be."""
        assert self.rows() == [{"id": n, "y": 2 * n, "z": 2 * n + 1} for n in ids if n not in without]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """600 rows in two files; files of the output are closed after a tenth of a second, so that there are several commits."""
    monkeypatch.setattr(commits, "_OLDEST_S", (0.1, 0.1))
    bench = Bench(tmp_path)
    bench.write("a", 0, 300)
    bench.write("b", 300, 600)
    return bench


IDS = range(600)


@contextlib.contextmanager
def no_ray() -> Any:
    """A connection that nobody may ask for."""
    pytest.fail("Ray was asked for")
    yield


@pytest.mark.parametrize("format", ["parquet", "jsonl", "delta"])
def test_a_run_that_was_stopped_goes_on(bench: Bench, format: str) -> None:
    """What was committed is not run again; a third time there is nothing to do. A Delta reader sees all or nothing."""
    done = bench.stopped(format=format)
    assert format != "delta" or not deltalake.DeltaTable.is_deltatable(str(bench.out))
    first = bench.called()
    report = bench.run(format=format)
    assert (report.rows_before, report.rows_in, report.rows_out, report.dead_letters) == (done, 600, 600, 0)
    assert len(bench.called()) == 600 - done and len(first) >= done
    bench.whole(IDS)
    assert f"{done} rows were done before" in str(report)
    if format == "delta":
        table = deltalake.DeltaTable(bench.out)
        assert table.version() == 0 and table.to_pyarrow_table().num_rows == 600
    before = {path: path.stat().st_mtime_ns for path in bench.out.rglob("*")}
    again = bench.run(format=format, connect=no_ray)
    assert str(again).startswith("nothing to do: all 600 rows were done before\n") and again.rows_out == 600
    assert {path: path.stat().st_mtime_ns for path in bench.out.rglob("*")} == before, "a finished output is left as it is"


def test_readers_see_the_rows_once(bench: Bench) -> None:
    """DuckDB, Polars and pyarrow, given the folder or a glob, as the documentation says."""
    bench.stopped()
    bench.run()
    bench.whole(IDS)
    expected = (600, sum(IDS))
    assert duckdb.sql(f"select count(*), sum(id) from '{bench.out}/*.parquet'").fetchall() == [expected]
    found = pl.read_parquet(f"{bench.out}/*.parquet")
    assert (found.height, found["id"].sum()) == expected
    assert (ds.dataset(bench.out).count_rows(), sum(pq.read_table(bench.out)["id"].to_pylist())) == expected


def test_a_stage_that_fails_to_set_up(bench: Bench) -> None:
    """It ends the run; the same run goes on when that is mended, with other code too, since nothing was done yet."""
    (bench.told / "broken").touch()
    with pytest.raises(StageError, match="stage 'double' setup failed: OSError: no weights"):
        bench.run(factor=3)
    (bench.told / "broken").unlink()
    report = bench.run()
    assert report.rows_before == 0
    bench.whole(IDS)


def test_restart(bench: Bench) -> None:
    """What was there is thrown away, whether it was finished or not."""
    bench.stopped(factor=3)
    bench.run(mode="restart", factor=3)
    old = set(bench.state().files)
    report = bench.run(mode="restart")
    assert report.rows_before == 0 and not old & set(bench.state().files)
    bench.whole(IDS)


def test_restart_of_a_delta_table(bench: Bench) -> None:
    """A reader sees the rows of the last run only."""
    bench.run(format="delta", factor=3)
    bench.stopped(format="delta", mode="restart")
    assert not deltalake.DeltaTable.is_deltatable(str(bench.out)), "no table that names files which are gone"
    bench.run(format="delta")
    bench.whole(IDS)
    assert sorted(deltalake.DeltaTable(bench.out).to_pyarrow_table()["y"].to_pylist()) == [2 * n for n in IDS]


def test_restart_of_a_damaged_ledger(bench: Bench) -> None:
    """A damaged record is refused, and `restart` is the way out that the message names."""
    bench.stopped()
    record = min((bench.out / "_headrace/ledger").glob("0*/record-*"))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(LedgerError, match="is damaged.*--restart"):
        bench.run(connect=no_ray)
    bench.run(mode="restart")
    bench.whole(IDS)


def test_another_setting(bench: Bench) -> None:
    """It is refused by name before Ray starts; accepted, it holds for the rows that were not done."""
    done = bench.stopped()
    with pytest.raises(ChangedError, match=r"(?s)double.factor: was 2, is 3\n.*--accept-change goes on.*--restart"):
        bench.run(factor=3, connect=no_ray)
    report = bench.run(factor=3, mode="accept-change")
    assert (report.rows_before, report.rows_out) == (done, 600)
    rows = bench.rows()
    assert [row["id"] for row in rows] == list(IDS) and sum(row["y"] == 2 * row["id"] for row in rows) in (done, done + 1)  # 2 * 0 is 3 * 0
    assert bench.run(factor=3, connect=no_ray).rows_in == 600, "from now on that is the job"


def test_input_that_changed(bench: Bench) -> None:
    """A file with other rows is refused by name, and where rows of it are done nothing but a restart helps."""
    bench.run()
    bench.write("b", 300, 500)
    with pytest.raises(ChangedError, match=r"b\.parquet"):
        bench.run(connect=no_ray)
    bench.write("b", 300, 600)  # as many rows as before, written anew
    with pytest.raises(ChangedError, match=r"input: changed: b\.parquet"):
        bench.run(connect=no_ray)
    bench.run(mode="accept-change")
    bench.whole(IDS)


def test_a_new_file(bench: Bench) -> None:
    """It is refused by name; accepted, it is all that is run. One that is gone leaves its rows."""
    bench.run()
    bench.called()
    new = bench.write("0-first", 600, 700)
    with pytest.raises(ChangedError, match=r"input: new in the input: 0-first\.parquet"):
        bench.run(connect=no_ray)
    report = bench.run(mode="accept-change")
    assert (report.rows_before, report.rows_in, bench.called()) == (600, 700, list(range(600, 700)))
    bench.whole(range(700))
    new.unlink()
    with pytest.raises(ChangedError, match=r"input: gone from the input: 0-first\.parquet"):
        bench.run(connect=no_ray)
    report = bench.run(mode="accept-change")
    assert (report.rows_out, report.unreadable, bench.called()) == (700, (), [])
    assert bench.run(connect=no_ray).rows_out == 700


def test_an_unknown_mode(bench: Bench) -> None:
    """It is no mode, and the ones that there are are named."""
    with pytest.raises(SettingError, match="mode must be one of 'resume', 'accept-change', 'restart', 'retry', got 'again'"):
        bench.run(mode="again")


FAILURES = {7: "raises", 120: "none", 121: "text", 410: "nan"}


def test_rows_that_fail_become_dead_letters(bench: Bench) -> None:
    """Each with its input and its failure; the others are done. Mended, `retry` runs them and nothing else, and merges them."""
    for row, how in FAILURES.items():
        bench.tell(row, how)
    report = bench.run()
    assert (report.rows_in, report.rows_out, report.dead_letters, report.unreadable) == (600, 596, 4, ())
    assert report.causes == {"ContractError in double": 3, "LookupError in double": 1}
    bench.whole(IDS, without=list(FAILURES))
    found = bench.letters()
    assert [(row["id"], row["error"], Path(row["file"]).name, row["row_group"], row["row"]) for row in found] == [
        (7, "LookupError", "a.parquet", 0, 7),
        (120, "ContractError", "a.parquet", 2, 20),
        (121, "ContractError", "a.parquet", 2, 21),
        (410, "ContractError", "b.parquet", 2, 10),
    ]
    assert found[0]["message"] == "row 7 has no luck" and "in fail" in found[0]["frames"] and found[0]["attempts"] > 1
    assert all("wrong 'y', declared as int" in row["message"] for row in found[1:]) and {row["stage"] for row in found} == {"double"}

    again = bench.run(connect=no_ray)
    assert again.dead_letters == 4 and "headrace replay" in str(again), "a finished job is finished, with its failures"

    bench.called()
    bench.mend()
    bench.tell(121, "raises")  # and fails in another way the next time
    report = bench.run(mode="retry")
    assert (report.rows_out, report.dead_letters, report.rows_before, report.causes) == (599, 1, 596, {"LookupError in double": 1})
    assert bench.called() == list(FAILURES)
    assert [(row["id"], row["error"]) for row in bench.letters()] == [(121, "LookupError")]
    bench.whole(IDS, without=[121])

    bench.mend()
    assert bench.run(mode="retry").dead_letters == 0 and bench.letters() == []
    bench.whole(IDS)


def test_what_is_mended_is_added_to_a_delta_table(bench: Bench) -> None:
    """In a commit of its own."""
    bench.tell(7, "raises")
    bench.run(format="delta")
    assert deltalake.DeltaTable(bench.out).to_pyarrow_table().num_rows == 599
    bench.mend()
    bench.run(format="delta", mode="retry")
    table = deltalake.DeltaTable(bench.out)
    assert table.version() == 1 and sorted(table.to_pyarrow_table()["id"].to_pylist()) == list(IDS)


@hr.stage(out={"y": int}, batch=8)
def forgetful(id: hr.Column[int]) -> dict[str, Any]:
    """A function that returns one row too few whenever row 33 is among them."""
    return {"y": list(id * 2)[: len(id) - (33 in id)]}


def test_a_result_of_the_wrong_length(bench: Bench) -> None:
    """It costs the row at fault alone, which is told."""
    report = bench.run(pipeline=hr.Pipeline("p", forgetful))
    (letter,) = bench.letters()
    assert (report.rows_out, letter["id"]) == (599, 33) and "0 values for 1 rows" in letter["message"]


@pytest.mark.parametrize("kind", ["function", "model"])
def test_a_row_that_kills_its_process(bench: Bench, kind: str) -> None:
    """It is found, and the rows around it are done."""
    bench.tell(150, "dies")
    pipeline = hr.Pipeline("p", poison, follow) if kind == "function" else None
    seen: list[Event] = []
    report = bench.run(pipeline=pipeline, watch=lambda events, rows: seen.extend(events))
    assert (report.rows_out, report.dead_letters) == (599, 1)
    (letter,) = bench.letters()
    assert (letter["id"], letter["error"], letter["stage"]) == (150, "ProcessDied", "poison" if kind == "function" else "double")
    assert letter["attempts"] == 3, "once among others, and twice alone"
    bench.whole(IDS, without=[150])
    assert 3 <= sum(isinstance(event, ProcessDied) for event in seen) <= 16
    bench.mend()
    assert bench.run(pipeline=pipeline, mode="retry").dead_letters == 0
    bench.whole(IDS)


@pytest.mark.parametrize(("limit", "allowed"), [("1%", 6), (2, 2), (0, 0)])
def test_too_many_dead_letters(bench: Bench, limit: Any, allowed: int) -> None:
    """The run stops with what is allowed and one of the failures; with more allowed it goes on from there."""
    failing = range(0, 600, 7)
    for row in failing:
        bench.tell(row, "raises")
    (bench.told / "gate").touch()  # most rows are not done: it stops early
    message = rf"(?s)\d+ rows of 600 failed, and --max-dead-letters allows {allowed}\. double: LookupError: row \d+ has no luck.*in fail"
    with pytest.raises(DeadLetterError, match=message):
        bench.run(max_dead_letters=limit)
    (bench.told / "gate").unlink()
    assert not (bench.out / "_SUCCESS").exists() and bench.state().rows_done < 300
    report = bench.run(max_dead_letters="20%")
    assert (report.dead_letters, report.rows_out) == (len(failing), 600 - len(failing))
    bench.whole(IDS, without=failing)


def test_code_that_fails_for_every_row(bench: Bench) -> None:
    """Where half of all rows may fail, the job still ends; where only a few may, it stops at once."""
    bench.write("b", 300, 320)
    for row in range(320):
        bench.tell(row, "raises")
    with pytest.raises(DeadLetterError):
        bench.run()
    report = bench.run(max_dead_letters="100%")
    assert (report.rows_out, report.dead_letters, report.files) == (0, 320, 0)
    assert len(bench.letters()) == 320 and (bench.out / "_SUCCESS").exists()


def damage(path: Path, how: str) -> None:
    """Damage a file, or remove it."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = content.index((450).to_bytes(8, "little"))  # in the middle of a page of ids
        path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "corrupt"])
def test_a_file_that_cannot_be_read(bench: Bench, how: str) -> None:
    """It costs what cannot be read of it, and is named in the report; put back, `retry` reads it."""
    path = bench.write("b", 300, 600, group=100)
    whole, stat = path.read_bytes(), path.stat()

    def watch(events: Sequence[Event], rows: int | None) -> None:
        if how == "missing" and any(isinstance(event, RunStarted) for event in events):
            path.unlink()

    if how == "truncated":
        damage(path, how)
    elif how == "corrupt":
        pq.write_table(pq.read_table(path), path, row_group_size=100, compression="none", use_dictionary=False, write_page_checksum=True)
        whole = path.read_bytes()
        stat = path.stat()
        damage(path, how)
    report = bench.run(watch=watch, max_dead_letters=3)
    lost = range(400, 500) if how == "corrupt" else range(300, 600)
    assert (report.rows_in, report.rows_out, len(report.unreadable)) == (600 - len(lost),) * 2 + (1,)
    assert "unreadable: cannot read " in str(report) and "b.parquet" in report.unreadable[0]
    bench.whole(IDS, without=lost)
    assert bench.run(connect=no_ray, max_dead_letters=3).unreadable == report.unreadable if how != "missing" else True

    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bench.called()
    report = bench.run(mode="retry")
    assert (report.rows_out, report.unreadable, bench.called()) == (600, (), list(lost))
    bench.whole(IDS)


def test_too_many_files_that_cannot_be_read(bench: Bench) -> None:
    """One unit may be lost by default, or 1 % of them; two of three are too many, and all of them are no input."""
    for name in "bc":
        damage(bench.write(name, 300, 310), "truncated")
    with pytest.raises(DeadLetterError, match=r"2 of 8 input units cannot be read, and --max-dead-letters allows 1; unit 6: cannot read .*b\.parquet"):
        bench.run()


def test_a_broken_file_beside_dead_letters(bench: Bench) -> None:
    """Units keep their numbers: a new file that comes first and cannot be read is not taken for one of the old ones."""
    bench.tell(7, "raises")
    bench.run()
    damage(bench.write("0-first", 600, 700), "truncated")
    bench.mend()
    report = bench.run(mode="retry")
    assert (report.rows_out, report.dead_letters, len(report.unreadable)) == (600, 0, 1)
    assert "0-first" in report.unreadable[0]
    bench.whole(IDS)


def test_a_run_that_died_after_its_last_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are there: the next run publishes what is not published, and puts down the mark."""

    def die(*_: Any) -> None:
        raise StoppedError("here")

    monkeypatch.setattr(Driver, "publish_rest", die)
    with pytest.raises(StoppedError):
        bench.run()
    assert bench.state().rows_done == 600
    monkeypatch.undo()
    bench.called()
    assert bench.run().rows_before == 600 and bench.called() == []
    bench.whole(IDS)
