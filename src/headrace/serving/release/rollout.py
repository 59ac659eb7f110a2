r"""How one version of a service takes over from another: pure steps from what was decided and what is seen to what is decided next.

    starting --> gating --> joining --> current --> previous --> retired
        \___________\__________\--> failed           ^     |
                                                     +-----+  rollback

A newcomer gets a replica of each group beside what runs. Once they are ready and the gate is passed it joins: replica by replica (`Rolling`), by growing
shares while `canary` compares it (`Canary`), or unanswered (`Shadow`). Whatever goes wrong until it is current costs the current version nothing.
Everything here is a function of its arguments, so that whoever decides may end after any step and go on from the state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from headrace.errors import ServingError
from headrace.scaling import policy
from headrace.serving.release.canary import Trial, Verdict, feed, judge
from headrace.serving.release.shares import capacity, floors, is_ready, mirror, needs, sizes, targets, weights
from headrace.serving.release.versions import Canary, How, Load, Role, Rolling, Rollout, Seen, ServiceState, Shadow, Told, Traffic, Version
from headrace.serving.routes import VersionReport

__all__ = ["abort", "deploy", "forget", "gate_failed", "gate_passed", "promote", "retired", "rollback", "step", "stop", "targets", "weights"]

FAILED_STARTS = 3
"""So many failed starts, and a newcomer without a replica in each group is given up."""
ROOM_S = 60.0
"""A newcomer that lacks replicas for so long has no room beside the others."""
HOLD_S = 300.0
"""A step of a canary that takes longer than this beyond its time is told of."""
_TRAFFIC_S = 10.0

Decision = tuple[ServiceState, tuple[Told, ...]]


def deploy(state: ServiceState, version: Version, *, how: How | None = None, at_s: float, gate: bool = False) -> Decision:
    """Bring a version up beside what runs; with `gate`, it waits for `gate_passed` once a replica of each group is ready.

    A newcomer that is under way is given up for it, and the version kept warm is retired: there is room for one beside the current.

    Raises:
        ServingError: the version's number is not above all that were given before.
    """
    if version.number <= state.latest:
        raise ServingError(f"version {version.number} cannot be deployed: numbers up to {state.latest} are given already")
    told: tuple[Told, ...] = ()
    if state.rollout is not None:
        state, told = _fail(state, f"superseded by version {version.number}", at_s=at_s)
    if state.previous is not None:
        state, more = _retire(state, state.previous, f"version {version.number} is deployed", at_s=at_s)
        told += more
    how = Rolling() if how is None else how
    newcomer = dataclasses.replace(version, role=Role.STARTING, since_s=at_s, why="")
    rollout = Rollout(version.number, how, gate, began_s=at_s, moved_s=at_s, waits="its first replicas")
    state = dataclasses.replace(state, versions=(*state.versions, newcomer), rollout=rollout, latest=version.number, stopped=False)
    return state, (*told, Told("deployed", version.number, how.kind, at_s=at_s))


def gate_passed(state: ServiceState, version: int, *, at_s: float, why: str = "") -> Decision:
    """The version that waits at the gate may take requests.

    Raises:
        ServingError: that version does not wait there.
    """
    state, told = _join(state, _at_gate(state, version), at_s=at_s)
    return state, (Told("gate passed", version, why, at_s=at_s), *told)


def gate_failed(state: ServiceState, version: int, *, at_s: float, why: str) -> Decision:
    """The version that waits at the gate may not take requests, and goes.

    Raises:
        ServingError: that version does not wait there.
    """
    _at_gate(state, version)
    return _fail(state, f"gate: {why}", at_s=at_s)


def promote(state: ServiceState, *, at_s: float, why: str = "told to") -> Decision:
    """The newcomer takes over as fast as its replicas get ready, whatever the trial says.

    Raises:
        ServingError: there is none, or it has not passed the gate.
    """
    candidate, rollout = state.candidate, state.rollout
    if candidate is None or rollout is None:
        raise ServingError("nothing to promote: no version is being rolled out")
    if candidate.role is not Role.JOINING:
        raise ServingError(f"version {candidate.number} cannot be promoted yet: it is {candidate.role}, and waits for {rollout.waits}")
    rollout = dataclasses.replace(rollout, how=Rolling(start_s=rollout.how.start_s), step=0, mirror=0.0, moved_s=at_s, trial=None)
    return dataclasses.replace(state, rollout=rollout), (Told("step", candidate.number, f"all requests: {why}", at_s=at_s),)


def abort(state: ServiceState, *, at_s: float, why: str = "told to", version: int | None = None) -> Decision:
    """The newcomer goes; what ran before is untouched.

    Raises:
        ServingError: there is none.
    """
    if state.rollout is None:
        raise ServingError("nothing to abort: no version is being rolled out")
    if version is not None and version != state.rollout.version:
        raise ServingError(f"nothing to abort: version {version} is not being rolled out")
    return _fail(state, why, at_s=at_s)


def rollback(state: ServiceState, *, at_s: float, why: str = "told to") -> Decision:
    """Go back: a newcomer under way goes; without one, the version that answered before answers at once again, and the current one goes.

    Raises:
        ServingError: there is neither.
    """
    if state.rollout is not None:
        return _fail(state, f"rolled back: {why}", at_s=at_s)
    current, previous = state.current, state.previous
    if previous is None:
        number = "no version is running" if current is None else f"version {current.number} is alone"
        raise ServingError(f"nothing to roll back to: {number}; a version is kept for {state.keep_s:g} s after another took over. Deploy the old file again")
    told: tuple[Told, ...] = ()
    need = needs(state, previous)
    if current is not None:
        state = _put(state, dataclasses.replace(current, role=Role.FAILED, since_s=at_s, why=f"rolled back: {why}"))
        told = (Told("rolled back", current.number, why, at_s=at_s),)
    back = dataclasses.replace(previous, role=Role.CURRENT, since_s=at_s, why=why, wishes=need, policies=_held(need, at_s), shed={})
    return _put(state, back), (*told, Told("answers again", previous.number, why, at_s=at_s))


def stop(state: ServiceState, *, at_s: float, why: str = "the service is stopped") -> Decision:
    """Every version is retired."""
    there = [version for version in state.versions if not version.role.gone]
    told: tuple[Told, ...] = ()
    for version in there:
        state, more = _retire(state, version, why, at_s=at_s)
        told += more
    return dataclasses.replace(state, rollout=None, stopped=True), told


def retired(state: ServiceState) -> tuple[int, ...]:
    """The versions whose replicas are to be ended, gently; then `forget` them."""
    return tuple(version.number for version in state.versions if version.role.gone)


def forget(state: ServiceState, version: int) -> ServiceState:
    """Nothing is left of a version that was to be ended."""
    return dataclasses.replace(state, versions=tuple(one for one in state.versions if one.number != version or not one.role.gone))


def step(state: ServiceState, seen: Seen) -> Decision:
    """What is to be decided now. To be called about once a second, once replicas had the time to say that they are there."""
    if state.stopped:
        return state, ()
    state, told = _scale(state, seen)
    if state.previous is not None and seen.at_s - state.previous.since_s >= state.keep_s:
        state, more = _retire(state, state.previous, f"kept for {state.keep_s:g} s", at_s=seen.at_s)
        told += more
    if state.candidate is not None:
        state, more = _advance(state, seen)
        told += more
    return state, told


def _scale(state: ServiceState, seen: Seen) -> Decision:
    """The wishes of all versions by their loads. What a newcomer answers counts for the current one, too, so that it could take it back at any time."""
    shares, told = weights(state, seen), []
    candidate, joins = state.candidate, state.candidate is not None and state.candidate.role is Role.JOINING
    for version in state.versions:
        if version.role.gone or version.role is Role.PREVIOUS:
            continue
        wishes, policies, shed = {}, {}, {}
        for group, scale in version.scales.items():
            load = seen.loads.get((version.number, group), Load())
            there = load.in_flight
            if version.role is Role.CURRENT and joins and candidate is not None:
                answered, mirrored = shares[candidate.number]
                part = answered / (answered + (1 - answered) * mirrored) if answered else 0.0
                there += part * seen.loads.get((candidate.number, group), Load()).in_flight
            shed[group] = load.shed
            more = max(0, load.shed - version.shed.get(group, load.shed))
            observed = policy.Observation(seen.at_s, there, load.waiting, more, seen.ready.get((version.number, group), 0), load.background > 0)
            wishes[group], policies[group] = policy.desired(scale, observed, version.policies.get(group, policy.State()))
            before = version.wishes.get(group)
            if before is not None and before != wishes[group] and version.role is Role.CURRENT:
                why = f"{group} from {before} to {wishes[group]} replicas, for {there:.0f} requests in flight, {load.waiting:.0f} waiting, {more} shed"
                numbers = {"before": before, "replicas": wishes[group], "in_flight": there, "waiting": load.waiting, "shed": more}
                told.append(Told("scaled", version.number, why, numbers, at_s=seen.at_s))
        state = _put(state, dataclasses.replace(version, wishes=wishes, policies=policies, shed=shed))
    return state, tuple(told)


def _advance(state: ServiceState, seen: Seen) -> Decision:
    candidate, rollout = state.candidate, state.rollout
    assert candidate is not None
    assert rollout is not None
    rollout = _looked(state, rollout, candidate, seen)
    state = dataclasses.replace(state, rollout=rollout)
    if not is_ready(candidate, seen):
        return _unready(state, rollout, candidate, seen)
    if candidate.role is Role.STARTING:
        told = (Told("ready", candidate.number, f"after {seen.at_s - rollout.began_s:.1f} s", {"took_s": seen.at_s - rollout.began_s}, at_s=seen.at_s),)
        if rollout.gate:
            state = _put(state, dataclasses.replace(candidate, role=Role.GATING, since_s=seen.at_s))
            return _waiting(state, "the gate"), told
        state, more = _join(state, candidate, at_s=seen.at_s)
        return state, told + more
    if candidate.role is Role.GATING:
        if seen.at_s - candidate.since_s >= rollout.how.start_s:
            return _fail(state, f"gate: no word within {rollout.how.start_s:g} s", at_s=seen.at_s)
        return _waiting(state, "the gate"), ()
    has = capacity(state, candidate, seen)
    if has < rollout.share - 1e-9 and seen.at_s - rollout.moved_s >= rollout.how.start_s:
        why = f"replicas for {has:.0%} of the requests, and no further one within {rollout.how.start_s:g} s{_starts(seen, candidate)}"
        return _fail(state, why, {"share": has}, at_s=seen.at_s)
    if rollout.share >= 1 and has >= 1:
        return _take_over(state, candidate, "a replica for each of the old" if isinstance(rollout.how, Rolling) else "no worse at any step", at_s=seen.at_s)
    if isinstance(rollout.how, Rolling):
        return _waiting(state, f"replicas: there are some for {has:.0%} of the requests"), ()
    return _compare(state, rollout, candidate, seen)


def _unready(state: ServiceState, rollout: Rollout, candidate: Version, seen: Seen) -> Decision:
    """A newcomer without a ready replica in each group is waited for, within bounds."""
    missing = ", ".join(group for group in candidate.scales if not seen.ready.get((candidate.number, group), 0))
    count, _ = seen.failures.get(candidate.number, (0, ""))
    since_s = max(candidate.since_s, rollout.moved_s)
    if count >= FAILED_STARTS:
        return _fail(state, f"no replica of {missing}{_starts(seen, candidate)}", {"failed_starts": count}, at_s=seen.at_s)
    if seen.at_s - since_s >= rollout.how.start_s:
        why = f"no replica of {missing} within {rollout.how.start_s:g} s{_starts(seen, candidate)}"
        return _fail(state, why, {"failed_starts": count}, at_s=seen.at_s)
    return _waiting(state, f"a replica of {missing}"), ()


def _starts(seen: Seen, candidate: Version) -> str:
    count, last = seen.failures.get(candidate.number, (0, ""))
    return f"; starts failed {count} times, the last time: {last}" if count else ""


def _looked(state: ServiceState, rollout: Rollout, candidate: Version, seen: Seen) -> Rollout:
    """What is seen, noted: how much traffic there is, and how many replicas the newcomer has."""
    versions = [version.number for version in (state.current, candidate) if version is not None]
    answered = sum(seen.reports[number].answered for number in versions if number in seen.reports)
    traffic, passed_s = rollout.traffic, seen.at_s - rollout.traffic.at_s
    if traffic.answered is None or answered < traffic.answered:
        traffic = Traffic(seen.at_s, answered, traffic.per_s)
    elif passed_s > 0:
        latest = (answered - traffic.answered) / passed_s
        part = 1 - math.exp(-passed_s / _TRAFFIC_S)
        traffic = Traffic(seen.at_s, answered, latest if traffic.per_s is None else traffic.per_s + part * (latest - traffic.per_s))
    ready = sum(seen.ready.get((candidate.number, group), 0) for group in candidate.scales)
    trial = rollout.trial
    if ready > rollout.ready and trial is not None:
        trial = trial.warm_up(at_s=seen.at_s)
    joins = candidate.role is Role.JOINING
    enough = joins and is_ready(candidate, seen) and capacity(state, candidate, seen) >= rollout.share - 1e-9
    moved_s = seen.at_s if ready > rollout.ready or enough else rollout.moved_s  # what is lacking is counted from when it began to lack
    lacks = joins and not enough and seen.at_s - moved_s >= ROOM_S
    rollout = dataclasses.replace(
        rollout, traffic=traffic, trial=trial, ready=max(ready, rollout.ready), moved_s=moved_s, tight=rollout.tight or lacks, sizes=sizes(state, seen)
    )
    return dataclasses.replace(rollout, mirror=mirror(state, rollout, candidate, seen) if joins else 0.0)


def _compare(state: ServiceState, rollout: Rollout, candidate: Version, seen: Seen) -> Decision:
    """A canary or a shadow is held against the version that answers, and goes a step on or fails."""
    assert state.current is not None
    assert rollout.trial is not None
    reports = [seen.reports.get(number, VersionReport()) for number in (candidate.number, state.current.number)]
    trial = feed(rollout.trial, at_s=seen.at_s, candidate=reports[0], base=reports[1])
    rollout = dataclasses.replace(rollout, trial=trial)
    state = dataclasses.replace(state, rollout=rollout)
    verdict = judge(trial)
    if isinstance(rollout.how, Shadow):
        return _shadowed(state, rollout, verdict, at_s=seen.at_s)
    assert isinstance(rollout.how, Canary)
    if verdict.worse:
        return _fail(state, verdict.why, verdict.numbers, at_s=seen.at_s)
    if rollout.share >= 1:
        return _waiting(state, f"replicas: there are some for {capacity(state, candidate, seen):.0%} of the requests"), ()
    if weights(state, seen)[candidate.number][0] < rollout.share - 1e-9:
        return _waiting(state, f"replicas for {rollout.share:.0%} of the requests"), ()
    if rollout.step_s is None:
        state = dataclasses.replace(state, rollout=dataclasses.replace(rollout, step_s=seen.at_s, step_pairs=trial.sample))
        return state, (Told("step", candidate.number, f"answers {rollout.share:.0%}", {"share": rollout.share}, at_s=seen.at_s),)
    left_s, left = rollout.step_s + rollout.how.step_s - seen.at_s, rollout.step_pairs + rollout.how.step_pairs - trial.sample
    if left_s > 0 or left > 0:
        waits = f"{left} more requests to compare" if left > 0 else f"{left_s:.0f} s more"
    elif not verdict.within:
        waits = f"certainty: {verdict.text}"
    else:
        rollout = dataclasses.replace(rollout, step=rollout.step + 1, step_s=None, moved_s=seen.at_s, said="")
        state = _waiting(dataclasses.replace(state, rollout=rollout), f"replicas for {rollout.share:.0%} of the requests")
        return state, (Told("step", candidate.number, f"on to {rollout.share:.0%}: {verdict.text}", verdict.numbers, at_s=seen.at_s),)
    state = _waiting(state, waits)
    if left_s > -HOLD_S or rollout.said:
        return state, ()
    return _said(state, "waits", f"at {rollout.share:.0%} for {waits}", verdict.numbers, at_s=seen.at_s)


def _shadowed(state: ServiceState, rollout: Rollout, verdict: Verdict, *, at_s: float) -> Decision:
    assert rollout.trial is not None
    enough = Canary().step_pairs
    said = "looks worse" if verdict.worse else "looks alike" if verdict.within and rollout.trial.candidate.pairs >= enough else ""
    state = _waiting(state, f"a word of yours: {verdict.why or verdict.text}")
    if not said or rollout.said in (said, "looks worse"):
        return state, ()
    return _said(state, said, verdict.why or verdict.text, verdict.numbers, at_s=at_s)


def _said(state: ServiceState, what: str, why: str, numbers: Mapping[str, float], *, at_s: float) -> Decision:
    assert state.rollout is not None
    rollout = dataclasses.replace(state.rollout, said=what)
    return dataclasses.replace(state, rollout=rollout), (Told(what, rollout.version, why, numbers, at_s=at_s),)


def _join(state: ServiceState, candidate: Version, *, at_s: float) -> Decision:
    """A newcomer whose replicas are ready and that has passed the gate begins to take over; at once where nothing else runs."""
    assert state.rollout is not None
    if state.current is None:
        return _take_over(state, candidate, "the first version", at_s=at_s)
    how = state.rollout.how
    trial = None if isinstance(how, Rolling) else Trial.begin(how.tolerance, at_s=at_s)
    rollout = dataclasses.replace(state.rollout, moved_s=at_s, trial=trial, waits="requests to compare" if trial else "replicas")
    return _put(dataclasses.replace(state, rollout=rollout), dataclasses.replace(candidate, role=Role.JOINING, since_s=at_s)), ()


def _take_over(state: ServiceState, candidate: Version, why: str, *, at_s: float) -> Decision:
    assert state.rollout is not None
    need, old = needs(state, candidate), state.current
    if old is not None:
        kept = floors(old, tight=state.rollout.tight)
        state = _put(state, dataclasses.replace(old, role=Role.PREVIOUS, since_s=at_s, why=f"version {candidate.number} took over", wishes=kept, policies={}))
    state = _put(state, dataclasses.replace(candidate, role=Role.CURRENT, since_s=at_s, why=why, wishes=need, policies=_held(need, at_s)))
    trial = state.rollout.trial if state.rollout else None
    numbers = judge(trial).numbers if trial else {}
    return dataclasses.replace(state, rollout=None), (Told("promoted", candidate.number, why, numbers, at_s=at_s),)


def _fail(state: ServiceState, why: str, numbers: Mapping[str, float] | None = None, *, at_s: float) -> Decision:
    candidate = state.candidate
    assert candidate is not None
    state = _put(state, dataclasses.replace(candidate, role=Role.FAILED, since_s=at_s, why=why))
    return dataclasses.replace(state, rollout=None), (Told("failed", candidate.number, why, numbers or {}, at_s=at_s),)


def _retire(state: ServiceState, version: Version, why: str, *, at_s: float) -> Decision:
    return _put(state, dataclasses.replace(version, role=Role.RETIRED, since_s=at_s, why=why)), (Told("retired", version.number, why, at_s=at_s),)


def _at_gate(state: ServiceState, number: int) -> Version:
    candidate = state.candidate
    if candidate is None or candidate.number != number or candidate.role is not Role.GATING:
        raise ServingError(f"version {number} does not wait at the gate" + (f"; version {candidate.number} is {candidate.role}" if candidate else ""))
    return candidate


def _put(state: ServiceState, version: Version) -> ServiceState:
    """The state with this version in place of the one of its number."""
    return dataclasses.replace(state, versions=tuple(version if one.number == version.number else one for one in state.versions))


def _waiting(state: ServiceState, waits: str) -> ServiceState:
    assert state.rollout is not None
    return dataclasses.replace(state, rollout=dataclasses.replace(state.rollout, waits=waits))


def _held(need: Mapping[str, int], at_s: float) -> dict[str, policy.State]:
    """A memory by which so many replicas are held until it is certain that fewer do."""
    return {group: policy.State(wishes=((at_s, count),), busy_s=at_s) for group, count in need.items()}
