"""The versions of a service as one door sees them: which of them answers a request, and what it has counted of each."""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace.serving.door.journey import GONE, MOVED
from headrace.serving.door.retries import Retries
from headrace.serving.door.routing import Pool
from headrace.serving.routes import LATENCY_BOUNDS_S, Limits, Routes, VersionReport, VersionRoute
from headrace.serving.watch.lookups import Told
from headrace.serving.wire import Done, Failure, Stats

_SHED = (429, 503)


class Version:
    """One version of a service: its groups in order, and its counters. `open` says whether each group has a usable replica."""

    def __init__(self, route: VersionRoute, service: str = "") -> None:
        self.route = route
        self.service = service
        self.number = route.version
        self.pools: list[Pool] = []
        self.report = VersionReport()
        self.pipeline = str(route.contract.get("pipeline", ""))

    @property
    def open(self) -> bool:
        """Whether each group has a usable replica."""
        return all(pool.usable for pool in self.pools)

    def missing(self) -> list[str]:
        """The groups without a usable replica."""
        return [pool.group for pool in self.pools if not pool.usable]

    def saturated(self) -> bool:
        """Whether requests wait at a later group already, so that one more would only be computed to wait there, too."""
        return len(self.pools) > 1 and any(pool.saturated() for pool in self.pools[1:])

    def full(self, priority: int) -> bool:
        """Whether all replicas of the first group have said lately that they have no room for requests of this class."""
        return bool(self.pools) and self.pools[0].full(priority)

    def waiting(self) -> int:
        """How many requests no replica has at the moment."""
        return sum(pool.waiting() for pool in self.pools)

    def retry_after_s(self) -> int:
        """In how many seconds it may be worth while to ask again; at least 1."""
        return max(1, min(60, math.ceil(max((pool.retry_after_s for pool in self.pools), default=0.0))))

    def count(self, status: int, took_s: float) -> None:
        """Count a request that this version answered, or did not. Status 429 and 503 are rejected, 504 expired, and other 5xx errors.

        One whose client went away is not counted.
        """
        report = self.report
        if status == GONE.status:
            return
        if status in _SHED:
            report.rejected += 1
            return
        if status == 504:
            report.expired += 1
            return
        report.answered += 1
        report.errors += status >= 500
        report.latencies[bisect.bisect_left(LATENCY_BOUNDS_S, took_s)] += 1


class Fleet:
    """All versions, by number and by the path under which they are asked."""

    def __init__(self, *, retries: Retries, answered: Callable[[Pool, Done], None]) -> None:
        self.routes: Routes | None = None
        self.limits = Limits()
        self.versions: dict[int, Version] = {}
        self.mixes: dict[str, Mix] = {}
        self._retries = retries
        self._answered = answered
        self._leaving: set[Pool] = set()  # of versions no longer served, with requests under way

    def update(self, routes: Routes) -> None:
        """Serve what `routes` says. What is under way at replicas that it no longer names is finished."""
        self.routes = routes
        self.limits = routes.limits
        named = {route.version: route for route in routes.versions}
        for number in [number for number in self.versions if number not in named]:
            for pool in self.versions.pop(number).pools:
                self._leave(pool)
        for number, route in named.items():
            version = self.versions.get(number)
            if version is None:
                version = self.versions[number] = Version(route, routes.service)
            version.route = route
            have = {pool.group: pool for pool in version.pools}
            version.pools = [have.pop(group.name) if group.name in have else self._pool(number, group.name) for group in route.groups]
            for pool, group in zip(version.pools, route.groups, strict=True):
                pool.serve(group.endpoints)
            for pool in have.values():
                self._leave(pool)
        paths = {version.pipeline for version in self.versions.values()}
        self.mixes = {f"/{name}": Mix([version for version in self.versions.values() if version.pipeline == name]) for name in paths}

    def first(self) -> Version | None:
        """The version that answers most requests."""
        return max(self.versions.values(), key=lambda version: (version.route.weight, version.number), default=None)

    def unready(self) -> dict[int, list[str]]:
        """Of the versions that answer requests, the groups without a usable replica."""
        serving = [version for version in self.versions.values() if version.route.weight > 0]
        return {version.number: missing for version in serving if (missing := version.missing())}

    def tick(self) -> None:
        """Look after all replicas; called twice a second."""
        for version in self.versions.values():
            for pool in version.pools:
                pool.tick()
        for pool in list(self._leaving):
            pool.tick()
            if not pool.leaving:
                self._leaving.discard(pool)

    def abort(self, failure: Failure) -> None:
        """Close all connections to replicas."""
        for pool in [*(pool for version in self.versions.values() for pool in version.pools), *self._leaving]:
            pool.abort(failure)

    def reports(self) -> dict[int, VersionReport]:
        """The counters of each version."""
        for version in self.versions.values():
            version.report.queued = version.waiting()
        return {number: dataclasses.replace(version.report, latencies=list(version.report.latencies)) for number, version in self.versions.items()}

    def replicas(self) -> dict[str, dict[str, Any]]:
        """What was last heard of each replica."""
        return {link.endpoint.replica: dataclasses.asdict(link.stats) for pool in self._pools() for link in pool.links.values() if link.stats is not None}

    def engines(self) -> dict[tuple[int, str], Mapping[str, float]]:
        """What was last heard of the engines of language models, by version and replica."""
        return {place: stats.engine for place, stats in self._heard() if stats.engine is not None}

    def lookups(self) -> dict[tuple[int, str], Told]:
        """What was last heard of the features that replicas look up, by version and replica."""
        return {place: stats.lookups for place, stats in self._heard() if stats.lookups is not None}

    def hung(self) -> tuple[str, ...]:
        """The replicas that are ejected."""
        return tuple(link.endpoint.replica for pool in self._pools() for link in pool.links.values() if link.hung)

    def waiting(self) -> dict[tuple[int, str], int]:
        """How many requests wait for a group's first replica."""
        return {(pool.version, pool.group): count for pool in self._pools() if not pool.usable and (count := pool.waiting())}

    def _heard(self) -> Iterator[tuple[tuple[int, str], Stats]]:
        """What was last heard of each replica, by version and name."""
        for pool in self._pools():
            for link in pool.links.values():
                if link.stats is not None:
                    yield (pool.version, link.endpoint.replica), link.stats

    def _pools(self) -> list[Pool]:
        return [pool for version in self.versions.values() for pool in version.pools]

    def _pool(self, version: int, group: str) -> Pool:
        return Pool(version, group, retries=self._retries, answered=self._answered)

    def _leave(self, pool: Pool) -> None:
        pool.close(MOVED)
        if pool.leaving:
            self._leaving.add(pool)


class Mix:
    """The versions behind one path, and their shares."""

    def __init__(self, versions: list[Version]) -> None:
        self.versions = {version.number: version for version in versions}
        self.weighted = [version for version in versions if version.route.weight > 0]
        self.mirrored = [version for version in versions if version.route.shadow > 0]

    def choose(self) -> Version | None:
        """The version that answers the next request. One that lacks replicas is passed over while another one has all of its."""
        weighted = self.weighted
        if len(weighted) == 1:
            return weighted[0]
        pick = self._draw(weighted)
        if pick is None or pick.open:
            return pick
        return self._draw([version for version in weighted if version.open]) or pick

    def base_for(self, version: Version) -> Version | None:
        """The version that `version` is compared with: the one with the most weight beside it."""
        others = [other for other in self.weighted if other is not version]
        return max(others, key=lambda other: other.route.weight, default=None)

    @staticmethod
    def _draw(versions: list[Version]) -> Version | None:
        left = random.random() * sum(version.route.weight for version in versions)  # noqa: S311
        for version in versions:
            left -= version.route.weight
            if left < 0:
                return version
        return versions[-1] if versions else None
