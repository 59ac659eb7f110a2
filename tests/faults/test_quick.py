"""One fault of each kind, in the tests that everybody runs; `make faults` does the rest."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import poison
import pytest
from harness import SLOW, Moment, Output
from test_kills import ACTORS, TASKS, kill_one
from test_poison import expect_letters

import headrace as hr

RECORD = r"ledger/\d+-\w+/record-"


def test_a_task_and_an_actor_are_killed(stage: Any) -> None:
    """In one run, which goes on."""
    scene, chance, killed = stage("quick: worker and actor"), random.Random(0), 0
    run = scene.start()
    assert Moment(r"ledger/\d+-\w+/base-").wait(run, scene.output), run.said
    for titles in (ACTORS, TASKS):
        while run.alive and not kill_one(run, titles, chance):
            time.sleep(0.01)  # until there is one
        killed += run.alive
    assert run.wait() == 0, run.said
    assert killed == 2, "the run was over before both were killed: the test tests nothing"
    scene.check(killed)


def test_the_driver_and_then_everything_is_killed(stage: Any) -> None:
    """And the same command goes on, each time."""
    scene = stage("quick: driver and everything")
    run = scene.start()
    assert Moment(RECORD).wait(run, scene.output), run.said
    run.kill()
    again = scene.start()
    assert Moment(RECORD).wait(again, scene.output), again.said
    again.kill_all()
    assert "rows were done before" in scene.finish().said
    scene.check(2)


def test_two_runs_at_once(stage: Any) -> None:
    """The second is refused while the first is at work."""
    scene = stage("quick: two runs")
    first = scene.start(*SLOW)
    assert Moment(r"ledger/\d+-\w+/base-").wait(first, scene.output), first.said
    second = scene.start(*SLOW)
    assert (second.wait(), first.wait()) == (5, 0), second.said + first.said
    scene.check(1)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("form", "kind"),
    [("function", "raises"), ("model", "wrong length"), ("function", "memory limit"), ("function", "sigkill"), ("accelerated", "sigkill")],
)
def test_a_poison_row(tmp_path: Path, job_input: Path, form: str, kind: str) -> None:
    """It is the one dead letter."""
    hr.run(poison.pipeline(form, kind, [77]), input=str(job_input), output=str(tmp_path / "out"), keep="id")
    expect_letters(Output(str(tmp_path / "out")), [77])
