"""A running service loses no request that it has accepted, whatever is done to it. `benchmarks/serving_faults.py` has the same cases beside plain Ray Serve."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import online
import psutil
import pytest
from harness import AGENTS, GONE_S, title
from online import Headrace

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def running() -> Iterator[Headrace]:
    """A service of three replicas."""
    with Headrace(name="headrace") as service:
        yield service


@pytest.fixture
def service(running: Headrace) -> Headrace:
    """The same, with all replicas ready again."""
    running.settle()
    return running


def test_replicas_are_killed(service: Headrace) -> None:
    """By SIGKILL, every three seconds."""
    found = online.killed_replicas(service)
    assert found["kills"] >= 6
    assert found["lost"] == found["turned away"] == 0, found


def test_replicas_are_killed_in_the_middle_of_long_requests(service: Headrace) -> None:
    """Of six seconds each."""
    found = online.killed_in_long_requests(service)
    assert found["kills"] >= 5
    assert found["lost"] == 0, found


def test_a_frozen_replica_is_replaced(service: Headrace) -> None:
    """Within five seconds nobody waits for it any more."""
    found = online.frozen_replica(service)
    assert found["lost"] == 0, found
    assert found["slowest_s"] <= 6, found
    assert found["replaced"], found


def test_a_replica_whose_thread_hangs_is_replaced(service: Headrace) -> None:
    """The row that hangs is the only one that has no answer."""
    found = online.locked_replica(service)
    assert found["lost"] == 0, found


@pytest.mark.parametrize("role", ["controller", "control"])
def test_who_steers_is_killed(service: Headrace, role: str) -> None:
    """Requests do not pass it."""
    found = online.killed(service, role)
    assert found["kills"] == 2
    assert found["lost"] == 0, found


def test_a_door_is_killed(service: Headrace) -> None:
    """Only the requests on its own connections are cut; others are answered within a second."""
    found = online.killed(service, "door")
    assert found["kills"] == 2
    assert found["down_s"] < 1, found
    assert found["lost"] <= 8, found


def test_a_rolling_update(service: Headrace) -> None:
    """The new version takes over, and nobody notices."""
    found = online.rolling_update(service)
    assert found["taken over"], found["said"]
    assert found["lost"] == 0, found


def test_a_rolling_update_under_long_requests(service: Headrace) -> None:
    """Requests of six seconds end where they began."""
    found = online.rolling_update(service, pause_s=6.0, seconds=50)
    assert found["taken over"], found["said"]
    assert found["lost"] == 0, found


def test_a_version_that_cannot_start(service: Headrace) -> None:
    """It is refused with its reason, and the one that runs goes on with all its replicas."""
    found = online.bad_version(service)
    assert not found["taken over"] and "a version that cannot start" in found["said"], found["said"]
    assert found["still right"] and found["lost"] == 0, found


def test_a_row_that_kills_its_process(service: Headrace) -> None:
    """It takes two replicas with it at most, and is told so."""
    found = online.poison(service)
    assert found["status"] == 500 and json.loads(found["answer"])["error"]["code"] == "deadly_row", found
    assert found["deaths"] <= 2, found
    assert found["lost"] == 0, found


def test_five_times_the_load() -> None:
    """What cannot be done in time is turned away, and what is taken is done in time."""
    with Headrace(name="flood", more=("--latency", "150ms")) as service:
        found = online.overload(service)
    assert found["goodput"] >= 0.9, found
    assert found["p99 over p99 at capacity"] <= 2, found
    assert found["lost"] == 0, found


def test_slow_and_vanished_clients(service: Headrace) -> None:
    """Thousands of idle connections, half-sent bodies and huge ones: others are served, and memory stays bounded."""
    found = online.bad_clients(service)
    assert found["lost"] == 0, found
    assert found["grown_mb"] < 300, found
    assert found["huge body"] == 413, found


def test_sigterm_drains() -> None:
    """What is under way is answered, and no process is left."""
    with Headrace(name="drain") as service:
        family = online.session(service.process.pid)
        found = online.drained(service)
        assert found["answered"] == found["of"], found
        assert found["exit code"] in (0, 130), service.said
        assert not psutil.wait_procs(family, timeout=30)[1]


@pytest.mark.parametrize("killed", [("raylet",), ("raylet", "gcs_server")], ids=" and ".join)
def test_its_ray_is_killed(killed: tuple[str, ...]) -> None:
    """Nobody is left to steer or replace its processes, so all of them end, and the command says why."""
    with Headrace(name="orphans") as service:
        family = [process for process in online.session(service.process.pid) if process.pid != service.process.pid]
        struck = [process for process in family if process.name() in killed]
        assert len(struck) == len(killed)
        for process in struck:
            process.kill()
        ours = [process for process in family if not title(process).startswith(AGENTS)]
        assert not psutil.wait_procs(ours, timeout=GONE_S / 2)[1]  # they do not wait for the minute after which they would miss the GCS
        assert service.process.wait(GONE_S) == 1
        assert "the raylet of its Ray has died" in service.said
        assert not psutil.wait_procs(family, timeout=1.5 * GONE_S)[1]


@pytest.mark.parametrize("what", [signal.SIGKILL])
def test_a_node_goes_away(what: signal.Signals, tmp_path: Path) -> None:
    """With the replicas on it; those of the other nodes take over."""
    os.environ.pop("RAY_ADDRESS", None)
    with online.nodes() as (address, remove), Headrace(name="nodes", address=address, replicas=4) as service:
        found = online.node_removed(service, remove)
    assert found["lost"] == 0, found
