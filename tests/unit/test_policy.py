"""Scaling: from requests alone, up at once, down by the largest wish of a window, to zero only after nothing came for long."""

from __future__ import annotations

import itertools

import pytest

from headrace.errors import SettingError
from headrace.scaling.policy import Observation, Scale, State, desired


def play(scale: Scale, loads: dict[float, float], *, until_s: int, waiting: dict[int, float] | None = None, shed: dict[int, int] | None = None) -> list[int]:
    """The replicas wanted each second; `loads` are requests in flight from a second on, and replicas are ready as soon as they are wanted."""
    state, ready, found, load = State(), scale.least, [], 0.0
    for at_s in range(until_s):
        load = loads.get(at_s, load)
        ready, state = desired(scale, Observation(at_s, load, (waiting or {}).get(at_s, 0), (shed or {}).get(at_s, 0), ready), state)
        found.append(ready)
    return found


def test_as_many_as_the_requests_need_within_the_bounds():
    scale = Scale(1, 5, target_in_flight=4, up_s=0, down_delay_s=0)
    wanted = [desired(scale, Observation(0, load), State())[0] for load in (0, 1, 4, 5, 8, 17, 1000)]
    assert wanted == [1, 1, 1, 2, 2, 5, 5]


def test_up_within_the_short_window_and_down_only_after_the_delay():
    wanted = play(Scale(1, 10, target_in_flight=1, up_s=2, down_delay_s=20), {5: 8.0, 30: 0.0}, until_s=60)
    assert wanted[:5] == [1] * 5
    assert wanted[5] == 4  # the mean of 0 and 8
    assert wanted[6:49] == [8] * 43
    assert wanted[49] == 4
    assert wanted[50:] == [1] * 10


def test_waves_do_not_take_replicas_away_from_the_next_wave():
    waves = {at_s: 8.0 if at_s // 10 % 2 == 0 else 0.0 for at_s in range(0, 200, 10)}
    wanted = play(Scale(1, 10, target_in_flight=1, down_delay_s=30), waves, until_s=200)
    assert set(wanted[2:]) == {8}


def test_the_window_holds_the_largest_wish_and_then_the_next_largest():
    wanted = play(Scale(1, 10, target_in_flight=1, up_s=1, down_delay_s=10), {0: 9.0, 2: 5.0, 4: 2.0}, until_s=20)
    assert wanted[:11] == [9] * 11
    assert wanted[11:13] == [5] * 2
    assert wanted[13:] == [2] * 7


def test_to_zero_after_idle_time_only_where_asked_and_back_at_once():
    scale = Scale(0, 4, target_in_flight=2, down_delay_s=600, idle_s=30)
    wanted = play(scale, {0: 3.0, 10: 0.0}, until_s=60, waiting={55: 7.0})
    assert wanted[:39] == [2] * 39  # the delay is longer than the idle time, which has the last word
    assert wanted[39:55] == [0] * 16
    assert wanted[55:] == [4] * 5
    assert play(Scale(1, 4, idle_s=30), {}, until_s=60) == [1] * 60


def test_a_version_that_nobody_asked_yet_has_one_replica():
    assert play(Scale(0, 4, idle_s=30), {}, until_s=40) == [1] * 30 + [0] * 10


def test_what_was_shed_counts_as_one_replica_more():
    """Queues that are bounded below the target would hide the load."""
    wanted = play(Scale(1, 4, target_in_flight=100), {0: 5.0}, until_s=10, shed=dict.fromkeys(range(2, 5), 50))
    assert wanted == [1, 1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_a_clock_that_is_set_back_does_no_harm():
    scale = Scale(0, 8, target_in_flight=1, idle_s=30)
    _, state = desired(scale, Observation(1e6, 8), State())
    wanted, state = desired(scale, Observation(10, 1), state)
    assert wanted == 1
    assert desired(scale, Observation(41, 0), state)[0] == 0


def test_memory_stays_small():
    scale, state = Scale(0, 50, target_in_flight=1, up_s=5, down_delay_s=600), State()
    for at_s, load in zip(range(2000), itertools.cycle(range(97)), strict=False):
        _, state = desired(scale, Observation(at_s, load), state)
        assert len(state.loads) <= 5 and len(state.wishes) <= 50


@pytest.mark.parametrize("values", [{"least": 3, "most": 2}, {"least": -1}, {"least": 0, "most": 0}, {"target_in_flight": 0}, {"idle_s": -1}])
def test_bounds_that_cannot_be_are_refused(values):
    with pytest.raises(SettingError):
        Scale(**values)


def test_background_work_keeps_the_last_replica_and_asks_for_no_further_one():
    scale, state = Scale(0, 4, target_in_flight=1, idle_s=10), State()
    found = []
    for at_s in range(60):
        wanted, state = desired(scale, Observation(at_s, 0, ready=1, background=at_s < 30), state)
        found.append(wanted)
    assert found[:39] == [1] * 39 and found[39:] == [0] * 21
