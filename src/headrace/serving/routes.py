"""What control tells the front doors, and what they tell it: versions of a service, where their replicas are, how each fares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LATENCY_BOUNDS_S = tuple(0.0005 * 1.2**step for step in range(72))
"""Upper bounds of the buckets in which latencies are counted: 0.5 ms to 210 s, each 1.2 times the one before; one more holds the rest."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A replica of a group: its id, and where it listens. `node` and `pid` say which process it is.

    `token` is what it asks of whoever connects, since others than doors may reach its port; "" where it asks for none. `beside` is the name
    of the Unix socket over which doors on its machine hand it their clients', if it has one.
    """

    replica: str
    host: str
    port: int
    node: str = ""
    pid: int = 0
    token: str = field(default="", repr=False)
    beside: str = ""


@dataclass(frozen=True, slots=True)
class GroupRoute:
    """A group's replicas, ready ones only."""

    name: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class VersionRoute:
    """A version of a service: the share of requests it answers, and the share of all requests that are mirrored to it unanswered.

    `contract` is what `openapi.contract` made of its pipeline.
    """

    version: int
    weight: float
    groups: tuple[GroupRoute, ...]
    contract: Mapping[str, Any]
    shadow: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a service. `latency_s` is the latency target, from which waits for company and queues are derived.

    `background` is the share of a language model's places that requests of the last class have beside better ones.
    """

    body_bytes: int = 16 << 20
    rows: int = 4096
    deadline_s: float = 60.0
    latency_s: float = 1.0
    header_s: float = 10.0
    body_s: float = 30.0
    connections: int = 12_000
    background: float = 0.25


@dataclass(frozen=True, slots=True)
class Routes:
    """A service as its doors see it. `revision` grows with every change; `keys` are the hashes of valid API keys, None while none are asked for.

    `guests` are the services that have no doors of their own, and are behind these.
    """

    service: str
    revision: int
    versions: tuple[VersionRoute, ...]
    limits: Limits = Limits()
    keys: Mapping[str, str] | None = None  # SHA-256 of the key, in hex -> the key's name
    guests: tuple[str, ...] = ()


@dataclass(slots=True)
class VersionReport:
    """Of one version, counted by one door since it started; control takes differences.

    `latencies` counts answered requests by `LATENCY_BOUNDS_S` and `rejected` those shed. A pair is a request that both the version and
    the one that it is compared with computed: `pairs` counts them, `pair_errors` those that only this version failed (status 5xx),
    `pair_base_errors` those that only the other one failed, `pair_slower` those where this version took longer, `pair_log_ratio` the sum
    of ln(this version's seconds / the other's) and `pair_log_ratio_squares` of its squares, `pair_different` those whose outputs differed
    beyond tolerance.
    """

    answered: int = 0
    errors: int = 0
    rejected: int = 0
    expired: int = 0
    retries: int = 0
    in_flight: int = 0
    queued: int = 0
    latencies: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    pairs: int = 0
    pair_errors: int = 0
    pair_base_errors: int = 0
    pair_slower: int = 0
    pair_log_ratio: float = 0.0
    pair_log_ratio_squares: float = 0.0
    pair_different: int = 0


@dataclass(slots=True)
class DoorReport:
    """What a door tells control each second.

    `replicas` are the `wire.Stats` last heard of each replica, as maps; `hung` those that it has ejected because they no longer answer;
    `waiting` counts requests held because a group has no replica, by version and group; `metrics` is the door's own Prometheus text; `hops`
    are the latencies of each version's groups, and `paces` the times to first tokens and between tokens of each version that speaks, by
    `LATENCY_BOUNDS_S`.
    """

    door: str
    versions: dict[int, VersionReport] = field(default_factory=dict)
    replicas: dict[str, dict[str, Any]] = field(default_factory=dict)
    hung: tuple[str, ...] = ()
    waiting: dict[tuple[int, str], int] = field(default_factory=dict)
    metrics: str = ""
    hops: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    paces: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
