"""Nodes that go away in the middle of a run, and new ones that come."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import INJECT, SEED, SOURCE, Moment, share
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
