"""Several nodes of different hardware: groups land where `on` says, a cluster is joined by address, a file is submitted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

import headrace as hr
from headrace.errors import HardwareError, RunError
from headrace.letters import Allowance
from headrace.on_ray.cluster import connected
from headrace.on_ray.job import Job
from headrace.resume import Mode

from conftest import SOURCE, Run  # isort: skip

GPU_NODE = {"num_cpus": 3, "num_gpus": 1, "resources": {"accelerator_type:L4": 1}}
STAGES = """
import headrace as hr


def node():
    import ray
    return ray.get_runtime_context().get_node_id()


@hr.stage(out={"tidy": str, "tidy_node": str})
def tidy(text: hr.Column[str]):
    return {"tidy": [" ".join(t.split()) for t in text], "tidy_node": [node()] * len(text)}


@hr.stage(out={"vector": hr.Vector(2), "device": str, "embed_node": str}, on=[hr.gpu(1, "H100"), hr.gpu(1, "L4"), hr.cpu(1)])
class Embed:
    factor: float = 1.0

    def setup(self, device):
        self.device = device

    def __call__(self, tidy: hr.Column[str]):
        n = len(tidy)
        return {"vector": [[len(t) * self.factor, 0.0] for t in tidy], "device": [self.device] * n, "embed_node": [node()] * n}


placed = hr.Pipeline("placed", tidy, Embed())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without accelerators and a node with one L4, with a dashboard on loopback; all of it is ended afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCE))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # a job runs the `python` that it finds
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": 0,
                "dashboard_agent_listen_port": 0,  # its fixed default belongs to whichever Ray on this machine came first
                "object_store_memory": 256 << 20,
            },
        )
        try:
            cluster.add_node(**GPU_NODE, object_store_memory=256 << 20)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    """A pipeline file, and beside it 200 rows in Parquet."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(200), "text": [f" text  {n}" for n in range(200)]}), tmp_path / "in/a.parquet")
    (tmp_path / "placed.py").write_text(STAGES)
    return tmp_path / "placed.py"


def load(path: Path) -> hr.Pipeline:
    """The pipeline of the file."""
    from headrace.cli.loading import load

    return load(str(path))


def nodes_with(**wanted: float) -> set[str]:
    """Nodes of the cluster that this process has joined which have some of each resource."""
    return {
        node["NodeID"] for node in ray.nodes() if node["Alive"] and all(bool(node["Resources"].get(name, 0)) == bool(there) for name, there in wanted.items())
    }


def read_back(folder: Path) -> pa.Table:
    """The output, by id."""
    return pa.concat_tables(pq.read_table(path) for path in folder.glob("part-*")).sort_by("id")


def test_groups_land_where_on_says(cluster: Cluster, pipeline_file: Path) -> None:
    """Joined by address: the model runs on the node with an L4, the second entry, since there is no H100."""
    out = pipeline_file.parent / "out"
    seen: dict[str, set[str]] = {}

    def watch(events: Any, rows: int | None) -> None:
        seen.setdefault("gpu", nodes_with(GPU=1))

    connect = partial(connected, cluster.address, folder=pipeline_file.parent)
    job = Job.of(load(pipeline_file), input=str(pipeline_file.parent / "in"), output=str(out), keep="id")
    report = job.run(mode=Mode.RESUME, allowance=Allowance.parse("1%"), connect=connect, watch=watch)
    data = read_back(out)
    assert data["id"].to_pylist() == list(range(200)) and data["vector"][7].as_py() == [6.0, 0.0]
    assert set(data["device"].to_pylist()) == {"cuda"}
    assert set(data["embed_node"].to_pylist()) == seen["gpu"] and len(seen["gpu"]) == 1
    assert report.stages[1].replicas == 1
    assert not ray.is_initialized(), "a connection ends with the run"


@hr.stage(out={"y": str}, on=[hr.gpu(1, "H100"), hr.cpu(2)], replicas=1)
class Fallback:
    """A model that would rather have an accelerator."""

    def setup(self, device: str) -> None:
        """Remember where it is."""
        self.device = device

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """The device."""
        return {"y": [self.device] * len(text)}


@hr.stage(out={"y": int}, on=[hr.gpu(8, "H100"), hr.gpu(2, "L4")])
class Greedy:
    """A model that nobody can hold."""

    def __call__(self, text: hr.Column[str]) -> dict[str, Any]:
        """Never called."""
        return {"y": [0] * len(text)}


def test_hardware_that_is_not_there(cluster: Cluster, pipeline_file: Path) -> None:
    """The next entry is taken where the first is absent; where there is none, the message says what there is."""
    input, out = str(pipeline_file.parent / "in"), pipeline_file.parent / "out"
    connect = partial(connected, cluster.address)
    options = {"mode": Mode.RESUME, "allowance": Allowance.parse("1%"), "connect": connect, "watch": lambda events, rows: None}
    Job.of(hr.Pipeline("p", Fallback()), input=input, output=str(out / "1"), keep="id").run(**options)
    assert set(read_back(out / "1")["y"].to_pylist()) == {"cpu"}
    with pytest.raises(HardwareError, match=r"stage 'greedy' asks for gpu\(8, H100\) or gpu\(2, L4\), and no node has it; the cluster has .*1 x L4"):
        Job.of(hr.Pipeline("p", Greedy()), input=input, output=str(out / "2")).run(**options)
    assert not (out / "2").exists()


def test_an_address_that_does_not_answer() -> None:
    """What it must look like is said."""
    with pytest.raises(RunError, match=r"cannot join Ray at 'not an address'.*It must be the head.s host:6379"), connected("not an address"):
        pass


def test_submit(cluster: Cluster, pipeline_file: Path, command: Run) -> None:
    """`--submit` ships the file and headrace to the cluster, runs there, shows what the job prints, and passes its exit code on."""
    url = f"http://{cluster.head_node.webui_url}"
    folder = pipeline_file.parent
    files = ["run", "placed.py", "--submit", url, "--input", str(folder / "in"), "--output", str(folder / "out"), "--keep", "id"]
    done = command(*files, "--set", "embed.factor=2")
    assert done.returncode == 0, done.stdout + done.stderr
    data = read_back(folder / "out")
    assert data["id"].to_pylist() == list(range(200)) and data["vector"][7].as_py() == [12.0, 0.0]
    assert "200 rows in" in done.stdout and (folder / "out/_SUCCESS").exists()
    again = command(*files)
    assert again.returncode == 4 and "embed.factor: was 2.0, is 1.0" in again.stdout and "code of" not in again.stdout


def test_a_dashboard_that_does_not_answer(pipeline_file: Path, command: Run) -> None:
    """What the address must be is said, without a traceback."""
    done = command("run", "placed.py", "--submit", "http://127.0.0.1:9", "-i", "x", "-o", "y")
    assert done.returncode == 1 and "cannot submit to 'http://127.0.0.1:9'" in done.stderr and "Traceback" not in done.stderr
