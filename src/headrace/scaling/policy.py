"""How many replicas a group of stages should have: from the requests that are there, never from CPU or memory.

    wanted = ceil(mean over up_s of (in flight + waiting) / target_in_flight), within least..most
    desired = max(wanted over the last down_delay_s)

The first line is Ray Serve's own formula (`ray.serve.autoscaling_policy`: ongoing requests over the target, per replica), which is Little's law with
a chosen number of requests per replica. The second differs from Ray's, which after its delay takes the latest value: under load that comes and goes
the latest value takes away what the next wave needs, and so it goes in circles; the largest of the window does not. To zero it goes after
`idle_s` in which nothing was there, and back from zero as soon as something waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.errors import SettingError


@dataclass(frozen=True, slots=True)
class Scale:
    """Bounds and pace of a group: `least`..`most` replicas, each for `target_in_flight` requests.

    `up_s` is the window over which the requests are averaged, `down_delay_s` how long a smaller number must have been enough, `idle_s` how long
    nothing must have been there before the last replica goes (only where `least` is 0).
    """

    least: int = 1
    most: int = 1
    target_in_flight: float = 8.0
    up_s: float = 2.0
    down_delay_s: float = 120.0
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most < 1:
            raise SettingError(f"replicas {self.least}:{self.most}: give least:most with 0 <= least <= most and most >= 1, as in 1:8")
        if not self.target_in_flight > 0:
            raise SettingError(f"target_in_flight is {self.target_in_flight}; it must be above 0")
        if min(self.up_s, self.down_delay_s, self.idle_s) < 0:
            raise SettingError(f"up_s, down_delay_s and idle_s are {self.up_s}, {self.down_delay_s} and {self.idle_s}; none may be below 0")


@dataclass(frozen=True, slots=True)
class Observation:
    """What is there at `at_s`, in seconds on any clock that goes on.

    `in_flight` are the requests that replicas have taken and not answered, those queued there included (the sum of `wire.Stats.in_flight`, but for
    background work), `waiting` those that doors hold because there is no replica, `shed` those refused since the observation before, `ready` the
    replicas that are. `background` says whether there is work that nobody waits for: it keeps the last replica, and asks for no further one.
    """

    at_s: float
    in_flight: float
    waiting: float = 0.0
    shed: int = 0
    ready: int = 0
    background: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What a decision remembers: recent loads by time, the largest of recent wishes by time (falling), and when something was last there."""

    loads: tuple[tuple[float, float], ...] = ()
    wishes: tuple[tuple[float, int], ...] = ()
    busy_s: float | None = None


def desired(scale: Scale, observation: Observation, state: State) -> tuple[int, State]:
    """The number of replicas to have now, and what to remember. The formula stands at the top of this module.

    Shed requests are in nobody's queue, so they count as one replica more than are ready: otherwise queues bounded below `target_in_flight` would hide
    the load for ever.
    """
    now_s = observation.at_s
    load = observation.in_flight + observation.waiting
    # What lies in the future is of a clock that was set back.
    loads = (*((at_s, was) for at_s, was in state.loads if now_s - scale.up_s < at_s < now_s), (now_s, load))
    mean = sum(was for _, was in loads) / len(loads)
    if observation.waiting and not observation.ready:
        mean = max(mean, load)  # from zero at once, and to the number that those who wait need
    wanted = math.ceil(mean / scale.target_in_flight - 1e-9)
    if observation.shed:
        wanted = max(wanted, observation.ready + 1)
    busy_s = now_s if load or observation.shed or observation.background or state.busy_s is None else min(state.busy_s, now_s)
    if not scale.least and now_s - busy_s >= scale.idle_s:
        return 0, State(loads, ((now_s, 0),), busy_s)
    wanted = min(max(wanted, scale.least, 1), scale.most)
    # Of wishes as large as the new one or smaller, the new one outlives them all.
    wishes = (*((at_s, was) for at_s, was in state.wishes if now_s - scale.down_delay_s < at_s <= now_s and was > wanted), (now_s, wanted))
    return wishes[0][1], State(loads, wishes, busy_s)
