"""SIGKILL at random moments, to every kind of process of a job: rows in are rows out still, and none comes twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from harness import SEED, Moment, Output, Running, share

pytestmark = pytest.mark.faults

IN_A_ROW = 10
IN_A_RUN = 6

TASKS = "ray::MapBatches", "ray::Repartition", "ray::write", "ray::merge"
ACTORS = ("ray::MapWorker",)
LOG = ("ray::EventLog",)

WHERE = pytest.mark.parametrize("where", ["local", "s3"])


@pytest.fixture
def outputs(where: str, request: pytest.FixtureRequest) -> Callable[[str], Output | None]:
    """Outputs by name, on S3 or where the scene has them."""
    return request.getfixturevalue("bucket") if where == "s3" else lambda name: None


def kill_one(run: Running, titles: tuple[str, ...], chance: random.Random) -> bool:
    """SIGKILL to one of the run's processes; False when there is none."""
    found = run.members(*titles)
    if not found:
        return False
    victim = chance.choice(found)
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@WHERE
@pytest.mark.parametrize(("kind", "titles"), [("task workers", TASKS), ("actors", ACTORS), ("event log", LOG)])
def test_processes_of_a_run(stage: Any, outputs: Any, where: str, kind: str, titles: tuple[str, ...]) -> None:
    """The run itself goes on, and ends well, however many of its processes are killed."""
    chance, killed, quota, runs = random.Random(f"{SEED} {kind} {where}"), 0, share(kind, where), 0
    while killed < quota:
        runs += 1
        assert runs <= quota + 5, f"{runs} runs, in which {killed} of {quota} processes could be killed"
        name = f"{kind.replace(' ', '-')}-{runs}"
        scene = stage(f"{kind}, {where}", output=outputs(name), name=name)
        run, here = scene.start(), 0
        assert Moment(r"ledger/\d+-\w+/base-").wait(run, scene.output), run.said
        while here < min(IN_A_RUN, quota - killed) and Moment.soon(chance).wait(run, scene.output):
            here += kill_one(run, titles, chance)
        code = run.wait()
        assert code == 0, f"exit code {code} after {here} kills:\n{run.said[-4000:]}"
        scene.check(here)
        killed += here


@WHERE
@pytest.mark.parametrize("kind", ["driver", "everything"])
def test_the_whole_run(stage: Any, outputs: Any, where: str, kind: str) -> None:
    """Killed up to ten times in a row, and started again with the same command each time."""
    chance, killed, quota, series = random.Random(f"{SEED} {kind} {where}"), 0, share(kind, where), 0
    while killed < quota:
        series += 1
        assert series <= quota + 5, f"{series} series, in which {killed} of {quota} runs could be killed"
        name = f"{kind}-{series}"
        scene = stage(f"{kind}, {where}", output=outputs(name), name=name)
        here = 0
        while here < min(IN_A_ROW, quota - killed):
            run = scene.start()
            if not Moment.random(chance).wait(run, scene.output):
                assert run.wait() == 0, run.said[-4000:]
                break  # it was faster, and is done: begin a new output
            run.kill() if kind == "driver" else run.kill_all()
            here += 1
        scene.finish()
        scene.check(here)
        killed += here
