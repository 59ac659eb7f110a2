"""Where a request of one group goes: which replica, how long it waits for one, and what happens when its replica dies or hangs."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from headrace.serving.door.journey import GONE, Hop, Journey
from headrace.serving.door.link import LEAST_BUSY_S, MOST_BUSY_S, Link
from headrace.serving.door.retries import UNSAID_DEATHS, Retries
from headrace.serving.routes import Endpoint
from headrace.serving.wire import Done, Failure, Said

MOST_WAITING = 1_000  # that no replica has taken yet; those whose replica died wait beside them
MOST_ASKED = 3  # replicas lost with the same request for a language model on board
PROBE_S = 0.010  # while all replicas are busy, one request goes to them this often
MOST_REFUSALS = 4  # of one request in a row
MOST_UNANSWERED = 6  # PINGs
LEAST_HUNG_S = 4.0
LONGEST_HUNG_S = 30.0  # where nothing shows that it is the replica, or how long calls take
DOUBT_FACTOR, HUNG_FACTOR = 2, 8  # times the longest call seen lately: another replica is asked as well; it is given up without proof
MEMORY_S = 300.0  # of how long calls take

NO_ROOM = Failure(429, "overloaded", "all replicas have as many requests as they can answer in time; try again later")
CROWDED = Failure(503, "unavailable", "there is no replica yet, and as many requests as may wait for one do so")
FULLER = 1.25  # times the mean load, up to which a replica gets the requests of its prefixes
_MIXER, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1  # Fibonacci hashing

MIRROR_LEFT = Failure(503, "unavailable", "there was no room for a mirrored request")
BROKEN_OFF = Failure(503, "unavailable", "the replica was lost while it answered; what was sent of the answer is all there is of it")
NO_BUDGET = Failure(503, "unavailable", "the replica was lost while it computed the request, and too many requests have been tried again lately")


class Pool:
    """The replicas of one group of a version, as one door sees them, and the requests that wait for one.

    `longest_s` is the longest computation seen within the last five to ten minutes.
    """

    def __init__(self, version: int, group: str, *, retries: Retries, answered: Callable[[Pool, Done], None]) -> None:
        self.version = version
        self.group = group
        self.links: dict[Endpoint, Link] = {}
        self.leaving: set[Link] = set()  # no longer on the routes, with requests under way
        self.usable: list[Link] = []
        self.retry_after_s = 0.0
        self._answered = answered
        self._retries = retries
        self._waiting: list[tuple[int, int, Hop]] = []
        self._loop = asyncio.get_running_loop()
        self._longest_s = [0.0, 0.0]  # of the current span of five minutes, and of the one before
        self._turn_at = self._loop.time() + MEMORY_S
        self._probed = 0.0
        self._closed: Failure | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, endpoints: Iterable[Endpoint]) -> None:
        """Use these replicas, and no others."""
        wanted = set(endpoints)
        for endpoint in [endpoint for endpoint in self.links if endpoint not in wanted]:
            link = self.links.pop(endpoint)
            link.retire()
            if link.hops:
                self.leaving.add(link)
        for endpoint in wanted - self.links.keys():
            self.links[endpoint] = Link(endpoint, self)
        self._settle_usable()
        self.pump()

    def close(self, failure: Failure) -> None:
        """Serve no more: waiting requests end with `failure`, what is under way is finished."""
        self._closed = failure
        waiting, self._waiting = self._waiting, []
        for _, _, hop in waiting:
            hop.settle(failure)
        self.serve(())

    def abort(self, failure: Failure) -> None:
        """Close all connections now."""
        self.close(failure)
        for link in list(self.leaving):
            for hop in link.take():
                hop.settle(failure)
            link.close()
        self.leaving.clear()
        if self._timer is not None:
            self._timer.cancel()

    def waiting(self) -> int:
        """How many requests wait here."""
        return sum(not hop.future.done() for _, _, hop in self._waiting)

    def saturated(self) -> bool:
        """Whether requests wait although there are replicas: they are all busy."""
        return bool(self.usable) and self._first() is not None

    def full(self, priority: int) -> bool:
        """Whether a request of this class would be turned away now."""
        now = self._loop.time()
        return bool(self.usable) and now - self._probed < PROBE_S and all(link.busy_until[priority] > now for link in self.usable)

    def submit(self, hop: Hop) -> None:
        """Take a request that comes to this group. Its outcome comes to the hop."""
        priority = hop.journey.priority
        first = self._first() if self._waiting else None
        if first is None or priority < first.journey.priority:
            link = self._choose(hop.journey, probe=not hop.journey.shadow)
            if link is not None:
                link.send(hop)
                return
        if hop.journey.shadow:
            hop.settle(MIRROR_LEFT)
        elif self.usable and not hop.journey.patient:
            hop.settle(NO_ROOM)
        elif hop.journey.patient or len(self._waiting) < MOST_WAITING or self.waiting() < MOST_WAITING:
            self._hold(hop)
        else:
            hop.settle(CROWDED)

    def pump(self) -> None:
        """Send waiting requests to replicas that have room."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (hop := self._first()) is not None:
            link = self._choose(hop.journey)
            if link is None:
                if self.usable:
                    self._timer = self._loop.call_later(PROBE_S, self.pump)
                return
            heapq.heappop(self._waiting)
            link.send(hop)

    def tick(self) -> None:
        """Look after the replicas; called twice a second.

        A replica hangs when it leaves PINGs unanswered. PINGs are counted, not timed: where this process itself was stopped for a while,
        the replicas are not to blame. If a call takes far longer than any did lately, it may be the replica or the requests: others are
        asked as well. When one of them is done first, it was the replica; if nobody can tell, it is given up after `LONGEST_HUNG_S`.
        """
        now = self._loop.time()
        if now >= self._turn_at:
            self._turn_at = now + MEMORY_S
            self._longest_s = [0.0, self._longest_s[0]]
        for link in [*self.links.values(), *self.leaving]:
            self._look(link)
            if link in self.leaving and not link.hops:
                link.close()
                self.leaving.discard(link)
            else:
                link.ping()
        if self._waiting:
            self.pump()

    # what links tell

    def changed(self, link: Link) -> None:
        """A link can be used now, or no longer."""
        self._settle_usable()
        self.pump()

    def answered(self, link: Link, done: Done | Said) -> None:
        """A replica has computed a request: it may have room for another."""
        if isinstance(done, Done):
            self._longest_s[0] = max(self._longest_s[0], done.compute_s)
            self._answered(self, done)
        if self._waiting:
            self.pump()

    def refused(self, link: Link, hop: Hop, retry_after_s: float) -> None:
        """A replica has no room for a request: ask another one, or shed the request."""
        journey = hop.journey
        self.retry_after_s = retry_after_s
        link.turn_away(journey.priority, self._loop.time() + min(max(retry_after_s, LEAST_BUSY_S), MOST_BUSY_S))
        hop.refusals += 1
        if journey.shadow:
            hop.settle(MIRROR_LEFT)
            return
        other = self._choose(journey, probe=False) if hop.refusals % MOST_REFUSALS else None
        if other is not None:
            other.send(hop)
        elif journey.patient or not self.usable:
            self._hold(hop)
        else:
            hop.settle(NO_ROOM)

    def lost(self, link: Link, hops: list[Hop]) -> None:
        """A replica's connection is gone: what it had is tried elsewhere."""
        self._settle_usable()
        self.leaving.discard(link)
        if not link.local and any(hop.deaths for hop in hops):  # an only death is not worth the wait for an answer from another machine
            self._start(self._ask_then_retry(link, hops))
        else:
            self._retry(hops, self._retries.evidence(link))

    async def _ask_then_retry(self, link: Link, hops: list[Hop]) -> None:
        self._retry(hops, await self._retries.ask(link))

    def _retry(self, hops: list[Hop], words: str | None) -> None:
        """Requests whose replica died. If it was by its own doing, each by itself from now on, lest it was the cause.

        Otherwise somebody else has killed it, or the machine is gone; after several such deaths of the same request that is less sure.
        """
        for hop in hops:
            if hop.future.done() or hop.drop():
                continue
            hop.deaths += hop.started or not hop.alone or hop.speaking is not None
            verdict = self._retries.verdict(hop, words if hop.alone and hop.started else None)
            if verdict is not None:
                hop.settle(verdict)
                continue
            hop.alone = hop.alone or words is not None or hop.deaths >= UNSAID_DEATHS
            self._resend(hop, "death")

    def _look(self, link: Link) -> None:
        """Whether the replica hangs, or no longer does."""
        silent, stuck = link.unanswered >= MOST_UNANSWERED, self._stuck(link)
        if not link.hung and (silent or (link.slow and self._stuck(link, surely=True))):
            self._give_up(link, silent=silent)
        elif link.hung and not (silent or stuck):
            link.hung = link.slow = False
            self.changed(link)
        elif link.slow and not stuck:
            link.slow = False
            for hop in list(link.hops.values()):
                if (twin := hop.twin) is not None and hop is hop.journey.hop and twin.link is None:
                    hop.twin = None  # it would come to this replica, too
                    twin.withdraw(GONE)
            self.changed(link)
        elif stuck and not link.hung:
            link.slow = True
            self._settle_usable()
            for hop in list(link.hops.values()):
                if hop.alone and not hop.started:  # it waits behind the one that takes so long
                    if self._retries.tokens >= 1:
                        link.cancel(hop)
                        self._resend(hop, "slow")
                else:
                    self._double(link, hop)

    def _give_up(self, link: Link, *, silent: bool) -> None:
        """A replica hangs. What it had is sent elsewhere; a request in whose computation a second one hangs is watched like one that kills."""
        link.hung = True
        self._settle_usable()
        for hop in link.take():
            hop.hangs += 1
            if hop.alone and hop.started and silent:
                hop.deaths += 1
            if hop.drop():
                continue
            verdict = self._retries.verdict(hop, None)
            if verdict is not None:
                hop.settle(verdict)
                continue
            hop.alone = hop.alone or hop.hangs > 1 or not silent
            self._resend(hop, "hung")

    def _double(self, link: Link, hop: Hop) -> None:
        """Have another replica compute the request as well; what is done first is the answer."""
        if hop.speaking is not None:  # an engine that hangs is found out by its replica
            return
        if hop.twin is not None or hop.alone or hop.hangs or hop.journey.shadow or not self._retries.spend(hop, "slow", version=self.version):
            return
        # Alone: of those that hang together one may be to blame, and would take the others with it again.
        twin = hop.twin = Hop(hop.journey, hop.body, hop.content, hop.accept, alone=True)
        twin.twin = hop
        hop.journey.patient = True
        hop.journey.retries += 1

        def done(_: object) -> None:
            outcome = twin.future.result()
            if hop.future.done() or (isinstance(outcome, Failure) and not hop.dropped):
                return  # the other one may still make it
            oldest = next(iter(link.hops.values()), None) is hop  # what came later may only have waited there
            if oldest and link.slow and not link.hung and not self._excused(link):
                link.cancel(hop)
                self._give_up(link, silent=False)
            hop.replica = twin.replica
            hop.withdraw(outcome)

        twin.future.add_done_callback(done)
        hop.future.add_done_callback(lambda _: twin.withdraw(GONE))
        self.submit(twin)

    def _resend(self, hop: Hop, why: str) -> None:
        journey = hop.journey
        if journey.shadow:
            hop.settle(MIRROR_LEFT)
        elif hop.speaking is not None and (hop.speaking.begun or hop.deaths + hop.hangs >= MOST_ASKED):
            hop.settle(BROKEN_OFF)
        elif self._retries.spend(hop, why, version=self.version):
            journey.patient = True
            journey.retries += 1
            self.submit(hop)
        else:
            hop.settle(NO_BUDGET)

    def _stuck(self, link: Link, *, surely: bool = False) -> bool:
        """Whether a call of its takes far too long: long enough to ask another replica as well, or to give it up without proof."""
        if link.stats is None or not link.ready or (surely and self._excused(link)):
            return False
        least_s, factor = (LONGEST_HUNG_S, HUNG_FACTOR) if surely else (LEAST_HUNG_S, DOUBT_FACTOR)
        longest_s = max(self._longest_s)
        return link.stats.oldest_call_s > (max(least_s, factor * longest_s) if longest_s else LONGEST_HUNG_S)

    @staticmethod
    def _excused(link: Link) -> bool:
        """Whether it is at a request that has made a replica hang before: it is the request that is slow, and is given its time."""
        return any(hop.hangs and hop.started for hop in link.hops.values())

    def _hold(self, hop: Hop) -> None:
        if self._closed is not None:
            hop.settle(self._closed)
            return
        hop.journey.patient = True  # it has waited: it is not shed any more
        if len(self._waiting) >= 2 * MOST_WAITING:
            self._waiting = [entry for entry in self._waiting if not entry[2].future.done()]
            heapq.heapify(self._waiting)
        heapq.heappush(self._waiting, (hop.journey.priority, hop.order, hop))
        if self.usable and self._timer is None:
            self._timer = self._loop.call_later(PROBE_S, self.pump)

    def _first(self) -> Hop | None:
        """The request that is next; those that were settled while they waited are dropped."""
        waiting = self._waiting
        while waiting:
            hop = waiting[0][2]
            if not hop.future.done():
                return hop
            heapq.heappop(waiting)
        return None

    def _choose(self, journey: Journey, *, probe: bool = True) -> Link | None:
        """The better of two replicas that have room; if none has, any, now and then, to see whether that is still so.

        Requests of the same prefix go to the same replica, which has it in its cache (rendezvous hashing), unless it has clearly more to do
        than the others.
        """
        usable = self.usable
        if not usable:
            return None
        now = self._loop.time()
        room = [link for link in usable if link.busy_until[journey.priority] <= now]
        if room:
            if len(room) == 1:
                return room[0]
            if journey.prefix is not None and (home := self._home(room, journey.prefix)) is not None:
                return home
            at = int(random.random() * len(room))  # noqa: S311
            one, other = room[at], room[at - 1 - int(random.random() * (len(room) - 1))]  # noqa: S311
            return one if one.load() <= other.load() else other
        if probe and now - self._probed >= PROBE_S:
            self._probed = now
            return random.choice(usable)  # noqa: S311
        return None

    @staticmethod
    def _home(room: list[Link], prefix: int) -> Link | None:
        """The replica of a prefix, if it is not much fuller than the others."""
        home = max(room, key=lambda link: ((link.seed ^ prefix) * _MIXER) & _MASK)
        return home if home.load() <= FULLER * sum(link.load() for link in room) / len(room) + 1 else None

    def _settle_usable(self) -> None:
        self.usable = [link for link in self.links.values() if link.usable]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
