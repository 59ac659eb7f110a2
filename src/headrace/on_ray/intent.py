"""A service as a command means it: what, where, how; and what stands when that is done."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.on_ray.deploying import Bounds, Change
from headrace.on_ray.doors import Opening
from headrace.pipeline import Pipeline
from headrace.serving.bodies import openapi
from headrace.serving.routes import Limits
from headrace.speech import COMPLETIONS, EMBEDDINGS


@dataclass(frozen=True, slots=True)
class Where:
    """Which Ray: the one at `address`, or a service's own on this machine. `folder` is where the pipeline file lies."""

    address: str | None = None
    folder: Path | None = None
    verbose: bool = False

    @property
    def joins(self) -> str | None:
        """The cluster to join, if any."""
        return self.address or os.environ.get("RAY_ADDRESS")


@dataclass(frozen=True, slots=True)
class Face:
    """What a service shows: where its doors listen, how many there are, TLS, the file with its keys, and whether requests are logged.

    `opening` has the doors speak OpenAI's interface; `guarded` is whether it knows keys, and lets nobody in without one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    doors: int = 2
    tls: tuple[str, str] | None = None
    keys: Path | None = None
    log: bool = True
    opening: Opening | None = None
    guarded: bool = False

    def url(self, port: int, machine: str) -> str:
        """Where it answers, seen from this machine, whose own address is `machine`."""
        host = machine if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared, not bound
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True, slots=True)
class Service:
    """A service as a command means it: its pipeline and name, where it is to run, and how.

    With `behind` it is the guest of the service of that name, whose doors and whose Ray are its, too, and `face` counts for nothing.
    """

    pipeline: Pipeline
    name: str
    where: Where = field(default_factory=Where)
    face: Face = field(default_factory=Face)
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    change: Change = field(default_factory=Change)
    behind: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What answers now: the services that were begun or changed, those that are `new`, where, and the service whose doors these are.

    `ca` is the certificate to trust there; `guarded` is whether a key is asked for.
    """

    services: tuple[Service, ...]
    new: tuple[Service, ...]
    url: str
    host: str
    ca: str | None
    guarded: bool

    def curl(self, path: str, model: str) -> str:
        """The command that asks a model."""
        asked = {EMBEDDINGS: {"input": "Good"}, COMPLETIONS: {"prompt": "Good"}}.get(path, {"messages": [{"role": "user", "content": "Hello"}]})
        return self._curl(path, {"model": model, **asked})

    def told(self, service: Service) -> list[str]:
        """How a service is asked, in lines."""
        contract = openapi.contract(service.pipeline)
        path = f"/{service.pipeline.name}"
        documented = f" and is documented at {self.url}/docs" if service.behind is None else ""
        lines = [f"{service.name} answers at {self.url}{path}{documented}", self._curl(path, contract["sample"])]
        if speech := contract.get("speech"):
            lines += [
                f"{service.name} speaks OpenAI's interface at {self.url}/v1, as the model {speech['model']}",
                self.curl(speech["paths"][0], speech["model"]),
            ]
        return lines

    def _curl(self, path: str, body: Any) -> str:
        key = " -H 'Authorization: Bearer hr_...'" if self.guarded else ""
        return f"  curl {self.url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
