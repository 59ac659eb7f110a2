"""Whatever is told to a rollout and whatever it sees, requests go only where they can be answered, and what runs is not taken away."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ServingError
from headrace.scaling.policy import Scale
from headrace.serving.release import rollout
from headrace.serving.release.versions import Canary, Load, Role, Rolling, Seen, ServiceState, Shadow, Version, from_json, to_json
from headrace.serving.routes import VersionReport

GROUPS = ("prepare", "embed")
SCALES = st.builds(
    lambda least, more, target: Scale(least, least + more, target_in_flight=target), st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 8])
)
HOWS = st.sampled_from(
    [Rolling(start_s=100), Canary(share=0.05, step_s=5, step_pairs=20, start_s=100), Canary(share=0.5, steps=(), step_s=2, step_pairs=5), Shadow(share=0.5)]
)
COMMANDS = st.one_of(
    st.tuples(st.just("deploy"), HOWS, st.dictionaries(st.sampled_from(GROUPS), SCALES, min_size=1), st.booleans()),
    st.tuples(st.sampled_from(["gate_passed", "gate_passed", "gate_failed", "promote", "abort", "rollback", "stop", "forget"])),
)
LOOKS = st.tuples(
    st.just("look"),
    st.sampled_from([0.5, 1.0, 1.0, 1.0, 20.0, 300.0]),
    st.lists(st.integers(-1, 2), min_size=4, max_size=4),  # how far replicas are from what they should be, at most
    st.integers(0, 40),  # requests in flight
    st.integers(0, 3),  # failed starts
    st.floats(0, 1),  # of pairs, failed by the newest version
)
SCRIPTS = st.lists(st.one_of(LOOKS, LOOKS, LOOKS, COMMANDS), min_size=1, max_size=60)


class Play:
    """A service that is told and shown whatever a script says, and saved and loaded after each line."""

    def __init__(self) -> None:
        self.state, self.at_s = ServiceState(), 0.0
        self.ready: dict[tuple[int, str], int] = {}
        self.reports: dict[int, VersionReport] = {}
        self.loads: dict[tuple[int, str], Load] = {}
        self.failures: dict[int, tuple[int, str]] = {}

    @property
    def seen(self) -> Seen:
        return Seen(self.at_s, dict(self.ready), dict(self.loads), dict(self.reports), dict(self.failures))

    def tell(self, name: str, *arguments: Any) -> None:
        """A command; one that cannot be obeyed is refused, and nothing else comes of it."""
        before = self.state
        try:
            if name == "deploy":
                how, scales, gate = arguments
                self.state, _ = rollout.deploy(self.state, Version(self.state.latest + 1, scales), how=how, at_s=self.at_s, gate=gate)
            elif name == "forget":
                for number in rollout.retired(self.state):
                    self.state = rollout.forget(self.state, number)
            elif name in ("gate_passed", "gate_failed"):
                self.state, _ = getattr(rollout, name)(self.state, self.state.latest, at_s=self.at_s, why="rows")
            else:
                self.state, _ = getattr(rollout, name)(self.state, at_s=self.at_s)
        except ServingError:
            assert self.state is before
            assert name in ("gate_passed", "gate_failed", "promote", "abort", "rollback")
            assert name != "rollback" or (before.previous is None and before.rollout is None)

    def look(self, passed_s: float, off: list[int], in_flight: int, failed: int, errors: float) -> None:
        """Time goes by, replicas come and go, requests are answered; then what is decided is decided."""
        self.at_s += passed_s
        targets = rollout.targets(self.state, self.seen)
        self.ready = {key: max(0, count - off[at % len(off)]) for at, (key, count) in enumerate(sorted(targets.items()))}
        self.loads = {key: Load(in_flight, 0 if count else in_flight, failed) for key, count in self.ready.items()}
        if failed and self.state.rollout:
            self.failures[self.state.rollout.version] = (failed, "ImportError")
        for number, (answers, mirrored) in rollout.weights(self.state, self.seen).items():
            was = self.reports.get(number, VersionReport())
            pairs = round(20 * mirrored * passed_s)
            self.reports[number] = dataclasses.replace(
                was, answered=was.answered + round(20 * answers * passed_s), pairs=was.pairs + pairs, pair_errors=was.pair_errors + round(pairs * errors)
            )
        before = self.state
        self.state, told = rollout.step(before, self.seen)
        assert (self.state, told) == rollout.step(from_json(to_json(before)), self.seen)
        assert all(one.at_s == self.at_s and str(one) and "\n" not in str(one) for one in told)


def ready(version: Version, play: Play) -> bool:
    return all(play.ready.get((version.number, group), 0) > 0 for group in version.scales)


def check(play: Play) -> None:
    """What must hold at any time."""
    state, weights, targets = play.state, rollout.weights(play.state, play.seen), rollout.targets(play.state, play.seen)
    there = [version for version in state.versions if not version.role.gone]
    assert len([version for version in there if version.role is Role.CURRENT]) <= 1
    assert len(there) <= 3 and (state.rollout is None) == (state.candidate is None)
    assert set(weights) == {version.number for version in there}
    assert set(targets) == {(version.number, group) for version in there for group in version.scales}
    shadow = state.rollout is not None and isinstance(state.rollout.how, Shadow)
    may = [v for v in there if v.role in (Role.CURRENT, Role.PREVIOUS) or (v.role is Role.JOINING and not shadow)]
    able = [version for version in may if ready(version, play)]
    if able or state.current is not None:
        assert abs(sum(weight for weight, _ in weights.values()) - 1) < 1e-9
    for version in there:
        weight, mirrored = weights[version.number]
        assert 0 <= weight <= 1 and 0 <= mirrored <= 1
        assert not weight or version in may
        assert not weight or not able or version in able
        assert not mirrored or version is state.candidate
        for group, scale in version.scales.items():
            assert 0 <= targets[version.number, group] <= max(scale.most, 1)
    current, candidate = state.current, state.candidate
    if current is not None and (candidate is None or candidate.role is not Role.JOINING or not ready(candidate, play)):
        for group in current.scales:  # nothing is taken from it for a newcomer that cannot answer
            assert targets[current.number, group] >= current.wishes.get(group, 0)
    if current is not None and (state.previous is not None or (candidate is not None and candidate.role is Role.JOINING)):
        assert all(targets[current.number, group] >= 1 for group in current.scales)


@given(SCRIPTS)
def test_no_sequence_of_commands_and_looks_breaks_the_rules(script):
    play = Play()
    for name, *arguments in script:
        if name == "look":
            play.look(*arguments)
        else:
            play.tell(name, *arguments)
        assert from_json(to_json(play.state)) == play.state
        check(play)
        if play.state.rollout is None and play.state.previous is not None:
            back, _ = rollout.rollback(play.state, at_s=play.at_s)
            assert back.current is not None and back.current.number == play.state.previous.number
            if ready(back.current, play):
                assert rollout.weights(back, play.seen)[back.current.number][0] == 1


@given(st.lists(LOOKS, min_size=1, max_size=20), HOWS)
def test_a_healthy_newcomer_takes_over_in_the_end_and_a_shadow_never(looks, how):
    """After any disturbance, once all replicas are there and nothing fails."""
    play = Play()
    scales = {"embed": Scale(1, 4, target_in_flight=8)}
    for count in range(2):
        play.tell("deploy", how if count else Rolling(), scales, False)
        for _, *arguments, _ in looks if count else []:
            play.look(*arguments, 0.0)
        play.failures = {}
        for _ in range(80 if count else 5):
            play.look(1.0, [0, 0, 0, 0], 4, 0, 0.0)
    current = play.state.current
    assert current is not None
    failed = play.state.version(2) is not None and play.state.version(2).role is Role.FAILED  # by a disturbance
    assert failed or current.number == (1 if isinstance(how, Shadow) else 2)
    assert (play.state.rollout is not None) == (isinstance(how, Shadow) and not failed)
