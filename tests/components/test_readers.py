"""Readers: exactly the rows that are due, each with its number; blocks are bounded; a bad value costs its own row only."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import readers, sources, texts
from headrace.columns import type_of
from headrace.errors import SourceError
from headrace.formats import Input
from headrace.lineage import FAULT, HIDDEN, ROW, UNIT, Fault, spans
from headrace.readers import Gap, read
from headrace.sources import open_source, select
from headrace.units import Source, Unit

ALL: list[Gap] = [(0, None)]


def opened(path: Path, wanted: dict[str, Any], **options: Any) -> Source:
    """What a run with these options reads."""
    return select(open_source(Input(str(path))), {name: type_of(annotation) for name, annotation in wanted.items()}, pipeline="p", **options)


def given(
    source: Source, todo: Sequence[tuple[Unit, Sequence[Gap]]], wanted: dict[str, Any], *, block_rows: int = 100, counted: Any = lambda unit, rows: None
) -> pa.Table:
    """All that a reader gives, as one table, after a check of the types."""
    columns = {name: type_of(annotation) for name, annotation in wanted.items()}
    parts = list(read(source, todo, columns, block_rows=block_rows, counted=counted))
    for part in parts:
        assert 0 < part.num_rows <= block_rows and part.column_names == [*wanted, *HIDDEN]
        assert len(set(part[UNIT].to_pylist())) == 1
        for name, column in columns.items():
            assert part.schema.field(name).type == (source.schema.field(name).type if column.kind == "any" else column.arrow)
    return pa.concat_tables(parts) if parts else pa.table({name: [] for name in (*wanted, *HIDDEN)})


def read_all(source: Source, wanted: dict[str, Any], **options: Any) -> pa.Table:
    """All rows of all units."""
    return pa.concat_tables([given(source, [(unit, ALL)], wanted, **options) for unit in source.units], promote_options="permissive")


def faults(data: pa.Table) -> dict[int, str]:
    """The messages of the faults, by row."""
    found = {row: Fault.from_json(text) for row, text in zip(data[ROW].to_pylist(), data[FAULT].to_pylist(), strict=True) if text}
    assert all((fault.stage, fault.error, fault.attempts) == ("input", "SourceError", 1) for fault in found.values())
    return {row: fault.message for row, fault in found.items()}


def one_group(path: Path, rows: int = 20) -> Path:
    """A file of one row group with the column n: 0, 1, 2, ..."""
    pq.write_table(pa.table({"n": range(rows), "even": [n % 2 == 0 for n in range(rows)]}), path)
    return path


TODO: list[tuple[list[list[Gap]], list[int]]] = [
    ([ALL, ALL, ALL], list(range(20))),
    ([[(0, 8)], [(8, 16)], [(16, 20)]], list(range(20))),
    ([[(3, 5), (7, 8)], [(9, 10)], []], [3, 4, 7, 9]),
    ([[], [(15, None)], [(18, None)]], [15, 18, 19]),
    ([[], [], []], []),
    ([[(0, 1)], [], [(19, 20)]], [0, 19]),
    ([[(n, n + 1) for n in range(0, 8, 2)], [], []], [0, 2, 4, 6]),
]


@pytest.mark.parametrize("block_rows", [1, 3, 8, 100])
@pytest.mark.parametrize(("gaps", "expected"), TODO)
def test_exactly_the_rows_that_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gaps: list[list[Gap]], expected: list[int], block_rows: int) -> None:
    """Ranges of one row group, each with gaps of its own, in one scan; a row's number is its place in the row group."""
    monkeypatch.setattr(sources, "UNIT_ROWS", 8)
    source = opened(one_group(tmp_path / "a.parquet"), {"n": int})
    assert [unit.stop for unit in source.units] == [8, 16, 20]
    data = given(source, list(zip(source.units, gaps, strict=True)), {"n": int}, block_rows=block_rows)
    assert data["n"].to_pylist() == data[ROW].to_pylist() == expected
    assert data[UNIT].to_pylist() == [source.units[n // 8].id for n in expected]
    for unit, missing in zip(source.units, gaps, strict=True):  # and the same one by one
        alone = given(source, [(unit, missing)], {"n": int}, block_rows=block_rows)
        assert alone[ROW].to_pylist() == [n for n in expected if n // 8 == unit.id]


def test_a_row_group_is_decoded_once_and_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many units it has; and a batch that has nothing due is not looked at."""
    monkeypatch.setattr(sources, "UNIT_ROWS", 8)
    source = opened(one_group(tmp_path / "a.parquet"), {"n": int})
    opens, decoded, conformed = [], [], []

    class File(pq.ParquetFile):
        def iter_batches(self, *args: Any, **options: Any) -> Any:
            opens.append(1)
            for batch in super().iter_batches(*args, **options):
                decoded.append(batch.num_rows)
                yield batch

    conform = readers._conformed
    monkeypatch.setattr(pq, "ParquetFile", File)
    monkeypatch.setattr(readers, "_conformed", lambda array, *rest: conformed.append(len(array)) or conform(array, *rest))
    given(source, [(source.units[0], [(6, 7)]), (source.units[1], [(9, 10)])], {"n": int}, block_rows=2)
    assert (len(opens), sum(decoded), conformed) == (1, 10, [1, 1])
    given(source, [(unit, []) for unit in source.units], {"n": int})
    assert len(opens) == 1


def test_a_unit_of_unknown_rows_is_counted(tmp_path: Path) -> None:
    """Behind a filter rows are numbered as it leaves them, and the end is told of, also when nothing of it is due."""
    source = opened(one_group(tmp_path / "a.parquet", 21), {"n": int}, where="even")
    (unit,) = source.units
    for gaps, expected in (([(0, None)], list(range(0, 21, 2))), ([(2, 4), (9, None)], [4, 6, 18, 20]), ([(1, 2)], [2]), ([], []), ([(50, None)], [])):
        for block_rows in (1, 4, 100):
            ends: list[tuple[int, int]] = []
            data = given(source, [(unit, gaps)], {"n": int}, block_rows=block_rows, counted=lambda unit, rows, ends=ends: ends.append((unit, rows)))
            assert data["n"].to_pylist() == expected and data[ROW].to_pylist() == [n // 2 for n in expected]
            assert ends == [(unit.id, 11)]


def test_the_end_is_told_of_after_the_last_row(tmp_path: Path) -> None:
    """Nobody who stops early is told a count."""
    (tmp_path / "a.csv").write_text("n\n1\n2\n3\n")
    source = opened(tmp_path, {"n": int})
    ends: list[int] = []
    parts = read(source, [(source.units[0], ALL)], {"n": type_of(int)}, block_rows=1, counted=lambda unit, rows: ends.append(rows))
    for _ in range(3):
        next(parts)
        assert ends == []
    assert list(parts) == [] and ends == [3]


def test_a_limit_and_gaps(tmp_path: Path) -> None:
    """A unit that a limit has cut has an end."""
    source = opened(one_group(tmp_path / "a.parquet"), {"n": int}, limit=7)
    assert given(source, [(source.units[0], [(5, None)])], {"n": int})[ROW].to_pylist() == [5, 6]
    filtered = opened(tmp_path / "a.parquet", {"n": int}, where="even", limit=7)
    assert given(filtered, [(filtered.units[0], [(5, None)])], {"n": int}, counted=lambda *told: pytest.fail("counted"))["n"].to_pylist() == [10, 12]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
@pytest.mark.parametrize("where", [None, "n >= 10"])
def test_gaps_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str | None) -> None:
    """A file is parsed from its start; what is not due is left out."""
    monkeypatch.setattr(texts, "_STREAM_BYTES", 64)
    content = ("n\n" if "csv" in kind else "") + "".join(f"{n}\n" if "csv" in kind else f'{{"n": {n}}}\n' for n in range(50))
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(content.encode()) if kind.endswith("gz") else content.encode())
    source, ends = opened(tmp_path, {"n": int}, where=where), []
    data = given(source, [(source.units[0], [(3, 6), (20, 21), (38, None)])], {"n": int}, block_rows=5, counted=lambda unit, rows: ends.append(rows))
    before = 10 if where else 0
    assert data[ROW].to_pylist() == [3, 4, 5, 20, *range(38, 50 - before)] and ends == [50 - before]
    assert data["n"].to_pylist() == [row + before for row in data[ROW].to_pylist()]


def test_images_that_are_not_due_are_not_opened(tmp_path: Path) -> None:
    """Only a filter has to look at those before."""
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(b"%d" % n)
    source = opened(tmp_path, {"image": hr.Image})
    opened_: list[str] = []
    image = readers._image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_image", lambda source, path: opened_.append(path[-5]) or image(source, path))
        data = given(source, [(source.units[0], [(1, 2), (4, 5)])], {"image": hr.Image, "path": str})
        assert data["image"].to_pylist() == [b"1", b"4"] and opened_ == ["1", "4"]
        given(source, [(source.units[0], [(1, 3)])], {"path": str})
        assert opened_ == ["1", "4"]
    filtered = opened(tmp_path, {"image": hr.Image}, where=f"path > '{tmp_path}/1.png'")
    assert given(filtered, [(filtered.units[0], [(1, 2)])], {"image": hr.Image})["image"].to_pylist() == [b"3"]


def test_a_large_row_group_is_streamed(tmp_path: Path) -> None:
    """What Arrow holds while a row group is read does not grow with the row group."""
    held = {}
    for megabytes in (4, 32):
        path = tmp_path / f"{megabytes}.parquet"
        blob = np.random.default_rng(0).integers(0, 255, (megabytes * 1024, 1024), np.uint8)
        pq.write_table(pa.table({"b": [row.tobytes() for row in blob]}), path, compression="none", use_dictionary=False)
        source = open_source(Input(str(path)))
        (unit,) = source.units
        pool = pa.default_memory_pool()
        pool.release_unused()
        before, most = pool.bytes_allocated(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "_PREFETCH_BYTES", 0)
            for _ in read(source, [(unit, ALL)], {"b": type_of(bytes)}, block_rows=1024):
                most = max(most, pool.bytes_allocated() - before)
        held[megabytes] = most
    assert held[32] < 2 * held[4] + (8 << 20)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_is_cut_into_blocks(tmp_path: Path, kind: str) -> None:
    """A parsed piece of a text file is cut down to the rows of a block."""
    head, line = ("a\n", "{}\n") if kind == "csv" else ("", '{{"a": {}}}\n')
    (tmp_path / f"x.{kind}").write_text(head + "".join(line.format(n) for n in range(1000)))
    source = open_source(Input(str(tmp_path)))
    sizes = [part.num_rows for part in read(source, [(source.units[0], ALL)], {"a": type_of(int)}, block_rows=300)]
    assert sum(sizes) == 1000 and max(sizes) == 300


@pytest.mark.parametrize("block_bytes", [64, 100, 1000, 4096])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_growing_blocks_lose_and_double_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, kind: str) -> None:
    """However often the parser has to start again with larger blocks, or for bad rows, each row comes once, in order."""
    monkeypatch.setattr(texts, "_STREAM_BYTES", block_bytes)
    cells = [f"{n} " + "x" * (n * n % 5000) for n in range(200)]
    lines = [f"{n},{cell}" if kind == "csv" else json.dumps({"n": n, "a": cell}) for n, cell in enumerate(cells)]
    for row, bad in ((70, "70" if kind == "csv" else "oops"), (120, "?,x" if kind == "csv" else '{"n": "?", "a": "x"}')):
        lines[row] = bad
    (tmp_path / f"x.{kind}").write_text("n,a\n" * (kind == "csv") + "\n".join(lines) + "\n")
    source = opened(tmp_path, {"n": hr.Column, "a": str})
    source = replace(source, schema=pa.schema([("n", pa.int64()), ("a", pa.string())]))
    data = given(source, [(source.units[0], ALL)], {"n": int, "a": str}, block_rows=7)
    good = [n for n in range(200) if n not in (70, 120)]
    assert data[ROW].to_pylist() == list(range(200)) and list(faults(data)) == [70, 120]
    assert data["a"].take(good).to_pylist() == [cells[n] for n in good] and data["n"].take(good).to_pylist() == good


@pytest.mark.parametrize(
    ("name", "content", "annotation", "bad"),
    [
        ("x.csv", "a\n1\nx\n3\n", int, {1: r"x\.csv', row 1: column 'a' does not fit int: CSV conversion error to int64: invalid value 'x'$"}),
        ("x.csv", "a,b\n1,2\n3\n5,6\n", int, {1: r"x\.csv', row 1: Expected 2 columns, got 1: 3$"}),
        ("x.csv", "a,b\n3\n\n1,2\n5\n6\n", int, {0: "got 1: 3", 2: "got 1: 5", 3: "got 1: 6"}),
        ("x.csv", "a,b\n1,2\n3,4,5\nx,6\n7\n", int, {1: "got 3", 2: "invalid value 'x'", 3: "got 1"}),
        ("x.csv", "a\n*\nAA==\n", bytes, {0: r"x\.csv', row 0: column 'a' does not fit bytes: "}),
        ("x.csv", "a\n1\n\n2\n", int, {}),  # a blank line is no row
        ("x.csv", "a,b\n1,x\n,y\n2,z\n", int, {1: "column 'a' does not fit int: a null; declare int | None"}),
        ("x.jsonl", '{"a": 1}\n{"a": null}\n', int, {1: r"x\.jsonl', row 1: column 'a' does not fit int: a null; declare int \| None"}),
        ("x.jsonl", '{"a": 1}\n\n{"a": "x"}\n{"a": 2}\n', int, {1: "column 'a' does not fit int: JSON parse error: .*changed from number to string$"}),
        ("x.jsonl", '{"a": 1}\n{"a": 2.5}\n', int, {1: "column 'a' does not fit int: "}),
        ("x.jsonl", '{"a": 1}\ngarbage\n{"a": 2}\n[3]\nnull\n{"a": 4, "b"', int, {1: "not a JSON object: Expecting", 3: "not a JSON obj", 4: "not", 5: "not"}),
        ("x.jsonl", '{"a": [1, 2]}\n{"a": [1]}\n', hr.Vector(2), {1: r"x\.jsonl', row 1: column 'a' does not fit Vector\(2\)"}),
        ("x.jsonl", '{"a": ["x"]}\n{"a": [null]}\n', list[str], {1: r"does not fit list\[str\]: 1 nulls, the first in list item 0"}),
    ],
)
def test_a_bad_value_is_a_fault_of_its_row(tmp_path: Path, name: str, content: str, annotation: Any, bad: dict[int, str]) -> None:
    """The message names file, row, column and type; every other row is there, and so is a null in place of the value."""
    (tmp_path / name).write_text(content)
    source = opened(tmp_path, {"a": hr.Column if annotation is int else annotation})
    if annotation is int:  # as if the first rows had been numbers, which these few lines do not show
        source = replace(source, schema=pa.schema([("a", pa.int64())]))
    for block_rows in (1, 100):
        data = given(source, [(source.units[0], ALL)], {"a": annotation}, block_rows=block_rows)
        assert data[ROW].to_pylist() == list(range(data.num_rows)) and data.num_rows == len(content.replace("\n\n", "\n").strip().split("\n")) - ("csv" in name)
        found = faults(data)
        assert list(found) == list(bad) and all(re.search(bad[row], found[row]) for row in bad), found
        assert [row for row, value in enumerate(data["a"].to_pylist()) if value is None] == list(bad)


def test_a_bad_value_in_parquet_is_a_fault_of_its_row(tmp_path: Path) -> None:
    """Nulls, vectors of another length, numbers out of range: those rows, and no other."""
    n = 1000
    vectors: list[Any] = [[float(i), 1.0] for i in range(n)]
    vectors[5], vectors[700] = [1.0], [1.0, None]
    big = pa.array([2**63 if i == 17 else i for i in range(n)], pa.uint64())
    pq.write_table(pa.table({"text": [None if i % 100 == 3 else f"t{i}" for i in range(n)], "v": vectors, "big": big}), tmp_path / "a.parquet")
    wanted = {"text": str, "v": hr.Vector(2), "big": int}
    source = opened(tmp_path, dict.fromkeys(wanted, hr.Column))
    data = given(source, [(source.units[0], [(2, 900)])], wanted, block_rows=64)
    assert sorted(faults(data)) == sorted([*range(3, 900, 100), 5, 17, 700])
    assert re.search(r"a\.parquet', row group 0, row 17: column 'big' does not fit int: .*9223372036854775808", faults(data)[17])
    assert data["v"].null_count == 2 and data["big"].null_count == 1 and data["text"].null_count == 9
    good = [row for row in range(2, 900) if row not in faults(data)]
    assert data["text"].take([row - 2 for row in good]).to_pylist() == [f"t{row}" for row in good]
    assert spans(data) == {source.units[0].id: [(2, 900)]}


def test_text_that_is_not_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are a fault of their row in every format, wherever the parser notices."""
    bad = b"\xff\xfe"
    (tmp_path / "a.csv").write_bytes(b"n,a\n1,x\n2," + bad + b"\n3,\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1, "a": "x"}\n{"n": 2, "a": "' + bad + b'"}\n{"n": 3, "a": ""}\n')
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 3, 3], np.int32).tobytes()), pa.py_buffer(b"x" + bad))
    pq.write_table(pa.table({"n": [1, 2, 3], "a": broken}), tmp_path / "a.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        data = read_all(opened(tmp_path / f"a.{kind}", {"n": int, "a": str}), {"n": int, "a": str})
        assert list(faults(data)) == [1] and data["a"].to_pylist() == ["x", None, ""] and data["n"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_filter_does_not_drop_a_row_that_it_cannot_judge(tmp_path: Path, kind: str) -> None:
    """A row whose value for the filter cannot be read is kept, as a fault; one that the filter drops may be bad elsewhere."""
    lines = (
        ["1,1", "?,2", "3,?", "9,4", "9,?", "9"]
        if kind == "csv"
        else [f'{{"n": {n}, "a": {a}}}' for n, a in ((1, 1), ('"?"', 2), (3, '"?"'), (9, 4), (9, '"?"'))]
    )
    lines += [] if kind == "csv" else ["{"]
    (tmp_path / f"x.{kind}").write_text("\n".join(["n,a"] * (kind == "csv") + lines) + "\n")
    schema = pa.schema([("n", pa.int64()), ("a", pa.int64())])
    source = replace(open_source(Input(str(tmp_path))), schema=schema)
    source = select(source, {"a": type_of(int)}, pipeline="p", where="n > 5")
    data = given(source, [(source.units[0], ALL)], {"a": int})
    assert data["a"].to_pylist() == [2, 4, None, None] and list(faults(data)) == [0, 2, 3]
    assert given(source, [(source.units[0], [(1, 3)])], {"a": int}, block_rows=1)[ROW].to_pylist() == [1, 2]


CELLS: list[tuple[pa.DataType, list[str], str]] = [
    (pa.int64(), ["1", " 2", "3 ", "-0", "007", "0x1F", "9223372036854775807", '"4"', '" 5"', "", '""'], "1.0"),
    (pa.float64(), ["1", " 1.5 ", "+2", "nan", "-inf", "1e400", "1e-400", "0.1", ".5", "1.", "", '"0.30000000000000004"'], "x"),
    (pa.float32(), ["0.1", "16777217", "1e39"], "x"),
    (pa.bool_(), ["true", "True", "TRUE", "1", "0", "false", ""], "tRuE"),
    (pa.date32(), ["2020-01-02", " 2020-01-02", ""], "2020-1-2"),
    (pa.timestamp("us"), ["2020-01-02", "2020-01-02T03:04", "2020-01-02 03:04:05.123456", ""], "2020-01-02T03:04:05Z"),
    (pa.timestamp("us", "UTC"), ["2020-01-02T03:04:05Z", "2020-01-02 03:04:05.5+02:00", ""], "2020-01-02"),
    (pa.time32("s"), ["03:04:05", " 03:04", ""], "25:00"),
    (pa.string(), ["x", " y ", '"a ""b"", c"', '"two\nlines"', "NA", ""], "\udcff"),
]


@pytest.mark.parametrize(("kind", "cells", "bad"), CELLS, ids=[str(kind) for kind, _, _ in CELLS])
def test_csv_cells_read_the_same_beside_a_bad_one(tmp_path: Path, kind: pa.DataType, cells: list[str], bad: str) -> None:
    """The second parse of a file, for a cell that does not convert, gives exactly the values of the first."""
    values = []
    for name, extra in (("good", []), ("bad", [bad])):
        text = "a,b\n" + "".join(f"{cell},x\n" for cell in [*cells, *extra])
        (tmp_path / f"{name}.csv").write_bytes(text.encode(errors="surrogateescape"))
        source = replace(open_source(Input(str(tmp_path / f"{name}.csv"))), schema=pa.schema([("a", kind)]))
        values.append(read_all(source, {"a": hr.Column}))
    assert list(faults(values[1])) == [len(cells)] and not faults(values[0])
    one, other = values[0]["a"].to_pylist(), values[1]["a"].slice(0, len(cells)).to_pylist()
    assert all(a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True)), (one, other)
    assert values[1]["a"][-1].as_py() is None


def test_instants_and_empty_cells_beside_a_bad_one(tmp_path: Path) -> None:
    """What is declared counts in the second parse as in the first."""
    (tmp_path / "a.csv").write_text("n,t,s,o,d\n1,2020-01-02T03:04:05,,,2020-01-02\n2,2021-01-02T03:04:05,x,y,2021-01-02\n?,2021-01-02T03:04:05,,,2021-01-02\n")
    wanted = {"t": dt.datetime, "s": str, "o": str | None, "d": dt.date}
    source = opened(tmp_path, {**wanted, "n": hr.Column})
    source = replace(source, schema=source.schema.set(0, pa.field("n", pa.int64())))
    (good, bad) = (read_all(source, more).slice(0, 2).select(list(wanted)) for more in (wanted, {**wanted, "n": int}))
    assert good.equals(bad) and good["s"].to_pylist() == ["", "x"] and good["o"].to_pylist() == [None, "y"]


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    """A truncated gzip file gives rows of its start (Arrow reads ahead, and drops what it has when that fails), then an error of the source."""
    path = tmp_path / "x.csv.gz"
    path.write_bytes(whole := gzip.compress(b"a\n" + b"\n".join(b"%d" % n for n in range(600_000)), compresslevel=1))
    source = open_source(Input(str(tmp_path)))
    stat = os.stat(path)
    path.write_bytes(whole[: len(whole) * 9 // 10])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows = 0
    with pytest.raises(SourceError, match=r"cannot read '.*x\.csv\.gz'"):
        for part in read(source, [(source.units[0], ALL)], {"a": type_of(int)}, block_rows=100_000, counted=lambda *told: pytest.fail("counted")):
            assert part["a"].to_pylist() == list(range(rows, rows + part.num_rows))
            rows += part.num_rows


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path, seed: int) -> None:
    """An error that names the file, never a crash or a wrong value."""
    path = tmp_path / "a.parquet"
    data = pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 5000), "t": [f"text {n}" for n in range(5000)]})
    pq.write_table(data, path, write_page_checksum=True, compression="zstd")
    source = opened(path, {"n": int, "t": str})
    content = bytearray(path.read_bytes())
    stat = os.stat(path)
    content[np.random.default_rng(seed).integers(50, int(len(content) * 0.9))] ^= 1 << (seed % 8)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match=r"cannot read '.*a\.parquet'"):
        read_all(source, {"n": int, "t": str}, block_rows=512)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    """Its rows are not the ones that were counted and numbered."""
    path = one_group(tmp_path / "a.parquet")
    source = opened(path, {"n": int})
    assert given(source, [(source.units[0], ALL)], {"n": int}).num_rows == 20
    unknown = [replace(source.units[0], modified_ns=0)]
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match=r"cannot read '.*a\.parquet': it changed while the run was reading it"):
        given(source, [(source.units[0], ALL)], {"n": int})
    assert given(source, [(unknown[0], ALL)], {"n": int}).num_rows == 20
    one_group(path, 30)
    with pytest.raises(SourceError, match="changed while the run was reading it"):
        given(source, [(unknown[0], ALL)], {"n": int})
    path.unlink()
    with pytest.raises(SourceError, match=r"cannot read '.*a\.parquet': .*No such file"):
        given(source, [(source.units[0], ALL)], {"n": int})


def test_changed_images_are_refused(tmp_path: Path) -> None:
    """A unit of many files is that of all of them."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    source = opened(tmp_path, {"image": hr.Image})
    (tmp_path / "b.png").write_bytes(b"longer")
    with pytest.raises(SourceError, match=r"cannot read '.*a\.png' to '.*b\.png': one of them changed"):
        given(source, [(source.units[0], ALL)], {"image": hr.Image})


def test_fewer_rows_than_promised_are_an_error(tmp_path: Path) -> None:
    """A unit cut by a limit whose file has lost rows, without a trace in its size or time."""
    (tmp_path / "a.csv").write_text("a\n1\n2\n")
    source = opened(tmp_path, {"a": int})
    unit = replace(source.units[0], rows=5)
    with pytest.raises(SourceError, match=r"cannot read '.*a\.csv': it ends after 2 rows, where 5 were promised"):
        given(source, [(unit, ALL)], {"a": int})
    assert given(source, [(unit, [(0, 2)])], {"a": int}).num_rows == 2


def test_a_column_of_nothing_but_bad_values_is_still_quick(tmp_path: Path) -> None:
    """Bisecting costs a few calls per row, no more."""
    (tmp_path / "a.csv").write_text("a\n" + "x\n" * 2000)
    source = replace(open_source(Input(str(tmp_path))), schema=pa.schema([("a", pa.int64())]))
    assert len(faults(read_all(source, {"a": int}))) == 2000
