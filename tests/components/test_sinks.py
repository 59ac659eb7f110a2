"""Sinks: a file is whole or not there, an output belongs to one job, and readers can use it as it stands."""

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
from headrace.errors import LedgerError, OutputError, StorageError
from headrace.formats import Output
from headrace.ledger import Ledger, staged
from headrace.sinks import commit_delta, inspect, open_sink, write
from headrace.state import Change, State

SCHEMA = pa.schema([("a", pa.int64())])
RUN = "000001-abc"


def sink_at(path: Path, format: str = "parquet") -> sinks.Sink:
    """A sink of a folder."""
    return open_sink(Output(str(path), format=format))


def names(path: Path) -> list[str]:
    """All names in a folder, hidden ones included."""
    return sorted(os.listdir(path))


def committed(sink: sinks.Sink, *tables: pa.Table, finish: bool = True) -> Ledger:
    """An output with a file for each table, as a run that begins afresh leaves it."""
    held, _ = Ledger.claim(sink.store, restart=True)
    held.begin(State(request={}, facts={}, units="u"))
    at = 0
    for data in tables:
        held.commit(Change(files=[write(sink, held.run, data)], done={0: [(at, at + data.num_rows)]}))
        at += data.num_rows
    if finish:
        held.finish()
    return held


def test_a_file_lies_in_the_staging_folder_of_its_run(tmp_path: Path) -> None:
    """Whole, with its size as it is on disk, and with nothing beside it that a reader of the output would see."""
    for format, ending in (("parquet", ".parquet"), ("jsonl", ".jsonl"), ("delta", ".parquet")):
        sink = sink_at(tmp_path / format, format)
        file = write(sink, RUN, pa.table({"a": [1, 2, 3]}))
        assert file.name.startswith(f"part-{RUN}-") and file.name.endswith(ending)
        assert (file.rows, file.bytes) == (3, (tmp_path / format / staged(file.name)).stat().st_size)
        assert names(tmp_path / format) == ["_headrace"] and names(tmp_path / format / "_headrace/staging" / RUN) == [file.name]
        letters = write(sink, RUN, pa.table({"a": [1]}), kind="letters")
        assert letters.name.startswith(f"letters-{RUN}-") and pq.read_table(tmp_path / format / staged(letters.name)).num_rows == 1


def test_parquet_is_zstd_with_bounded_row_groups(tmp_path: Path) -> None:
    """Files are compressed with zstd; row groups hold about 16 MB, so that the next reader can share them out."""
    schema = pa.schema([("v", pa.list_(pa.float32(), 256))])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(40_000 * 256, dtype="float32")), 256)
    footer = pq.read_metadata(tmp_path / staged(write(sink_at(tmp_path), RUN, pa.table({"v": vectors}, schema)).name))
    assert footer.row_group(0).column(0).compression == "ZSTD"
    assert footer.num_row_groups == 3


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full there is no file under any name, and the message says what could not be written, where, and why."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"cannot write '_headrace/staging/.*part-.*' in '.*': .*No space left"):
        write(sink_at(tmp_path), RUN, pa.table({"a": [1]}))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_small_files_become_one(tmp_path: Path, format: str) -> None:
    """With all their rows, in order; a column that is empty in one file takes the type that it has in the other."""
    sink = sink_at(tmp_path, format)
    files = [write(sink, RUN, data) for data in (pa.table({"a": [1, 2], "b": pa.nulls(2)}), pa.table({"a": [3], "b": ["x"]}))]
    one = sinks.merge(sink, RUN, files)
    assert one.rows == 3 and one.name not in {file.name for file in files}
    path = tmp_path / staged(one.name)
    assert one.bytes == path.stat().st_size
    rows = pq.read_table(path).to_pylist() if format == "parquet" else [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"a": 1, "b": None}, {"a": 2, "b": None}, {"a": 3, "b": "x"}]


def test_a_merge_holds_little_in_memory(tmp_path: Path) -> None:
    """Files that are small because they compress well are not decoded all at once."""
    sink, values = sink_at(tmp_path), pa.array(np.zeros(4 << 20))
    files = [write(sink, RUN, pa.table({"a": values})) for _ in range(6)]
    assert sum(file.bytes for file in files) < 1 << 20 < values.nbytes
    pool = pa.default_memory_pool()
    pa.set_memory_pool(measured := pa.proxy_memory_pool(pool))
    try:
        one = sinks.merge(sink, RUN, files)
    finally:
        pa.set_memory_pool(pool)
    assert one.rows == 6 * len(values) and measured.max_memory() < 3 * values.nbytes
    assert pq.ParquetFile(tmp_path / staged(one.name)).metadata.num_row_groups > 6


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
    lines = (tmp_path / staged(write(sink_at(tmp_path, "jsonl"), RUN, data).name)).read_text().split("\n")
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
    rows = [{"id": n, "v": [n, n], "at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC), "b": b"x"} for n in range(4)]
    sink = sink_at(tmp_path, "delta")
    held = committed(sink, *(pa.Table.from_pylist(rows[at : at + 2], schema) for at in (0, 2)))
    write(sink, held.run, pa.Table.from_pylist(rows, schema))
    commit_delta(sink, held.state.files.values(), schema)
    found = deltalake.DeltaTable(tmp_path)
    assert found.version() == 0 and len(found.file_uris()) == 2
    assert sorted(found.to_pyarrow_table().to_pylist(), key=lambda row: row["id"]) == rows


def test_a_delta_commit_that_is_made_again(tmp_path: Path) -> None:
    """Begun again it changes nothing; later files are added; those of a job that was thrown away are no longer named."""
    sink = sink_at(tmp_path, "delta")
    first = committed(sink, pa.table({"a": [1]}), pa.table({"a": [2]}))
    for _ in range(2):
        commit_delta(sink, list(first.state.files.values())[:1], SCHEMA)
    assert (deltalake.DeltaTable(tmp_path).version(), deltalake.DeltaTable(tmp_path).to_pyarrow_table().num_rows) == (0, 1)
    commit_delta(sink, first.state.files.values(), SCHEMA)
    assert (deltalake.DeltaTable(tmp_path).version(), deltalake.DeltaTable(tmp_path).to_pyarrow_table().num_rows) == (1, 2)
    again = committed(sink, pa.table({"a": [7]}))
    commit_delta(sink, again.state.files.values(), SCHEMA)
    assert deltalake.DeltaTable(tmp_path).to_pyarrow_table()["a"].to_pylist() == [7]


def test_an_empty_delta_table(tmp_path: Path) -> None:
    """A run of no rows leaves a table with the columns and no rows."""
    commit_delta(sink_at(tmp_path, "delta"), [], SCHEMA)
    assert deltalake.DeltaTable(tmp_path).to_pyarrow_table().schema.names == ["a"]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.float16(), pa.null(), pa.time32("s"), pa.timestamp("ns"), pa.list_(pa.uint64()), pa.duration("s")], ids=str)
def test_what_delta_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, kind: pa.DataType) -> None:
    """Delta has no unsigned numbers, half floats or nanoseconds: said at the start, not after hours of work."""
    with pytest.raises(OutputError, match="cannot hold column 'odd' of type .*; leave it out, convert it in a stage, or write parquet"):
        inspect(sink_at(tmp_path / "out", "delta"), pa.schema([("odd", kind)]))
    assert not (tmp_path / "out").exists()


def raising(error: Exception) -> Any:
    """A function that raises."""

    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_a_commit_that_delta_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that appeared in the same moment is not written over; a store that does not answer is the store's error."""
    sink = sink_at(tmp_path, "delta")
    held = committed(sink, pa.table({"a": [1]}))
    deltalake.write_deltalake(str(tmp_path), pa.table({"b": [1]}))
    for missed in (deltalake.exceptions.TableNotFoundError("none"), OSError("out of reach")):
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="cannot commit the Delta table '"):
            patch.setattr(deltalake, "DeltaTable", raising(missed))
            commit_delta(sink, held.state.files.values(), SCHEMA)


def test_an_output_that_is_free(tmp_path: Path) -> None:
    """A folder that is not there, an empty one, and one in which a run died before it wrote anything that counts; none is touched."""
    assert inspect(sink_at(tmp_path / "none"), SCHEMA) is None
    assert not (tmp_path / "none").exists()
    assert inspect(sink_at(tmp_path), SCHEMA) is None
    Ledger.claim(sink_at(tmp_path).store)
    assert inspect(sink_at(tmp_path), SCHEMA) is None


@pytest.mark.parametrize("finish", [True, False])
def test_an_output_that_holds_a_job(tmp_path: Path, finish: bool) -> None:
    """What the ledger knows is returned."""
    held = committed(sink_at(tmp_path), pa.table({"a": [1, 2]}), finish=finish)
    state = inspect(sink_at(tmp_path), SCHEMA)
    assert state is not None and (state.rows_done, state.finished, state.files) == (2, finish, held.state.files)
    assert inspect(sink_at(tmp_path), SCHEMA, restart=True) is None


def test_a_damaged_ledger(tmp_path: Path) -> None:
    """It is told, with what to do; and that can be done."""
    committed(sink_at(tmp_path), pa.table({"a": [1, 2]}))
    for record in tmp_path.glob("_headrace/ledger/0*/record-*"):
        record.write_bytes(record.read_bytes()[:-3])
    with pytest.raises(LedgerError, match="record-000000 is damaged: its checksum does not match. Restore the file, or begin again with --restart"):
        inspect(sink_at(tmp_path), SCHEMA)
    assert inspect(sink_at(tmp_path), SCHEMA, restart=True) is None
    committed(sink_at(tmp_path), pa.table({"a": [7]}))
    assert pq.read_table(tmp_path).to_pydict() == {"a": [7]}


@pytest.mark.parametrize("restart", [True, False])
def test_what_is_not_ours_is_refused(tmp_path: Path, restart: bool) -> None:
    """A folder with something else in it, which `--restart` does not throw away either; a file; an unknown format."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(OutputError, match=r"output '.*full' holds no run of headrace: it has 'notes.txt'; choose an empty folder"):
        inspect(sink_at(tmp_path / "full"), SCHEMA, restart=restart)
    with pytest.raises(StorageError, match="cannot list '.*notes.txt'"):
        inspect(sink_at(tmp_path / "full/notes.txt"), SCHEMA, restart=restart)
    assert names(tmp_path / "full") == ["notes.txt"]


def test_outputs_that_cannot_be() -> None:
    """Known before anything is touched."""
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
