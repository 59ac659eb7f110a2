"""Which version answers which share of the requests, and how many replicas each has: what follows from a service's state and what is seen."""

from __future__ import annotations

import math

from headrace.serving.release.versions import MIRROR_PER_S, Canary, Role, Rolling, Rollout, Seen, ServiceState, Shadow, Version

_DUST = 1e-9  # what sums of fractions are off


def is_ready(version: Version, seen: Seen) -> bool:
    """Whether each group of a version has a ready replica, so that it can answer."""
    return bool(version.scales) and all(seen.ready.get((version.number, group), 0) > 0 for group in version.scales)


def needs(state: ServiceState, version: Version) -> dict[str, int]:
    """By group of a version, the replicas that it would need if it answered everything."""
    current = state.current
    found = {}
    for group, scale in version.scales.items():
        wishes = [one.wishes.get(group, 0) for one in (current, version) if one is not None]
        found[group] = min(max(*wishes, scale.least, 1), scale.most)
    return found


def capacity(state: ServiceState, version: Version, seen: Seen) -> float:
    """The share of all requests for which a version has ready replicas, by its scarcest group."""
    if not is_ready(version, seen):
        return 0.0
    return min(1.0, *(seen.ready.get((version.number, group), 0) / need for group, need in needs(state, version).items()))


def weights(state: ServiceState, seen: Seen) -> dict[int, tuple[float, float]]:
    """By version that is not gone: the share of requests that it answers, and the share of all requests that is mirrored to it.

    The first ones add up to 1 as soon as there is a version to answer. One without a ready replica in each group gets nothing while another that may
    answer has them; if none has, the current one gets everything, so that doors hold the requests for it.
    """
    found = {version.number: (0.0, 0.0) for version in state.versions if not version.role.gone}
    current, candidate, rollout = state.current, state.candidate, state.rollout
    joins = candidate is not None and candidate.role is Role.JOINING
    answering = [version for version in (current, candidate if joins and rollout and rollout.share else None, state.previous) if version is not None]
    first = next((version for version in answering if is_ready(version, seen)), None)
    if first is None:
        return found | ({current.number: (1.0, 0.0)} if current is not None else {})
    found[first.number] = (1.0, 0.0)
    if not joins or candidate is None or rollout is None or first is not current or not is_ready(candidate, seen):
        return found
    share = _share(state, rollout, candidate, seen)
    return found | {current.number: (1 - share, 0.0), candidate.number: (share, rollout.mirror if share < 1 else 0.0)}


def _share(state: ServiceState, rollout: Rollout, candidate: Version, seen: Seen) -> float:
    """What a newcomer with ready replicas answers: what it is to, as far as its replicas suffice."""
    has = capacity(state, candidate, seen)
    if rollout.share < 1:
        return min(rollout.share, has)
    current = state.current
    others = capacity(state, current, seen) if current is not None else 0.0
    return 1.0 if has >= 1 else has / (has + others)


def mirror(state: ServiceState, rollout: Rollout, candidate: Version, seen: Seen) -> float:
    """The share of requests to mirror: to a newcomer what the current version answers, and the other way round.

    It is bounded by the requests per second of `how`, and so that a replica of the newcomer has no more to do than one of the current version: it would
    look slower only because of that. A bound changes in leaps, since every change goes to all doors.
    """
    if isinstance(rollout.how, Rolling):
        return 0.0
    share = rollout.share
    most = rollout.how.share if isinstance(rollout.how, Shadow) else 1.0
    spare = max(0.0, capacity(state, candidate, seen) - share) / (1 - share) if share < 1 else 0.0  # what it answers itself is no load more
    bound = min(most, wanted_mirror(rollout), spare)
    fits = bound > 0 and rollout.mirror <= min(most, spare) + _DUST and 0.8 <= rollout.mirror / bound <= 1.25
    return rollout.mirror if fits else bound


def wanted_mirror(rollout: Rollout) -> float:
    """The share of requests that makes `mirror_per_s`, whatever the newcomer can bear."""
    per_s = rollout.how.mirror_per_s if isinstance(rollout.how, Canary | Shadow) else MIRROR_PER_S
    if rollout.traffic.per_s is None:
        return 0.0
    return min(1.0, per_s / max(rollout.traffic.per_s, 1e-3))


def sizes(state: ServiceState, seen: Seen) -> dict[str, int]:
    """By group of the newcomer, the replicas to have: one at first, then as its share asks for, never fewer than it was given unless it needs fewer."""
    candidate, rollout = state.candidate, state.rollout
    if candidate is None or rollout is None:
        return {}
    need = needs(state, candidate)
    if candidate.role is not Role.JOINING:
        return {group: 1 if state.current is not None else need[group] for group in need}
    if rollout.share >= 1:  # one at a time in each group, all groups level
        has = capacity(state, candidate, seen)
        wanted = {group: math.floor(has * count + _DUST) + 1 for group, count in need.items()}
    else:
        share = rollout.share + (1 - rollout.share) * wanted_mirror(rollout)
        wanted = {group: max(math.ceil(share * count - _DUST), candidate.wishes.get(group, 0), 1) for group, count in need.items()}
    return {group: min(max(wanted[group], rollout.sizes.get(group, 0)), need[group]) for group in need}


def floors(version: Version, *, tight: bool) -> dict[str, int]:
    """By group, the replicas with which a version is kept so that it can answer again at once; where there is no room, one."""
    return {group: 1 if tight else max(1, scale.least) for group, scale in version.scales.items()}


def targets(state: ServiceState, seen: Seen) -> dict[tuple[int, str], int]:
    """By version and group: the replicas to have. Versions to be deleted are not in it.

    The current version gives up replicas only for those of a newcomer that are ready and may answer: one for one while that rolls in, none for a canary
    unless there is no room. As long as another version is there, none goes to zero.
    """
    found: dict[tuple[int, str], int] = {}
    candidate, rollout = state.candidate, state.rollout
    joins = candidate is not None and candidate.role is Role.JOINING
    for version in state.versions:
        if version.role.gone:
            continue
        if version is candidate:
            found |= {(version.number, group): count for group, count in sizes(state, seen).items()}
            continue
        alone = version.role is Role.CURRENT and state.previous is None and not joins
        for group, scale in version.scales.items():
            found[version.number, group] = version.wishes.get(group, max(1, scale.least)) if alone else max(1, version.wishes.get(group, scale.least))
        if version.role is Role.CURRENT and joins and candidate and rollout and (rollout.tight or rollout.share >= 1):
            has = capacity(state, candidate, seen)
            for group, floor in floors(version, tight=rollout.tight).items():
                count = found[version.number, group]
                found[version.number, group] = min(count, max(floor, math.ceil(count * (1 - has) - _DUST)))
    return found
