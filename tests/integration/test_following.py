"""A service that follows an alias of a registry: a move brings the version in as a canary, a bad one is taken back, and the registry may be away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import registered
from test_service import Served, until

from headrace import registry

SERVICE = """
import headrace as hr
from headrace import registry
from headrace.on_ray.deploying import Change
from headrace.on_ray.service import Face, Service, serve
from headrace.serving.release.versions import Canary


@hr.stage(out={"scaled": float})
class Scale:
    model: str = "models:/scale@prod"

    def setup(self, device):
        self.factor = float((registry.fetch(self.model) / "factor.txt").read_text())

    def __call__(self, x: hr.Column[float]):
        return {"scaled": x * self.factor}


if __name__ == "__main__":
    quick = Canary(share=0.5, steps=(), step_s=1.0, step_pairs=10, start_s=60.0)
    serve(Service(hr.Pipeline("scaled", Scale()), "scaled", face=Face(port=0), change=Change(quick, follow_s=0.5)), tell=lambda text: print(text, flush=True))
"""


class Followed(Served):
    """A service in a process of its own, which prints what happens."""

    def follow(self) -> None:
        (self.folder / "service.py").write_text(SERVICE)
        environment = {**self.environment, **{name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}}
        self.process = subprocess.Popen([sys.executable, "service.py"], cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.readers = [threading.Thread(target=lambda: self.lines.extend(self.process.stdout))]  # type: ignore[union-attr, arg-type]
        self.readers[0].start()

    def say(self) -> str:
        return "".join(self.lines)

    def told(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def scaled(self) -> tuple[float, str]:
        """What 1.0 is scaled to, and by which version."""
        request = urllib.request.Request(f"{self.url}/scaled", json.dumps({"x": 1.0}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())["scaled"], answer.headers["X-Headrace-Version"]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    with registered.asked(registered.in_file(tmp_path / "registry")) as client, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield client


def made(folder: Path, factor: str) -> None:
    """A new version of the model that multiplies by `factor`, as the candidate."""
    folder.mkdir(exist_ok=True)
    (folder / "factor.txt").write_text(factor)
    registry.register(folder, "scale")


@pytest.mark.faults  # for the time it takes
@pytest.mark.filterwarnings("ignore")  # mlflow's own, and its dependencies'
def test_an_alias_that_moves_brings_its_version_in(client: Any, tmp_path: Path):
    made(tmp_path / "model", "2")
    registry.promote("scale", gates=[])
    service = Followed(tmp_path)
    service.follow()
    try:
        assert until(lambda: service.told("answers at"), 120)
        service.url = next(line for line in service.lines if "answers at" in line).split("answers at ")[1].split("/scaled")[0]
        assert service.scaled() == (2.0, "1")

        made(tmp_path / "model", "3")
        registry.promote("scale", gates=[])
        assert until(lambda: service.scaled() == (3.0, "2") and service.told("version 2"), 120)
        assert service.told("scale.model was 'models:/scale/1', is 'models:/scale/2': brought in as a canary")
        assert until(lambda: {service.scaled() for _ in range(5)} == {(3.0, "2")}, 60)  # all of them, by now

        made(tmp_path / "model", "no number")  # its replicas cannot start
        registry.promote("scale", gates=[])
        assert until(lambda: service.told("it is not tried again until the alias has named another"), 120)
        assert {service.scaled() for _ in range(5)} == {(3.0, "2")}
        registry.rollback("scale")  # to what answers anyway: nothing is deployed

        made(tmp_path / "model", "5")
        registry.promote("scale", gates=[])
        assert until(lambda: service.scaled()[0] == 5.0, 120)
        assert sum("brought in" in line for line in service.lines) == 3
    finally:
        print(service.say())  # shown where the test fails
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(60)
        service.readers[0].join()
        assert service.process.stdout is not None
        service.process.stdout.close()
