"""Sinks: a file is whole or not there, an output belongs to one run, and readers can use it as it stands."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace import sinks
from headrace.errors import OutputError
from headrace.formats import Output
from headrace.sinks import finish, open_sink, prepare, write

SCHEMA = pa.schema([("a", pa.int64())])


def sink_at(path: Path, format: str = "parquet", schema: pa.Schema = SCHEMA, *, pipeline: str = "p") -> sinks.Sink:
    """A sink that is ready to be written to."""
    sink = open_sink(Output(str(path), format=format))
    prepare(sink, schema, pipeline=pipeline)
    return sink


def names(path: Path) -> list[str]:
    """All names in a folder, hidden ones included."""
    return sorted(os.listdir(path))


def test_a_run_leaves_its_files_and_a_mark(tmp_path: Path) -> None:
    """Data files, what headrace keeps beside them, and _SUCCESS at the end."""
    sink = sink_at(tmp_path / "deep/out")
    file = write(sink, [pa.table({"a": [1, 2]}), pa.table({"a": [3]})])
    assert (file.rows, file.bytes) == (3, (tmp_path / "deep/out" / file.path).stat().st_size)
    assert names(tmp_path / "deep/out") == ["_headrace", file.path]
    finish(sink, [file], SCHEMA)
    assert names(tmp_path / "deep/out") == ["_SUCCESS", "_headrace", file.path]
    assert pq.read_table(tmp_path / "deep/out").to_pydict() == {"a": [1, 2, 3]}
    assert json.loads((tmp_path / "deep/out/_headrace/run.json").read_text()) == {"pipeline": "p", "format": "parquet"}


def test_parquet_is_zstd_with_bounded_row_groups(tmp_path: Path) -> None:
    """Files are compressed with zstd; row groups hold about 16 MB, so that the next reader can share them out."""
    schema = pa.schema([("v", pa.list_(pa.float32(), 256))])
    sink = sink_at(tmp_path, schema=schema)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(40_000 * 256, dtype="float32")), 256)
    footer = pq.read_metadata(tmp_path / write(sink, [pa.table({"v": vectors}, schema)]).path)
    assert footer.row_group(0).column(0).compression == "ZSTD"
    assert footer.num_row_groups == 3


@pytest.mark.parametrize("failing", ["write", "replace"])
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, format: str) -> None:
    """When the disk is full there is no file under the final name, and no other, and the message says why."""
    sink = sink_at(tmp_path, format)
    before = names(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(sinks, "put", failing_stream(full))
    with pytest.raises(OutputError, match=r"cannot write part-.* to '.*': .*No space left"):
        write(sink, [pa.table({"a": [1]})])
    assert names(tmp_path) == before


def failing_stream(fail: Any) -> Any:
    """`put` on a file system whose streams take a few bytes and then fail."""
    put = sinks.put

    class Stream:
        def __init__(self, path: str) -> None:
            self.file = open(path, "wb")

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: Any) -> None:
            self.file.write(bytes(content)[:4])
            fail()

    class Disk:
        def open_output_stream(self, path: str) -> Stream:
            return Stream(path)

    class Place:
        def __init__(self, place: Any) -> None:
            self.path, self.uri, self.is_local, self.filesystem = place.path, place.uri, True, Disk()

    return lambda place, content: put(Place(place), content)  # type: ignore[arg-type]


def test_finish_removes_what_is_not_the_runs(tmp_path: Path) -> None:
    """A file of a writer that died after, or while, it wrote is removed; what is not ours by name stays."""
    sink = sink_at(tmp_path)
    mine, orphan = (write(sink, [pa.table({"a": [n]})]) for n in (1, 2))
    (tmp_path / ".part-dead.parquet.1234").touch()
    (tmp_path / "notes.txt").touch()
    finish(sink, [mine], SCHEMA)
    assert orphan.path not in names(tmp_path)
    assert names(tmp_path) == ["_SUCCESS", "_headrace", "notes.txt", mine.path]


def test_json_lines(tmp_path: Path) -> None:
    """JSON has no NaN, bytes or instants: null, base64 and ISO text stand for them, in nested values as well."""
    instant = dt.datetime(2020, 1, 2, 3, 4, 5, 600, tzinfo=dt.UTC)
    data = pa.table(
        {
            "x": [1.5, math.nan, math.inf, None],
            "v": pa.array([[1.0, math.nan], [], None, [2.0]], pa.list_(pa.float32())),
            "half": pa.array([1.5, None, 0.25, math.nan], pa.float16()),
            "b": [b"\x00\xff", b"", None, b"x"],
            "at": pa.array([instant, None, instant, instant], pa.timestamp("us", tz="UTC")),
            "day": [dt.date(2020, 1, 2), None, None, None],
            "price": [decimal.Decimal("1.10"), None, None, None],
            "nested": [{"b": b"a", "x": math.nan}, None, None, None],
            "text": ["ü\n\u2028", "", None, '"'],
        }
    )
    sink = sink_at(tmp_path, "jsonl", data.schema)
    lines = (tmp_path / write(sink, [data]).path).read_text().split("\n")
    assert lines.pop() == ""
    first, second, third, fourth = map(json.loads, lines)
    assert first == {
        "x": 1.5,
        "v": [1.0, None],
        "half": 1.5,
        "b": base64.b64encode(b"\x00\xff").decode(),
        "at": "2020-01-02T03:04:05.000600+00:00",
        "day": "2020-01-02",
        "price": "1.10",
        "nested": {"b": "YQ==", "x": None},
        "text": "ü\n\u2028",
    }
    assert (second["x"], second["v"], second["b"], third["x"], third["b"], fourth["half"]) == (None, [], "", None, None, None)


def test_delta(tmp_path: Path) -> None:
    """The rows of all files appear in one commit, as version 0, vectors and instants included; orphans are not among them."""
    schema = pa.schema([("id", pa.int64()), ("v", pa.list_(pa.float32(), 2)), ("at", pa.timestamp("us", tz="UTC")), ("b", pa.binary())])
    sink = sink_at(tmp_path, "delta", schema)
    rows = [{"id": n, "v": [n, n], "at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC), "b": b"x"} for n in range(4)]
    files = [write(sink, [pa.Table.from_pylist(rows[at : at + 2], schema)]) for at in (0, 2)]
    write(sink, [pa.Table.from_pylist(rows, schema)])
    finish(sink, files, schema)
    found = deltalake.DeltaTable(tmp_path)
    assert found.version() == 0 and len(found.file_uris()) == 2
    assert sorted(found.to_pyarrow_table().to_pylist(), key=lambda row: row["id"]) == rows


def test_an_empty_delta_table(tmp_path: Path) -> None:
    """A run of no rows leaves a table with the columns and no rows."""
    sink = sink_at(tmp_path, "delta")
    finish(sink, [], SCHEMA)
    assert deltalake.DeltaTable(tmp_path).to_pyarrow_table().schema.names == ["a"]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.float16(), pa.null(), pa.time32("s"), pa.timestamp("ns"), pa.list_(pa.uint64()), pa.duration("s")], ids=str)
def test_what_delta_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, kind: pa.DataType) -> None:
    """Delta has no unsigned numbers, half floats or nanoseconds: said at the start, not after hours of work."""
    with pytest.raises(OutputError, match="cannot hold column 'odd' of type .*; leave it out, convert it in a stage, or write parquet"):
        sink_at(tmp_path / "out", "delta", pa.schema([("odd", kind)]))
    assert not (tmp_path / "out").exists()


def test_a_commit_that_delta_refuses(tmp_path: Path) -> None:
    """A table that appeared meanwhile is not written over, and the run is no success."""
    sink = sink_at(tmp_path, "delta")
    deltalake.write_deltalake(str(tmp_path), pa.table({"b": [1]}))
    with pytest.raises(OutputError, match="cannot commit the Delta table '"):
        finish(sink, [write(sink, [pa.table({"a": [1]})])], SCHEMA)
    assert "_SUCCESS" not in names(tmp_path)


@pytest.mark.parametrize(
    ("owner", "done", "message"),
    [
        ("p", True, "holds the finished run of this pipeline; choose an empty folder, or remove this one first"),
        ("p", False, "holds the unfinished run of this pipeline"),
        ("q", True, "holds the finished run of another pipeline, 'q'"),
        ("q", False, "holds the unfinished run of another pipeline, 'q'"),
    ],
)
def test_an_output_belongs_to_one_run(tmp_path: Path, owner: str, done: bool, message: str) -> None:
    """A folder that a run has used is refused, and whose it is is said."""
    sink = sink_at(tmp_path, pipeline=owner)
    if done:
        finish(sink, [], SCHEMA)
    with pytest.raises(OutputError, match=message):
        sink_at(tmp_path)


def test_other_refusals(tmp_path: Path) -> None:
    """A folder with something in it, a file, and an unknown format."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(OutputError, match="is not empty: it holds 'notes.txt'; choose an empty folder"):
        sink_at(tmp_path / "full")
    with pytest.raises(OutputError, match="cannot list '.*notes.txt'"):
        sink_at(tmp_path / "full/notes.txt")
    with pytest.raises(OutputError, match="no output format 'parqet'; there are 'parquet', 'jsonl', 'delta'; did you mean 'parquet'"):
        Output("x", format="parqet")
    with pytest.raises(OutputError, match="cannot open 'nope://x'"):
        open_sink(Output("nope://x"))


def test_delta_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said before anything runs."""
    import sys

    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(OutputError, match=r"pip install 'headrace\[delta\]'"):
        open_sink(Output("x", format="delta"))
