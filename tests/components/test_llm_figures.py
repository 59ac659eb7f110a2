"""What engines say about themselves, on its way from vLLM's statistics to the report; and how a process that cannot go on ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import headrace as hr
from headrace import expendable
from headrace.cli.progress import line
from headrace.console.page import page
from headrace.cost import Machine, Meter, Prices
from headrace.events import BlockDone, EngineSampled, Event, GroupPlanned, MachinesSeen, RunFinished, RunStarted
from headrace.llms import processes
from headrace.llms.steps import Steps
from headrace.readings import Readings
from headrace.report import Report
from headrace.stage import Stage
from headrace.tally import Tally


def scheduled(running: int, kv_cache: float, *, looked_up: int = 0, found: int = 0) -> Any:
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=1, kv_cache_usage=kv_cache, prefix_cache_stats=SimpleNamespace(queries=looked_up, hits=found)
    )


def done(prompt: int, generated: int) -> Any:
    return SimpleNamespace(num_prompt_tokens=prompt, num_generation_tokens=generated, num_preempted_reqs=0)


def test_steps_add_up_and_the_cache_keeps_its_peak():
    steps = Steps()
    steps.add(scheduled(8, 0.5, looked_up=100, found=64), done(100, 8))
    steps.add(scheduled(2, 0.1), done(0, 2))
    steps.add(None, None)
    first = steps.figures()
    assert (first["prompt_tokens"], first["generated_tokens"], first["prefix_hits"], first["running"], steps.count) == (100, 10, 64, 2, 3)
    assert (first["kv_cache"], first["kv_cache_peak"]) == (0.1, 0.5) and steps.figures() == first


@hr.stage(out={"y": str})
class Counting:
    def __call__(self, x: hr.Column[str]):
        return {"y": x}

    def figures(self) -> dict[str, float]:
        return {"generated_tokens": 5.0 * self.asked(), "kv_cache": 0.25}

    def asked(self) -> int:
        vars(self)["times"] = vars(self).get("times", 0) + 1
        return vars(self)["times"]


def test_readings_are_what_has_changed():
    told: list[Event] = []
    readings = Readings([Stage.of(Counting())], group="g", emit=told.append)
    readings.tell()
    readings.tell()
    assert [(one.group, one.generated_tokens, one.kv_cache) for one in told if isinstance(one, EngineSampled)][:2] == [("g", 5, 0.25), ("g", 5, 0.25)]


def test_a_stage_without_figures_is_not_asked():
    told: list[Event] = []
    readings = Readings([Stage.of(hr.stage(out={"y": str})(_same))], group="g", emit=told.append)
    readings.tell()
    assert not told


def _same(x: hr.Column[str]):
    return {"y": x}


def test_the_report_sums_up_what_engines_said():
    tally = Tally(Meter(Prices.parse(["cpu=1"])))
    tally.add(
        [
            RunStarted("p", ("in",), "out", asked_s=0.0, at_s=0.0),
            MachinesSeen((tuple(vars_of(Machine("a", cpus=1.0, memory_gb=4.0)).values()),), at_s=0.0),
            GroupPlanned("summary", "model", 1.0, at_s=0.0),
            BlockDone("summary", 100, 10.0, 0, 0, at_s=20.0),
            EngineSampled("summary", 3000, 1000, 3000, 1500, 0, 8, 0, 0.1, 0.4, at_s=15.0),
            EngineSampled("summary", 1000, 1000, 1000, 500, 2, 0, 0, 0.0, 0.2, at_s=20.0),
            RunFinished(100, 100, 0, 36.0, at_s=36.0),
        ]
    )
    report = Report.of(tally, output="out", state=None)
    (group,) = report.stages
    assert group.engine is not None
    assert (group.engine.prompt_tokens, group.engine.generated_tokens, group.engine.generated_per_s) == (4000, 2000, 200.0)
    assert (group.engine.prefix_share, group.engine.kv_cache, group.engine.preempted) == (0.5, 0.4, 2)
    assert report.usd_per_million_tokens == pytest.approx(0.01 / 6000 * 1e6)
    for shown in (str(report), page(report)):
        assert "4,000 prompt and 2,000 generated tokens, 200 tokens/s; KV cache at most 40% in use" in shown
        assert "1.67 USD per million tokens" in shown
    assert "summary 0 replicas, 0.0 tokens/s" in line(report)  # in the last ten seconds
    assert report.to_dict()["groups"][0]["engine"]["generated_tokens"] == 2000


def vars_of(machine: Machine) -> dict[str, Any]:
    import dataclasses

    return {one.name: getattr(machine, one.name) for one in dataclasses.fields(machine)}


def test_a_run_without_engines_says_nothing_of_them():
    report = Report.of(Tally(), output="out", state=None)
    assert report.usd_per_million_tokens is None and "tokens" not in str(report)


@pytest.mark.parametrize(("declared", "own_doing", "code"), [(True, True, 1), (True, False, -9), (False, True, 0)])
def test_only_a_process_that_somebody_starts_again_ends(declared: bool, own_doing: bool, code: int):
    script = f"from headrace import expendable\nif {declared}: expendable.declare()\nexpendable.give_up('the engine died', own_doing={own_doing})"
    environment = {"PYTHONPATH": str(Path(expendable.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ("the engine died" in ended.stderr) == declared


CHILDREN = """
import os, signal, subprocess, sys, time
from headrace.llms.processes import Processes
processes = Processes()
with processes.marked():
    child = subprocess.Popen(["sh", "-c", "(echo 1; sleep 300) & wait"], stdout=subprocess.PIPE)
child.stdout.readline()
os.kill(child.pid, signal.SIGSTOP)
print(processes.mark, flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["processes.end(); child.wait()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_an_engines_processes_end_with_the_one_that_started_them(then: str):
    """However that ends, and though one of them is stopped."""
    environment = {"PYTHONPATH": str(Path(expendable.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", CHILDREN.format(then=then)], env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    mark = f"HEADRACE_ENGINE={ended.stdout.strip()}".encode()
    until_s = time.monotonic() + 20
    while left := [pid for pid in processes._others() if mark in processes._environment(pid)]:
        assert time.monotonic() < until_s, left
        time.sleep(0.05)
