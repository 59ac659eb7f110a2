"""The job of features in this process: the same values as the join itself, resumed after any failure, and nothing mixed."""

import datetime as dt
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import headrace as hr
from headrace import features as f
from headrace import sinks
from headrace.cli import app
from headrace.console.diff import compare
from headrace.console.diff import read as diff_read
from headrace.console.runs import runs
from headrace.errors import ChangedError, DefinitionError, OutputError, PipelineFileError, SettingError, SourceError, TakenOverError, WiringError
from headrace.features.job import HOME, FeatureJob, here
from headrace.features.parts import Part, part_of
from headrace.formats import Input, Output
from headrace.online_store import open_store

NOON = dt.datetime(2024, 3, 31, 12)
EVENTS, LABELS = 900, 120


@hr.stage(out={"words": int})
def count_words(text: hr.Column[str]):
    return {"words": [len(one.split()) for one in text]}


WORDS = hr.Pipeline("words", count_words)


def hours(numbers) -> pa.Array:
    return pa.array([NOON + dt.timedelta(hours=int(h)) for h in numbers], pa.timestamp("us"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Events in three files, some without key or time, and labels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    keys = np.where(rng.random(EVENTS) < 0.3, 7, rng.integers(0, 40, EVENTS))  # one of them is hot
    events = pa.table(
        {
            "k": pa.array(keys, mask=rng.random(EVENTS) < 0.02),
            "t": pa.concat_arrays([hours(rng.integers(-900, 60, EVENTS - 2)), pa.nulls(2, pa.timestamp("us"))]),
            "x": pa.array(rng.normal(size=EVENTS), mask=rng.random(EVENTS) < 0.1),
            "text": pa.array([" ".join(["word"] * int(n)) for n in rng.integers(1, 9, EVENTS)]),
            "v": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=2 * EVENTS), pa.float32()), 2),
        }
    )
    (tmp_path / "events").mkdir()
    for at in range(3):
        pq.write_table(events.slice(at * EVENTS // 3, EVENTS // 3), f"events/{at}.parquet", row_group_size=100)
    labels = pa.table({"id": range(LABELS), "k": pa.array(rng.integers(0, 45, LABELS), pa.int32(), mask=rng.random(LABELS) < 0.05)})
    pq.write_table(labels.append_column("t", hours(rng.integers(-400, 60, LABELS))), "labels.parquet")
    return tmp_path


def view(name: str = "v", **more) -> hr.FeatureView:
    features = {"n": f.count(over="7d"), "mean": f.mean("x", over="30d", default=0.0), "vector": "v", "half": f.quantile("x", 0.5)}
    return hr.FeatureView(name, "events/*.parquet", time="t", **({"key": "k", "features": features, "delay": "1h"} | more))


def read(output: str) -> list[dict]:
    return pq.read_table(output).to_pylist()


def by_id(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: row["id"])


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_a_training_set_in_parts_is_the_join_itself(folder, parts):
    second = view("second", features={"events": f.count(), "kinds": f.distinct("text")}, delay="0s")
    report = FeatureJob.of([view(), second], output="out", labels="labels.parquet", parts=parts).run()
    expected = hr.training_set("labels.parquet", [view(), second])
    assert repr(by_id(read("out"))) == repr(by_id(expected.to_pylist()))
    assert expected["id"].to_pylist() == list(range(LABELS))
    events = pq.read_table("events")
    assert (report.rows, report.events, report.parts) == (LABELS, 2 * EVENTS, parts)
    assert report.left_out == 2 * f.left_out(view(), events)
    assert f"{LABELS} rows from {2 * EVENTS:,} events" in str(report)
    assert sorted(path.name for path in Path("out", HOME).iterdir() if path.is_dir()) == ["cut", "joined"]


@pytest.mark.parametrize("parts", [1, 5])
def test_what_is_known_at_an_instant_in_parts_is_latest(folder, parts):
    report = FeatureJob.of([view()], output="out", at=NOON, parts=parts).run()
    expected = f.latest(view(), pq.read_table("events"), at=NOON).to_pylist()
    assert repr(sorted(read("out"), key=lambda row: row["k"])) == repr(expected)
    assert report.rows == len(expected)
    assert report.at == "2024-03-31T12:00:00+00:00"


def test_a_pipeline_runs_before_the_features(folder):
    words = view(features={"words": f.sum("words", over="30d"), "longest": f.max("words")}, pipeline=WORDS)
    FeatureJob.of([words], output="out", labels="labels.parquet", parts=3).run()
    events = pq.read_table("events")
    told = events.append_column("words", pa.array([len(text.split()) for text in events["text"].to_pylist()], pa.int64()))
    expected = f.as_of(words, pq.read_table("labels.parquet"), told).to_pylist()
    assert by_id(read("out")) == by_id(expected)
    assert hr.training_set(pq.read_table("labels.parquet"), words).to_pylist() == expected


def test_other_formats_and_tables_are_read_as_well(folder):
    events = pq.read_table("events").select(["k", "t", "x"])
    pyarrow.csv.write_csv(events, "events.csv")
    fewer = view(features={"n": f.count(), "x": "x"})
    from_csv = hr.training_set(pl.read_parquet("labels.parquet"), hr.FeatureView("v", "events.csv", key="k", time="t", features=fewer.features, delay="1h"))
    assert from_csv.select(["id", "n", "x"]).to_pylist() == hr.training_set(["labels.parquet"], fewer).select(["id", "n", "x"]).to_pylist()
    some = hr.FeatureView("v", Input("events", where="x > 0"), key="k", time="t", features={"least": f.min("x")})
    assert min(hr.training_set("labels.parquet", some)["least"].drop_null().to_pylist()) > 0


def test_a_job_that_died_goes_on_where_it_was(folder):
    """It fails after each number of steps in turn; what was done is not done again, and the output is that of an undisturbed job."""
    done: list[str] = []

    def failing(tasks):
        for name, outcome in here(tasks):
            done.append(name)
            yield name, outcome
            raise OSError("the machine went down")

    def job():
        return FeatureJob.of([view()], output="out", labels="labels.parquet", parts=3)

    for _ in range(50):
        try:
            report = job().run(each=failing)
            break
        except OSError:
            assert "_SUCCESS" not in {path.name for path in Path("out").iterdir()}
    assert len(done) == len(set(done))
    FeatureJob.of([view()], output="other", labels="labels.parquet", parts=3).run()
    assert read("out") == read("other")
    assert job().run(each=None) == report  # there is nothing left to do


def test_an_instant_that_was_left_out_stays_what_it_was(folder):
    first = FeatureJob.of([view()], output="out")
    first.run()
    assert FeatureJob.of([view()], output="out").at == first.at


def test_an_output_is_not_mixed(folder):
    FeatureJob.of([view()], output="out", labels="labels.parquet", parts=3).run()
    for changed in ([view(delay="2h")], [view(pipeline=WORDS)], [view(), view("other", features={"m": f.count()})]):
        with pytest.raises(ChangedError, match="begun with other"):
            FeatureJob.of(changed, output="out", labels="labels.parquet").run()
    pq.write_table(pq.read_table("events/0.parquet"), "events/3.parquet")
    with pytest.raises(ChangedError, match="begun with other inputs"):
        FeatureJob.of([view()], output="out", labels="labels.parquet").run()
    again = FeatureJob.of([view()], output="out", labels="labels.parquet", parts=2).run(restart=True)
    assert again.events == EVENTS * 4 // 3
    assert repr(by_id(read("out"))) == repr(by_id(hr.training_set("labels.parquet", view()).to_pylist()))


def test_only_keys_with_new_events_are_computed_again(folder):
    """A file is added: keys in it are as of the new instant, all others stay as they were, and parts without them are not touched."""
    later = NOON + dt.timedelta(days=5)
    counted = view(features={"n": f.count(over="7d"), "all": f.count(), "vector": "v"})
    first = FeatureJob.of([counted], output="out", at=NOON, parts=8, incremental=True)
    first.run()
    old = {row["k"]: row for row in read("out")}
    untouched = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*")}
    assert FeatureJob.of([counted], output="out", incremental=True).run().rows == len(old)  # nothing is new
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4], pa.float32()), 2)
    more = pa.table({"k": pa.array([7, 1000]), "t": hours([20, 30]), "x": [1.0, 2.0], "text": ["a", "b"], "v": vectors})
    pq.write_table(more, "events/0a.parquet")  # sorted among the others
    steps: list[str] = []

    def failing(tasks):
        for name, outcome in here(tasks):
            steps.append(name)
            yield name, outcome
            if len(steps) < 4:
                raise OSError("the machine went down")

    for _ in range(6):
        try:
            report = FeatureJob.of([counted], output="out", at=later, incremental=True).run(each=failing)
            break
        except OSError:
            assert not Path("out/_SUCCESS").exists()
    assert steps[0] == "0-1-00000" and len(steps) == len(set(steps)) <= 3
    now = {row["k"]: row for row in read("out")}
    expected = {row["k"]: row for row in f.latest(counted, pq.read_table("events"), at=later).to_pylist()}
    assert now == old | {7: expected[7], 1000: expected[1000]}
    assert (report.rows, report.events) == (len(now), EVENTS + 2)
    touched = {path.name for path in Path("out").glob("part-*") if path.stat().st_mtime_ns != untouched.get(path.name)}
    assert 1 <= len(touched) <= 2
    Path("events/1.parquet").unlink()
    with pytest.raises(ChangedError, match="inputs or another instant"):
        FeatureJob.of([counted], output="out", incremental=True).run()
    with pytest.raises(ChangedError, match="incremental"):
        FeatureJob.of([counted], output="out").run()


def test_a_foreign_folder_is_left_alone(folder):
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"holds no features: it has '0.parquet', '1.parquet'"):
            FeatureJob.of([view()], output="events", at=NOON).run(restart=restart)


def test_it_is_a_run_that_is_listed_and_no_batch_job(folder):
    FeatureJob.of([view()], output="out", at=NOON).run()
    (run,) = runs(["."])
    assert (run.output, run.pipeline, run.state, run.rows, run.total) == ("out", "v", "succeeded", EVENTS, EVENTS) and run.dead_letters
    with pytest.raises(OutputError, match="'out' holds features; what is compared are batch jobs"):
        compare(diff_read("out"), diff_read("out"))
    with pytest.raises(OutputError, match="'out' holds features of headrace; choose another folder"):
        sinks.inspect(sinks.open_sink(Output("out")), pa.schema([("k", pa.int64())]), restart=True)


def test_of_two_jobs_on_one_output_the_older_stops(folder):
    def overtaken(tasks):
        for name, outcome in here(tasks):
            job.output.put("_headrace/ledger/claims/999999-newer", b"")
            yield name, outcome

    job = FeatureJob.of([view()], output="out", at=NOON)
    with pytest.raises(TakenOverError):
        job.run(each=overtaken)


@pytest.mark.parametrize(
    ("mistake", "kind", "parts"),
    [
        (lambda: FeatureJob.of([], output="out"), DefinitionError, ["no feature view"]),
        (lambda: FeatureJob.of([view(), view("w")], output="out"), DefinitionError, ["one view at a time", "'v', 'w'"]),
        (lambda: FeatureJob.of([view()], output="out", labels="labels.parquet", at=NOON), DefinitionError, ["labels have times of their own"]),
        (lambda: FeatureJob.of([view(), view("w")], output="out", input="events", labels="labels.parquet"), DefinitionError, ["one view"]),
        (lambda: FeatureJob.of([view(), view("w", key="text")], output="out", labels="labels.parquet"), WiringError, ["'w' has the key 'text'", "'k'"]),
        (lambda: FeatureJob.of([view(), view("w")], output="out", labels="labels.parquet"), WiringError, ["column 'n'", "as a feature is called"]),
        (lambda: FeatureJob.of([view()], output="out", labels="nothing.parquet"), SourceError, ["nothing.parquet"]),
        (lambda: FeatureJob.of([view(features={"n": f.sum("xx")})], output="out"), WiringError, ["'xx'", "did you mean 'x'?"]),
        (lambda: FeatureJob.of([view()], output="out", labels="labels.parquet", incremental=True), DefinitionError, ["incremental", "with labels"]),
        (lambda: FeatureJob.of([view()], output="out", parts=0), DefinitionError, ["number of parts", "got 0"]),
        (lambda: hr.training_set("labels.parquet", hr.FeatureView("v", key="k", time="t", features={"n": f.count()})), DefinitionError, ["has no source"]),
        (lambda: hr.training_set(3, view()), DefinitionError, ["labels are a table", "got 3"]),
        (lambda: hr.training_set("labels.parquet", "v"), DefinitionError, ["hr.FeatureViews", "'v'"]),
    ],
)
def test_mistakes_are_told_before_anything_is_read(folder, mistake, kind, parts):
    with pytest.raises(kind) as caught:
        mistake()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not Path("out").exists()


def test_a_file_that_cannot_be_read_is_no_missing_event(folder):
    Path("events/1.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(SourceError, match=r"1.parquet.*features without its rows would be wrong"):
        FeatureJob.of([view()], output="out", at=NOON)


def test_a_key_is_in_one_part_in_any_width_or_encoding():
    numbers = pa.array([1, 2, 3, None, -1, 2])
    forms = [numbers, numbers.cast(pa.int16()), numbers.dictionary_encode()]
    words = pa.array(["a", "ä", "", None, "a" * 99, "ä"])
    for several in (forms, [words, words.cast(pa.large_string()), words.dictionary_encode()]):
        found = [part_of([pa.chunked_array([form.slice(0, 2), form.slice(2)])], 97).tolist() for form in several]
        assert found[0] == found[1] == found[2]
        assert found[0][1] == found[0][5]
        assert found[0][3] == 0
    both = part_of([pa.chunked_array([numbers]), pa.chunked_array([words])], 1000)
    assert len(set(both.tolist())) == 5


def test_keys_spread_evenly():
    counts = np.bincount(part_of([pa.chunked_array([pa.array(range(64_000))])], 64))
    assert counts.min() > 850 and counts.max() < 1150


def test_wide_columns_are_fetched_one_at_a_time(folder):
    job = FeatureJob.of([view()], output="out", at=NOON, parts=2)
    schema = job.inputs[0].schema
    store = job.output
    job.output.put("empty", b"")
    part = Part(store, schema, [], 0)
    assert part.rows == 0
    assert part._narrow.column_names == ["k", "t", "x"]
    assert len(part["v"]) == 0


VIEWS = """
import headrace as hr

stays = hr.FeatureView("stays", "events/*.parquet", key="k", time="t", features={"n": hr.features.count(over="7d")})
prices = hr.FeatureView("prices", "events/*.parquet", key="k", time="t", features={"price": hr.features.mean("x")})
"""


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["features", *arguments, "--local"])


def test_the_command(folder):
    Path("views.py").write_text(VIEWS)
    done = invoke("views.py", "--labels", "labels.parquet", "--output", "set")
    assert done.exit_code == 0, done.output
    assert f"{LABELS} rows from {2 * EVENTS:,} events" in done.output
    assert pq.read_table("set").column_names == ["id", "k", "t", "n", "price"]
    told = invoke("views.py::stays", "--at", "2024-03-31T14:00+02:00", "--output", "now", "--json", "--parts", "2")
    assert '"at": "2024-03-31T14:00:00+02:00"' in told.output
    assert repr(sorted(read("now"), key=lambda row: row["k"])) == repr(
        f.latest(hr.FeatureView("v", key="k", time="t", features={"n": f.count(over="7d")}), pq.read_table("events"), at=NOON).to_pylist()
    )
    one = invoke("views.py::prices", "--input", "events/0.parquet", "--output", "some", "--quiet")
    assert one.output == ""
    assert set(pq.read_table("some").column_names) == {"k", "t", "price"}


def test_the_command_publishes_what_is_known(folder):
    """As often as it is run: what a crash left out is published by the next, and nothing goes back."""
    Path("views.py").write_text(VIEWS)
    expected = f.latest(hr.FeatureView("v", key="k", time="t", features={"n": f.count(over="7d")}), pq.read_table("events"), at=NOON)
    for newer in (expected.num_rows, expected.num_rows):
        told = invoke("views.py::stays", "--at", "2024-03-31T12:00", "--output", "now", "--publish", "features.db", "--parts", "3")
        assert told.exit_code == 0, told.output
        assert f"published {expected.num_rows} keys: {newer} new or newer, 0 of which" in told.output
    with open_store("features.db", make=False) as store:
        found = store.read("stays", [*expected["k"].to_pylist(), 999])
    assert found["n"].to_pylist() == [*expected["n"].to_pylist(), None]
    refused = invoke("views.py", "--labels", "labels.parquet", "--output", "set", "--publish", "features.db")
    assert isinstance(refused.exception, SettingError)


def test_files_that_are_dropped_are_picked_up_once(folder):
    """The loop computes and publishes what a new file tells of, and ends when it is told to."""
    Path("views.py").write_text(VIEWS)
    environment = {**os.environ, "PYTHONPATH": str(Path(hr.__file__).parents[1])}
    command = ["features", "views.py::stays", "--input", "events", "--output", "out", "--local", "--follow", "50ms", "--publish", "features.db"]
    with subprocess.Popen([sys.executable, "-m", "headrace", *command], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert f"from {EVENTS} events" in process.stdout.readline()
        assert "published" in process.stdout.readline()
        more = pq.read_table("events/0.parquet").slice(0, 1).set_column(0, "k", pa.array([5000]))
        pq.write_table(more, ".dropped")
        os.rename(".dropped", "events/9.parquet")  # whole, or not there
        assert f"from {EVENTS + 1} events" in process.stdout.readline()
        assert "published" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(60) == 130
    with open_store("features.db", make=False) as store:
        assert store.read("stays", [5000])["n"].null_count == 0
    assert sum(row["k"] == 5000 for row in read("out")) == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        (("views.py::stay", "-o", "out"), PipelineFileError, "did you mean 'stays'?"),
        (("empty.py", "-o", "out"), PipelineFileError, "no feature view"),
        (("twice.py", "-o", "out"), PipelineFileError, "two feature views of one name"),
        (("views.py", "-o", "out"), DefinitionError, "one view at a time"),
        (("views.py::stays", "-o", "out", "--follow", "soon"), DefinitionError, "--follow must be a number and a unit"),
        (("views.py::stays", "-o", "out", "--follow", "30s", "--at", "2024-03-31"), SettingError, "--at says nothing"),
        (("views.py::stays", "-o", "out", "--at", "yesterday"), SettingError, "--at 'yesterday' is no instant"),
    ],
)
def test_mistakes_at_the_command_line(folder, arguments, kind, part):
    Path("views.py").write_text(VIEWS)
    Path("empty.py").write_text("")
    Path("twice.py").write_text(VIEWS + "\nprices = hr.FeatureView('stays', key='k', time='t', features={'n': 'x'})\n")
    found = invoke(*arguments).exception
    assert isinstance(found, kind)
    assert part in str(found)
