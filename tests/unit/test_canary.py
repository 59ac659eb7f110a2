"""The sequential test: equal versions are never told apart by looking often, worse ones soon, and the reasons carry the numbers."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from headrace.errors import SettingError
from headrace.serving.release import canary
from headrace.serving.release.canary import Coins, Counts, Tolerance, Trial, feed, judge
from headrace.serving.routes import LATENCY_BOUNDS_S, VersionReport


class Doors:
    """Two versions' reports, second by second: pairs by ratio of latencies and by who failed."""

    def __init__(self, tolerance: Tolerance | None = None, *, seed: int = 0) -> None:
        self.trial = Trial.begin(tolerance or Tolerance(), at_s=0.0)
        self.new, self.old = VersionReport(), VersionReport()
        self.random = np.random.default_rng(seed)
        self.at_s = 0.0
        self.look()

    def look(self) -> None:
        self.trial = feed(self.trial, at_s=self.at_s, candidate=self.new, base=self.old)

    def second(self, *, pairs: int = 20, slower: float = 1.0, errors: float = 0.0, base_errors: float = 0.0, different: float = 0.0) -> None:
        self.at_s += 1
        ratios = math.log(slower) + self.random.normal(0, 0.5, pairs)
        self.new.pairs += pairs
        self.new.pair_log_ratio += float(ratios.sum())
        self.new.pair_slower += int((ratios > 0).sum())
        self.new.pair_errors += int(self.random.binomial(pairs, errors))
        self.new.pair_base_errors += int(self.random.binomial(pairs, base_errors))
        self.new.pair_different += int(self.random.binomial(pairs, different))
        self.look()

    def answers(self, report: VersionReport, count: int, *, middle_s: float, errors: float = 0.0) -> None:
        report.answered += count
        report.errors += int(self.random.binomial(count, errors))
        for bucket in np.searchsorted(LATENCY_BOUNDS_S, middle_s * np.exp(self.random.normal(0, 0.4, count))):
            report.latencies[bucket] += 1

    def until_worse(self, limit_s: int = 200, **what: float) -> float:
        while not judge(self.trial).worse:
            assert self.at_s < limit_s, judge(self.trial)
            self.second(**what)
        return self.at_s


def test_equal_versions_are_not_told_apart():
    for seed in range(5):
        doors = Doors(seed=seed)
        for _ in range(200):
            doors.second(errors=0.01, base_errors=0.01)
            assert not judge(doors.trial).worse
        assert judge(doors.trial).within


def test_slower_by_half_is_found_within_a_minute():
    doors = Doors()
    assert 10 < doors.until_worse(slower=1.5) < 60
    assert re.fullmatch(r"latency 1\.[45]\d times the other version's on \d+ pairs; e-value [\d,]+ > 571", judge(doors.trial).why)


def test_two_percent_errors_are_found_within_a_minute():
    doors = Doors(seed=1)
    assert doors.until_worse(errors=0.02) < 60
    assert judge(doors.trial).why.startswith("errors in ")
    assert judge(doors.trial).numbers["errors"] > 0.005


def test_shifted_outputs_are_found_as_soon_as_there_is_a_sample():
    doors = Doors()
    assert doors.until_worse(different=1.0) == 1
    assert judge(doors.trial).why.startswith("outputs differ in 100.0% of 20 pairs; e-value")


def test_ten_differing_pairs_are_no_sample():
    doors = Doors()
    doors.second(pairs=10, different=1.0)
    assert not judge(doors.trial).worse


def test_what_is_tolerated_is_no_reason():
    tolerance = Tolerance(slower=1.6, errors=0.05, different=0.3)
    doors = Doors(tolerance)
    for _ in range(200):
        doors.second(slower=1.5, errors=0.02, different=0.25)
        assert not judge(doors.trial).worse


def test_what_is_not_judged_is_no_reason_and_not_told():
    doors = Doors(Tolerance(slower=None, errors=None, different=None))
    for _ in range(100):
        doors.second(slower=3, errors=0.5, different=1)
    verdict = judge(doors.trial)
    assert (verdict.worse, verdict.within, verdict.text) == (False, True, "nothing compared yet")


def test_a_little_slower_than_tolerated_is_not_within():
    doors = Doors()
    for _ in range(20):
        doors.second(slower=1.25, pairs=200)
    assert not judge(doors.trial).within


def test_cold_caches_are_left_out():
    doors = Doors()
    for _ in range(5):
        doors.second(pairs=4, slower=50)
    assert doors.trial.timed == 0
    doors.second()
    assert doors.trial.timed == 20
    assert math.exp(doors.trial.log_ratio / 20) < 2
    doors.trial = doors.trial.warm_up(at_s=doors.at_s)
    doors.second(slower=50)
    assert doors.trial.timed == 20


def test_errors_of_the_first_requests_count():
    doors = Doors()
    doors.second(pairs=10, errors=1.0)
    assert doors.trial.candidate.pair_errors == 10


def test_a_hiccup_of_one_version_is_no_verdict():
    doors = Doors()
    for at_s in range(120):
        doors.second(slower=4.0 if 40 <= at_s < 52 else 1.0)
        assert not judge(doors.trial).worse


def test_a_burst_of_errors_counts_as_few():
    doors = Doors()
    for at_s in range(60):
        doors.second(errors=1.0 if at_s in (30, 31) else 0.0)
        assert not judge(doors.trial).worse


def test_differences_too_small_to_matter_are_allowed():
    """0.2 ms more on 0.4 ms is half as much again, and nobody's concern."""
    doors = Doors(Tolerance(slower_s=0.0005))
    doors.answers(doors.old, 500, middle_s=0.0004)
    for _ in range(100):
        doors.second(slower=1.5)
    assert not judge(doors.trial).worse


def answered(doors: Doors, *, slower: float = 1.0, errors: float = 0.0, share: float = 0.1, limit_s: int = 400) -> float | None:
    """When a verdict comes without pairs, of answers alone."""
    for _ in range(limit_s):
        doors.at_s += 1
        doors.answers(doors.new, int(50 * share), middle_s=0.04 * slower, errors=errors)
        doors.answers(doors.old, int(50 * (1 - share)), middle_s=0.04, errors=0.002)
        doors.look()
        if judge(doors.trial).worse:
            return doors.at_s
    return None


def test_answers_alone_suffice_though_later():
    assert answered(Doors(), errors=0.002) is None
    found_s = answered(slower := Doors(), slower=1.5)
    assert found_s is not None and found_s < 200
    assert "answers against" in judge(slower.trial).why and judge(slower.trial).why.startswith("latency 1.")
    found_s = answered(failing := Doors(), errors=0.1)
    assert found_s is not None and found_s < 200
    assert judge(failing.trial).why.startswith("errors ")


def test_counting_that_begins_anew_loses_no_more_than_a_look():
    doors = Doors()
    for _ in range(20):
        doors.second(errors=0.02)
    before = doors.trial.candidate
    doors.new, doors.old = VersionReport(pairs=3, pair_errors=1), VersionReport()
    doors.look()
    assert doors.trial.candidate == before
    doors.second(pairs=20)
    assert doors.trial.candidate.pairs == before.pairs + 20


def test_looking_twice_at_the_same_changes_nothing():
    doors = Doors()
    doors.second()
    before = doors.trial
    doors.look()
    assert doors.trial == before


def test_a_fair_game_does_not_grow():
    """The mean of the e-value over all outcomes of ten fair tosses is 1, of ten that are capped in pairs below."""
    mean = sum(math.comb(10, heads) * Coins(heads, 10 - heads).e_value for heads in range(11)) / 2**10
    assert mean == pytest.approx(1)
    capped = sum(math.comb(10, heads) * Coins().toss(heads, 10 - heads, most=2).e_value for heads in range(11)) / 2**10
    assert capped < 1


def test_the_game_for_outputs_is_fair_too():
    mean = sum(math.comb(30, count) * 0.001**count * 0.999 ** (30 - count) * canary._e_different(count, 30, 0.0) for count in range(31))
    assert mean == pytest.approx(1)


def test_ranks_are_even_for_equal_latencies_and_lead_for_slower_ones():
    one = tuple(np.random.default_rng(0).multinomial(1000, np.full(73, 1 / 73)).tolist())
    assert canary._lead(one, one, 0.0) == pytest.approx(0, abs=1e-12)
    assert canary._lead(one, one, math.log(1.1)) < 0
    assert canary._lead((0,) * 50 + (5,) + (0,) * 22, (0,) * 20 + (95,) + (0,) * 52, math.log(1.1)) > 0.9
    assert canary._lead((0,) * 73, one, 0.0) == 0


def test_counts_add_up_and_go_back():
    report = VersionReport(answered=5, errors=1, pairs=3, pair_log_ratio=0.5)
    counts = Counts.of(report)
    assert counts.plus(counts).plus(counts, -1) == counts
    assert not counts.plus(counts.plus(counts), -1).sound
    assert dataclasses.replace(counts, errors=9, answered=9) == Counts.of(dataclasses.replace(report, errors=9))


@pytest.mark.parametrize("values", [{"slower": 0.9}, {"errors": 1.5}, {"different": -0.1}, {"alpha": 0}])
def test_tolerances_that_cannot_be_are_refused(values):
    with pytest.raises(SettingError):
        Tolerance(**values)
