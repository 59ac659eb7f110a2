"""Batch runs on a local Ray: every row accounted for, errors as the user's own, and nothing that grows with the input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import events
from headrace.errors import RunError, SourceError, StageError, StorageError, WiringError
from headrace.formats import Input
from headrace.hardware import Cluster, Node
from headrace.lineage import ROW
from headrace.on_ray import batch, compat, job
from headrace.on_ray.batch import lower
from headrace.on_ray.cluster import describe
from headrace.on_ray.operators import EventLog
from headrace.plan import resolve
from headrace.sources import open_source, select
from headrace.units import Source

pytestmark = pytest.mark.usefixtures("shared_ray")


@hr.stage(out={"length": int})
def length(text: hr.Column[str]) -> dict[str, Any]:
    """A function."""
    return {"length": [len(one) for one in text]}


@hr.stage(out={"vector": hr.Vector(8)}, replicas=2, batch=hr.tokens(512, of="text"))
class Embed:
    """A model."""

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Eight numbers a text."""
        return {"vector": np.stack([np.full(8, len(one), np.float32) for one in text])}


MEASURE = hr.Pipeline("measure", length)
REVIEWS = hr.Pipeline("reviews", length, Embed())


def write_rows(folder: Path, rows: int, *, files: int = 1, group: int | None = None, **columns: Any) -> str:
    """Parquet files with the columns id and text, and others; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        ids = range(file * rows // files, (file + 1) * rows // files)
        data = {"id": list(ids), "text": [f"text {n} " + "x" * (n % 50) for n in ids], **{name: [make(n) for n in ids] for name, make in columns.items()}}
        pq.write_table(pa.table(data), folder / f"{file:04}.parquet", row_group_size=group)
    return str(folder)


def read_back(folder: Path) -> pa.Table:
    """All rows of an output of Parquet files, by id."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))).sort_by("id")


@pytest.mark.parametrize(
    ("keep", "columns"),
    [("all", ["id", "text", "place", "length"]), ("id", ["id", "length"]), (["place", "id"], ["place", "id", "length"])],
    ids=["all", "one", "some"],
)
def test_rows_in_are_rows_out(tmp_path: Path, keep: Any, columns: list[str]) -> None:
    """Every row of several files comes out once, with the columns that were kept, nulls in them included."""
    input = write_rows(tmp_path / "in", 1000, files=3, group=100, place=lambda n: f"p{n}" if n % 3 else None)
    report = hr.run(MEASURE, input=input, output=str(tmp_path / "out"), keep=keep)
    data = read_back(tmp_path / "out")
    assert (report.rows_in, report.rows_out, report.stages[0].rows) == (1000, 1000, 1000)
    assert data.column_names == columns and data["id"].to_pylist() == list(range(1000))
    assert data["length"].to_pylist() == [len(f"text {n} ") + n % 50 for n in range(1000)]
    if "place" in columns:
        assert data["place"].to_pylist() == [f"p{n}" if n % 3 else None for n in range(1000)]


def test_the_output_can_be_read_as_it_stands(tmp_path: Path) -> None:
    """Parquet with zstd, that DuckDB, Polars and pyarrow read; a mark of success; and what happened, event by event."""
    out = tmp_path / "out"
    report = hr.run(REVIEWS, input=write_rows(tmp_path / "in", 500, files=2), output=str(out), keep="id")
    files = sorted(out.glob("part-*.parquet"))
    assert report.files == len(files) and report.bytes == sum(file.stat().st_size for file in files)
    assert {pq.read_metadata(file).row_group(0).column(0).compression for file in files} == {"ZSTD"}
    assert (out / "_SUCCESS").exists()
    assert duckdb.sql(f"select count(*), sum(id), sum(vector[1]) from '{out}/*.parquet'").fetchall()[0][:2] == (500, 124750)
    found = pl.read_parquet(f"{out}/*.parquet").sort("id")
    assert found["id"].to_list() == list(range(500)) and found["vector"][0].to_list() == [7.0] * 8
    assert pq.read_table(out, columns=["id"]).num_rows == 500
    (record,) = (out / "_headrace").glob("events-000001-*.jsonl")
    told = events.from_json_lines(record.read_text())
    assert isinstance(told[0], events.RunStarted) and isinstance(told[-1], events.RunFinished)
    assert sum(one.rows for one in told if isinstance(one, events.FileWritten)) == 500
    assert {one.unit for one in told if isinstance(one, events.UnitRead)} == {0, 1}
    assert [(sum(one.rows for one in told if isinstance(one, events.Committed)), told[-1].rows_out, told[-1].dead)] == [(500, 500, 0)]
    assert {one.group for one in told if isinstance(one, events.BlockDone)} == {"(read)", "length", "embed"}


def test_json_lines_output(tmp_path: Path) -> None:
    """An output of JSON Lines can be the input of the next run."""
    hr.run(MEASURE, input=write_rows(tmp_path / "in", 100), output=hr.Output(str(tmp_path / "one"), format="jsonl"), keep="all")
    report = hr.run(MEASURE, input=str(tmp_path / "one"), output=str(tmp_path / "two"), keep="id")
    assert report.rows_out == 100 and read_back(tmp_path / "two")["id"].to_pylist() == list(range(100))


def test_delta_output(tmp_path: Path) -> None:
    """All rows are in one commit of a Delta table."""
    report = hr.run(REVIEWS, input=write_rows(tmp_path / "in", 300, files=3), output=hr.Output(str(tmp_path / "out"), format="delta"), keep="id")
    table = deltalake.DeltaTable(tmp_path / "out")
    data = table.to_pyarrow_table().sort_by("id")
    assert table.version() == 0 and len(table.file_uris()) == report.files
    assert data["id"].to_pylist() == list(range(300)) and data["vector"][0].as_py() == [7.0] * 8


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"where": "id >= 290 or id in (5, 7)"}, [5, 7, *range(290, 300)]),
        ({"limit": 123}, list(range(123))),
        ({"where": "even", "limit": 70}, list(range(0, 140, 2))),
        ({"where": "even and id == 41"}, []),
    ],
    ids=["where", "limit", "both", "nothing left"],
)
def test_where_and_limit(tmp_path: Path, options: Mapping[str, Any], ids: list[int]) -> None:
    """A run reads the rows that it was told to, no more and no fewer; also when that is none."""
    input = write_rows(tmp_path / "in", 300, files=3, group=40, even=lambda n: n % 2 == 0)
    report = hr.run(REVIEWS, input=hr.Input(input, **options), output=str(tmp_path / "out"), keep="id")
    assert report.rows_out == len(ids)
    assert (tmp_path / "out/_SUCCESS").exists()
    assert not ids or read_back(tmp_path / "out")["id"].to_pylist() == ids


def test_text_inputs(tmp_path: Path) -> None:
    """CSV and JSON Lines run as Parquet does, a limit included."""
    for kind, head, line in (("csv", "id,text\n", "{0},text {0}\n"), ("jsonl", "", '{{"id": {0}, "text": "text {0}"}}\n')):
        folder = tmp_path / kind
        folder.mkdir()
        for file in range(3):
            (folder / f"{file}.{kind}").write_text(head + "".join(line.format(n) for n in range(file * 50, file * 50 + 50)))
        report = hr.run(MEASURE, input=hr.Input(str(folder), limit=120), output=str(tmp_path / f"{kind}-out"), keep="all")
        assert report.rows_out == 120 and read_back(tmp_path / f"{kind}-out")["id"].to_pylist() == list(range(120))


@hr.stage(out={"size": int})
def weigh(image: hr.Column[hr.Image]) -> dict[str, Any]:
    """The size of an image."""
    return {"size": [len(one) for one in image]}


def test_images(tmp_path: Path) -> None:
    """A folder of images is an input with the columns path and image."""
    for n in range(150):
        (tmp_path / f"{n:03}.png").write_bytes(b"x" * n)
    hr.run(hr.Pipeline("weigh", weigh), input=str(tmp_path / "*.png"), output=str(tmp_path / "out"), keep="path")
    data = pq.read_table(next((tmp_path / "out").glob("part-*"))).sort_by("path")
    assert data["size"].to_pylist() == list(range(150))


def test_many_small_files_become_one(tmp_path: Path) -> None:
    """An input of 200 small files does not become an output of 200 small files."""
    report = hr.run(MEASURE, input=write_rows(tmp_path / "in", 1000, files=200), output=str(tmp_path / "out"), keep="id")
    assert (report.files, report.rows_out) == (1, 1000)


class OutOfMemoryError(RuntimeError):
    """What an accelerator's framework raises."""


@hr.stage(out={"n": int}, batch=64, replicas=1)
class Greedy:
    """A model that cannot hold more than ten rows."""

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Fail when asked for too much."""
        if len(text) > 10:
            raise OutOfMemoryError("the accelerator is full")
        return {"n": [len(text)] * len(text)}


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    """The run goes on with smaller batches, no row is lost, and the report says so."""
    report = hr.run(hr.Pipeline("greedy", Greedy()), input=write_rows(tmp_path / "in", 300), output=str(tmp_path / "out"), keep="id")
    data = read_back(tmp_path / "out")
    assert data["id"].to_pylist() == list(range(300)) and max(data["n"].to_pylist()) <= 10
    assert [halved.stage for halved in report.budgets_halved] == ["greedy"]
    assert "greedy: out of memory, batches of 64 rows divided by" in str(report)


@hr.stage(out={"y": int}, replicas=1)
class NoSetup:
    """A model that cannot be loaded."""

    def setup(self, device: str) -> None:
        """Fail."""
        raise FileNotFoundError(f"no weights for {device}")

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Never called."""
        return {"y": [0] * len(text)}


def test_an_error_of_setup_is_the_users_own(tmp_path: Path) -> None:
    """It comes through Ray with its type, its message and the user's frames; the output is not marked as a success."""
    with pytest.raises(StageError, match="stage 'no_setup' setup failed: FileNotFoundError: no weights for cpu") as caught:
        hr.run(hr.Pipeline("p", NoSetup()), input=write_rows(tmp_path / "in", 200), output=str(tmp_path / "out"))
    assert "in setup" in caught.value.frames and "test_batch.py" in caught.value.frames
    assert "site-packages/ray/" not in caught.value.frames
    assert not (tmp_path / "out/_SUCCESS").exists() and not list((tmp_path / "out").glob("part-*"))


@hr.stage(out={"y": int})
class Vandal:
    """A model that puts a file where the output was."""

    out: str = ""

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Destroy the output."""
        if os.path.isdir(self.out):
            shutil.rmtree(self.out)
            Path(self.out).touch()
        return {"y": [0] * len(text)}


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """A writer's error comes through Ray as the error of the output."""
    out = str(tmp_path / "out")
    with pytest.raises(StorageError, match=r"cannot write '_headrace/.*' in '.*out'"):
        hr.run(hr.Pipeline("p", Vandal(out=out)), input=write_rows(tmp_path / "in", 10), output=out)


@pytest.mark.parametrize("below", [(1, 2), (1, 0)], ids=["once", "for good"])
def test_rows_that_the_engine_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: tuple[int, int]) -> None:
    """They are run again at once; when they never come out, the run is no success, and the next one tries them again."""
    input, lower = write_rows(tmp_path / "in", 1000, files=4), job.lower
    passes = iter(below)  # the first gives rows of even numbers only, the second all, or none

    def lossy(*args: Any, **options: Any) -> Any:
        least = next(passes)
        return lower(*args, **options).map_batches(lambda block: block.filter(pc.less(pc.bit_wise_and(block[ROW], 1), least)), batch_format="pyarrow")

    monkeypatch.setattr(job, "lower", lossy)
    if below == (1, 0):
        with pytest.raises(
            RunError, match=r"rows of 4 input units never came out of the engine, among them \(1, 2\) of .*0000\.parquet'.*not marked as a success"
        ):
            hr.run(MEASURE, input=input, output=str(tmp_path / "out"), keep="id")
        assert not (tmp_path / "out/_SUCCESS").exists()
        monkeypatch.undo()
    report = hr.run(MEASURE, input=input, output=str(tmp_path / "out"), keep="id")
    assert (report.rows_before, report.rows_out, read_back(tmp_path / "out")["id"].to_pylist()) == (500 if below == (1, 0) else 0, 1000, list(range(1000)))


@pytest.mark.parametrize(
    ("input", "keep", "kind", "message"),
    [
        ("*.parquet", "place", SourceError, "'place', which the input lacks"),
        ("*.csv", (), SourceError, "no file matches"),
        ("*.parquet", ["length2"], SourceError, "length2"),
    ],
)
def test_mistakes_are_told_before_anything_is_touched(tmp_path: Path, input: str, keep: Any, kind: type[Exception], message: str) -> None:
    """Nothing is written when the input does not fit."""
    write_rows(tmp_path / "in", 10)
    with pytest.raises(kind, match=message):
        hr.run(MEASURE, input=str(tmp_path / "in" / input), output=str(tmp_path / "out"), keep=keep)
    assert not (tmp_path / "out").exists()


@hr.stage(out={"text": str})
def shout(text: hr.Column[str]) -> dict[str, Any]:
    """A function that replaces a column."""
    return {"text": [one.upper() for one in text]}


@hr.stage(out={"half": int}, on=hr.cpu(0.5))
def half(length: hr.Column[int]) -> dict[str, Any]:
    """A function on hardware of its own."""
    return {"half": length // 2}


def test_a_column_that_is_overwritten_cannot_be_kept(tmp_path: Path) -> None:
    """Keeping what a stage writes over, and no output shows, is refused."""
    pipeline = hr.Pipeline("p", shout, length, outputs=["length"])
    with pytest.raises(WiringError, match="cannot keep 'text' as it was"):
        hr.run(pipeline, input=write_rows(tmp_path / "in", 10), output=str(tmp_path / "out"), keep="all")


@hr.stage(out={"call_bytes": int, "call_rows": int}, batch=1_000_000)
def gulp(text: hr.Column[str]) -> dict[str, Any]:
    """A function that takes whole blocks, and says how large they were."""
    return {"call_bytes": [sum(map(len, text))] * len(text), "call_rows": [len(text)] * len(text)}


def incompressible(rows: int, size: int) -> list[str]:
    """Texts that stay as large as they are in any encoding."""
    generator = np.random.default_rng(rows)
    return [generator.bytes(size // 2).hex() for _ in range(rows)]


def test_the_working_set_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Ten times the input, in row groups ten times as large, comes in blocks of the same size."""
    largest = {}
    for rows in (1_500, 15_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        pq.write_table(pa.table({"id": range(rows), "text": incompressible(rows, 8_000)}), folder / "a.parquet", row_group_size=rows, compression="none")
        hr.run(hr.Pipeline("gulp", gulp), input=str(folder), output=str(folder / "out"), keep="id")
        data = read_back(folder / "out")
        assert data.num_rows == rows
        largest[rows] = max(data["call_bytes"].to_pylist())
    assert largest[15_000] <= 2 * batch._BLOCK_BYTES
    assert largest[15_000] <= 10 * largest[1_500]


def test_a_heavy_row_and_a_heavy_row_group(tmp_path: Path) -> None:
    """One row of 20 MB, and a row group of heavy rows among light ones, do not kill the job or lose a row."""
    texts = ["light"] * 600 + incompressible(1, 20 << 20) + ["light"] * 100 + incompressible(60, 200_000)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "in/a.parquet", row_group_size=200, compression="none")
    report = hr.run(hr.Pipeline("gulp", gulp), input=str(tmp_path / "in"), output=str(tmp_path / "out"), keep="id")
    data = read_back(tmp_path / "out")
    assert report.rows_out == len(texts) and data["id"].to_pylist() == list(range(len(texts)))
    assert max(data["call_bytes"].to_pylist()) < 64 << 20


@hr.stage(out={"threads": list[int], "variable": str, "process": int}, on=hr.cpu(2), replicas=2, batch=8)
class Threads:
    """A model that says how many threads it was given."""

    def setup(self, device: str) -> None:
        """Load a framework with thread pools of its own."""
        import torch

        self.torch = torch

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """What the libraries say."""
        import threadpoolctl

        found = [self.torch.get_num_threads(), *(pool["num_threads"] for pool in threadpoolctl.threadpool_info())]
        return {"threads": [found] * len(text), "variable": [os.environ["OMP_NUM_THREADS"]] * len(text), "process": [os.getpid()] * len(text)}


def test_replicas_keep_to_their_cores(tmp_path: Path) -> None:
    """Every thread pool of a replica has as many threads as the replica has cores, whatever was loaded when."""
    hr.run(hr.Pipeline("threads", Threads()), input=write_rows(tmp_path / "in", 400), output=str(tmp_path / "out"), keep="id")
    data = read_back(tmp_path / "out")
    assert {count for counts in data["threads"].to_pylist() for count in counts} == {2}
    assert set(data["variable"].to_pylist()) == {"2"} and len(set(data["process"].to_pylist())) <= 2


@pytest.mark.parametrize(
    ("pipeline", "operators"),
    [
        (hr.Pipeline("p", shout, length, Embed()), ["Reader", "Functions", "Replica"]),
        (hr.Pipeline("p", Embed()), ["Reader", "Replica"]),
        (hr.Pipeline("p", Embed(), length), ["Reader", "Replica", "Functions"]),
        (hr.Pipeline("p", length, half, Embed()), ["Reader", "Functions", "Functions", "Replica"]),
        (hr.Pipeline("p", Embed(), Threads()), ["Reader", "Replica", "Replica"]),
    ],
    ids=["functions and a model", "a model", "a model first", "functions on different hardware", "two models"],
)
def test_one_operator_per_group(tmp_path: Path, pipeline: hr.Pipeline, operators: list[str]) -> None:
    """Ray fuses no group with another: what prepares the input of a model runs beside it, on resources of its own."""
    source = open_source(Input(write_rows(tmp_path / "in", 100)))
    source = select(source, pipeline.inputs, pipeline=pipeline.name)
    dataset = lower(resolve(pipeline, describe()), source, log=EventLog.remote())  # type: ignore[attr-defined]
    assert isinstance(dataset, compat.Dataset)
    names = physical_operators(dataset)
    found = [[body for body in ("Reader", "Functions", "Replica") if body in name] for name in names]
    assert [bodies for bodies in found if bodies] == [[body] for body in operators], names


def physical_operators(dataset: Any) -> list[str]:
    """The names of the operators that Ray runs for a dataset, from the source on."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = get_execution_plan(dataset._logical_plan)
    plan = plan[0] if isinstance(plan, tuple) else plan
    return [operator.name for operator in plan.dag.post_order_iter()]


@pytest.mark.parametrize(
    ("rule", "count", "rows"),
    [
        (hr.tokens(1024, of="text"), 4_000, 167),
        (hr.tokens(1024, of="text"), 50_000, 632),
        (hr.tokens(1024, of="text"), 1_000_000, 2_828),
        (hr.tokens(1024, of="text"), None, 128),
        (hr.rows(4096), 50_000, 632),
        (hr.rows(256), 50_000, 632),
        (hr.rows(256), 10**10, 4_096),
        (hr.rows(32), 200, 32),
    ],
)
def test_blocks_are_as_large_as_padding_and_the_end_of_the_run_allow(rule: Any, count: int | None, rows: int) -> None:
    """On four replicas, with rows of some 64 tokens."""

    @hr.stage(out={"size": int}, batch=rule)
    class Size:
        def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
            return {"size": [len(t) for t in text]}

    plan = resolve(hr.Pipeline("sizes", Size()), Cluster((Node("here", cpus=4),)))
    source = Source(None, "parquet", pa.schema([("text", pa.string())]), (), row_bytes=256)  # type: ignore[arg-type]
    assert batch.block_rows(plan, source, count=count) == rows
