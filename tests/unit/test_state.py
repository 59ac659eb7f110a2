"""What a ledger says: commits add up, or are refused."""

from __future__ import annotations

import json

import pytest

from headrace.errors import LedgerError
from headrace.intervals import Intervals
from headrace.state import Change, DataFile, State


def fresh() -> State:
    return State(request={"limit": None}, facts={"code": "1"}, units="units-1.parquet")


def commit(name: str = "part-1", rows: int = 10, start: int = 0, unit: int = 0) -> Change:
    return Change(files=[DataFile(name, rows, 99, 1.0)], done={unit: [(start, start + rows)]})


def test_commits_add_up() -> None:
    state = fresh()
    state.apply(commit())
    state.apply(Change(letters=[DataFile("letters-1", 2, 9)], dead={0: [(10, 12)]}, counts={0: 20}))
    assert (state.rows_done, state.rows_dead) == (10, 2)
    assert state.missing(0, 0, None) == [(12, 20)], "the count tells where the unit ends"
    assert state.missing(1, 5, 10) == [(5, 15)]
    assert state.missing(2, 0, None) == [(0, None)]


def test_a_dead_row_may_become_done_or_dead_again_but_not_the_other_way() -> None:
    state = fresh()
    state.apply(Change(dead={0: [(0, 4)]}))
    state.apply(Change(dead={0: [(0, 1)]}))
    state.apply(commit(rows=2, start=1))
    assert (state.rows_done, state.rows_dead) == (2, 2)
    with pytest.raises(LedgerError, match="settles rows of unit 0 twice"):
        state.apply(Change(dead={0: [(1, 2)]}))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (commit(start=5), "twice"),
        (Change(files=[DataFile("part-2", 4, 9)], done={1: [(0, 2), (1, 3)]}), "twice"),
        (Change(files=[DataFile("part-2", 1, 9)], done={1: [(0, 1)]}, dead={1: [(0, 1)]}), "twice"),
        (Change(files=[DataFile("part-2", 3, 9)], done={1: [(0, 4)]}), "settles 4 rows, but its files hold 3"),
        (Change(done={1: [(0, 4)]}), "settles 4 rows, but its files hold 0"),
        (Change(dropped=["part-1"]), "settles 0 rows, but its files hold -10"),
        (Change(dropped=["part-9"]), "drops 'part-9', which is not there"),
    ],
)
def test_what_does_not_add_up_changes_nothing(wrong: Change, match: str) -> None:
    state = fresh()
    state.apply(commit())
    before = json.dumps(state.to_json())
    with pytest.raises(LedgerError, match=match):
        state.apply(wrong)
    assert json.dumps(state.to_json()) == before


def test_files_are_merged_without_settling_anything() -> None:
    state = fresh()
    state.apply(commit("part-1"))
    state.apply(commit("part-2", start=10))
    state.apply(Change(files=[DataFile("part-3", 20, 150)], dropped=["part-1", "part-2"]))
    assert list(state.files) == ["part-3"] and state.rows_done == 20 and state.done[0] == Intervals([(0, 20)])


def test_finished_stays_finished() -> None:
    state = fresh()
    state.apply(Change(finished=True))
    state.apply(Change(counts={3: 1}))
    assert state.finished


def test_both_come_back_from_json() -> None:
    state = fresh()
    for change in (commit(), Change(dead={2: [(0, 1)]}, letters=[DataFile("letters-1", 1, 5)], unreadable={4: "gone"}, counts={2: 7})):
        read = Change.from_json(json.loads(json.dumps(change.to_json())))
        assert json.dumps(read.to_json()) == json.dumps(change.to_json())
        state.apply(read)
    again = State.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
