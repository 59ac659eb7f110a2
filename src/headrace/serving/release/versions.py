"""The versions of one service and how one takes over from another, as values that survive a restart of whoever decides.

What happens to them stands in `rollout`; nothing here decides anything.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.errors import SettingError
from headrace.events import Event
from headrace.scaling import policy
from headrace.serving.release.canary import Tolerance, Trial
from headrace.serving.routes import VersionReport

MIRROR_PER_S = 25.0
"""Most requests per second that are mirrored to a version on trial: enough for a verdict within a minute, and bounded whatever the traffic."""


class Role(enum.StrEnum):
    """What a version is to its service."""

    STARTING = "starting"  # its first replicas come up
    GATING = "gating"  # a replica of each group is ready; whoever runs the gate has the word
    JOINING = "joining"  # it takes over by and by, or is compared
    CURRENT = "current"
    PREVIOUS = "previous"  # kept warm, so that it can answer again at once
    FAILED = "failed"  # it did not take over, or was rolled back; to be deleted
    RETIRED = "retired"  # replaced; to be deleted

    @property
    def gone(self) -> bool:
        """Whether a version has no part in the service any more."""
        return self in (Role.FAILED, Role.RETIRED)


@dataclass(frozen=True, slots=True)
class Rolling:
    """A version takes over replica by replica, each in addition to what is there before one of the old is taken away.

    It fails if for `start_s` no further replica gets ready that should.
    """

    kind: Literal["rolling"] = "rolling"
    start_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Canary:
    """A version answers `share` of the requests, then those of `steps`, then all; it fails by itself if it is worse (`canary`).

    A step lasts until its share is reached and for `step_s` and `step_pairs` requests compared more (answered by the new version where nothing is
    mirrored). At most `mirror_per_s` requests per second are mirrored to it.
    """

    kind: Literal["canary"] = "canary"
    share: float = 0.05
    steps: tuple[float, ...] = (0.25, 0.5)
    step_s: float = 60.0
    step_pairs: int = 100
    mirror_per_s: float = MIRROR_PER_S
    start_s: float = 600.0
    tolerance: Tolerance = field(default_factory=Tolerance)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or any(not 0 < step < 1 for step in self.steps):
            raise SettingError(f"a canary's share is {self.share:g}, then {self.steps}; shares lie between 0 and 1, as in 5%; --shadow answers nothing")

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each step: the first, those of `steps` beyond it, and all."""
        return (self.share, *sorted(step for step in set(self.steps) if step > self.share), 1.0)


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version answers nothing; `share` of the requests is mirrored to it, `mirror_per_s` at most. It is never promoted by itself."""

    kind: Literal["shadow"] = "shadow"
    share: float = 1.0
    mirror_per_s: float = MIRROR_PER_S
    start_s: float = 600.0
    tolerance: Tolerance = field(default_factory=Tolerance)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingError(f"the share that is mirrored is {self.share:g}; it lies above 0 and is at most 1, as in 100%")


How = Rolling | Canary | Shadow


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the service: its number, the bounds of each of its groups, and what it is since when, and why.

    `wishes` are the replicas that each group should have by its load, `policies` what that decision remembers, `shed` the requests shed when last seen.
    """

    number: int
    scales: Mapping[str, policy.Scale]
    role: Role = Role.STARTING
    since_s: float = 0.0
    why: str = ""
    wishes: Mapping[str, int] = field(default_factory=dict)
    policies: Mapping[str, policy.State] = field(default_factory=dict)
    shed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traffic:
    """How many requests per second the service answers: `answered` of the two versions when last looked at, and a mean over the last ten seconds or so."""

    at_s: float = 0.0
    answered: int | None = None
    per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """How the version of that number takes over, and how far it is; with `gate`, somebody has to say that the gate is passed.

    `step` counts the shares of a canary; one is under way since `step_s`, which is None until its share is reached, when the trial had compared
    `step_pairs`. `sizes` are the replicas that the newcomer was given, `ready` the most that it had, `moved_s` when that last grew. `tight` says that there
    is no room for as many beside the others. `mirror` is the share of requests that is mirrored to it, `waits` what the rollout waits for, in words,
    `said` what was last told of it.
    """

    version: int
    how: How = field(default_factory=Rolling)
    gate: bool = False
    began_s: float = 0.0
    moved_s: float = 0.0
    step: int = 0
    step_s: float | None = None
    step_pairs: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    ready: int = 0
    tight: bool = False
    mirror: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    trial: Trial | None = None
    waits: str = ""
    said: str = ""

    @property
    def share(self) -> float:
        """The share of requests that the newcomer is to answer now, where it has the replicas for it."""
        if isinstance(self.how, Canary):
            return self.how.shares[self.step]
        return 0.0 if isinstance(self.how, Shadow) else 1.0


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All that is decided about a service. `keep_s` is how long a version that was replaced is kept warm; `latest` the highest number ever given."""

    versions: tuple[Version, ...] = ()
    rollout: Rollout | None = None
    keep_s: float = 600.0
    latest: int = 0
    stopped: bool = False

    def find(self, role: Role) -> Version | None:
        """The version of this role, if there is one. At most one is current, and one previous."""
        return next((version for version in self.versions if version.role is role), None)

    def version(self, number: int) -> Version | None:
        """The version of this number, unless it is forgotten."""
        return next((version for version in self.versions if version.number == number), None)

    @property
    def current(self) -> Version | None:
        """The version that answers."""
        return self.find(Role.CURRENT)

    @property
    def previous(self) -> Version | None:
        """The version that answered before, kept warm."""
        return self.find(Role.PREVIOUS)

    @property
    def candidate(self) -> Version | None:
        """The version that is to take over."""
        return self.version(self.rollout.version) if self.rollout else None


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for one group of one version.

    `in_flight` are those that its replicas have taken and not answered (queued ones included), but for those of work in the `background`; `waiting`
    those that doors hold because it has no replica; `shed` counts those refused, since control began.
    """

    in_flight: float = 0.0
    waiting: float = 0.0
    shed: int = 0
    background: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known at `at_s`, in seconds since the epoch: ready replicas and loads by version and group, reports and failures by version.

    Reports are summed over doors since control began; a trial finds out by itself when they begin again. `failures` are starts of replicas that failed:
    how many since the version was deployed, and why the last one did.
    """

    at_s: float
    ready: Mapping[tuple[int, str], int] = field(default_factory=dict)
    loads: Mapping[tuple[int, str], Load] = field(default_factory=dict)
    reports: Mapping[int, VersionReport] = field(default_factory=dict)
    failures: Mapping[int, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Told(Event):
    """Something that happened to a version; `numbers` are those that decided.

    `what` is "deployed", "ready", "gate passed", "step", "waits", "promoted", "failed", "rolled back", "answers again", "scaled", "retired", or for a
    shadow "looks alike" and "looks worse".
    """

    what: str
    version: int
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"version {self.version} {self.what}: {self.why}" if self.why else f"version {self.version} {self.what}"


@functools.cache
def _codec() -> Any:
    import pydantic

    return pydantic.TypeAdapter(ServiceState)


def to_json(state: ServiceState) -> str:
    """A state as text."""
    text: str = _codec().dump_json(state).decode()
    return text


def from_json(text: str | bytes) -> ServiceState:
    """The inverse of `to_json`; raises ValueError where this is no state."""
    state: ServiceState = _codec().validate_json(text)
    return state
