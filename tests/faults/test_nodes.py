"""Nodes that go away in the middle of a run, and new ones that come."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import INJECT, SEED, SOURCE, Moment, share, title
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.faults

IN_A_RUN = 4
NODE = {"num_cpus": 3, "object_store_memory": 128 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head, to which nodes are added; all of it is ended afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(INJECT), str(SOURCE)]))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 256 << 20})
        try:
            yield cluster
        finally:
            cluster.shutdown()


def test_nodes_are_killed(stage: Any, cluster: Cluster, tmp_path: Path) -> None:
    """Their raylet by SIGKILL, and with it their workers and what their object store held. A new node comes for each."""
    chance, killed, quota = random.Random(f"{SEED} nodes"), 0, share("node")
    nodes = [cluster.add_node(**NODE), cluster.add_node(**NODE)]
    cluster.wait_for_nodes()
    while killed < quota:
        scene = stage("node, local", name=f"out-{killed}")
        run, here = scene.start("--address", cluster.address), 0
        assert Moment(r"ledger/\d+-\w+/base-").wait(run, scene.output), run.said
        while here < min(IN_A_RUN, quota - killed) and Moment.soon(chance).wait(run, scene.output):
            cluster.remove_node(nodes.pop(chance.randrange(2)), allow_graceful=False)
            here += 1
            nodes.append(cluster.add_node(**NODE))
        code = run.wait()
        assert code == 0, f"exit code {code} after {here} nodes were killed:\n{run.said[-4000:]}"
        scene.check(here)
        killed += here


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_writing_worker_wakes_up_when_another_run_has_finished(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A node freezes while its worker writes a file, the driver is killed, and another run finishes. What the worker then writes counts for nothing.

    The raylet is frozen as well, as a machine is that has lost its network: it would kill a worker whose driver is gone.
    """
    scene, mark = stage("a frozen writing worker wakes up"), tmp_path / "frozen"
    strike = {"who": "worker", "only": "staging/", "at": 0, "when": when, "signal": signal.SIGSTOP, "mark": str(mark)}
    monkeypatch.setenv("HEADRACE_FAULT_PLAN", json.dumps({"strike": strike}))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(INJECT), str(SOURCE)]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False, "object_store_memory": 256 << 20})
    frozen: list[psutil.Process] = []
    try:
        run = scene.start("--address", cluster.address)
        while not frozen:
            assert run.alive, run.said
            processes = psutil.Process().children(recursive=True)
            frozen = [process for process in processes if title(process).startswith("ray::") and process.status() == psutil.STATUS_STOPPED]
        raylet = frozen[0].parent()
        assert raylet is not None and "raylet" in raylet.name()
        raylet.suspend()
        frozen.append(raylet)
        run.kill()
        scene.finish()
        scene.output.check(scene.wanted)
        before = {path for path in scene.output.paths() if not path.startswith("_headrace/")}
        assert frozen[0].status() == psutil.STATUS_STOPPED
        frozen[0].resume()
        folder = "_headrace/staging/000001-"
        until = time.monotonic() + 60
        while not any(path.startswith(folder) and path.endswith(".parquet") for path in scene.output.paths()):
            assert when == "between" or time.monotonic() < until, "the worker has written nothing: the test tests nothing"
            if not frozen[0].is_running() or time.monotonic() > until:
                break  # the folder with its partial file was swept: there is nothing to rename
            time.sleep(0.01)
        assert {path for path in scene.output.paths() if not path.startswith("_headrace/")} == before
        scene.check(1, litter=True)
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        cluster.shutdown()
