"""Two runs and one output: side by side, in the same instant, or one that was frozen and wakes up when the other has finished."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
from harness import SEED, SLOW, Moment

pytestmark = pytest.mark.faults

RECORD = r"ledger/\d+-\w+/record-"


def test_the_second_of_two_runs_is_refused(stage: Any) -> None:
    """While the first is at work."""
    scene = stage("two runs, one after the other")
    first = scene.start(*SLOW)
    assert Moment(RECORD).wait(first, scene.output)
    second = scene.start(*SLOW)
    assert (second.wait(), first.wait()) == (5, 0), second.said + first.said
    assert "is being written by another run" in second.said
    scene.check(1)


@pytest.mark.parametrize("turn", range(4))
def test_two_runs_in_the_same_instant(stage: Any, turn: int) -> None:
    """At most one counts."""
    scene = stage("two runs in the same instant")
    runs = [scene.start(), scene.start()]
    codes = sorted(run.wait() for run in runs)
    assert codes in ([0, 5], [0, 0], [5, 5]), [run.said for run in runs]
    scene.finish()
    scene.check(1, litter=True)


@pytest.mark.parametrize("turn", range(6))
def test_a_driver_wakes_up_when_another_run_has_finished(stage: Any, turn: int) -> None:
    """Frozen at any moment in the middle, it ends with exit code 5, and has changed nothing."""
    chance = random.Random(f"{SEED} frozen {turn}")
    scene = stage("a frozen driver wakes up")
    sleeper = scene.start()
    assert Moment(chance.choice([RECORD, RECORD, r"staging/.*parquet$", "^part-"]), chance.randint(1, 2), chance.uniform(0, 0.1)).wait(sleeper, scene.output)
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    was_done = "_SUCCESS" in scene.output.paths()  # then nothing is left for it to do but to end Ray
    scene.finish()
    scene.output.check(scene.wanted, litter=True)
    before = {path for path in scene.output.paths() if not path.startswith("_headrace/")}
    os.kill(sleeper.process.pid, signal.SIGCONT)
    assert sleeper.wait() == (0 if was_done else 5), sleeper.said
    assert {path for path in scene.output.paths() if not path.startswith("_headrace/")} == before
    scene.check(1, litter=True)
