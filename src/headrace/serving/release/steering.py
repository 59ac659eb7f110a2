"""All that control knows of a service and decides each second, as one object without an engine: reports and announcements in, routes and targets out."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.serving.figures import Lately
from headrace.serving.release import canary, rollout
from headrace.serving.release.guests import Guests, names_of
from headrace.serving.release.roster import Roster
from headrace.serving.release.tallies import Tallies
from headrace.serving.release.versions import How, Load, Rolling, Seen, ServiceState, Told, Version, from_json, to_json
from headrace.serving.routes import DoorReport, Endpoint, Limits, Routes

EVENTS = 200
GRACE_S = 4.0
"""How long after a restart nothing is decided: by then every replica has said that it is there, twice."""


@dataclass(frozen=True, slots=True)
class Release:
    """A version that is to be deployed: its contract, and how it takes over. With `gate` it waits for the word of whoever runs the gate."""

    version: Version
    contract: Mapping[str, Any]
    how: How = dataclasses.field(default_factory=Rolling)
    gate: bool = False


class Steering:
    """A service's state, its replicas and counts. `at_s` is wall time, which is kept; `now_s` a monotonic clock of this process.

    `kept` is what `keep` returned before a restart; the first `GRACE_S` after that nothing is decided and no routes are given out.
    """

    def __init__(self, service: str, limits: Limits, *, now_s: float, at_s: float, kept: bytes | None = None) -> None:
        self.service, self.limits = service, limits
        self.roster, self.tallies, self.lately = Roster(), Tallies(), Lately()
        self.state = ServiceState()
        self.keys: Mapping[str, str] | None = None
        self.trouble = ""
        self.contracts: dict[int, Mapping[str, Any]] = {}
        self.guests = Guests(service)
        self.events: deque[tuple[int, Told]] = deque(maxlen=EVENTS)
        self.told = 0
        self.wanted: dict[tuple[int, str], int] = {}
        self.weights: dict[int, tuple[float, float]] = {}
        self._loads: dict[tuple[int, str], Load] = {}
        self._revision = int(at_s * 1000)  # grows over restarts, too
        self._ready_s, self._awake = now_s, True
        if kept is not None:
            self._resume(json.loads(kept), now_s=now_s)
        self.routes = Routes(service, self._revision, (), limits)

    @property
    def members(self) -> dict[tuple[int, str], tuple[Endpoint, ...]]:
        """The ready replicas of each group of each version that is not gone."""
        return {(v.number, group): self.roster.ready(v.number, group) for v in self.state.versions if not v.role.gone for group in v.scales}

    def waking(self, *, now_s: float) -> bool:
        """Whether it is too early after a restart to tell anything."""
        return now_s < self._ready_s or not self._awake

    def join(self, version: int, group: str, endpoint: Endpoint, *, now_s: float) -> bool:
        """Note a replica that says it is there; whether that is news."""
        return self.roster.join(version, group, endpoint, now_s=now_s)

    def report(self, report: DoorReport, *, now_s: float) -> bool:
        """Note what a door tells; whether it cannot wait: a group without replicas is asked for, or a replica hangs."""
        self.tallies.take(report, now_s=now_s)
        return any(self.wanted.get(key) == 0 for key in report.waiting) or any(self.roster.where(replica) for replica in report.hung)

    def peers(self, door: str, *, now_s: float) -> list[str]:
        """The metrics of the other doors."""
        return [report.metrics for report in self.tallies.current(now_s=now_s) if report.door != door and report.metrics]

    @property
    def names(self) -> tuple[str, ...]:
        """By which names the versions that are not gone are asked."""
        there = [version.number for version in self.state.versions if not version.role.gone]
        return tuple(name for number in there if number in self.contracts for name in names_of(self.contracts[number]))

    def seat(self, guest: str, names: Iterable[str]) -> None:
        """Take another service in behind this one's doors, to be asked by these names.

        Raises:
            ServingError: this one, or another guest, has one of the names.
        """
        self.guests.seat(guest, names, host=self.names)

    def deploy(self, release: Release, *, at_s: float) -> None:
        """Bring a version up beside what runs.

        Raises:
            ServingError: a guest has one of its names.
        """
        self.guests.check(self.service, names_of(release.contract), host=())
        self._decided(rollout.deploy(self.state, release.version, how=release.how, at_s=at_s, gate=release.gate))
        self.contracts[release.version.number] = release.contract

    def command(self, name: str, *, at_s: float, **arguments: Any) -> None:
        """One of `rollout`'s: promote, abort, rollback, stop, gate_passed, gate_failed."""
        self._decided(getattr(rollout, name)(self.state, at_s=at_s, **arguments))

    def tick(self, *, now_s: float, at_s: float, failures: Mapping[int, tuple[int, str]]) -> bool:
        """Decide what there is to decide; whether the routes have changed."""
        self.roster.expire(now_s=now_s)
        if now_s < self._ready_s:
            return False
        self._awake = True
        members = self.members
        replicas = {key: [endpoint.replica for endpoint in endpoints] for key, endpoints in members.items()}
        self._loads = self.tallies.loads(replicas, now_s=now_s)
        ready = {key: len(endpoints) for key, endpoints in members.items()}
        sums = self.tallies.sums(now_s=now_s)
        self.lately.note(sums, self.tallies.current(now_s=now_s), now_s=now_s)
        seen = Seen(at_s, ready, self._loads, sums, failures)
        self._decided(rollout.step(self.state, seen))
        self.weights = rollout.weights(self.state, seen)
        self.wanted = rollout.targets(self.state, seen)
        return self.publish()

    def publish(self) -> bool:
        """Make the routes anew; whether they have changed."""
        there = [version for version in self.state.versions if not version.role.gone]
        groups = {version.number: tuple(version.scales) for version in there}
        weights = {number: self.weights.get(number, (0.0, 0.0)) for number in groups}
        routes = Routes(self.service, self._revision, self.roster.routes(weights, groups, self.contracts), self.limits, self.keys, tuple(self.guests.names))
        if routes == self.routes:
            return False
        self._revision += 1
        self.routes = dataclasses.replace(routes, revision=self._revision)
        return True

    def retired(self) -> tuple[int, ...]:
        """Versions whose replicas are to be ended."""
        return rollout.retired(self.state)

    def forget(self, version: int) -> None:
        """A retired version's replicas have ended."""
        self.state = rollout.forget(self.state, version)
        self.contracts.pop(version, None)
        self.roster.forget(version)
        self.tallies.forget(version)

    def since(self, number: int) -> list[tuple[int, Told]]:
        """What happened after the event of that number."""
        return [(at, told) for at, told in self.events if at > number]

    def keep(self) -> bytes:
        """What a restart must not lose, as JSON."""
        events = [(number, dataclasses.asdict(told)) for number, told in self.events]
        contracts = {str(version): contract for version, contract in self.contracts.items()}
        kept = {"state": to_json(self.state), "contracts": contracts, "events": events, "told": self.told, "guests": self.guests.names}
        return json.dumps(kept).encode()

    def status(self, *, now_s: float, at_s: float) -> dict[str, Any]:
        """What `/status` tells beside each door's own figures."""
        sums = self.tallies.sums(now_s=now_s)
        return {
            "service": self.service,
            "at_s": at_s,
            "trouble": self.trouble,
            "versions": [self._version(version, sums.get(version.number), now_s=now_s) for version in self.state.versions],
            "rollout": None if self.state.rollout is None else self._rollout(),
            "doors": [{"name": door, "silent_s": round(silent_s, 1)} for door, silent_s in self.tallies.doors(now_s=now_s).items()],
            "events": [{**dataclasses.asdict(told), "number": number, "text": str(told)} for number, told in self.events],
        }

    def _version(self, version: Version, counted: Any, *, now_s: float) -> dict[str, Any]:
        weight, shadow = self.weights.get(version.number, (0.0, 0.0))
        return {
            "version": version.number,
            "role": version.role.value,
            "since_s": version.since_s,
            "why": version.why,
            "weight": weight,
            "shadow": shadow,
            "groups": [self._group(version.number, group, now_s=now_s) for group in version.scales],
            **self.lately.version(version.number, now_s=now_s),
            "speech": self.lately.speech(version.number, now_s=now_s),
            "counts": None if counted is None else {name: value for name, value in dataclasses.asdict(counted).items() if name != "latencies"},
        }

    def _group(self, version: int, group: str, *, now_s: float) -> dict[str, Any]:
        load = self._loads.get((version, group), Load())
        replicas = [endpoint.replica for endpoint in self.roster.ready(version, group)]
        return {
            "name": group,
            "ready": len(replicas),
            "wanted": self.wanted.get((version, group), 0),
            "in_flight": load.in_flight,
            "background": load.background,
            "waiting": load.waiting,
            "shed": load.shed,
            **self.lately.group(version, group, replicas, now_s=now_s),
        }

    def _rollout(self) -> dict[str, Any]:
        under_way = self.state.rollout
        assert under_way is not None
        verdict = canary.judge(under_way.trial) if under_way.trial else None
        return {
            "version": under_way.version,
            "kind": under_way.how.kind,
            "step": under_way.step,
            "mirror": under_way.mirror,
            "waits": under_way.waits,
            "seen": verdict.text if verdict else "",
            "numbers": dict(verdict.numbers) if verdict else {},
        }

    def _decided(self, decision: tuple[ServiceState, tuple[Told, ...]]) -> None:
        self.state, events = decision
        for told in events:
            self.told += 1
            self.events.append((self.told, told))

    def _resume(self, kept: Mapping[str, Any], *, now_s: float) -> None:
        self.state = from_json(kept["state"])
        self.contracts = {int(version): contract for version, contract in kept["contracts"].items()}
        self.events.extend((number, Told(**told)) for number, told in kept["events"])
        self.told = kept["told"]
        self.guests = Guests(self.service, kept.get("guests"))
        self.tallies = Tallies(resumed=True)
        if (rollout := self.state.rollout) is not None and rollout.trial is not None:
            self.state = dataclasses.replace(self.state, rollout=dataclasses.replace(rollout, trial=dataclasses.replace(rollout.trial, last=None)))
        self._ready_s, self._awake = now_s + GRACE_S, False
