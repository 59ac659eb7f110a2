"""A service follows the aliases that its settings name: when one moves, the version that it names now is brought in, as a canary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions

from headrace.errors import DeployError, HeadraceError, StoppedError
from headrace.on_ray.deploying import Deployed, Tell, get
from headrace.on_ray.naming import control_of
from headrace.pipeline import Pipeline
from headrace.serving.release.versions import Canary, How

Wait = Callable[[float], bool]
"""Waits so many seconds; whether it is over."""

Meant = Mapping[str, Mapping[str, Any]]
"""The settings of each stage, with the versions that aliases mean."""


@dataclass(slots=True)
class Follower:
    """Watches what the aliases mean that the settings of a deployed pipeline name; `last` is what was deployed last.

    A version that did not take over is not tried again until its alias has meant something else. What somebody else has deployed since is left
    alone: from then on it is theirs to follow.
    """

    last: Deployed
    every_s: float
    _refused: Meant | None = field(default=None, init=False)
    _trouble: str = field(default="", init=False)

    def run(self, tell: Tell, wait: Wait, narrated: bool = True) -> None:
        """Follow until `wait` says that it is over, or somebody else has deployed a version. With `narrated` all that a version goes through is told."""
        while not wait(self.every_s):
            try:
                if not self._look(tell, narrated, lambda: wait(0.0)):
                    return
                self._trouble = ""
            except StoppedError:
                return
            except (HeadraceError, ray.exceptions.RayError) as error:  # the registry, or control, is away: for as long as that takes, the service is as it was
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    tell(f"cannot look whether aliases of {self.last.deployment.service} have moved: {error}")

    def _look(self, tell: Tell, narrated: bool, over: Callable[[], bool]) -> bool:
        """Bring in what an alias means now, if that is something else; False if it is no longer for this one to do."""
        deployment, answering = self.last.deployment, _settings(self.last.pipeline)
        meant = _settings(deployment.pipeline.pinned())
        if meant == answering:
            self._refused = None
        if meant in (answering, self._refused):
            return True
        try:
            control = control_of(deployment.service)
        except ValueError:  # the service has ended
            return False
        latest, _ = get(control.latest.remote())
        if latest != self.last.number:
            tell(f"version {latest} of {deployment.service} was deployed by another command; aliases are not followed here any more")
            return False
        tell(f"{_moved(answering, meant)}: brought in as a canary")
        try:
            made = dataclasses.replace(deployment, change=dataclasses.replace(deployment.change, how=_canary(deployment.change.how))).run(
                tell if narrated else _silence, over=over
            )
            self.last = dataclasses.replace(made, deployment=deployment)
        except DeployError as error:
            self._refused = meant
            latest, _ = get(control.latest.remote())
            # A later one than ours is somebody else's, which superseded it.
            self.last = dataclasses.replace(self.last, number=min(latest, self.last.number + 1))
            tell(f"{error}; it is not tried again until the alias has named another")
        return True


def _canary(how: How) -> Canary:
    """How a version comes in. That another model answers otherwise is why it is there: what it says was judged by the gates of its promotion."""
    canary = how if isinstance(how, Canary) else Canary()
    return dataclasses.replace(canary, tolerance=dataclasses.replace(canary.tolerance, different=None))


def _silence(text: str) -> None:
    """Tell nothing."""


def _settings(pipeline: Pipeline) -> Meant:
    return {stage.name: stage.settings for stage in pipeline.stages}


def _moved(before: Meant, now: Meant) -> str:
    """Which settings name another version now."""
    moved = [(stage, name, value) for stage, values in now.items() for name, value in values.items() if before[stage][name] != value]
    return ", ".join(f"{stage}.{name} was {before[stage][name]!r}, is {value!r}" for stage, name, value in moved)
