"""Interval sets against sets of numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.intervals import Intervals

SPANS = st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1]))
STEPS = st.lists(st.tuples(st.booleans(), SPANS), max_size=12)


def numbers(intervals: Intervals) -> set[int]:
    return {number for start, stop in intervals for number in range(start, stop)}


@given(STEPS, SPANS)
def test_they_are_sets(steps: list[tuple[bool, tuple[int, int]]], probe: tuple[int, int]) -> None:
    known: set[int] = set()
    intervals = Intervals()
    for add, (start, stop) in steps:
        (intervals.add if add else intervals.discard)(start, stop)
        known = known | set(range(start, stop)) if add else known - set(range(start, stop))
    assert numbers(intervals) == known and intervals.rows == len(known)
    assert intervals.overlaps(*probe) == bool(known & set(range(*probe)))
    assert {row for start, stop in intervals.missing(*probe) for row in range(start, stop)} == set(range(*probe)) - known
    assert Intervals.of(intervals.flat) == intervals == Intervals(intervals)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(intervals)), "neighbours are merged"


def test_missing_without_an_end_stays_open() -> None:
    assert Intervals().missing(3, None) == [(3, None)]
    assert Intervals([(0, 5), (8, 9)]).missing(2, None) == [(5, 8), (9, None)]


@pytest.mark.parametrize("wrong", [(-1, 2), (3, 2)])
def test_an_interval_runs_forward_from_0(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="an interval runs from a row of at least 0"):
        Intervals().add(*wrong)


@pytest.mark.parametrize("flat", [[1], [3, 3], [5, 4], [0, 2, 1, 5], [-1, 4]])
def test_a_record_of_intervals_is_checked(flat: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending pairs"):
        Intervals.of(flat)


def test_they_show_what_they_hold() -> None:
    assert repr(Intervals([(1, 2), (4, 6)])) == "Intervals([(1, 2), (4, 6)])"
    assert len(Intervals([(1, 2), (2, 6)])) == 1
