"""Sources: what is found, what is refused, how it is cut into units, and what a run then reads."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace import sources, texts
from headrace.columns import type_of
from headrace.errors import SourceError
from headrace.formats import Input
from headrace.lineage import FAULT, HIDDEN, Fault
from headrace.readers import read
from headrace.sources import open_source, select


def rows_of(source: Any, wanted: dict[str, Any], *, block_rows: int = 100) -> list[dict[str, Any]]:
    """All rows of all units, as a run would read them."""
    columns = {name: type_of(annotation) for name, annotation in wanted.items()}
    parts = [part for unit in source.units for part in read(source, [(unit, [(0, None)])], columns, block_rows=block_rows)]
    assert not [fault for part in parts for fault in part[FAULT].to_pylist() if fault]
    return [row for part in parts for row in part.select(list(columns)).to_pylist()]


def taken(input: Any, wanted: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Open, select and read `input`."""
    columns = {name: type_of(annotation) for name, annotation in wanted.items()}
    source = select(open_source(input if isinstance(input, Input) else Input(str(input))), columns, pipeline="p", **options)
    return rows_of(source, wanted)


def numbers(folder: Path, *, files: int = 3, rows: int = 40, group: int = 10) -> Path:
    """Parquet files with columns n (0, 1, 2, ... over all files), even and text, in row groups of `group` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        n = np.arange(file * rows, (file + 1) * rows)
        pq.write_table(pa.table({"n": n, "even": n % 2 == 0, "text": [f"t{i}" for i in n]}), folder / f"{file}.parquet", row_group_size=group)
    return folder


def test_parquet_is_cut_by_row_group(tmp_path: Path) -> None:
    """Every row group is a unit that knows its rows, and the rows come in order of path and position."""
    source = open_source(Input(str(numbers(tmp_path))))
    assert (len(source.units), source.rows, source.format) == (12, 120, "parquet")
    assert [row["n"] for row in rows_of(source, {"n": int})] == list(range(120))


def test_blocks_are_bounded_and_have_only_the_columns_wanted(tmp_path: Path) -> None:
    """No table that a reader gives has more rows than asked for, or other columns."""
    source = open_source(Input(str(numbers(tmp_path))))
    parts = list(read(source, [(source.units[0], [(0, None)])], {"text": type_of(str)}, block_rows=3))
    assert [part.num_rows for part in parts] == [3, 3, 3, 1]
    assert {tuple(part.column_names) for part in parts} == {("text", *HIDDEN)}


@pytest.mark.parametrize(
    ("where", "units", "first"),
    [
        ("n >= 100", 2, 100),
        ("n == 55", 1, 55),
        ("n in (3, 115)", 2, 3),
        ("40 <= n < 60", 2, 40),
        ("n < 5 or n > 117", 2, 0),
        ("not n < 110", 1, 110),
        ("even and n > 80", 4, 82),
        ("text == 't7'", None, 7),
        ("n == 1.5 or n == 9", 1, 9),
    ],
)
def test_where_prunes_row_groups_and_filters_rows(tmp_path: Path, where: str, units: int | None, first: int) -> None:
    """Row groups that the statistics rule out are never read; in the others the rows are filtered."""
    source = select(open_source(Input(str(numbers(tmp_path)))), {"n": type_of(int)}, pipeline="p", where=where)
    assert units is None or len(source.units) == units
    assert source.rows is None
    found = [row["n"] for row in rows_of(source, {"n": int})]
    expected = [n for n in range(120) if eval(where, {"n": n, "even": n % 2 == 0, "text": f"t{n}"})]
    assert found == expected and found[0] == first


@pytest.mark.parametrize("limit", [1, 10, 11, 39, 40, 41, 119, 120, 1000])
def test_limit_is_exact(tmp_path: Path, limit: int) -> None:
    """A limit gives the first rows, cut in the middle of a row group where need be, and the source knows how many."""
    source = select(open_source(Input(str(numbers(tmp_path)))), {"n": type_of(int)}, pipeline="p", limit=limit)
    assert [row["n"] for row in rows_of(source, {"n": int}, block_rows=4)] == list(range(min(limit, 120)))
    assert source.rows == min(limit, 120)


@pytest.mark.parametrize("limit", [1, 7, 20, 21, 60, 500])
def test_limit_counts_behind_a_filter(tmp_path: Path, limit: int) -> None:
    """Behind a filter the limit counts the rows that are left."""
    source = select(open_source(Input(str(numbers(tmp_path)))), {"n": type_of(int)}, pipeline="p", where="even", limit=limit)
    assert [row["n"] for row in rows_of(source, {"n": int})] == list(range(0, 120, 2))[:limit]
    assert source.rows == min(limit, 60)


def text_files(folder: Path, kind: str, rows: list[dict[str, Any]], *, per_file: int = 5) -> Path:
    """The rows as several CSV, TSV or JSON Lines files, compressed if `kind` ends in .gz."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(rows), per_file):
        part = rows[start : start + per_file]
        if "json" in kind:
            content = "".join(json.dumps(row) + "\n" for row in part)
        else:
            sep = "\t" if "tsv" in kind else ","
            content = sep.join(part[0]) + "\n" + "".join(sep.join(str(value) for value in row.values()) + "\n" for row in part)
        data = content.encode()
        (folder / f"{start:04}.{kind}").write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "csv.gz", "tsv.gz", "jsonl.gz", "ndjson", "CSV"])
def test_text_formats(tmp_path: Path, kind: str) -> None:
    """CSV, TSV and JSON Lines, plain or compressed: all rows, a filter, an exact limit, and both."""
    rows = [{"n": n, "text": f"t{n}"} for n in range(18)]
    folder = text_files(tmp_path / "in", kind, rows)
    wanted = {"n": int, "text": str}
    assert taken(folder, wanted) == rows
    assert taken(folder, wanted, where="n >= 7") == rows[7:]
    assert taken(folder, wanted, limit=7) == rows[:7]
    assert taken(folder, wanted, where="n > 3", limit=7) == rows[4:11]


def write(path: Path, content: str | bytes) -> Path:
    """A file with `content`."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


CSV_CELLS: list[tuple[str, str, Any, list[Any]]] = [
    ("leading zeros of text", "a\n007\n010\n", str, ["007", "010"]),
    ("leading zeros that nobody declared", "a\n007\n010\n", hr.Column, ["007", "010"]),
    ("ids beyond 64 bits that nobody declared", "a\n12345678901234567890\n", hr.Column, ["12345678901234567890"]),
    ("quoted newlines, commas and quotes", 'a,b\n"x\ny, ""z""",1\n', str, ['x\ny, "z"']),
    ("an empty cell is an empty text", "a,b\n,1\nx,2\n", str, ["", "x"]),
    ("or a null where one may be", "a,b\n,1\nx,2\n", str | None, [None, "x"]),
    ("words that other readers take for null", "a\nNA\nnull\nnan\n", str, ["NA", "null", "nan"]),
    ("the same where nobody declared them", "a\nNA\nnull\nx\n", hr.Column, ["NA", "null", "x"]),
    ("a fraction after whole numbers", "a\n1\n2.5\n", float, [1.0, 2.5]),
    ("whole numbers as fractions", "a\n1\n2\n", float, [1.0, 2.0]),
    ("numbers with gaps", "a,b\n1,x\n,y\n", int | None, [1, None]),
    ("truth", "a\ntrue\nfalse\n", bool, [True, False]),
    ("a date", "a\n2020-01-02\n", dt.date, [dt.date(2020, 1, 2)]),
    ("an instant without a zone is in UTC", "a\n2020-01-02T03:04:05\n", dt.datetime, [dt.datetime(2020, 1, 2, 3, 4, 5, tzinfo=dt.UTC)]),
    ("an instant with one", "a\n2020-01-02T03:04:05Z\n", dt.datetime, [dt.datetime(2020, 1, 2, 3, 4, 5, tzinfo=dt.UTC)]),
    ("bytes as base64", "a\nAAEC\n", bytes, [b"\x00\x01\x02"]),
    ("no cell at all, kept", "a,b\n,1\n,2\n", hr.Column, [None, None]),
    ("CRLF", "a,b\r\nx,1\r\ny,2\r\n", str, ["x", "y"]),
    ("a byte order mark", "\ufeffa\nx\n", str, ["x"]),
]


@pytest.mark.parametrize(("content", "annotation", "expected"), [case[1:] for case in CSV_CELLS], ids=[case[0] for case in CSV_CELLS])
def test_csv_cells(tmp_path: Path, content: str, annotation: Any, expected: list[Any]) -> None:
    """What a CSV cell becomes, as it is declared."""
    assert [row["a"] for row in taken(write(tmp_path / "x.csv", content), {"a": annotation})] == expected


JSON_VALUES: list[tuple[str, list[Any], Any, list[Any]]] = [
    ("text that looks like a number", ["007"], str, ["007"]),
    ("text that looks like an instant", ["2020-01-02"], str, ["2020-01-02"]),
    ("a fraction after whole numbers", [1, 2.5], float, [1.0, 2.5]),
    ("null", [None, 3], int | None, [None, 3]),
    ("a field that is missing", [None, "x"], str | None, [None, "x"]),
    ("vectors", [[1, 2], [0.5, 3]], hr.Vector(2), [[1.0, 2.0], [0.5, 3.0]]),
    ("ragged vectors", [[], [1], [1, 2]], hr.Vector(), [[], [1.0], [1.0, 2.0]]),
    ("lists of text", [["a"], [], ["2020-01-02"]], list[str], [["a"], [], ["2020-01-02"]]),
    ("an instant", ["2020-01-02T03:04:05"], dt.datetime, [dt.datetime(2020, 1, 2, 3, 4, 5, tzinfo=dt.UTC)]),
    ("bytes as base64", ["AAEC"], bytes, [b"\x00\x01\x02"]),
    ("an object, kept", [{"x": 1, "y": "z"}], hr.Column, [{"x": 1, "y": "z"}]),
    ("characters beyond ASCII", ["ü€😀"], str, ["ü€😀"]),
]


@pytest.mark.parametrize(("values", "annotation", "expected"), [case[1:] for case in JSON_VALUES], ids=[case[0] for case in JSON_VALUES])
def test_json_values(tmp_path: Path, values: list[Any], annotation: Any, expected: list[Any]) -> None:
    """What a JSON value becomes, as it is declared."""
    path = write(tmp_path / "x.jsonl", "".join(json.dumps({"a": value, "b": 1}) + "\n" for value in values))
    assert [row["a"] for row in taken(path, {"a": annotation})] == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_longer_than_a_block_of_the_parser(tmp_path: Path, kind: str) -> None:
    """A line of more than 4 MB, with short ones around it, is read; no row is lost or doubled."""
    texts = [f"short {i}" for i in range(3000)]
    texts[1500] = "x" * 9_000_000
    rows = [{"n": n, "text": text} for n, text in enumerate(texts)]
    folder = text_files(tmp_path / "in", kind, rows, per_file=len(rows))
    found = taken(folder, {"n": int, "text": str})
    assert [row["n"] for row in found] == list(range(3000)) and [row["text"] for row in found] == texts


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_too_long_for_any_block_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest block that is tried is the largest that the parser can hold; then the file is named."""
    monkeypatch.setattr(texts, "_STREAM_BYTES", 1 << 10)
    monkeypatch.setattr(texts, "_LONGEST_LINE_BYTES", 1 << 14)
    folder = text_files(tmp_path / "in", kind, [{"text": "a"}, {"text": "x" * 100_000}])
    with pytest.raises(SourceError, match=rf"cannot read '.*0000\.{kind}'.*straddl"):
        taken(folder, {"text": str})


@pytest.mark.parametrize(("kind", "head"), [("csv", "text\n"), ("jsonl", "")])
def test_empty_text_files_give_no_rows(tmp_path: Path, kind: str, head: str) -> None:
    """Files of no bytes, or of a header alone, lie beside others without harm; alone they are refused."""
    folder = text_files(tmp_path / "in", kind, [{"text": "a"}])
    write(folder / f"00000.{kind}", "")
    write(folder / f"00001.{kind}", head)
    assert taken(folder, {"text": str}) == [{"text": "a"}]
    (folder / f"0000.{kind}").unlink()
    with pytest.raises(SourceError, match="no rows: '.*00000.* and 1 more files"):
        open_source(Input(str(folder)))


def test_empty_parquet_files_give_no_units(tmp_path: Path) -> None:
    """A Parquet file without rows is no work; an input of nothing else is refused."""
    empty = pa.table({"n": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "0.parquet")
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "1.parquet")
    assert taken(tmp_path, {"n": int}) == [{"n": 1}, {"n": 2}]
    with pytest.raises(SourceError, match="the input has no rows"):
        taken(tmp_path / "0.parquet", {"n": int})


def test_images(tmp_path: Path) -> None:
    """A folder of images has the columns path and image, and a filter on the path."""
    for name in ("a.png", "b.jpg", "c/d.JPEG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name.encode())
    found = taken(tmp_path, {"path": str, "image": hr.Image})
    assert [(Path(row["path"]).name, row["image"]) for row in found] == [("a.png", b"a.png"), ("b.jpg", b"b.jpg"), ("d.JPEG", b"c/d.JPEG")]
    assert len(taken(tmp_path, {"image": hr.Image}, where=f"path != '{tmp_path}/a.png'")) == 2
    assert open_source(Input(str(tmp_path))).rows == 3


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Of a unit of many images only the one that failed is lost, and its fault names it."""
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / name, name.encode())
    source = open_source(Input(str(tmp_path)))
    (tmp_path / "b.png").unlink()
    parts = list(read(source, [(source.units[0], [(0, None)])], {"image": type_of(hr.Image)}, block_rows=10))
    assert [part["image"][0].as_py() for part in parts] == [b"a.png", None, b"c.png"]
    assert [part[FAULT].null_count for part in parts] == [1, 0, 1]
    assert re.search(r"row 1: cannot read '.*b\.png'", Fault.from_json(parts[1][FAULT][0].as_py()).message)


def kept_types() -> pa.Table:
    """A table of columns that headrace has no exact name for, and of nulls."""
    return pa.table(
        {
            "narrow": pa.array([1, None], pa.int8()),
            "hash": pa.array([2**64 - 1, 0], pa.uint64()),
            "price": pa.array([None, 1], pa.decimal128(8, 2)),
            "ns": pa.array([1_000_000_001, None], pa.timestamp("ns")),
            "single": pa.array([0.1, None], pa.float32()),
            "tags": pa.array([["a", None], None], pa.list_(pa.string())),
            "holes": pa.array([[1.0, None], None], pa.list_(pa.float32())),
            "struct": pa.array([{"x": 1}, None], pa.struct([("x", pa.int16())])),
            "nothing": pa.nulls(2),
        }
    )


def test_kept_columns_are_carried_as_they_are(tmp_path: Path) -> None:
    """A column that is only kept comes through with its own type, its nulls and all its digits."""
    data = kept_types()
    pq.write_table(data, tmp_path / "x.parquet")
    source = select(open_source(Input(str(tmp_path))), dict.fromkeys(data.column_names, type_of(hr.Column)), pipeline="p")
    (part,) = read(source, [(source.units[0], [(0, None)])], dict.fromkeys(data.column_names, type_of(hr.Column)), block_rows=10)
    part = part.drop_columns(list(HIDDEN))
    assert part.schema.equals(data.schema) and part.equals(data)


def test_a_dictionary_column_is_read_as_its_values(tmp_path: Path) -> None:
    """How a column is encoded does not show, in values or in a filter."""
    pq.write_table(pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "x.parquet")
    assert taken(tmp_path, {"a": hr.Column}) == taken(tmp_path, {"a": str}) == [{"a": "x"}, {"a": "y"}, {"a": "x"}]
    assert taken(tmp_path, {"a": str}, where="a in ('x',)") == [{"a": "x"}] * 2


WIDTHS = [
    (pa.int32(), pa.int64(), hr.Column),
    (pa.int64(), pa.int32(), hr.Column),
    (pa.string(), pa.large_string(), str),
    (pa.null(), pa.string(), str | None),
    (pa.string(), pa.null(), str | None),
    (pa.float32(), pa.float64(), float),
]


@pytest.mark.parametrize(("one", "other", "annotation"), WIDTHS, ids=[f"{one} and {other}" for one, other, _ in WIDTHS])
def test_files_may_differ_in_width_and_encoding(tmp_path: Path, one: pa.DataType, other: pa.DataType, annotation: Any) -> None:
    """Files of one input may carry a column in different widths: it arrives in the wider one."""
    values = {"0": one, "1": other}
    for name, kind in values.items():
        value: Any = None if pa.types.is_null(kind) else "t" if "string" in str(kind) else 2**40 if kind == pa.int64() else 3
        pq.write_table(pa.table({"a": pa.array([value], kind)}), tmp_path / f"{name}.parquet")
    source = select(open_source(Input(str(tmp_path))), {"a": type_of(annotation)}, pipeline="p")
    parts = [part for unit in source.units for part in read(source, [(unit, [(0, None)])], {"a": type_of(annotation)}, block_rows=5)]
    assert pa.concat_tables(parts).num_rows == 2


def test_text_files_are_guessed_together(tmp_path: Path) -> None:
    """What one file's first values look like does not bind another: whole numbers here, fractions or words there."""
    write(tmp_path / "0.csv", "a,b,c\n1,1,\n")
    write(tmp_path / "1.csv", "a,b,c\n1.5,x,7\n")
    assert taken(tmp_path, {"a": float, "b": str, "c": int | None}) == [{"a": 1.0, "b": "1", "c": None}, {"a": 1.5, "b": "x", "c": 7}]
    assert taken(tmp_path, {"a": hr.Column, "b": hr.Column}) == [{"a": 1.0, "b": "1"}, {"a": 1.5, "b": "x"}]


def table(**columns: Any) -> pa.Table:
    """A table."""
    return pa.table(columns)


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("nothing there", {}, {"paths": "none/*.parquet"}, {}, r"no file matches 'none/\*\.parquet'; check the path, and quote"),
    ("a wildcard in part of a path", {}, {"paths": "a**.parquet"}, {}, r"cannot list 'a\*\*\.parquet'.*entire path component"),
    ("mixed formats", {"a.parquet": table(a=[1]), "b.csv": "a\n1\n"}, {}, {}, r"mixes formats: .*a\.parquet' is parquet, .*b\.csv' is csv; narrow"),
    ("an unknown ending", {"a.xyz": "a"}, {"paths": "a.xyz"}, {}, r"cannot tell the format of .*a\.xyz'; say --format parquet\|csv"),
    ("only unknown endings", {"a.xyz": "a", "b.xyz": "a"}, {}, {}, r"none of the 2 files of '.*' has a known ending .*say --format"),
    ("no Parquet", {"a.parquet": "not parquet"}, {}, {}, r"cannot read the Parquet file '.*a\.parquet'"),
    ("no JSON", {"a.jsonl": "{not json}\n"}, {}, {}, r"cannot read '.*a\.jsonl': JSON parse error"),
    ("another column", {"a.parquet": table(a=[1]), "b.parquet": table(b=[1])}, {}, {}, r"b\.parquet' has no column 'a', which '.*a\.parquet' has"),
    ("another type", {"a.parquet": table(a=[1]), "b.parquet": table(a=["x"])}, {}, {}, r"column 'a' is str in '.*b\.parquet' but int in '.*a\.parquet'"),
    ("JSON of two kinds", {"a.jsonl": '{"a": 1}\n', "b.jsonl": '{"a": "x"}\n'}, {}, {}, r"column 'a' is str in '.*b\.jsonl' but int"),
    ("a missing column", {"a.parquet": table(texts=["x"])}, {}, {"text": str}, r"'p' reads column 'text', which the input lacks; it has 'texts'; did you mean"),
    ("a wrong type", {"a.parquet": table(a=["x"])}, {}, {"a": int}, r"reads column 'a' as int, but in the input it is string; declare it as str"),
    ("a wrong type in CSV", {"a.csv": "a\nx\n"}, {}, {"a": int}, r"reads column 'a' as int, but in the input it is string; declare it as str"),
    (
        "nulls",
        {"a.parquet": table(a=["x", None, None])},
        {},
        {"a": str},
        r"as str, but the input has 2 nulls there; declare it as str \| None, or .*--where 'a is not",
    ),
    ("unknown --columns", {"a.parquet": table(alpha=[1])}, {"columns": ["alpa"]}, {}, r"--columns names 'alpa', .*it has 'alpha'; did you mean 'alpha'\?"),
    ("rows that do not exist", {"a.parquet": table(a=[1])}, {"where": "a > 1"}, {"a": int}, r"no rows for which --where 'a > 1' holds"),
]


@pytest.mark.parametrize(("files", "options", "wanted", "message"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], options: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    """An input that cannot be used is refused before anything runs: what is wrong, where, and what to do."""
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        pq.write_table(content, tmp_path / name) if isinstance(content, pa.Table) else write(tmp_path / name, content)
    input = Input(**{"paths": str(tmp_path), **options})
    with pytest.raises(SourceError, match=message):
        taken(input, wanted, where=input.where, limit=input.limit)


def test_nulls_behind_a_filter_are_not_refused_early(tmp_path: Path) -> None:
    """The advice that the refusal gives works."""
    pq.write_table(table(a=["x", None]), tmp_path / "a.parquet")
    assert taken(tmp_path, {"a": str}, where="a is not None") == [{"a": "x"}]
    assert taken(tmp_path, {"a": str | None}) == [{"a": "x"}, {"a": None}]
    source = select(open_source(Input(str(tmp_path))), {"a": type_of(str)}, pipeline="p", limit=2)
    (part,) = read(source, [(source.units[0], [(0, None)])], {"a": type_of(str)}, block_rows=10)
    assert part[FAULT][0].as_py() is None and "a.parquet', row group 0, row 1: column 'a' does not fit str: a null; declare" in part[FAULT][1].as_py()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"format": "parquett"}, "no input format 'parquett'; there are 'parquet', .*did you mean 'parquet'"),
        ({"paths": []}, "no input given; name at least one"),
    ],
)
def test_input_is_checked(options: dict[str, Any], message: str) -> None:
    """An `Input` that cannot mean anything is refused."""
    with pytest.raises(SourceError, match=message):
        open_source(Input(**{"paths": "x.parquet", **options}))


def test_several_paths_are_one_input(tmp_path: Path) -> None:
    """Paths that overlap name each file once; a format may be said where the name does not tell."""
    folder = numbers(tmp_path / "in")
    assert open_source(Input([str(folder), str(folder / "*.parquet"), str(folder / "0.parquet")])).rows == 120
    odd = write(tmp_path / "data.txt", "a\nx\n")
    assert taken(Input(str(odd), format="csv"), {"a": str}) == [{"a": "x"}]


def test_columns_narrow_what_keep_all_means(tmp_path: Path) -> None:
    """`columns` takes the input to have only these."""
    assert open_source(Input(str(numbers(tmp_path)), columns=["text", "n"])).schema.names == ["text", "n"]


def test_the_weight_of_a_row_is_that_of_the_heaviest_part(tmp_path: Path) -> None:
    """One row group of heavy rows bounds the blocks of the whole input."""
    data = table(text=["x"] * 99 + [np.random.default_rng(0).bytes(300_000).hex()])
    pq.write_table(data, tmp_path / "a.parquet", row_group_size=99, compression="none")
    assert open_source(Input(str(tmp_path))).heaviest_bytes >= 600_000


def opened(path: Path, wanted: dict[str, Any], **options: Any) -> Any:
    """The part of an input that a run with these options reads."""
    return select(open_source(Input(str(path))), {name: type_of(annotation) for name, annotation in wanted.items()}, pipeline="p", **options)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of at most 4 rows."""
    monkeypatch.setattr(sources, "UNIT_ROWS", 4)


def test_a_large_row_group_becomes_several_units(tmp_path: Path, small_units: None) -> None:
    """Ranges of rows that adjoin and cover the row group; identities are the same in every run."""
    numbers(tmp_path, files=2, rows=10)
    source = opened(tmp_path, {"n": int})
    assert [(unit.id, unit.row_group, unit.start, unit.rows) for unit in source.units[:4]] == [(0, 0, 0, 4), (1, 0, 4, 4), (2, 0, 8, 2), (3, 0, 0, 4)]
    assert source.rows == 20 and [row["n"] for row in rows_of(source, {"n": int}, block_rows=3)] == list(range(20))
    assert [unit.key for unit in source.units] == [unit.key for unit in opened(tmp_path, {"n": int}).units]
    assert len({unit.key for unit in source.units}) == 6


def test_behind_a_filter_a_row_group_is_one_unit(tmp_path: Path, small_units: None) -> None:
    """Where rows come to lie behind a filter is only known from the row group's first row on."""
    source = opened(numbers(tmp_path, files=2, rows=10), {"n": int}, where="even")
    assert [(unit.start, unit.rows) for unit in source.units] == [(0, None)] * 2
    assert [row["n"] for row in rows_of(source, {"n": int})] == list(range(0, 20, 2))


@pytest.mark.parametrize("where", [None, "even"])
@pytest.mark.parametrize("limit", [1, 3, 4, 5, 7, 12])
def test_a_limit_cuts_the_last_unit(tmp_path: Path, small_units: None, limit: int, where: str | None) -> None:
    """By its rows; the units after it are gone."""
    source = opened(numbers(tmp_path, files=2, rows=10), {"n": int}, where=where, limit=limit)
    expected = [n for n in range(20) if where is None or n % 2 == 0][:limit]
    assert [row["n"] for row in rows_of(source, {"n": int})] == expected
    assert source.rows == sum(unit.rows for unit in source.units) == len(expected)


BROKEN = {"empty": b"", "garbage": b"not parquet at all", "cut": None, "flipped": None}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_parquet_file_without_a_footer_is_a_unit_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    """The others are read; alone it is refused."""
    numbers(tmp_path, files=3, rows=10)
    whole = (tmp_path / "1.parquet").read_bytes()
    flipped = bytearray(whole)
    flipped[-8:-4] = b"\xff\xff\xff\x7f"  # the length of the footer
    write(tmp_path / "0.parquet", {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped)}.get(kind, BROKEN[kind]))  # also first of all
    source = opened(tmp_path, {"n": int})
    assert list(source.unreadable) == [0] and (source.units[0].row_group, source.units[0].rows, len(source.units)) == (None, None, 3)
    assert source.rows == 20
    with pytest.raises(SourceError, match=r"cannot read the Parquet file '.*0\.parquet'"):
        list(read(source, [(source.units[0], [(0, None)])], {"n": type_of(int)}, block_rows=10))
    filtered = opened(tmp_path, {"n": int}, where="n >= 20")
    assert [unit.id for unit in filtered.units] == [0, 2] and filtered.rows is None and list(filtered.unreadable) == [0]
    limited = opened(tmp_path, {"n": int}, limit=15)
    assert [unit.rows for unit in limited.units] == [None, 10, 5] and limited.rows == 15
    with pytest.raises(SourceError, match=r"has no rows for which --where 'n > 99' holds; cannot read the Parquet file"):
        opened(tmp_path, {"n": int}, where="n > 99")
    with pytest.raises(SourceError, match=r"cannot read the Parquet file '.*0\.parquet'"):
        open_source(Input(str(tmp_path / "0.parquet")))
    for name in ("1", "2"):
        write(tmp_path / f"{name}.parquet", b"x")
    with pytest.raises(SourceError, match=r"cannot read the Parquet file '.*0\.parquet'.*; nor can any of the 2 other files"):
        open_source(Input(str(tmp_path)))


def test_another_schema_is_a_mistake_beside_a_broken_file(tmp_path: Path) -> None:
    """A file that can be read must fit the others."""
    write(tmp_path / "0.parquet", b"")
    pq.write_table(table(a=[1]), tmp_path / "1.parquet")
    pq.write_table(table(b=[1]), tmp_path / "2.parquet")
    with pytest.raises(SourceError, match=r"2\.parquet' has no column 'a', which '.*1\.parquet' has"):
        open_source(Input(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "broken", "good", "message"),
    [
        ("jsonl", b"garbage\x00\xff\n{{{\n", b'{"a": 1}\n', "JSON parse error"),
        ("jsonl", b"null\n", b'{"a": 1}\n', "null, where an object"),
        ("csv.gz", gzip.compress(b"a\n1\n")[:12], gzip.compress(b"a\n1\n"), ""),
        ("jsonl.gz", b"not gzip", gzip.compress(b'{"a": 1}\n'), ""),
    ],
)
def test_a_text_file_that_cannot_be_opened_is_a_unit_that_cannot_be_read(tmp_path: Path, name: str, broken: bytes, good: bytes, message: str) -> None:
    """As with Parquet."""
    write(tmp_path / f"0.{name}", broken)
    write(tmp_path / f"1.{name}", good)
    source = opened(tmp_path, {"a": int})
    assert list(source.unreadable) == [0] and re.search(rf"cannot read '.*0\.{name}': .*{message}", source.unreadable[0])
    assert opened(tmp_path, {"a": int}, limit=5).rows == 1
    (tmp_path / f"1.{name}").unlink()
    with pytest.raises(SourceError, match=rf"cannot read '.*0\.{name}'"):
        open_source(Input(str(tmp_path)))


def test_names_of_hidden_columns_are_refused(tmp_path: Path) -> None:
    """An input with such a column can be read, but not that column."""
    pq.write_table(table(a=[1], __headrace_row=[1]), tmp_path / "a.parquet")
    assert taken(tmp_path, {"a": int}) == [{"a": 1}]
    with pytest.raises(SourceError, match="has a column '__headrace_row'; names that start with __headrace_ are headrace's own"):
        opened(tmp_path, {"a": int, "__headrace_row": int})
    with pytest.raises(SourceError, match="names that start with __headrace_"):
        opened(tmp_path, {"a": int}, where="__headrace_row > 0")


@pytest.mark.parametrize("cut", [1, 7, 10, 64, 1000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_large_json_lines_file_is_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, end: str) -> None:
    """Wherever the cuts fall, every line is in one unit."""
    lines = [json.dumps({"n": n, "text": "x" * (n % 7)}) for n in range(40)]
    write(tmp_path / "a.jsonl", "\n".join(lines) + end)
    monkeypatch.setattr(sources, "_CUT_BYTES", cut)
    monkeypatch.setattr(texts, "_STREAM_BYTES", 50)
    source = opened(tmp_path, {"n": int})
    assert len(source.units) == -(-(tmp_path / "a.jsonl").stat().st_size // cut) and len({unit.key for unit in source.units}) == len(source.units)
    assert [row["n"] for row in rows_of(source, {"n": int})] == list(range(40))
    assert [row["n"] for row in rows_of(opened(tmp_path, {"n": int}, where="n > 5", limit=9), {"n": int})] == list(range(6, 15))
