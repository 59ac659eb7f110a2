"""The driver dies at each of its operations on the output in turn, and so does the run that resumes it: nothing is lost or doubled."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Output

pytestmark = pytest.mark.faults

ROWS = 160
AT_ONCE = int(os.environ.get("HEADRACE_FAULT_JOBS", "3"))
MOST = 60  # operations of a run; it has about thirty


@pytest.fixture(scope="module")
def small_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Less input, since many runs are needed."""
    folder = tmp_path_factory.mktemp("small") / "in"
    harness.write_input(folder, ROWS)
    return folder


def strike(at: int, when: str) -> dict[str, Any]:
    """A plan by which the driver dies at one of its operations."""
    return {"strike": {"who": "driver", "at": at, "when": when, "signal": signal.SIGKILL}}


def die_and_resume(stage: Any, small_input: Path, output: Any, kind: str, at: int, when: tuple[str, str]) -> bool:
    """Die at the operation, die again in the resumed run, and resume that; False when the run has fewer operations."""
    name = f"{at}-{'-'.join(when)}"
    scene = stage(kind, name=name, output=output(name))
    scene = dataclasses.replace(scene, input=small_input, wanted=harness.expected(ROWS), runs=scene.runs)
    codes = []
    for turn, moment in enumerate(when):
        run = scene.start(plan=strike(at if turn == 0 else (7 * at) % 23, moment))
        codes.append(run.wait())
        assert codes[-1] in (0, -signal.SIGKILL), f"exit code {codes[-1]} at operation {at}, {moment}:\n{run.said[-4000:]}"
        if codes[0] == 0:
            run.end()
            return False
    scene.finish()
    scene.check(sum(code != 0 for code in codes))
    return True


def every(stage: Any, small_input: Path, output: Any, kind: str, when: tuple[str, str], step: int = 1) -> None:
    """`die_and_resume` for one operation after the other, several at once, until there are no more."""
    one = partial(die_and_resume, stage, small_input, output, kind, when=when)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for batch in itertools.batched(range(0, MOST, step), AT_ONCE) if hasattr(itertools, "batched") else _batched(range(0, MOST, step)):
            if not all(pool.map(lambda at: one(at=at), batch)):
                return
    pytest.fail(f"the run still had operations after {MOST}")


def _batched(numbers: range) -> list[range]:
    return [numbers[at : at + AT_ONCE] for at in range(0, len(numbers), AT_ONCE)]


@pytest.mark.parametrize("when", [("after", "between"), ("between", "before")], ids="-".join)
def test_death_at_each_operation_on_a_disk(stage: Any, small_input: Path, when: tuple[str, str]) -> None:
    """An operation took effect, and its answer never came; or it was cut off in the middle."""
    every(stage, small_input, lambda name: None, f"death {when[0]} each operation, local", when, step=1 if when[0] == "after" else 3)


def test_death_at_each_operation_on_s3(stage: Any, small_input: Path, bucket: Any) -> None:
    """The same; a move is a copy and a deletion there."""
    every(stage, small_input, bucket, "death after each operation, s3", ("after", "between"), step=2)


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_death_of_a_writing_worker(stage: Any, request: pytest.FixtureRequest, tmp_path: Path, when: str, where: str) -> None:
    """It has written a file, or a part of it, and nobody hears of that: the same run writes the rows again, and counts them once."""
    output: Output | None = request.getfixturevalue("bucket")(f"worker-{when}") if where == "s3" else None
    scene = stage(f"death of a writing worker, {where}", output=output)
    mark = tmp_path / "died"
    scene.finish(strike={"who": "worker", "only": "staging/", "at": 0, "when": when, "signal": signal.SIGKILL, "mark": str(mark)})
    assert mark.exists(), "nothing was killed: the test tests nothing"
    scene.check(1)
