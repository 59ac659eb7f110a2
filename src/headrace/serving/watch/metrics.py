"""What a door counts, as Prometheus reads it.

Counting happens with every request, so it is plain arithmetic on lists; text is made only when asked for. Every series has the labels `service`
and `door`, so that the doors of a service can be added up; only what replicas tell of engines and lookups, which every door hears, is of no door. The number
of series is bounded: the versions last deployed have labels of their own, older ones are `other`; so are names of keys, models and reasons beyond a
fixed number.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping

from prometheus_client import ProcessCollector

from headrace.serving.routes import LATENCY_BOUNDS_S
from headrace.serving.watch import lookups, speech
from headrace.serving.watch.exposition import CONTENT_TYPE, Family, Histogram, escaped, join, line, write
from headrace.serving.watch.speech import EACH, Engines, Spoken
from headrace.serving.wire import Done

__all__ = ["CONTENT_TYPE", "DoorMetrics"]

VERSIONS, KEYS, REASONS = 8, 100, 24  # with labels of their own
OTHER, NONE = "other", "none"

_ROWS = tuple(2**power for power in range(13))
_REASON = re.compile(r"[a-z][a-z0-9_]{0,39}")

_HELP = {
    "headrace_requests_total": ("counter", "Requests answered, by HTTP status."),
    "headrace_request_duration_seconds": ("histogram", "Time from a request's first byte to its answer."),
    "headrace_rows_total": ("counter", "Rows of the requests answered."),
    "headrace_group_queue_seconds": ("histogram", "Time that requests waited for a free worker of a group."),
    "headrace_group_batch_wait_seconds": ("histogram", "Time that requests waited for company in a call."),
    "headrace_group_compute_seconds": ("histogram", "Time in which a group computed requests."),
    "headrace_group_rows_total": ("counter", "Rows computed by a group."),
    "headrace_batch_rows": ("histogram", "Rows of the largest call that a request was part of."),
    "headrace_in_flight": ("gauge", "Requests taken and not answered."),
    "headrace_queued": ("gauge", "Requests taken that no replica has."),
    "headrace_replicas": ("gauge", "Replicas of a group that are ready."),
    "headrace_shed_total": ("counter", "Requests turned away because there was too much work."),
    "headrace_retries_total": ("counter", "Requests sent to another replica."),
    "headrace_expired_total": ("counter", "Requests whose deadline passed before they were computed."),
    "headrace_connections": ("gauge", "Open connections of clients."),
    "headrace_shadow_pairs_total": ("counter", "Requests that two versions computed to be compared, by outcome."),
    "headrace_key_requests_total": ("counter", "Requests by name of the API key."),
    **speech.HELP,
    **lookups.HELP,
}

_NAMED = {
    "shed": ("headrace_shed_total", "reason"),
    "retries": ("headrace_retries_total", "reason"),
    "pairs": ("headrace_shadow_pairs_total", "outcome"),
    "keys": ("headrace_key_requests_total", "key"),
}


class _Version:
    """What is counted of a version."""

    __slots__ = ("codes", "rows", "spoken", "took")

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self.spoken: Spoken | None = None  # of one that answers OpenAI's interface
        self.took = Histogram(LATENCY_BOUNDS_S, each=EACH)
        self.rows = 0

    def absorb(self, other: _Version) -> None:
        for code, number in other.codes.items():
            self.codes[code] = self.codes.get(code, 0) + number
        self.took.absorb(other.took)
        self.rows += other.rows
        if other.spoken is not None:
            self.spoken = self.spoken or Spoken()
            self.spoken.absorb(other.spoken)


class _Group:
    """What is counted of a group of a version."""

    __slots__ = ("batch", "compute", "hops", "queue", "rows", "wait")

    def __init__(self) -> None:
        self.queue, self.wait, self.compute = (Histogram(LATENCY_BOUNDS_S, each=EACH) for _ in range(3))
        self.batch = Histogram(_ROWS)
        self.hops = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.rows = 0

    def absorb(self, other: _Group) -> None:
        self.queue.absorb(other.queue)
        self.wait.absorb(other.wait)
        self.compute.absorb(other.compute)
        self.batch.absorb(other.batch)
        self.rows += other.rows


class DoorMetrics:
    """The counts of one door. All methods are called on the door's own loop.

    A version of 0 stands for requests that no version saw, such as those without a key. `process` is whether it tells of its process, too.
    """

    def __init__(self, service: str, door: str, *, process: bool = True) -> None:
        self._labels = f'service="{escaped(service)}",door="{escaped(door)}"'
        self._versions: dict[int, _Version] = {}  # those with labels of their own, and 0
        self._groups: dict[tuple[int, str], _Group] = {}
        self._older, self._older_groups = _Version(), _Group()
        self._named: dict[str, dict[str, int]] = {what: {} for what in _NAMED}
        self._occupancy: dict[int, tuple[int, int]] = {}
        self._replicas: dict[tuple[int, str], int] = {}
        self._engines = Engines(service)
        self._lookups = lookups.Lookups(service)
        self._connections = 0
        self._expired = 0
        self._process = ProcessCollector(registry=None) if process else None

    def answered(self, version: int, status: int, took_s: float, rows: int = 0, *, key: str | None = None) -> None:
        """A request was answered, `took_s` after its first byte; `key` is the name of its API key."""
        mine = self._versions.get(version) or self._version(version)
        mine.codes[status] = mine.codes.get(status, 0) + 1
        took = mine.took
        took.counts[bisect_left(LATENCY_BOUNDS_S, took_s)] += 1
        took.sum += took_s
        mine.rows += rows
        if key is not None:
            self._count("keys", key, most=KEYS)

    def group(self, version: int, group: str, done: Done) -> None:
        """A replica of a group answered."""
        mine = self._groups.get((version, group)) or self._group(version, group)
        mine.queue.add(done.queue_s)
        mine.wait.add(done.wait_s)
        mine.compute.add(done.compute_s)
        mine.batch.add(done.batch_rows)
        mine.rows += done.rows
        mine.hops[bisect_left(LATENCY_BOUNDS_S, done.queue_s + done.wait_s + done.compute_s)] += 1

    def hops(self) -> dict[tuple[int, str], list[int]]:
        """By version and group, the requests that it computed by `LATENCY_BOUNDS_S`, waiting in its replicas included; for `DoorReport.hops`."""
        return {place: list(group.hops) for place, group in self._groups.items()}

    def latencies(self, version: int) -> list[int]:
        """The requests of a version by `LATENCY_BOUNDS_S`, whatever they were answered: the list itself, which grows on."""
        return (self._versions.get(version) or self._version(version)).took.counts

    def spoken(self, version: int) -> Spoken:
        """Where a version's answers of OpenAI's interface are counted, which goes on."""
        mine = self._versions.get(version) or self._version(version)
        if mine.spoken is None:
            mine.spoken = Spoken()
        return mine.spoken

    def paces(self) -> dict[int, tuple[list[int], list[int]]]:
        """By version that speaks, times to first tokens and between tokens by `LATENCY_BOUNDS_S`; for `DoorReport.paces`."""
        return {version: spoken.pace() for version, counted in self._versions.items() if (spoken := counted.spoken) is not None}

    def engines(self, told: Mapping[tuple[int, str], Mapping[str, float]]) -> None:
        """What the engines of language models tell of themselves, by version and replica; see `headrace.readings`."""
        self._engines.told = told

    def lookups(self, told: Mapping[tuple[int, str], lookups.Told]) -> None:
        """What replicas tell of the features that they look up, by version and replica."""
        self._lookups.told = told

    def shed(self, reason: str) -> None:
        """A request was turned away because there is too much work."""
        self._count("shed", reason)

    def retried(self, why: str) -> None:
        """A request was sent to another replica."""
        self._count("retries", why)

    def expired(self) -> None:
        """A request's deadline passed before it was computed."""
        self._expired += 1

    def paired(self, outcome: str) -> None:
        """Two versions computed the same request: `same`, `different`, `failed`, ..."""
        self._count("pairs", outcome)

    def occupancy(self, version: int, in_flight: int, queued: int) -> None:
        """Requests of a version taken and not answered, and those of them that no replica has."""
        self._occupancy[version] = in_flight, queued

    def replicas(self, version: int, group: str, ready: int) -> None:
        """How many replicas of a group are ready."""
        self._replicas[version, group] = ready

    def connections(self, number: int) -> None:
        """How many connections of clients are open."""
        self._connections = number

    def keep(self, versions: Collection[int]) -> None:
        """Forget how full versions other than these are, which are gone. What was counted stays."""
        self._occupancy = {version: value for version, value in self._occupancy.items() if version in versions}
        self._replicas = {(version, group): value for (version, group), value in self._replicas.items() if version in versions}

    def text(self, peers: Iterable[str | bytes] = ()) -> bytes:
        """All of it in Prometheus' text format, together with that of other doors of the service (each its own `text`)."""
        others = [peer if isinstance(peer, str) else peer.decode("utf-8", "replace") for peer in peers]
        mine = self._families()
        return write(join(mine, others) if others else mine).encode()

    def _version(self, version: int) -> _Version:
        """Where a version is counted that is not yet among those with labels of their own."""
        known = [number for number in self._versions if number]
        if version and len(known) >= VERSIONS:
            oldest = min(known)
            if version < oldest:
                return self._older
            self._older.absorb(self._versions.pop(oldest))
            for place in [place for place in self._groups if place[0] <= oldest]:
                self._older_groups.absorb(self._groups.pop(place))
        return self._versions.setdefault(version, _Version())

    def _group(self, version: int, group: str) -> _Group:
        if self._versions.get(version) is None and self._version(version) is self._older:
            return self._older_groups
        return self._groups.setdefault((version, group), _Group())

    def _count(self, what: str, name: str, *, most: int = REASONS) -> None:
        counts = self._named[what]
        if name not in counts and (len(counts) >= most or not (what == "keys" or _REASON.fullmatch(name))):
            name = OTHER  # names of keys were checked when they were made
        counts[name] = counts.get(name, 0) + 1

    def _families(self) -> dict[str, Family]:
        families = {name: Family(kind, said) for name, (kind, said) in _HELP.items()}

        def add(name: str, labels: str, value: float) -> None:
            families[name].lines.append(line(name, f"{self._labels}{labels}", value))

        def add_histogram(name: str, labels: str, histogram: Histogram) -> None:
            families[name].lines += histogram.lines(name, f"{self._labels}{labels}")

        for version, counted in self._by_version():
            for code, number in sorted(counted.codes.items()):
                add("headrace_requests_total", f'{version},code="{code}"', number)
            add_histogram("headrace_request_duration_seconds", version, counted.took)
            add("headrace_rows_total", version, counted.rows)
        for labels, group in self._by_group():
            add_histogram("headrace_group_queue_seconds", labels, group.queue)
            add_histogram("headrace_group_batch_wait_seconds", labels, group.wait)
            add_histogram("headrace_group_compute_seconds", labels, group.compute)
            add_histogram("headrace_batch_rows", labels, group.batch)
            add("headrace_group_rows_total", labels, group.rows)
        for name, labels, value in (*self._gauges(), *self._by_name()):
            add(name, labels, value)
        for name, lines in self._by_part():
            families[name].lines += lines
        for metric in self._process.collect() if self._process is not None else ():
            for sample in metric.samples:
                families[sample.name] = Family(metric.type, metric.documentation, [line(sample.name, self._labels, sample.value)])
        return families

    def _by_version(self) -> Iterator[tuple[str, _Version]]:
        for version, counted in sorted(self._versions.items()):
            yield f',version="{version or NONE}"', counted
        if self._older.codes:
            yield f',version="{OTHER}"', self._older

    def _by_part(self) -> Iterator[tuple[str, list[str]]]:
        for version, counted in self._by_version():
            if counted.spoken is not None:
                yield from counted.spoken.lines(f"{self._labels}{version}")
        yield from self._engines.lines()
        yield from self._lookups.lines()

    def _by_group(self) -> Iterator[tuple[str, _Group]]:
        for (version, name), counted in sorted(self._groups.items()):
            yield f',version="{version}",group="{escaped(name)}"', counted
        if any(self._older_groups.batch.counts):
            yield f',version="{OTHER}",group="{OTHER}"', self._older_groups

    def _gauges(self) -> Iterator[tuple[str, str, int]]:
        """How full versions are, and how many replicas there are; what has no label of its own is added up."""
        own = sorted({*self._versions, *self._occupancy, *(version for version, _ in self._replicas)})[-VERSIONS:]
        sums: dict[tuple[str, str], int] = {}
        for number, values in self._occupancy.items():
            for name, value in zip(("headrace_in_flight", "headrace_queued"), values, strict=True):
                place = name, f',version="{number if number in own else OTHER}"'
                sums[place] = sums.get(place, 0) + value
        for (number, name), ready in self._replicas.items():
            version, group = (str(number), escaped(name)) if number in own else (OTHER, OTHER)
            place = "headrace_replicas", f',version="{version}",group="{group}"'
            sums[place] = sums.get(place, 0) + ready
        for (name, labels), value in sorted(sums.items()):
            yield name, labels, value
        yield "headrace_connections", "", self._connections

    def _by_name(self) -> Iterator[tuple[str, str, int]]:
        for what, (name, label) in _NAMED.items():
            for value, number in sorted(self._named[what].items()):
                yield name, f',{label}="{escaped(value)}"', number
        yield "headrace_expired_total", "", self._expired
