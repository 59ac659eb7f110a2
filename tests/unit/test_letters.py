"""Dead letters: how many may be, what each says, and that there is one per dead row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.columns import ANY, ColumnType, type_of
from headrace.errors import SettingError
from headrace.filesystems import Place
from headrace.formats import Input
from headrace.ledger import LETTERS, Ledger, staged
from headrace.letters import Allowance, consolidate, split, table
from headrace.lineage import Fault, trace
from headrace.sources import open_source, select
from headrace.state import Change, DataFile, State
from headrace.store import Folder
from headrace.units import Source

ABOUT = ["unit", "row", "file", "row_group", "stage", "error", "message", "frames", "attempts"]


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [
        ("1%", 1000, 10),
        ("1%", 199, 1),
        ("1%", 10, 1),
        ("0.5%", 1000, 5),
        (" 100% ", 7, 7),
        ("0%", 1000, 0),
        ("0", 1000, 0),
        ("20", 10, 20),
        (3, 1000, 3),
        (0, 1000, 0),
    ],
)
def test_an_allowance(text: Any, total: int, allowed: int) -> None:
    """A share of all rows, but one row always; or a number, which may be 0."""
    assert Allowance.parse(text).of(total) == allowed


def test_the_usual_allowance() -> None:
    """What the command line says by default is what Python says."""
    assert Allowance.parse("1%") == Allowance()


@pytest.mark.parametrize("text", ["", "-1", "1.5", "101%", "some", "1 %", "1%%", 0.01, None])
def test_no_allowance(text: Any) -> None:
    """A share without its sign could be a number of rows: neither is guessed."""
    with pytest.raises(SettingError, match="--max-dead-letters must be a share such as 1%.* or a number of rows such as 100, got "):
        Allowance.parse(text)


def fault(message: str, attempts: int = 1) -> str:
    return Fault("embed", "ValueError", message, "frames", attempts).to_json()


def test_split() -> None:
    """Rows with a fault on one side, all others on the other, in order; nothing is copied where nothing failed."""
    faults = pa.array([None, fault("a"), None, fault("b")], pa.string())
    good, bad = split(trace(pa.table({"x": [0, 1, 2, 3]}), 0, np.arange(4), faults))
    assert (good["x"].to_pylist(), bad["x"].to_pylist()) == ([0, 2], [1, 3])
    whole = trace(pa.table({"x": [0, 1]}), 0, np.arange(2))
    good, bad = split(whole)
    assert good is whole and (bad.num_rows, bad.schema) == (0, whole.schema)


def source_of(path: Path, wanted: dict[str, ColumnType], **options: Any) -> Source:
    return select(open_source(Input(str(path))), wanted, pipeline="p", **options)


def failed(*rows: tuple[int, int]) -> pa.Table:
    """A block in which these rows of units failed; its columns are whatever the stages left of them."""
    parts = [trace(pa.table({"text": pa.nulls(1, pa.string())}), unit, np.array([row]), pa.array([fault(f"{unit}.{row}", attempts=row)])) for unit, row in rows]
    return pa.concat_tables(parts)


def letters_of(source: Source, wanted: dict[str, ColumnType], *rows: tuple[int, int]) -> list[dict[str, Any]]:
    found = table(failed(*rows), source, {unit.id: unit for unit in source.units}, wanted)
    assert found.column_names[-len(ABOUT) :] == ABOUT
    return found.to_pylist()


def test_a_letter_has_the_input_and_the_failure(tmp_path: Path) -> None:
    """The columns as they were read, not as the stages left them, and where the row lies."""
    pq.write_table(pa.table({"id": range(10), "text": [f"t{n}" for n in range(10)]}), tmp_path / "a.parquet", row_group_size=5)
    wanted = {"id": ANY, "text": type_of(str)}
    found = letters_of(source_of(tmp_path, wanted), wanted, (1, 4), (0, 2), (1, 1))
    assert [(row["id"], row["text"], row["unit"], row["row"], row["message"], row["attempts"]) for row in found] == [
        (2, "t2", 0, 2, "0.2", 2),
        (6, "t6", 1, 1, "1.1", 1),
        (9, "t9", 1, 4, "1.4", 4),
    ]
    assert {(row["stage"], row["error"], row["frames"]) for row in found} == {("embed", "ValueError", "frames")}
    assert [(row["file"], row["row_group"]) for row in found] == [(str(tmp_path / "a.parquet"), group) for group in (0, 1, 1)]


def test_names_that_conflict(tmp_path: Path) -> None:
    """An input column named as one of ours keeps its values under another name."""
    pq.write_table(pa.table({"row": ["r"], "message": ["m"], "text": ["t"]}), tmp_path / "a.parquet")
    wanted = {"row": ANY, "message": ANY, "text": ANY}
    (row,) = letters_of(source_of(tmp_path, wanted), wanted, (0, 0))
    assert (row["input_row"], row["input_message"], row["text"], row["row"], row["message"]) == ("r", "m", "t", 0, "0.0")


def test_input_that_cannot_be_read_again(tmp_path: Path) -> None:
    """A file that is gone by now costs the values, not the letter; with none left there are no input columns."""
    for name in "ab":
        pq.write_table(pa.table({"id": [0, 1]}), tmp_path / f"{name}.parquet")
    wanted = {"id": ANY}
    source = source_of(tmp_path, wanted)
    (tmp_path / "a.parquet").unlink()
    found = letters_of(source, wanted, (0, 1), (1, 1))
    assert [(row["id"], row["unit"], row["row"], Path(row["file"]).name) for row in found] == [(1, 1, 1, "b.parquet"), (None, 0, 1, "a.parquet")]
    (tmp_path / "b.parquet").unlink()
    assert [list(row) for row in letters_of(source, wanted, (0, 1))] == [ABOUT]


def test_a_value_that_never_fitted(tmp_path: Path) -> None:
    """A row that could not be read as declared has null there, and its other columns."""
    (tmp_path / "a.jsonl").write_text('{"id": 1, "stars": 5}\n{"id": 2, "stars": "many"}\n')
    wanted = {"id": ANY, "stars": type_of(int)}
    (row,) = letters_of(source_of(tmp_path, wanted), wanted, (0, 1))
    assert (row["id"], row["stars"]) == (2, None)


@pytest.mark.parametrize("where", [None, "path < 'z' and path != 'x'"])
def test_an_image_is_named(tmp_path: Path, where: str | None) -> None:
    """Each of a unit's many files by its own name, also where a filter has left some out."""
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(b"x")
    names = [str(tmp_path / f"{n}.png") for n in range(4)]
    wanted = {"image": ANY}
    where = where and f"path != {names[0]!r}"
    found = letters_of(source_of(tmp_path, wanted, where=where), wanted, (0, 1), (0, 2))
    assert [row["file"] for row in found] == (names[2:] if where else names[1:3])
    assert [name for name in found[0] if name not in ABOUT] == ["image"]


@pytest.fixture
def held(tmp_path: Path) -> Ledger:
    """An output with 20 rows that are done in unit 0."""
    from pyarrow import fs

    held, _ = Ledger.claim(Folder(Place(fs.LocalFileSystem(), str(tmp_path), str(tmp_path))))
    held.begin(State(request={}, facts={}, units="u"))
    commit(held, done={0: [(0, 20)]})
    return held


def commit(held: Ledger, *, dead: Sequence[tuple[int, int, str]] = (), done: Any = ()) -> None:
    """Commit rows that died, each with its letter, and rows that are done."""
    done, files, letters = dict(done), [], []
    if rows := sum(stop - start for spans in done.values() for start, stop in spans):
        files = [DataFile(held.new_name("part", ".parquet"), rows, 1)]
    if dead:
        letters = [DataFile(held.new_name("letters", ".parquet"), len(dead), 1)]
        content = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([dict(zip(("unit", "row", "message"), one, strict=True)) for one in dead]), content)
        held.store.put(staged(letters[0].name), content.getvalue())
    spans: dict[int, list[tuple[int, int]]] = {}
    for unit, row, _ in dead:
        spans.setdefault(unit, []).append((row, row + 1))
    held.commit(Change(files=files, letters=letters, done=done, dead=spans))
    for file in letters:
        held.publish(file.name)


def kept(held: Ledger) -> list[tuple[int, int, str]]:
    """The letters that the ledger names, which must be those that lie there."""
    names = sorted(held.state.letters)
    assert sorted(held.store.names(LETTERS)) + sorted(held.store.names(f"_headrace/staging/{held.run}")) == names
    folder = Path(held.store.place.path)  # type: ignore[attr-defined]
    paths = [path for name in names for path in (folder / LETTERS / name, folder / staged(name)) if path.exists()]
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [(row["unit"], row["row"], row["message"]) for row in rows]


def test_one_letter_per_dead_row(held: Ledger) -> None:
    """Of two tries the later one stays, and those of rows that are done by now go."""
    commit(held, dead=[(0, 20, "old"), (0, 21, "old"), (1, 3, "old")])
    held, state = Ledger.claim(held.store)  # by a later run
    assert state is not None
    held.begin(state)
    commit(held, dead=[(1, 3, "new"), (0, 21, "new")], done={0: [(20, 21)]})
    consolidate(held)
    assert sorted(kept(held)) == [(0, 21, "new"), (1, 3, "new")]
    assert len(held.state.letters) == 1 and held.state.rows_dead == 2


def test_nothing_to_consolidate(held: Ledger) -> None:
    """Letters that are one per row already are left as they are; so is an output that has none."""
    consolidate(held)
    assert kept(held) == []
    commit(held, dead=[(0, 20, "a")])
    commit(held, dead=[(0, 21, "b")])
    before = dict(held.state.letters)
    consolidate(held)
    assert held.state.letters == before and len(before) == 2


def test_all_went_well_the_second_time(held: Ledger) -> None:
    """No letter is left, and no file of letters."""
    commit(held, dead=[(0, 20, "a"), (0, 21, "a")])
    commit(held, done={0: [(20, 22)]})
    consolidate(held)
    assert (kept(held), held.state.letters) == ([], {})
