"""The stations of a replica: the threads that compute what waits on the floor, call by call.

A model is a station with a thread of its own, in which it is set up and called, or as many as its `concurrency` says; neighbouring
functions share one, so that the loop of the sockets never computes. A thread that is free takes what is there at once: nobody waits for
company while there is nothing to wait for. What arrives meanwhile goes into the next call. Between stations go tables, not copies.

There is one exception. Where all stages are functions, whose calls have been shown to take less time than it takes to wake a thread and be
woken by it, the loop computes a small request that comes alone itself (`compute_here`). A first call that takes longer ends that for a while.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from headrace.batching import Rows, Tokens
from headrace.errors import OnlineStoreError, StageError
from headrace.lineage import Fault
from headrace.serving.bodies.codec import Codec
from headrace.serving.replica import lean
from headrace.serving.replica.floor import Call, Floor, Station, Wake
from headrace.serving.replica.jobs import Answer, Cut, Job, assemble, cut
from headrace.serving.wire import Failure
from headrace.worker import Worker, measure

EXPIRED = Failure(504, "deadline_exceeded", "the deadline passed before the request was computed")
BROKEN = Failure(500, "stage_failed", "the replica failed on a call that this request was part of; its log says why")
STORE_AWAY = Failure(503, "unavailable", "the store of features that this service reads cannot be used at the moment; the replica's log says why")
UNHEARD = Failure(503, "unavailable", "the replica could not tell that it begins")
_QUICK_S = 0.0002  # a call that takes less is computed by the loop itself
_SLOW_S, _WARY_S = 0.01, 5.0  # one that took so long all the same, be it for want of a core, is the last one for so long
_SMALL_BYTES = 4096
_MEASURED_CALLS = 4.0
_SHOWN_FAULTS = 20  # of a request of many rows


class Owner(Protocol):
    """Who is told what becomes of requests. Both are called in a station's thread."""

    def deliver(self, answers: list[tuple[Job, Answer]]) -> None:
        """These requests are done with."""

    def announce(self, job: Job) -> bool:
        """The computation of this request begins now: returns when that is known to the one who asked; false if it cannot be."""


class Stations:
    """The threads of all stations of a floor, set up.

    Raises:
        StageError: a model cannot be set up.
    """

    def __init__(self, floor: Floor, codec: Codec, *, owner: Owner, group: str, device: str) -> None:
        self.floor, self.codec, self.owner = floor, codec, owner
        self._threads: list[threading.Thread] = []
        self._outgoing: SimpleQueue[list[Job] | None] | None = None
        self._here: Worker | None = None  # the loop's own
        self._wary_until_s = 0.0
        try:
            for station in floor.stations:
                make = functools.partial(_worker, station, group, device)
                for seat in range(station.threads):
                    ready: Future[Worker] = Future()
                    self._spawn(self._set_up, station, seat, make, ready)
                    station.workers.append(ready.result())
            if len(floor.stations) == 1 and not station.model and isinstance(station.rule, Rows):
                self._here = make()
        finally:
            if sys.exception() is not None:
                self.close()
        if floor.stations[-1].model:  # its answers are written while it computes
            self._outgoing = SimpleQueue()
            self._spawn(self._write, self._outgoing)

    def compute_here(self, job: Job) -> bool:
        """Compute a request in the caller's thread if that is quick; else it is not let in.

        It ends with `Owner.deliver` like any other. That its computation begins is not announced: it is none that asks for it.
        """
        station = self.floor.stations[0]
        if self._here is None or job.alone or job.size > _SMALL_BYTES or station.pace.calls < _MEASURED_CALLS or station.pace.call_s > _QUICK_S:
            return False
        began_s = time.perf_counter()
        if began_s < self._wary_until_s:
            return False
        if (call := self.floor.put_here(job)) is not None:
            self._compute(station, station.threads, self._here, call)
            ended_s = time.perf_counter()
            if ended_s - began_s > _SLOW_S:
                self._wary_until_s = ended_s + _WARY_S
        return True

    def close(self) -> None:
        """End all threads. A call under way is waited for a second."""
        self.floor.close()
        if self._outgoing is not None:
            self._outgoing.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1)

    def _spawn(self, main: Callable[..., None], *given: object) -> None:
        thread = threading.Thread(target=main, args=given, name="headrace-station", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _set_up(self, station: Station, seat: int, make: Callable[[], Worker], ready: Future[Worker]) -> None:
        """A station's thread: what is set up in it is called in it."""
        try:
            worker = make()
            ready.set_result(worker)
        except (StageError, SystemExit) as error:
            ready.set_exception(error if isinstance(error, StageError) else StageError(f"the set-up ended with SystemExit({error})"))
            return
        finally:
            if not ready.done():
                ready.set_exception(StageError(f"the set-up ended with {sys.exception()!r}"))
        self._work(station, seat, worker)

    def _work(self, station: Station, seat: int, worker: Worker) -> None:
        wake: Wake = SimpleQueue()
        try:
            while True:
                call, expired, waits = self.floor.next_call(station, seat, wake)
                if expired:
                    self.owner.deliver([(job, EXPIRED) for job in expired])
                if call is not None:
                    self._compute(station, seat, worker, call)
                elif self.floor.closing:
                    return
                elif waits:
                    wake.get()
                if station.fresh:
                    self._measure(station)
        finally:
            if not self.floor.closing:  # a mistake in this package; the requests that it met with have their answer, and others go on
                self._spawn(self._work, station, seat, worker)

    def _measure(self, station: Station) -> None:
        """Find out the lengths of the rows that came in, all at once."""
        jobs = self.floor.unmeasured(station)
        with self._answered(jobs):
            groups: dict[object, list[Job]] = {}
            for job in jobs:
                groups.setdefault(job.group, []).append(job)
            for alike in groups.values():
                self._tabulate(alike)
                _measure(alike, station)
            self.floor.measured(jobs, station)

    def _tabulate(self, jobs: list[Job]) -> None:
        """Make a table of what these requests hold."""
        table, start = self.codec.table([job.incoming for job in jobs]), 0
        for job in jobs:
            job.data = Cut(table, start, start + job.rows)
            start += job.rows

    def _compute(self, station: Station, seat: int, worker: Worker, call: Call) -> None:
        jobs = [share.job for share in call.shares]
        settled, why = False, None
        try:
            if jobs[0].alone and not jobs[0].started:
                jobs[0].started = True
                if not self.owner.announce(jobs[0]):
                    return
                station.since[seat] = time.perf_counter()
            if new := [job for job in jobs if job.data is None]:
                self._tabulate(new)
            data = assemble([cut(share) for share in call.shares])
            began_s = time.perf_counter()
            out, faults = lean.run(worker, data)
            if not station.passes.issuperset(out.column_names):
                out = out.select([name for name in out.column_names if name in station.passes])
            complete, failed = self.floor.settle(station, seat, call, out, faults, time.perf_counter() - began_s)
            settled = True
        except OnlineStoreError as error:  # no fault of these rows, nor of this process
            print(f"headrace: {error}", file=sys.stderr, flush=True)
            why = STORE_AWAY
            return
        finally:
            if not settled:
                self.floor.end(station, seat, call)
                self.owner.deliver([(job, why or (BROKEN if sys.exception() else UNHEARD)) for job in jobs])
        if failed:
            self.owner.deliver([(job, failure(job.faults, single=job.single)) for job in failed])
        if complete:
            with self._answered(complete):
                self._send_on(complete, station)

    def _send_on(self, jobs: list[Job], station: Station) -> None:
        """To the next station, or as answers to those who asked."""
        for job in jobs:
            job.join()
        if left := [job for job in jobs if job.leaves and self.floor.ends(job, station)]:
            self.owner.deliver([(job, b"") for job in left])
            jobs = [job for job in jobs if job not in left]
        if not jobs:
            return
        if station is not self.floor.stations[-1]:
            following = self.floor.stations[station.at + 1]
            if isinstance(following.rule, Tokens):
                _measure(jobs, following)
            self.floor.pass_on(jobs, following)
        elif self._outgoing is None:
            self._answer(jobs)
        else:
            self._outgoing.put(jobs)

    def _answer(self, jobs: list[Job]) -> None:
        table, stop = assemble([job.data for job in jobs if job.data is not None]), 0
        cuts = []
        for job in jobs:
            start, stop = stop, stop + job.rows
            cuts.append((start, stop, job.single, job.accept))
        self.owner.deliver(list(zip(jobs, self.codec.encode(table, cuts), strict=True)))

    def _write(self, outgoing: SimpleQueue[list[Job] | None]) -> None:
        """The thread that writes a model's answers."""
        try:
            while (jobs := outgoing.get()) is not None:
                with self._answered(jobs):
                    self._answer(jobs)
        finally:
            if not self.floor.closing:
                self._spawn(self._write, outgoing)

    @contextlib.contextmanager
    def _answered(self, jobs: list[Job]) -> Iterator[None]:
        """Give an answer to these requests if what is done for them raises, which only a mistake in this package does."""
        try:
            yield
        finally:
            if sys.exception() is not None:
                self.floor.cancel(jobs)
                self.owner.deliver([(job, BROKEN) for job in jobs])


def _worker(station: Station, group: str, device: str) -> Worker:
    """What a thread of the station calls: all threads of a model the same instance, functions each their own."""
    if station.model and station.workers:
        return station.workers[0]
    worker = Worker(station.stages, group=group, device=device, overlap=False)
    lean.contain(worker)
    return worker


def _measure(jobs: list[Job], station: Station) -> None:
    """Note the lengths of the rows of those requests, which have the same columns."""
    lengths, stop = measure(station.stages[0], assemble([job.data for job in jobs if job.data is not None])), 0
    for job in jobs:
        start, stop = stop, stop + job.rows
        job.measured(lengths[start:stop])


def failure(faults: Mapping[int, Fault], *, single: bool) -> Failure:
    """Of a request, of one row by itself or of several, on which a stage raised: why, by row."""
    texts = {
        row: fault.message if fault.error == "ContractError" else f"stage {fault.stage!r} raised {fault.error}: {fault.message}"
        for row, fault in sorted(faults.items())[:_SHOWN_FAULTS]
    }
    details = tuple({"loc": [] if single else ["rows", row], "message": text} for row, text in texts.items())
    return Failure(500, "stage_failed", next(iter(texts.values())), details)
