"""The floor of a replica: who waits at which station, and what each call takes. One lock, no threads of its own.

Requests pass the stations in order. A station's call begins whenever one of its threads is free and something waits, except that a request
that asks to be `alone` is computed with nothing beside it in the whole process, and others begin when its answer is out of it: should the
process die meanwhile, it was that request.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import pyarrow as pa

from headrace.batching import BatchRule, Rows, Tokens
from headrace.lineage import Fault
from headrace.serving.replica.jobs import Cut, Job, Share
from headrace.serving.replica.queue import Line, Pace, Taken
from headrace.serving.routes import Limits
from headrace.stage import Stage
from headrace.worker import Worker

Wake = SimpleQueue[None]
"""What a thread without work waits for."""

_MOST_BYTES = 512 << 20  # of bodies that wait or are computed


@dataclass(frozen=True, slots=True)
class Call:
    """What one thread computes at once."""

    shares: list[Share]
    filled: float
    cost: float


@dataclass(slots=True, eq=False)
class Station:
    """Stages that are called one after the other in one thread, or several alike, and the requests that wait for it.

    `passes` are the columns that are needed after it. `fresh` are requests of unknown length, which a token budget asks for. `backlog` is the cost of all
    requests of the replica that are still to pass here, `busy` the part of it that calls hold; cost is rows, or bytes of the body where rows differ in
    length. `since` is when the call of each of its `threads` began, 0 while there is none, last that of the sockets' own; `free` are threads that wait.
    """

    at: int
    stages: tuple[Stage, ...]
    rule: BatchRule
    passes: frozenset[str]
    threads: int
    line: Line
    pace: Pace = field(default_factory=Pace)
    fresh: list[Job] = field(default_factory=list)
    free: list[Wake] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    backlog: float = 0.0
    busy: float = 0.0
    since: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.since = [0.0] * (self.threads + 1)

    def cost(self, job: Job) -> float:
        """Of one row of it."""
        return 1.0 if isinstance(self.rule, Rows) else job.size / job.rows

    @property
    def model(self) -> bool:
        """Whether it is a model, which has one thread unless its `concurrency` says otherwise."""
        return self.stages[0].is_model

    @property
    def full(self) -> float:
        """The cost of a call that holds all that the rule allows."""
        if isinstance(self.rule, Rows):
            return float(self.rule.count)
        return self.pace.cost / self.pace.filled if self.pace.filled else self.rule.budget * self.rule.bytes_per_token

    @property
    def wait_s(self) -> float:
        """How long it takes to compute all that is to pass here."""
        return self.pace.wait_s(self.backlog) / self.threads

    @property
    def shrink(self) -> int:
        """By what the rule is divided, since a call did not fit the accelerator's memory."""
        return max((max(worker.shrink.values()) for worker in self.workers), default=1)

    def wake(self) -> None:
        """Have a thread look for work, if one is free."""
        if self.free:
            self.free.pop().put(None)


def divide(stages: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """The stages of each station: neighbouring functions together, unless one has a token budget, and each model by itself."""
    alone = iter(range(1, len(stages) + 1))  # a key of its own for each stage that shares with none
    keys = [next(alone) if stage.is_model or isinstance(stage.batch, Tokens) else 0 for stage in stages]
    return [tuple(stage for _, stage in run) for _, run in itertools.groupby(zip(keys, stages, strict=True), key=lambda pair: pair[0])]


class Floor:
    """All stations of a replica.

    `rows` and `calls` count what was answered and done so far, and `filled` the part of their rule that calls held; of models alone, if there are any.
    """

    def __init__(self, stages: Sequence[Stage], *, writes: Iterable[str], limits: Limits, threads: int) -> None:
        self.stations: list[Station] = []
        self.rows = self.calls = 0
        self.filled = 0.0
        self.closing = False
        self._limits = limits
        self._lock = threading.Lock()  # holds for all that is here, and for the jobs that are
        self._running = 0  # calls
        self._alone: Job | None = None  # is computed, and nothing beside it
        self._next_alone: Job | None = None  # is, as soon as all calls have ended; no other begins before
        self._held_bytes = 0
        runs = divide(stages)
        for at, run in enumerate(runs):
            first, model = run[0].batch, run[0].is_model
            rule = first if isinstance(first, Tokens) else Rows(min(stage.batch.count for stage in run if isinstance(stage.batch, Rows)))
            following = {name for later in runs[at + 1 :] for stage in later for name in stage.reads}
            self.stations.append(Station(at, run, rule, frozenset({*writes, *following}), run[0].concurrency if model else threads, Line(rule)))
        models = [station for station in self.stations if station.model]
        self._counted = models or self.stations

    def full_s(self) -> float | None:
        """How long until there is room for a request; None if there is: where the wait is within the limit, or few are queued.

        Read without the lock: a figure that is just being changed does no harm.
        """
        worst = None
        for station in self.stations:
            if station.backlog - station.busy >= station.full * station.threads:  # the next calls are full: more only adds to the wait
                wait_s = station.wait_s
                if not station.pace.calls or wait_s > self._limits.latency_s:
                    worst = max(worst or 0.01, wait_s - self._limits.latency_s + station.pace.call_s)
        return 0.05 if worst is None and self._held_bytes >= _MOST_BYTES else worst

    def put(self, jobs: Iterable[Job]) -> None:
        """Let requests in."""
        now_s = time.perf_counter()
        with self._lock:
            for job in jobs:
                self._let_in(job, now_s)
            self.stations[0].wake()

    def put_instead(self, job: Job) -> list[Job] | None:
        """Let a request in though all is full, in place of the newest of worse classes, which are returned; None if they make no room for it."""
        now_s = time.perf_counter()
        with self._lock:
            tightest = max(self.stations, key=lambda station: station.wait_s)
            needed = tightest.cost(job) * job.rows
            out: list[Job] = []
            for station in reversed(self.stations[: tightest.at + 1]):
                fresh = [other for other in reversed(station.fresh) if other.rank(now_s) > job.priority and not (other.alone or other.leaves)]
                for other in itertools.chain(fresh, station.line.least(job.priority, now_s)):
                    if needed > 0:
                        needed -= tightest.cost(other) * other.rows
                        out.append(other)
            if needed > 0:
                return None
            for other in out:
                self._close(other)
            self._let_in(job, now_s)
            self.stations[0].wake()
            return out

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more. What a call holds of them is computed and thrown away."""
        with self._lock:
            for job in jobs:
                job.answered = True
                self._close(job)

    def release(self, job: Job) -> None:
        """Let others begin: a request that was `alone` has its answer, or needs none."""
        with self._lock:
            job.answered = True
            self._free_floor()

    def ends(self, job: Job, station: Station) -> bool:
        """Whether a request goes to no station after this one."""
        return station is self.stations[-2 if job.leaves else -1]

    def queued(self) -> int:
        """Requests that no call has begun on."""
        return len(self.stations[0].line) + len(self.stations[0].fresh)

    def oldest_call_s(self) -> float:
        """For how long the oldest call has been under way."""
        since = [began_s for station in self.stations for began_s in station.since if began_s]
        return max(0.0, time.perf_counter() - min(since)) if since else 0.0

    def put_here(self, job: Job) -> Call | None:
        """Let a request in that the caller will compute itself, as a call of the first station; None if others are to compute it."""
        now_s, station = time.perf_counter(), self.stations[0]
        with self._lock:
            if station.line or self._alone or self._next_alone or self.closing or job.closed or job.deadline_s <= now_s:
                self._let_in(job, now_s)
                station.wake()
                return None
            self._let_in(job, now_s)
            taken = station.line.take(now_s)
            return self._begin(station, station.threads, taken, now_s)

    # For the threads of the stations

    def next_call(self, station: Station, seat: int, wake: Wake) -> tuple[Call | None, list[Job], bool]:
        """A call to compute now, if there is one; requests that were too late for it; and whether to wait for `wake` and ask again."""
        with self._lock:
            if self.closing:
                return None, [], False
            line, now_s = station.line, time.perf_counter()
            may, only = self._turn(station, now_s)
            if not (line and may):
                waits = not station.fresh
                if waits:
                    station.free.append(wake)
                return None, [], waits
            taken = line.take(now_s, shrink=station.shrink, only=only)
            for job in taken.expired:
                self._close(job)
            if not taken.shares:
                return None, taken.expired, False
            call = self._begin(station, seat, taken, now_s)
            if line:
                station.wake()
            return call, taken.expired, False

    def end(self, station: Station, seat: int, call: Call) -> None:
        """A call came to nothing; its requests are closed."""
        with self._lock:
            self._end(station, seat, call)
            for share in call.shares:
                self._close(share.job)

    def settle(self, station: Station, seat: int, call: Call, out: pa.Table, faults: dict[int, Fault], seconds: float) -> tuple[list[Job], list[Job]]:
        """A call is done: the requests that are complete at this station, and those that failed."""
        complete: list[Job] = []
        failed: list[Job] = []
        stop, now_s = 0, time.perf_counter()
        with self._lock:
            self._end(station, seat, call)
            station.pace.add(seconds, call.cost, call.filled)
            if station in self._counted:
                self.calls += 1
                self.filled += call.filled
            for job, rows in call.shares:
                start, stop = stop, stop + len(rows)
                if job.closed:
                    continue
                job.batch_rows = max(job.batch_rows, out.num_rows)
                job.done += stop - start
                station.backlog -= station.cost(job) * (stop - start)
                job.faults = {int(rows[at - start]): fault for at, fault in faults.items() if start <= at < stop} if faults else {}
                job.parts.append((rows, Cut(out, start, stop)))
                if job.faults:
                    failed.append(job)
                elif job.done == job.rows:
                    job.compute_s += now_s - job.began_s
                    complete.append(job)
            for job in complete:
                if self.ends(job, station):
                    self.rows += 0 if job.leaves else job.rows
                    self._close(job)
            for job in failed:
                self._close(job)
        return complete, failed

    def pass_on(self, jobs: Iterable[Job], station: Station) -> None:
        """Let requests wait at the next station."""
        now_s = time.perf_counter()
        with self._lock:
            for job in jobs:
                if not job.closed:
                    self._enter(job, station.at, now_s)
            station.wake()

    def unmeasured(self, station: Station) -> list[Job]:
        """The requests whose lengths are to be found out; they must be given to `measured`."""
        with self._lock:
            jobs, station.fresh = station.fresh, []
            return jobs

    def measured(self, jobs: Iterable[Job], station: Station) -> None:
        """Let requests wait whose lengths are known by now."""
        with self._lock:
            for job in jobs:
                if not job.closed:
                    station.line.put(job)

    def forget(self, *, pace: bool) -> None:
        """Begin to count anew; and, if `pace`, to measure."""
        with self._lock:
            self.rows, self.calls, self.filled = 0, 0, 0.0
            for station in self.stations if pace else ():
                station.pace = Pace()

    def close(self) -> None:
        """Begin no further call, and wake all threads that wait."""
        with self._lock:
            self.closing = True
            for station in self.stations:
                while station.free:
                    station.wake()

    # With the lock

    def _begin(self, station: Station, seat: int, taken: Taken, now_s: float) -> Call:
        cost = 0.0
        for job, rows in taken.shares:
            if not job.began_s:
                job.began_s = now_s
                job.queue_s += (job.passed_s or now_s) - job.queued_s
                job.wait_s += now_s - (job.passed_s or now_s)
            cost += station.cost(job) * len(rows)
        station.busy += cost
        station.since[seat] = now_s
        self._running += 1
        return Call(taken.shares, taken.filled, cost)

    def _let_in(self, job: Job, now_s: float) -> None:
        if not job.closed:
            self._held_bytes += job.size
            for station in self.stations:
                station.backlog += station.cost(job) * job.rows
            self._enter(job, 0, now_s)

    def _enter(self, job: Job, at: int, now_s: float) -> None:
        station, lengths = self.stations[at], job.widths
        job.enter(at, now_s)
        if isinstance(station.rule, Tokens):
            if lengths is None:
                station.fresh.append(job)
                return
            job.measured(lengths)
        station.line.put(job)

    def _close(self, job: Job) -> None:
        if job.closed:
            return
        job.closed = True
        if job.at < 0:
            return
        self._held_bytes -= job.size
        for station in self.stations[job.at :]:
            station.backlog -= station.cost(job) * (job.rows - job.done if station.at == job.at else job.rows)
        station = self.stations[job.at]
        station.line.drop(job)
        if job in station.fresh:
            station.fresh.remove(job)
        if job is self._next_alone:
            self._next_alone = None
            self._wake_all()
        self._free_floor()

    def _wake_all(self) -> None:
        for station in self.stations:
            if station.line or station.fresh:
                station.wake()

    def _turn(self, station: Station, now_s: float) -> tuple[bool, Job | None]:
        """Whether a call of the station may begin now, and of which request alone."""
        if self._alone is not None:
            return self._alone in station.line, self._alone
        head = station.line.head(now_s) if self._next_alone is None else self._next_alone
        if head is None or not head.alone:
            return True, None
        if head.deadline_s < now_s:
            return head in station.line, None  # there it is found to be late
        if self._running:
            self._next_alone = head
            return False, None
        if head not in station.line:
            return False, None
        self._alone, self._next_alone = head, None
        return True, head

    def _end(self, station: Station, seat: int, call: Call) -> None:
        station.since[seat] = 0.0
        station.busy -= call.cost
        self._running -= 1
        self._free_floor()

    def _free_floor(self) -> None:
        """Have others go on when a request that was alone is done with, or the next one begin when all others are."""
        if self._running:
            return
        if self._alone is not None and self._alone.closed and self._alone.answered:
            self._alone = None
            self._wake_all()
        elif self._alone is None and self._next_alone is not None:
            self._wake_all()
