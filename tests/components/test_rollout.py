"""One version takes over from another: rolling, by canary, in the shadow; and goes back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from headrace.errors import ServingError, SettingError
from headrace.scaling.policy import Scale
from headrace.serving.release import rollout
from headrace.serving.release.canary import Tolerance
from headrace.serving.release.versions import Canary, How, Load, Role, Rolling, Seen, ServiceState, Shadow, Told, Version, from_json, to_json
from headrace.serving.routes import VersionReport


class Cluster:
    """A service whose wishes come true: each second replicas become what they should be, as far as there is `room`."""

    def __init__(self, *groups: str, scale: Scale | None = None, room: int = 1000) -> None:
        self.scales = dict.fromkeys(groups or ("embed",), scale or Scale(1, 8, target_in_flight=1))
        self.state = ServiceState()
        self.at_s = 1000.0
        self.ready: dict[tuple[int, str], int] = {}
        self.loads: dict[tuple[int, str], Load] = {}
        self.reports: dict[int, VersionReport] = {}
        self.failures: dict[int, tuple[int, str]] = {}
        self.broken: set[int] = set()
        self.room = room
        self.told: list[Told] = []
        self.load = 0.0  # requests in flight for each group, shared out by weight
        self.per_s = 0
        self.errors: dict[int, float] = {}
        self.random = np.random.default_rng(0)

    @property
    def seen(self) -> Seen:
        return Seen(self.at_s, dict(self.ready), dict(self.loads), self.reports, self.failures)

    @property
    def weights(self) -> dict[int, tuple[float, float]]:
        return rollout.weights(self.state, self.seen)

    @property
    def targets(self) -> dict[tuple[int, str], int]:
        return rollout.targets(self.state, self.seen)

    def do(self, decision: tuple[ServiceState, tuple[Told, ...]]) -> None:
        self.state, told = decision
        self.told += told

    def deploy(self, number: int, how: How | None = None, *, gate: bool = False) -> None:
        self.do(rollout.deploy(self.state, Version(number, self.scales), how=how or Rolling(), at_s=self.at_s, gate=gate))

    def traffic(self) -> None:
        for number, (answers, mirrored) in self.weights.items():
            report = self.reports.setdefault(number, VersionReport())
            count = round(self.per_s * answers)
            report.answered += count
            report.latencies[30] += count
            report.errors += round(count * self.errors.get(number, 0))
            pairs = round(self.per_s * mirrored)
            report.pairs += pairs
            report.pair_log_ratio += float(self.random.normal(0, 0.4, pairs).sum())
            report.pair_errors += int(self.random.binomial(pairs, self.errors.get(number, 0)))

    def second(self, count: int = 1) -> None:
        for _ in range(count):
            self.at_s += 1
            self.loads = {(number, group): Load(self.load * answers) for number, (answers, _) in self.weights.items() for group in self.scales}
            self.traffic()
            self.do(rollout.step(self.state, self.seen))
            assert from_json(to_json(self.state)) == self.state
            targets = self.targets
            self.ready = {key: min(self.ready.get(key, 0), count) for key, count in targets.items()}
            for key, wanted in targets.items():
                used = sum(self.ready.values())
                if key[0] not in self.broken and self.ready[key] < wanted and used < self.room:
                    self.ready[key] += 1

    def running(self, *, replicas: int) -> Cluster:
        """Version 1 runs with so many replicas."""
        self.load = replicas
        self.deploy(1)
        self.second(15)
        assert {self.ready[1, group] for group in self.scales} == {replicas}
        return self

    def role(self, number: int) -> Role | None:
        version = self.state.version(number)
        return version.role if version else None

    def last(self, what: str) -> Told:
        return next(told for told in reversed(self.told) if told.what == what)


def test_the_first_version_answers_as_soon_as_it_is_ready():
    cluster = Cluster("prepare", "embed")
    cluster.deploy(1)
    assert cluster.weights == {1: (0.0, 0.0)}
    assert cluster.targets == {(1, "prepare"): 1, (1, "embed"): 1}
    cluster.second(2)
    assert cluster.role(1) is Role.CURRENT and cluster.weights == {1: (1.0, 0.0)}
    assert [told.what for told in cluster.told] == ["deployed", "ready", "promoted"]


def test_a_gate_is_waited_for():
    cluster = Cluster()
    cluster.deploy(1, gate=True)
    cluster.second(5)
    assert cluster.role(1) is Role.GATING and cluster.weights == {1: (0.0, 0.0)}
    assert cluster.state.rollout is not None and cluster.state.rollout.waits == "the gate"
    cluster.do(rollout.gate_passed(cluster.state, 1, at_s=cluster.at_s, why="20 rows"))
    assert cluster.role(1) is Role.CURRENT
    with pytest.raises(ServingError):
        rollout.gate_passed(cluster.state, 1, at_s=cluster.at_s)


def test_a_gate_that_fails_or_is_silent_costs_nothing():
    cluster = Cluster().running(replicas=3)
    cluster.deploy(2, gate=True)
    cluster.second(3)
    cluster.do(rollout.gate_failed(cluster.state, 2, at_s=cluster.at_s, why="3 of 20 rows differ"))
    assert cluster.role(2) is Role.FAILED and cluster.ready[1, "embed"] == 3
    assert str(cluster.last("failed")) == "version 2 failed: gate: 3 of 20 rows differ"
    cluster.deploy(3, Rolling(start_s=30), gate=True)
    cluster.second(40)
    assert "no word" in cluster.last("failed").why


def test_a_rolling_update_goes_one_by_one_and_never_below_what_is_needed():
    cluster = Cluster("prepare", "embed").running(replicas=4)
    cluster.deploy(2)
    assert cluster.targets == {(1, "prepare"): 4, (1, "embed"): 4, (2, "prepare"): 1, (2, "embed"): 1}
    shares = []
    for _ in range(20):
        cluster.second()
        for group in cluster.scales:
            there = [cluster.ready.get((number, group), 0) for number in (1, 2)]
            assert sum(there) >= 4
            if cluster.role(1) is Role.CURRENT:
                assert sum(there) <= 5
        shares.append(cluster.weights[2][0])
    assert shares == sorted(shares) and shares[-1] == 1 and {0.4, 0.6} <= set(shares)
    assert (cluster.role(1), cluster.role(2)) == (Role.PREVIOUS, Role.CURRENT)
    assert cluster.ready == {(1, "prepare"): 1, (1, "embed"): 1, (2, "prepare"): 4, (2, "embed"): 4}


def test_a_rolling_update_with_room_for_one_replica_only():
    cluster = Cluster(room=5).running(replicas=4)
    cluster.deploy(2)
    cluster.second(20)
    assert cluster.role(2) is Role.CURRENT and cluster.ready == {(1, "embed"): 1, (2, "embed"): 4}


def test_more_replicas_are_kept_warm_than_there_is_room_for():
    """The bound of the old version would keep the new one from its last replicas."""
    cluster = Cluster(scale=Scale(3, 8, target_in_flight=1), room=5).running(replicas=4)
    cluster.deploy(2)
    cluster.second(30)
    assert cluster.role(2) is Role.JOINING and cluster.ready == {(1, "embed"): 3, (2, "embed"): 2}
    cluster.second(60)
    assert cluster.role(2) is Role.CURRENT and cluster.ready == {(1, "embed"): 1, (2, "embed"): 4}


def test_a_version_that_cannot_start_takes_nothing():
    cluster = Cluster().running(replicas=4)
    cluster.broken = {2, 3}
    cluster.deploy(2, Rolling(start_s=60))
    for _ in range(59):
        cluster.second()
        assert cluster.ready[1, "embed"] == 4 and cluster.weights == {1: (1.0, 0.0), 2: (0.0, 0.0)}
    cluster.second(2)
    assert cluster.role(2) is Role.FAILED and "no replica of embed within 60 s" in cluster.last("failed").why
    cluster.deploy(3)
    cluster.failures = {3: (3, "ImportError: no module named torch")}
    cluster.second()
    assert cluster.role(3) is Role.FAILED and cluster.last("failed").why.endswith("starts failed 3 times, the last time: ImportError: no module named torch")
    assert rollout.retired(cluster.state) == (2, 3)
    assert [v.number for v in rollout.forget(rollout.forget(cluster.state, 2), 1).versions] == [1, 3]


def test_a_newcomer_that_gets_stuck_half_way_gives_everything_back():
    cluster = Cluster().running(replicas=4)
    cluster.deploy(2, Rolling(start_s=100))
    cluster.second(3)
    cluster.broken = {2}
    cluster.second(90)
    assert cluster.role(2) is Role.JOINING and 0 < cluster.weights[2][0] < 1
    cluster.second(20)
    assert cluster.role(2) is Role.FAILED and "no further one within 100 s" in cluster.last("failed").why
    assert cluster.weights[1] == (1.0, 0.0) and cluster.ready == {(1, "embed"): 4}


def test_a_version_is_kept_and_answers_again_at_once():
    cluster = Cluster().running(replicas=4)
    cluster.deploy(2)
    cluster.second(20)
    cluster.do(rollout.rollback(cluster.state, at_s=cluster.at_s, why="wrong labels"))
    assert cluster.weights == {1: (1.0, 0.0)}  # with the one replica that it has
    assert cluster.targets == {(1, "embed"): 4}
    assert cluster.role(2) is Role.FAILED
    assert [str(told) for told in cluster.told[-2:]] == ["version 2 rolled back: wrong labels", "version 1 answers again: wrong labels"]
    with pytest.raises(ServingError, match="nothing to roll back to: version 1 is alone"):
        rollout.rollback(cluster.state, at_s=cluster.at_s)


def test_a_version_is_kept_for_a_time_only_and_until_the_next():
    cluster = Cluster().running(replicas=2)
    cluster.state = dataclasses.replace(cluster.state, keep_s=100)
    cluster.deploy(2)
    cluster.second(20)
    cluster.deploy(3)
    assert cluster.role(1) is Role.RETIRED
    cluster.second(20)
    assert cluster.role(2) is Role.PREVIOUS
    cluster.second(100)
    assert cluster.role(2) is Role.RETIRED and cluster.last("retired").why == "kept for 100 s"


def test_a_rollback_under_way_gives_the_newcomer_up():
    cluster = Cluster().running(replicas=4)
    cluster.deploy(2)
    cluster.second(3)
    assert 0 < cluster.weights[2][0] < 1
    cluster.do(rollout.rollback(cluster.state, at_s=cluster.at_s))
    assert cluster.weights == {1: (1.0, 0.0)} and cluster.targets == {(1, "embed"): 4}
    with pytest.raises(ServingError, match="nothing to abort"):
        rollout.abort(cluster.state, at_s=cluster.at_s)


def test_the_next_version_supersedes_one_under_way():
    cluster = Cluster().running(replicas=4)
    cluster.deploy(2)
    cluster.second(4)
    cluster.deploy(3)
    assert cluster.role(2) is Role.FAILED and cluster.last("failed").why == "superseded by version 3"
    cluster.second(20)
    assert cluster.role(3) is Role.CURRENT and cluster.role(1) is Role.PREVIOUS
    with pytest.raises(ServingError, match="numbers up to 3 are given already"):
        cluster.deploy(3)


def test_a_canary_goes_up_in_steps_while_the_old_version_keeps_its_replicas():
    cluster = Cluster().running(replicas=4)
    cluster.per_s = 50
    cluster.deploy(2, Canary(share=0.05))
    shares, mirrored = [], []
    for _ in range(220):
        cluster.second()
        if cluster.role(2) is Role.JOINING:
            shares.append(cluster.weights[2][0])
            mirrored.append(cluster.weights[2][1])
            if shares[-1] <= 0.5:
                assert cluster.ready[1, "embed"] == 4
    assert cluster.role(2) is Role.CURRENT
    assert sorted(set(shares))[:3] == [0.05, 0.25, 0.5] and shares == sorted(shares)
    assert 20 <= max(mirrored) * 50 <= 25
    steps = [str(told) for told in cluster.told if told.what == "step"]
    assert (
        steps[1].startswith("version 2 step: on to 25%: errors in 0.0% of ")
        and "pairs against 0.0%; latency 0.99 times" in steps[1]
        and "answers" not in steps[1]
    )
    assert 180 < cluster.last("promoted").at_s - cluster.last("deployed").at_s < 215
    assert cluster.last("promoted").numbers["pairs"] > 3000


def test_a_failing_canary_is_rolled_back_with_the_numbers():
    cluster = Cluster().running(replicas=2)
    cluster.per_s, cluster.errors = 50, {2: 0.1}
    cluster.deploy(2, Canary(share=0.1))
    cluster.second(30)
    failed = cluster.last("failed")
    assert failed.at_s - cluster.last("ready").at_s < 20
    assert failed.why.startswith("errors in ") and failed.numbers["errors_e_value"] > 571
    assert cluster.weights == {1: (1.0, 0.0)} and cluster.ready == {(1, "embed"): 2}
    json.dumps(dataclasses.asdict(failed))


def test_a_canary_without_traffic_holds_and_says_what_it_waits_for():
    cluster = Cluster().running(replicas=1)
    cluster.deploy(2, Canary(share=0.2))
    cluster.second(400)
    assert cluster.role(2) is Role.JOINING and cluster.weights[2][0] == 0.2
    assert cluster.state.rollout is not None and cluster.state.rollout.waits == "100 more requests to compare"
    assert cluster.last("waits").why == "at 20% for 100 more requests to compare"
    assert len([told for told in cluster.told if told.what == "waits"]) == 1


def test_a_canary_answers_no_more_than_its_replicas_can():
    cluster = Cluster().running(replicas=8)
    cluster.broken = {2}
    cluster.deploy(2, Canary(share=0.4))
    cluster.ready[2, "embed"] = 1
    cluster.at_s += 1
    cluster.do(rollout.step(cluster.state, cluster.seen))
    assert cluster.weights == {1: (0.875, 0.0), 2: (0.125, 0.0)}


def test_where_there_is_no_room_the_old_version_makes_some_for_a_canary():
    cluster = Cluster(room=5).running(replicas=4)
    cluster.per_s = 4
    cluster.deploy(2, Canary(share=0.05))
    cluster.second(500)
    assert cluster.role(2) is Role.CURRENT and cluster.ready == {(1, "embed"): 1, (2, "embed"): 4}


def test_a_shadow_answers_nothing_and_tells_its_verdict():
    for errors, said in ((0.0, "looks alike"), (0.2, "looks worse")):
        cluster = Cluster().running(replicas=2)
        cluster.per_s, cluster.errors = 10, {2: errors}
        cluster.deploy(2, Shadow())
        cluster.second(100)
        assert cluster.role(2) is Role.JOINING
        assert cluster.weights == {1: (1.0, 0.0), 2: (0.0, 1.0)}
        assert [told.what for told in cluster.told if told.what.startswith("looks")] == [said]
        cluster.do(rollout.promote(cluster.state, at_s=cluster.at_s))
        cluster.second(10)
        assert cluster.role(2) is Role.CURRENT


def test_promotion_by_word_needs_a_version_that_may_answer():
    cluster = Cluster().running(replicas=1)
    with pytest.raises(ServingError, match="nothing to promote"):
        rollout.promote(cluster.state, at_s=0)
    cluster.deploy(2, gate=True)
    cluster.second(3)
    with pytest.raises(ServingError, match="it is gating, and waits for the gate"):
        rollout.promote(cluster.state, at_s=0)


def test_a_version_without_a_replica_in_each_group_answers_nothing_while_another_can():
    cluster = Cluster("prepare", "embed").running(replicas=1)
    cluster.deploy(2)
    cluster.second(5)
    assert cluster.role(2) is Role.CURRENT
    cluster.ready[2, "embed"] = 0
    assert cluster.weights == {1: (1.0, 0.0), 2: (0.0, 0.0)}
    cluster.ready[1, "prepare"] = 0
    assert cluster.weights == {1: (0.0, 0.0), 2: (1.0, 0.0)}  # doors hold the requests for it


def test_to_zero_where_asked_but_not_while_another_version_is_there():
    cluster = Cluster(scale=Scale(0, 4, target_in_flight=1, idle_s=60))
    cluster.state = dataclasses.replace(cluster.state, keep_s=200)
    cluster.deploy(1)
    cluster.second(80)
    assert cluster.targets == {(1, "embed"): 0} and cluster.weights == {1: (1.0, 0.0)}
    cluster.deploy(2)
    cluster.second(100)
    assert cluster.role(2) is Role.CURRENT and cluster.targets == {(1, "embed"): 1, (2, "embed"): 1}
    cluster.second(200)
    assert cluster.targets == {(2, "embed"): 0}
    assert (cluster.last("scaled").numbers["before"], cluster.last("scaled").numbers["replicas"]) == (1, 0)


def test_shed_requests_bring_a_replica():
    cluster = Cluster(scale=Scale(1, 4, target_in_flight=100)).running(replicas=1)
    for shed in (5, 5, 9):
        seen = dataclasses.replace(cluster.seen, loads={(1, "embed"): Load(1, 0, shed)}, at_s=cluster.at_s + 1)
        cluster.do(rollout.step(cluster.state, seen))
        cluster.at_s += 1
    assert cluster.targets == {(1, "embed"): 2}  # the first look only tells where the count stands


def test_stop_retires_all_and_the_next_deployment_begins_anew():
    cluster = Cluster().running(replicas=2)
    cluster.deploy(2)
    cluster.second(1)
    cluster.do(rollout.stop(cluster.state, at_s=cluster.at_s))
    assert rollout.retired(cluster.state) == (1, 2) and cluster.weights == {} and cluster.targets == {}
    assert rollout.step(cluster.state, cluster.seen) == (cluster.state, ())
    cluster.deploy(3)
    cluster.second(3)
    assert cluster.role(3) is Role.CURRENT


@pytest.mark.parametrize("how", [Rolling(), Canary(share=0.1, tolerance=Tolerance(slower=None, different=0.5)), Shadow(share=0.5)])
def test_a_state_is_text_and_back(how: Any):
    cluster = Cluster("prepare", "embed").running(replicas=2)
    cluster.per_s = 20
    cluster.deploy(2, how)
    cluster.second(10)
    state = from_json(to_json(cluster.state))
    assert state == cluster.state
    assert rollout.step(state, cluster.seen) == rollout.step(cluster.state, cluster.seen)


@pytest.mark.parametrize(
    "make", [lambda: Canary(share=0), lambda: Canary(share=1), lambda: Canary(steps=(2,)), lambda: Shadow(share=0), lambda: Shadow(share=1.1)]
)
def test_shares_that_cannot_be_are_refused(make: Any):
    with pytest.raises(SettingError):
        make()


def test_only_the_version_that_is_meant_is_aborted():
    state, _ = rollout.deploy(ServiceState(), Version(1, {"m": Scale(1, 1, 8.0)}), how=Rolling(), at_s=0.0)
    with pytest.raises(ServingError, match="version 7 is not being rolled out"):
        rollout.abort(state, at_s=1.0, version=7)
    aborted, told = rollout.abort(state, at_s=1.0, version=1)
    assert aborted.rollout is None and told
