"""A job in a folder, an S3 server, and the figures of the suite. Whatever a test starts, it ends."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Set before ray is imported: a local Ray would otherwise turn authentication on by itself, and leave a token behind.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import harness
import pyarrow as pa
import pytest
from harness import TIGHT, Figures, Output, Running

RESULTS = Path(__file__).parents[2] / "benchmarks/results/faults.json"
FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--record, for which this folder must be named on the command line."""
    parser.addoption("--record", action="store_true", help="write the figures to benchmarks/results/faults.json, unless a test failed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray and its dependencies warn about themselves, from frames that a filter cannot tell from ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Where the tests add up what they find."""
    return pytestconfig.stash.setdefault(FIGURES, Figures())


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the figures, and record them if that was asked for."""
    found = config.stash.get(FIGURES, Figures())
    for line in found.lines():
        terminalreporter.write_line(line)
    if found.rows and config.getoption("--record", default=False) and not terminalreporter.stats.keys() & {"failed", "error"}:
        about = {
            "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("headrace", "ray", "pyarrow", "numpy")},
            "date": time.strftime("%Y-%m-%d"),
        }
        # The suite may be run in parts: figures of the kinds that did not run stay.
        before = json.loads(RESULTS.read_text())["kinds"] if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(about | {"kinds": before | found.rows}, indent=2) + "\n")


@dataclass(slots=True, kw_only=True)
class Scene:
    """A job and an output, over which runs are started, struck and started again."""

    folder: Path
    output: Output
    kind: str
    figures: Figures
    input: Path
    wanted: pa.Table
    runs: list[Running] = field(default_factory=list)
    since_s: float = field(default_factory=time.monotonic)

    def start(self, *more: str, plan: dict[str, Any] | None = None, **variables: str) -> Running:
        """`headrace run` of the job, under tight limits."""
        arguments = ["headrace", "run", "job.py", "--input", str(self.input), "--output", self.output.uri, "--keep", "id,text", *more]
        run = Running(arguments, folder=self.folder, plan={"limits": TIGHT, **(plan or {})}, **variables)
        self.runs.append(run)
        return run

    def finish(self, *more: str, **plan: Any) -> Running:
        """A run to its end, which must be a good one."""
        run = self.start(*more, plan=plan)
        code = run.wait()
        assert code == 0, f"exit code {code}:\n{run.said[-4000:]}"
        return run

    def check(self, faults: int, *, litter: bool = False) -> None:
        """Hold that nothing was lost, doubled or changed, that no row is dead, and that no process is left; note the figures."""
        left = [one for run in self.runs for one in run.left()]
        count = self.output.count(self.wanted)
        self.figures.add(self.kind, faults=faults, runs=len(self.runs), seconds=time.monotonic() - self.since_s, count=count, left=len(left))
        for run in self.runs:
            run.end()
        self.runs.clear()
        self.since_s = time.monotonic()
        self.output.check(self.wanted, litter=litter)
        assert self.output.letters() == []
        assert not left, f"processes outlived their run: {left}"


@pytest.fixture(scope="session")
def job_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's input."""
    folder = tmp_path_factory.mktemp("input") / "in"
    harness.write_input(folder)
    return folder


@pytest.fixture
def stage(tmp_path: Path, job_input: Path, figures: Figures) -> Iterator[Callable[..., Scene]]:
    """Makes scenes; what is left of their runs is ended."""
    made: list[Scene] = []

    def make(kind: str, *, output: Output | None = None, name: str = "out", **more: Any) -> Scene:
        output = output or Output(str(tmp_path / name))
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work/job.py").write_text(harness.PIPELINE)
        scene = Scene(folder=tmp_path / "work", output=output, kind=kind, figures=figures, input=job_input, wanted=harness.expected(), **more)
        made.append(scene)
        return scene

    try:
        yield make
    finally:
        for run in [run for scene in made for run in scene.runs]:
            run.end()


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str], Output]]:
    """An S3 server on loopback, and outputs on it. The environment points to it for the length of the module."""
    import boto3
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(proxy, raising=False)
        client = boto3.client("s3")
        client.create_bucket(Bucket="faults")

        def keys() -> set[str]:
            return {*dict.keys(s3_backends["123456789012"]["aws"].buckets["faults"].keys)}  # the server runs in this very process

        try:
            yield lambda name: Output(f"s3://faults/{name}", keys)
        finally:
            client.close()
            server.stop()


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A Ray of eight CPUs in this process, whose workers can import headrace."""
    import ray

    from headrace.on_ray import compat

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(harness.SOURCE), os.environ.get("PYTHONPATH")])))
        patch.delenv("RAY_ADDRESS", raising=False)
        with compat.lean():
            ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
        try:
            yield
        finally:
            ray.shutdown()
