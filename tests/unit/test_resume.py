"""Resume: which rows a run begins with, when the input is as it was, and when it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from headrace.errors import ChangedError
from headrace.filesystems import Place
from headrace.intervals import Intervals
from headrace.resume import Mode, Start, check, given_up, is_gone, renumbered, start, table_name, todo
from headrace.state import DataFile, State
from headrace.units import Source, Unit

PLACE = Place(fs.LocalFileSystem(), "/in", "/in")
FACTS = {"code of reviews.py": "1"}


def unit(number: int, file: str, *, rows: int | None = 10, group: int | None = 0, size: int = 100, modified: int = 1, start: int = 0) -> Unit:
    return Unit(number, (f"/in/{file}",), group, start, rows, size, modified)


def source_of(*units: Unit, unreadable: dict[int, str] | None = None) -> Source:
    return Source(PLACE, "parquet", pa.schema([]), units, unreadable=unreadable or {})


A, B, C = unit(0, "a"), unit(1, "b"), unit(2, "c")


def state_of(units: Sequence[Unit], *, done: Any = None, dead: Any = None, **more: Any) -> State:
    """What a ledger says of an output in which these spans are settled."""
    done = {number: Intervals(spans) for number, spans in (done or {}).items()}
    dead = {number: Intervals(spans) for number, spans in (dead or {}).items()}
    files = {"part": DataFile("part", sum(rows.rows for rows in done.values()), 1)} if done else {}
    letters = {"letters": DataFile("letters", sum(rows.rows for rows in dead.values()), 1)} if dead else {}
    return State(request={"old": 1}, facts=FACTS, units=table_name(units), done=done, dead=dead, files=files, letters=letters, **more)


def begin(before: State | None, units: Sequence[Unit], source: Source, *, facts: Any = None) -> Start:
    """The start of a run over `source`, where the output was begun over `units`."""

    def old(name: str) -> Sequence[Unit]:
        assert name == table_name(units), "the table that the state names is read"
        return units

    return start(before, source, request={"new": 1}, facts=facts or FACTS, old=old)


def left(here: Start, **options: Any) -> dict[int, list[tuple[int, int | None]]]:
    """The rows to run, per unit."""
    return {unit.id: rows for unit, rows in todo(here.state, here.units, **options)}


def test_a_fresh_start() -> None:
    """Nothing is known: every row is to be run."""
    here = begin(None, (), source_of(A, B, unreadable={1: "why"}))
    assert (here.changes, here.grew, here.units, left(here)) == ((), False, (A, B), {0: [(0, 10)]})
    assert (here.state.request, here.state.facts, here.state.unreadable) == ({"new": 1}, FACTS, {1: "why"})


def test_where_nothing_is_settled_nothing_has_changed() -> None:
    """A run that died before its first commit binds nobody: other code, other input, all is fresh."""
    before = state_of([A], counts={0: 5}, unreadable={0: "why"})
    here = begin(before, [A], source_of(C), facts={"code of reviews.py": "2"})
    assert (here.changes, here.units, here.state.unreadable, here.state.counts) == ((), (C,), {}, {})
    assert here.state.facts == {"code of reviews.py": "2"}


def test_going_on() -> None:
    """Rows that are done or dead are not run again; with `retry` those that are dead are."""
    before = state_of([A, B], done={0: [(0, 4), (6, 10)]}, dead={0: [(5, 6)], 1: [(9, 10)]})
    here = begin(before, [A, B], source_of(A, B))
    assert (here.changes, here.grew, here.state.units) == ((), True, before.units)
    assert left(here) == {0: [(4, 5)], 1: [(0, 9)]}
    assert left(here, retry=True) == {0: [(4, 5), (5, 6)], 1: [(0, 9), (9, 10)]}


def test_a_finished_job() -> None:
    """There is nothing to do, and nothing has grown; with `retry` there is what failed."""
    before = state_of([A, B], done={0: [(0, 10)], 1: [(0, 9)]}, dead={1: [(9, 10)]}, finished=True)
    here = begin(before, [A, B], source_of(A, B))
    assert (here.changes, here.grew, left(here), left(here, retry=True)) == ((), False, {}, {1: [(9, 10)]})


def test_a_new_file_that_comes_first() -> None:
    """It gets a number that nobody had; the others keep theirs, wherever they stand now."""
    before = state_of([B, C], done={1: [(0, 10)], 2: [(0, 3)]}, finished=True)
    here = begin(before, [B, C], source_of(A, replace(B, id=1), replace(C, id=2)))
    assert [(one.paths[0], one.id) for one in here.units] == [("/in/a", 3), ("/in/b", 1), ("/in/c", 2)]
    assert (here.changes, here.grew, left(here)) == (("input: new in the input: a",), True, {3: [(0, 10)], 2: [(3, 10)]})
    assert here.state.units == table_name(here.units) != before.units


def test_many_new_files_are_counted() -> None:
    """Four are named, the rest is a number; the row groups of a file are one file."""
    before = state_of([A], done={0: [(0, 1)]})
    more = [unit(n, f"new{n // 2}", group=n % 2) for n in range(2, 14)]
    assert begin(before, [A], source_of(A, *more)).changes == ("input: new in the input: new1, new2, new3, new4 and 2 more",)


def test_a_file_that_is_gone() -> None:
    """What it gave stays, its other rows are given up, and that is told once; it is not run, not even with `retry`."""
    before = state_of([A, B, C], done={0: [(0, 10)], 1: [(0, 4)]}, dead={1: [(4, 5)]})
    here = begin(before, [A, B, C], source_of(A))
    assert here.changes == ("input: gone from the input: b, c",)
    assert [one.id for one in here.units] == [0, 1], "c has given nothing: it is forgotten"
    assert here.state.unreadable == {1: "'/in/b' is gone from the input"} and is_gone(here.state.unreadable[1])
    assert left(here) == left(here, retry=True) == {}
    assert given_up(here.state, here.units) == here.state.unreadable
    again = begin(here.state, here.units, source_of(A))
    assert (again.changes, again.state.unreadable, again.grew) == ((), here.state.unreadable, False)


def test_a_file_that_is_back() -> None:
    """It goes on where it was, under its old number."""
    gone = state_of([A, B], done={0: [(0, 10)], 1: [(0, 4)]}, unreadable={1: "'/in/b' is gone from the input"})
    here = begin(gone, [A, B], source_of(A, B))
    assert (here.changes, here.state.unreadable, left(here)) == (("input: new in the input: b",), {}, {1: [(4, 10)]})


def test_a_file_that_changed() -> None:
    """Its name is told. With as many rows as it had it goes on; counts and failures of the old one no longer hold."""
    before = state_of([A, replace(B, rows=None)], done={0: [(0, 5)], 1: [(0, 5)]}, unreadable={0: "why"}, counts={1: 10})
    changed = [replace(A, size_bytes=99), replace(B, rows=None, modified_ns=2)]
    here = begin(before, [A, replace(B, rows=None)], source_of(*changed))
    assert here.changes == ("input: changed: a, b",)
    assert (here.state.unreadable, here.state.counts, left(here)) == ({}, {}, {0: [(5, 10)], 1: [(5, None)]})
    assert (before.unreadable, before.counts) == ({0: "why"}, {1: 10}), "what was known before is left as it was"


def test_rows_that_cannot_be_told_apart() -> None:
    """A row group with settled rows that has another number of rows now is refused, whatever the mode; without settled rows it is not."""
    before = state_of([A, B], done={0: [(0, 4)]}, dead={0: [(4, 5)]})
    with pytest.raises(
        ChangedError, match="'/in/a' had 10 rows when 5 of its rows were run, and has 9 now: .*Begin again with --restart, or put the file back"
    ):
        begin(before, [A, B], source_of(replace(A, rows=9, size_bytes=9), B))
    here = begin(before, [A, B], source_of(A, replace(B, rows=9, size_bytes=9)))
    assert left(here) == {0: [(5, 10)], 1: [(0, 9)]}


def test_code_and_settings() -> None:
    """What differs in the facts is told before what differs in the input."""
    before = state_of([A], done={0: [(0, 1)]})
    here = begin(before, [A], source_of(A, B), facts={"code of reviews.py": "2", "--keep": "id"})
    assert here.changes == ("--keep: was absent, is id", "code of reviews.py: changed", "input: new in the input: b")
    assert here.state.facts["--keep"] == "id", "from now on they are compared with these"


def test_another_filter() -> None:
    """Rows are numbered behind it: those that are done would be taken for others, so nothing but a restart helps."""
    before = state_of([A], done={0: [(0, 1)]})
    with pytest.raises(ChangedError, match="--where was None when the output was begun, and is 'x > 1' now: .* Begin again with --restart, or keep it"):
        begin(before, [A], source_of(A), facts={**FACTS, "--where": "x > 1"})


def test_other_columns() -> None:
    """One output has the same columns in all of its files."""
    before = state_of([A], done={0: [(0, 1)]})
    with pytest.raises(ChangedError, match="the output's columns was None when the output was begun, and is 'y: int64' now: one output cannot hold both"):
        begin(before, [A], source_of(A), facts={**FACTS, "the output's columns": "y: int64"})


def test_an_edited_text_file() -> None:
    """Its rows are known by their place: of another size it is refused once rows of it are settled."""
    text = replace(A, row_group=None, rows=None)
    with pytest.raises(ChangedError, match="had 100 bytes when 4 of its rows were run, and has 120 now"):
        begin(state_of([text], done={0: [(0, 4)]}), [text], source_of(replace(text, size_bytes=120, modified_ns=2)))


def test_another_limit() -> None:
    """More rows of the same file are run beside those that are done; fewer leave them as they are."""
    before = state_of([A], done={0: [(0, 10)]})
    more = begin(before, [A], source_of(replace(A, rows=15)))
    assert (left(more), more.changes) == ({0: [(10, 15)]}, ()), "the flag itself is told among the facts"
    assert left(begin(before, [A], source_of(replace(A, rows=None)))) == {0: [(10, None)]}
    assert left(begin(before, [A], source_of(replace(A, rows=5)))) == {}


@pytest.mark.parametrize("mode", Mode)
def test_who_may_go_on(mode: Mode) -> None:
    """Only plain resuming is refused, with every line of what changed and the choices; without a change nobody is."""
    changed = Start(state_of([A]), (A,), ("input: changed: a", "--where: was 1, is 2"))
    if mode is Mode.RESUME:
        with pytest.raises(ChangedError, match=r"(?s)output 'out' was begun .*  input: changed: a\n  --where: was 1, is 2\n.*--accept-change.*--restart"):
            check(changed, "out", mode)
    else:
        check(changed, "out", mode)
    check(replace(changed, changes=()), "out", mode)


def test_unreadable_units() -> None:
    """They are left out until somebody says `retry`; those of this opening are told anew."""
    before = state_of([A, B, C], done={0: [(0, 10)], 1: [(0, 4)]}, unreadable={1: "torn"})
    here = begin(before, [A, B, C], source_of(A, B, C, unreadable={2: "no footer"}))
    assert here.state.unreadable == {1: "torn", 2: "no footer"}
    assert (left(here), left(here, retry=True)) == ({}, {1: [(4, 10)], 2: [(0, 10)]})
    assert given_up(here.state, here.units) == {1: "torn", 2: "no footer"}


def test_what_is_given_up() -> None:
    """A unit that was read to its end meanwhile is not; one without a footer, whose rows nobody knows, is."""
    units = [A, unit(1, "b", rows=0, group=None), C]
    state = state_of(units, done={0: [(0, 9)]}, dead={0: [(9, 10)]}, unreadable={0: "once", 1: "no footer", 7: "of no unit"})
    assert given_up(state, units) == {1: "no footer"}


@pytest.mark.parametrize(("counts", "rows"), [({}, [(3, None)]), ({0: 3}, []), ({0: 5}, [(3, 5)])])
def test_units_of_unknown_length(counts: dict[int, int], rows: list[Any]) -> None:
    """They are open at the end until they were counted."""
    text = unit(0, "a.csv", rows=None, group=None)
    here = begin(state_of([text], done={0: [(0, 3)]}, counts=counts), [text], source_of(text))
    assert left(here) == ({0: rows} if rows else {})


def test_the_source_in_the_ledgers_numbers() -> None:
    """What cannot be read is known by the numbers that units have in the ledger, not by those of this opening."""
    before = state_of([replace(B, id=0)], done={0: [(0, 1)]})
    source = source_of(A, B, C, unreadable={0: "no footer"})
    here = begin(before, [replace(B, id=0)], source)
    assert [one.id for one in here.units] == [1, 0, 2]
    assert renumbered(source, here.units).unreadable == {1: "no footer"} == here.state.unreadable


def test_a_table_is_named_by_its_content() -> None:
    """Units of the same files have the same name for their table; others have another."""
    assert table_name([A, B]) == table_name([A, B]) != table_name([A, C])
    assert table_name([A]).startswith("_headrace/units-")
