"""Who comes next at a station: priorities, age, and the stage's own batch rule. Pure: no threads, no clock."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from headrace.batching import BatchRule, Indices, Rows, Tokens
from headrace.serving.replica.jobs import LEAST_PRIORITY, Job, Share

_AHEAD = 4  # budgets' worth of rows among which those of like length are looked for
PADDING = 1 / 16  # of a token budget, at most
_DECAY = 0.8  # weight of what is known when one call more is measured


class Taken(NamedTuple):
    """What one call computes; requests that were too late for it; and which part of what the rule allows it is."""

    shares: list[Share]
    expired: list[Job]
    filled: float


class Line:
    """Requests that wait for a station's calls, in the order of their class, then of their coming."""

    def __init__(self, rule: BatchRule) -> None:
        self.rule = rule
        self._classes: tuple[OrderedDict[Job, None], ...] = tuple(OrderedDict() for _ in range(LEAST_PRIORITY + 1))

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def __contains__(self, job: Job) -> bool:
        return job in self._classes[job.priority]

    def put(self, job: Job) -> None:
        """Let the request wait. With a token budget it must have been `measured`."""
        self._classes[job.priority][job] = None

    def drop(self, job: Job) -> None:
        """Let it wait no more, if it does."""
        self._classes[job.priority].pop(job, None)

    def ordered(self, now_s: float) -> Iterable[Job]:
        """All that wait, the next first."""
        waiting = [jobs for jobs in self._classes if jobs]
        if len(waiting) == 1:
            return waiting[0]
        return heapq.merge(*waiting, key=lambda job: (job.rank(now_s), job.arrived_s))

    def head(self, now_s: float) -> Job | None:
        """The next."""
        return next(iter(self.ordered(now_s)), None)

    def least(self, above: int, now_s: float) -> Iterator[Job]:
        """Those of a class worse than `above` that no call has begun on, and that may be given back: the worst class first, in it the newest."""
        for jobs in reversed(self._classes[above + 1 :]):
            for job in reversed(jobs):
                if job.rank(now_s) <= above:
                    break  # as are all that came before it
                if not (job.taken or job.alone or job.leaves):
                    yield job

    def take(self, now_s: float, *, shrink: int = 1, only: Job | None = None) -> Taken:
        """What the next call computes, which waits no more: always rows of the next request that is not too late, and what may go with it.

        `shrink` divides the rule. `only` takes of this request alone, as is done for one that asks to be `alone`; others never go with it.
        """
        expired: list[Job] = []
        waiting = self._timely(self.ordered(now_s), now_s, expired) if only is None else [only]
        if isinstance(self.rule, Tokens):
            shares, filled = self._by_tokens(waiting, self.rule, max(1, self.rule.budget // shrink), now_s)
        else:
            shares, filled = self._by_rows(waiting, self.rule, max(1, self.rule.count // shrink))
        for job in expired:
            self.drop(job)
        for share in shares:
            share.job.taken += len(share.rows)
            if share.job.taken == share.job.rows:
                self.drop(share.job)
        return Taken(shares, expired, filled)

    @staticmethod
    def _timely(jobs: Iterable[Job], now_s: float, expired: list[Job]) -> Iterator[Job]:
        first: Job | None = None
        for job in jobs:
            if job.deadline_s < now_s:
                expired.append(job)
            elif first is None:
                if job.alone:
                    return
                first = job
                yield job
            elif not job.alone and job.group == first.group:
                yield job

    @staticmethod
    def _by_rows(waiting: Iterable[Job], rule: Rows, most: int) -> tuple[list[Share], float]:
        shares, room = [], most
        for job in waiting:
            count = min(room, job.rows - job.taken)
            shares.append(Share(job, range(job.taken, job.taken + count)))
            room -= count
            if not room:
                break
        return shares, (most - room) / rule.count

    @staticmethod
    def _by_tokens(waiting: Iterable[Job], rule: Tokens, budget: int, now_s: float) -> tuple[list[Share], float]:
        jobs: list[Job] = []
        widths: list[Indices] = []
        tokens, rank = 0, 0
        for job in waiting:
            if not jobs:
                rank = job.rank(now_s)
            elif tokens >= budget and job.rank(now_s) > rank:
                break  # a worse class fills up what a better one leaves, and no more
            assert job.widths is not None
            jobs.append(job)
            widths.append(job.widths)
            tokens += int(job.widths.sum())
            if tokens >= _AHEAD * budget:
                break
        if not jobs:
            return [], 0.0
        lengths = widths[0] if len(jobs) == 1 else np.concatenate(widths)
        padded = len(lengths) * int(lengths.max())
        if padded <= budget:
            chosen = None
        else:
            chosen = fit(lengths, int(widths[0].argmax()), budget)
            padded = len(chosen) * int(lengths[chosen].max())
        shares = _shares(jobs, chosen)
        if len(shares) < len(jobs):
            for job in {*jobs} - {share.job for share in shares}:
                job.passed_s = job.passed_s or now_s
        return shares, min(1.0, padded / rule.budget)


def _shares(jobs: list[Job], chosen: Indices | None) -> list[Share]:
    """The rows at those places among the rows left of all jobs, None for all of them, by job; they are left no more."""
    shares, start = [], 0
    for job in jobs:
        assert job.left is not None
        assert job.widths is not None
        left, stop = job.left, start + len(job.left)
        if chosen is None:
            rows, job.left, job.widths = left, left[:0], left[:0]
        else:
            low, high = np.searchsorted(chosen, (start, stop))
            start = stop
            if low == high:
                continue
            at = chosen[low:high] - (stop - len(left))
            rows = left[at]
            keep = np.ones(len(left), bool)
            keep[at] = False
            job.left, job.widths = left[keep], job.widths[keep]
        adjoin = int(rows[-1]) - int(rows[0]) + 1 == len(rows)  # they ascend
        shares.append(Share(job, range(int(rows[0]), int(rows[-1]) + 1) if adjoin else rows))
    return shares


def fit(lengths: Indices, anchor: int, budget: int) -> Indices:
    """Places of the rows, ascending, that go into a call with the row at `anchor`: neighbours in length, padded to the longest within `budget`.

    No more than 1/16 of the budget is padding: few queued rows of unlike lengths are computed sooner in several calls. Of all such runs of
    neighbours it is the one with the most tokens of its own; of rows of the same length the first are preferred. A row longer than the
    budget goes alone.
    """
    order = np.lexsort((-np.arange(len(lengths)), lengths))
    place = int(np.flatnonzero(order == anchor)[0])
    ordered = lengths[order].tolist()
    sums = [0, *itertools.accumulate(ordered)]
    start, most, best = 0, -1, (place, place)
    for top in range(place, len(ordered)):
        widest = ordered[top]
        while start < top and ((padded := (top - start + 1) * widest) > budget or padded - (sums[top + 1] - sums[start]) > budget * PADDING):
            start += 1
        if start > place:
            break
        if (tokens := sums[top + 1] - sums[start]) > most:
            most, best = tokens, (start, top)
    return np.sort(order[best[0] : best[1] + 1])


class Pace:
    """How fast a station works, from its latest calls; a large call counts more than a small one, since load makes calls large."""

    __slots__ = ("calls", "cost", "filled", "seconds")

    def __init__(self) -> None:
        self.calls = self.cost = self.filled = self.seconds = 0.0

    def add(self, seconds: float, cost: float, filled: float) -> None:
        """Count a call."""
        self.calls = self.calls * _DECAY + 1
        self.seconds = self.seconds * _DECAY + seconds
        self.cost = self.cost * _DECAY + cost
        self.filled = self.filled * _DECAY + filled

    @property
    def call_s(self) -> float:
        """Seconds that a call takes."""
        return self.seconds / self.calls if self.calls else 0.0

    def wait_s(self, cost: float) -> float:
        """Seconds that work of this cost takes."""
        return cost * self.seconds / self.cost if self.cost else 0.0
