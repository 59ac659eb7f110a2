"""The replicas that say that they are there, and the routes that follow from it: what control tells the doors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.serving.routes import Endpoint, GroupRoute, VersionRoute

EXPIRY_S = 6.0  # three announcements missed
_LATE_S = 1.5  # later than this, whoever counts was held up itself, and missed what others said meanwhile


@dataclass(slots=True)
class _Entry:
    version: int
    group: str
    endpoint: Endpoint
    seen_s: float


class Roster:
    """Replicas by what they announce every other second. Times are of one monotonic clock, `now_s`."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._barred: dict[str, float] = {}
        self._counted_s: float | None = None

    def join(self, version: int, group: str, endpoint: Endpoint, *, now_s: float) -> bool:
        """Note a replica; whether it is new, or elsewhere than before."""
        if endpoint.replica in self._barred:
            return False
        known = self._entries.get(endpoint.replica)
        self._entries[endpoint.replica] = _Entry(version, group, endpoint, now_s)
        return known is None or known.endpoint != endpoint

    def bar(self, replica: str, *, now_s: float) -> bool:
        """Take out a replica that is being killed, whatever it still says; whether it was there."""
        self._barred[replica] = now_s
        return self._entries.pop(replica, None) is not None

    def expire(self, *, now_s: float) -> bool:
        """Take out replicas that have not been heard of for `EXPIRY_S`; whether there were any. To be called each second.

        Where the calls themselves come late, this process could not listen: the time is given back to everybody.
        """
        late_s = max(0.0, now_s - self._counted_s - 1.0) if self._counted_s is not None else 0.0
        self._counted_s = now_s
        if late_s > _LATE_S - 1.0:
            for entry in self._entries.values():
                entry.seen_s += late_s
        gone = [replica for replica, entry in self._entries.items() if now_s - entry.seen_s > EXPIRY_S]
        for replica in gone:
            del self._entries[replica]
        self._barred = {replica: at_s for replica, at_s in self._barred.items() if now_s - at_s < 10 * EXPIRY_S}
        return bool(gone)

    def forget(self, version: int) -> bool:
        """Take out all replicas of a version; whether there were any."""
        gone = [replica for replica, entry in self._entries.items() if entry.version == version]
        for replica in gone:
            del self._entries[replica]
        return bool(gone)

    def ready(self, version: int, group: str) -> tuple[Endpoint, ...]:
        """The replicas of a group, in a fixed order."""
        return tuple(entry.endpoint for _, entry in sorted(self._entries.items()) if (entry.version, entry.group) == (version, group))

    def where(self, replica: str) -> tuple[int, str] | None:
        """The version and the group of a replica."""
        entry = self._entries.get(replica)
        return None if entry is None else (entry.version, entry.group)

    def routes(
        self, weights: Mapping[int, tuple[float, float]], groups: Mapping[int, Iterable[str]], contracts: Mapping[int, Mapping[str, Any]]
    ) -> tuple[VersionRoute, ...]:
        """The versions as doors see them; `weights` are (share answered, share mirrored)."""
        return tuple(
            VersionRoute(version, weight, tuple(GroupRoute(group, self.ready(version, group)) for group in groups[version]), contracts[version], shadow)
            for version, (weight, shadow) in sorted(weights.items())
            if version in contracts
        )
