"""Sums over events: time lines that stay small, shares that add up, and a remaining time that comes true."""

from __future__ import annotations

import random

import numpy as np
import pytest

from headrace.events import BlockDone, Committed, GroupPlanned, GroupSampled, ReplicaReady, RunFailed, RunStarted
from headrace.report import Report, Shares
from headrace.tally import READER, GroupSums, Tally, Timeline
from headrace.units import Unit
from headrace.weights import Weights

Told = list[tuple[float, float | None, float]]


def run_of(
    units: list[Unit], *, s_per_byte: float, replicas: int = 4, startup_s: float = 12.0, noise: float = 0.0
) -> tuple[Tally, list[tuple[float, float | None, float]]]:
    """A run whose work is proportional to bytes; with (share that is done, remaining time told, remaining time in truth) at each commit."""
    chance = random.Random(0)
    rows = sum(unit.rows or 0 for unit in units)
    tally, weights = Tally(), Weights([(unit, [(0, unit.rows)]) for unit in units])
    tally.add([RunStarted("p", ("in",), "out", "r", asked_s=0.0, rows=rows or None, at_s=1.0), GroupPlanned("model", "model", 1.0, at_s=1.0)])
    free, ends = [startup_s + 0.3 * at for at in range(replicas)], []
    for unit in units:
        at = free.index(min(free))
        free[at] += unit.size_bytes * s_per_byte * (1 + noise * chance.uniform(-1, 1))
        ends.append((free[at], unit))
    told = []
    ends.sort(key=lambda end: end[0])
    for now in np.arange(startup_s, max(free) + 2, 2.0):
        settled = [unit for end, unit in ends if now - 2 <= end < now]
        if not settled:
            continue
        weights.settle({unit.id: [(0, unit.rows or 1000)] for unit in settled})
        for unit in settled:
            if unit.rows is None:
                weights.count(unit.id, 1000)
        tally.add([Committed(sum(unit.rows or 1000 for unit in settled), 0, (), weights.share, at_s=float(now))])
        told.append((tally.share or 0.0, tally.eta_s, max(free) - now))
    return told


def units_of(sizes: list[int], *, rows: int | None = 1000) -> list[Unit]:
    return [Unit(number, (f"in/{number}.parquet",), 0 if rows else None, 0, rows, size, 0) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("rows", [1000, None], ids=["known rows", "rows that only reading tells"])
@pytest.mark.parametrize(
    ("sizes", "within"),
    [([1000] * 400, 0.1), ([100] * 200 + [1900] * 200, 0.2), ([1900] * 200 + [100] * 200, 0.2), ([1000 + 900 * (at % 2) for at in range(400)], 0.1)],
    ids=["uniform", "light first", "heavy first", "mixed"],
)
def test_the_remaining_time_is_within_a_tenth_after_a_tenth_of_the_run(sizes: list[int], within: float, rows: int | None) -> None:
    """A fifth where rows change their weight at one go, since what is being computed counts for nothing yet."""
    told = run_of(units_of(sizes, rows=rows), s_per_byte=0.001, noise=0.3)
    late = [(share, eta, truth) for share, eta, truth in told if 0.1 <= share < 0.95]
    assert len(late) > 20
    for share, eta, truth in late:
        assert eta == pytest.approx(truth, rel=within, abs=3.0), f"at {share:.0%}"


def test_the_remaining_time_of_rows_without_bytes() -> None:
    """Without weights the share is one of rows; without a number of rows nothing is said."""
    tally = Tally()
    tally.add([RunStarted("p", (), "out", asked_s=0.0, rows=1100, before=100, at_s=0.0), Committed(100, 0, at_s=10.0)])
    assert (tally.share, tally.eta_s) == (0.1, None), "one commit is no rate"
    tally.add([Committed(100, 0, at_s=20.0)])
    assert (tally.share, tally.eta_s) == (0.2, pytest.approx(80.0))
    unknown = Tally()
    unknown.add([RunStarted("p", (), "out", at_s=0.0), Committed(100, 0, at_s=10.0), Committed(100, 0, at_s=20.0)])
    assert (unknown.share, unknown.eta_s) == (None, None)


def test_weights_of_a_run_that_goes_on() -> None:
    """Only what is due counts, and a unit that is several parts of a file has its part of the file's bytes."""
    halves = [Unit(0, ("a",), 0, 0, 60, 1000, 0), Unit(1, ("a",), 1, 0, 40, 1000, 0)]
    weights = Weights([(halves[0], [(50, 60)]), (halves[1], [(0, 40)])])
    assert weights.share is None
    weights.settle({0: [(50, 60)]})
    assert weights.share == pytest.approx(100 / 500)
    weights.settle({1: [(0, 20), (20, 40)]})
    assert weights.share == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_timeline_keeps_its_sums_and_stays_small(seed: int) -> None:
    """However long a run is, and in whatever order its events come."""
    chance, line = random.Random(seed), Timeline(100.0)
    total = 0.0
    for _ in range(300):
        start = 100 + chance.random() ** 4 * 1e6
        amount = chance.random()
        line.add("rows", start, start + chance.choice([0, 0.1, 50, 5000]), amount)
        total += amount
    assert sum(line.series["rows"]) == pytest.approx(total)
    assert len(line.series["rows"]) <= 120


def test_what_came_before_the_start_is_not_lost() -> None:
    """Clocks of machines differ."""
    line = Timeline(100.0)
    line.add("rows", 90.0, 95.0, 3.0)
    line.add("rows", 95.0, 101.5, 2.0)
    assert sum(line.series["rows"]) == pytest.approx(5.0)


def test_shares_of_a_model() -> None:
    """Two replicas for ten seconds: 12 of 20 computing, 5 without a block, 2 with one that could not be taken, 1 between blocks."""
    sums = GroupSums(GroupPlanned("m", "model"))
    sums.sample(GroupSampled("m", 0, 0, 2, at_s=0.0))
    for second, (queued, running) in enumerate([(0, 1)] * 5 + [(3, 1)] * 2 + [(3, 4)] * 3, 1):
        sums.sample(GroupSampled("m", queued, running, 2, at_s=float(second)))
    sums.block(BlockDone("m", 10, 12.0, 0, 0, at_s=10.0))
    assert Shares.of(sums) == Shares(0.6, 0.25, 0.1, pytest.approx(0.05))
    assert sums.busy_share == pytest.approx(13 / 20)
    assert Shares.of(GroupSums(GroupPlanned("m", "model"))) is None


def test_start_up_and_first_rows() -> None:
    """Up is when rows are being read and each model has a replica ready."""
    tally = Tally()
    tally.add([RunStarted("p", (), "out", asked_s=100.0, at_s=101.0), GroupPlanned(READER, "reader"), GroupPlanned("a", "model"), GroupPlanned("b", "model")])
    tally.add([BlockDone(READER, 5, 0.5, 0, 0, at_s=104.0), ReplicaReady("a", "n", "cpu", 3.0, at_s=106.0), ReplicaReady("b", "n", "cpu", 3.0, at_s=109.0)])
    tally.add([ReplicaReady("b", "n", "cpu", 3.0, at_s=120.0), BlockDone("b", 5, 1.0, 0, 0, at_s=111.0)])
    report = Report.of(tally, output="out", state=None)
    assert (report.startup_s, report.first_rows_s) == (9.0, 11.0)


@pytest.mark.parametrize(("error", "state"), [("StoppedError", "stopped"), ("StorageError", "failed")])
def test_a_run_that_ended_early(error: str, state: str) -> None:
    """Its report says how, and what it had done."""
    tally = Tally()
    tally.add([RunStarted("p", (), "out", rows=10, asked_s=0.0, at_s=0.0), Committed(4, 1, (("E in s", 1),), at_s=5.0), RunFailed(error, "why", at_s=6.0)])
    report = Report.of(tally, output="out", state=None)
    assert (report.state, report.error, report.rows_in, report.rows_out, report.dead_letters, report.wall_s) == (state, f"{error}: why", 5, 4, 1, 6.0)
    assert report.to_dict()["rows_per_s"] == pytest.approx(5 / 6)
