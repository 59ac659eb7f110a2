"""Readers: blocks are bounded whatever the file looks like, and errors name the place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace import readers
from headrace.columns import type_of
from headrace.errors import SourceError
from headrace.formats import Input
from headrace.readers import read
from headrace.sources import open_source


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
            for _ in read(source, unit, {"b": type_of(bytes)}, block_rows=1024):
                most = max(most, pool.bytes_allocated() - before)
        held[megabytes] = most
    assert held[32] < 2 * held[4] + (8 << 20)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_is_cut_into_blocks(tmp_path: Path, kind: str) -> None:
    """A parsed piece of a text file is cut down to the rows of a block."""
    head, line = ("a\n", "{}\n") if kind == "csv" else ("", '{{"a": {}}}\n')
    (tmp_path / f"x.{kind}").write_text(head + "".join(line.format(n) for n in range(1000)))
    source = open_source(Input(str(tmp_path)))
    sizes = [part.num_rows for part in read(source, source.units[0], {"a": type_of(int)}, block_rows=300)]
    assert sum(sizes) == 1000 and max(sizes) == 300


@pytest.mark.parametrize("block_bytes", [64, 100, 1000, 4096])
def test_growing_blocks_lose_and_double_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """However often the parser has to start again with larger blocks, each row comes once, in order."""
    monkeypatch.setattr(readers, "_STREAM_BYTES", block_bytes)
    texts = [f"{n} " + "x" * (n * n % 5000) for n in range(200)]
    (tmp_path / "x.csv").write_text("a\n" + "\n".join(texts) + "\n")
    source = open_source(Input(str(tmp_path)))
    found = [value for part in read(source, source.units[0], {"a": type_of(str)}, block_rows=7) for value in part["a"].to_pylist()]
    assert found == texts


@pytest.mark.parametrize(
    ("name", "content", "annotation", "message"),
    [
        ("x.csv", "a\n1\nx\n", int, r"reads column|cannot read '.*x\.csv'.*conversion error to int64: invalid value 'x'"),
        ("x.csv", "a,b\n1,2\n3\n", int, r"cannot read '.*x\.csv'.*Expected 2 columns, got 1"),
        ("x.csv", "a\n*\n", bytes, r"x\.csv', after row 0: column 'a' does not fit bytes"),
        ("x.jsonl", '{"a": 1}\n{"a": null}\n', int, r"x\.jsonl', after row 0: column 'a' does not fit int: 1 nulls, the first in row 1"),
        ("x.jsonl", '{"a": [1, 2]}\n{"a": [1]}\n', None, r"x\.jsonl', after row 0: column 'a' does not fit Vector\(2\)"),
    ],
)
def test_a_value_that_does_not_fit_is_placed(tmp_path: Path, name: str, content: str, annotation: type | None, message: str) -> None:
    """The message names file, column and position."""
    from headrace.columns import Vector
    from headrace.sources import select

    (tmp_path / name).write_text(content)
    wanted = {"a": type_of(annotation or Vector(2))}
    with pytest.raises(SourceError, match=message):
        source = select(open_source(Input(str(tmp_path))), wanted, pipeline="p")
        list(read(source, source.units[0], wanted, block_rows=10))


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    """A truncated gzip file is an error of the source, not a traceback."""
    import gzip

    whole = gzip.compress(b"a\n" + b"\n".join(b"%d" % n for n in range(100_000)))
    (tmp_path / "x.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cannot read '.*x\.csv\.gz'"):
        source = open_source(Input(str(tmp_path)))
        list(read(source, source.units[0], {"a": type_of(int)}, block_rows=1000))
