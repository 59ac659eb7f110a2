"""The server of a replica: takes frames from front doors, has its stations compute them, and answers."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa

from headrace.arrays import table
from headrace.columns import ColumnType
from headrace.errors import StageError
from headrace.serving.bodies.codec import Codec, Incoming, Refused, sample
from headrace.serving.replica.floor import Floor
from headrace.serving.replica.hearing import Connection
from headrace.serving.replica.jobs import LEAST_PRIORITY, Answer, Busy, Job
from headrace.serving.replica.lean import contained
from headrace.serving.replica.lookups import Lookups
from headrace.serving.replica.outlets import Anteroom, Channel
from headrace.serving.replica.parsing import LARGE_BYTES, parse
from headrace.serving.replica.scribe import Scribe
from headrace.serving.replica.station import Stations
from headrace.serving.replica.talks import Talks, speaker_of
from headrace.serving.routes import Limits
from headrace.serving.wire import Content, Failure, Kind, Question, Stats
from headrace.stage import Stage

UNSPOKEN = Failure(404, "not_found", "no stage of this pipeline speaks OpenAI's interface")
_LIMITS = Limits()
_PONG_S = 1.0
_OUT_S = 2.0  # a door that does not take an answer for so long does not keep others waiting
_RETRY_S = 0.05  # for requests that come while draining
_SWITCH_S = 0.0005
_WARM_S = 600.0
_IDLE_S = 0.005


class ReplicaServer:
    """Stages that answer requests over sockets. Making one sets the stages up; `start` opens the port.

    `reads` are the columns of requests, `carries` those of answers. Functions run in `threads` threads, a model in as many as its `concurrency` says.
    `token` is what whoever connects must name first, "" for none.

    Raises:
        StageError: a stage cannot be set up.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        reads: Mapping[str, ColumnType],
        carries: Mapping[str, ColumnType],
        group: str = "",
        device: str = "cpu",
        limits: Limits = _LIMITS,
        threads: int = 1,
        token: str = "",
    ) -> None:
        self.token = token
        self._reads, self._carries = dict(reads), dict(carries)
        self._codec = Codec(reads, carries, rows=limits.rows)
        self._floor = Floor(stages, writes=carries, limits=limits, threads=threads)
        self._answers: deque[list[tuple[Job, Answer]]] = deque()
        self._called = False  # the loop, to send the answers
        self._warm: SimpleQueue[tuple[Job, Answer]] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._parser: ThreadPoolExecutor | None = None
        self._connections: set[Connection] = set()
        self._new: list[Job] = []
        self._touched: set[Connection] = set()  # with something to write
        self._lone: list[Job] = []  # that were answered since the last writing
        self._draining = False
        self._turns_s = sys.getswitchinterval()
        self._stations = Stations(self._floor, self._codec, owner=self, group=group, device=device)
        speaker = speaker_of(contained(station.workers[0]) for station in self._floor.stations)
        self._scribe = None if speaker is None else Scribe.of(self._stations)
        self._lookups = Lookups(call for station in self._floor.stations for call in contained(station.workers[0]))
        self._talks = None if speaker is None else Talks(speaker, background=limits.background, scribe=self._scribe)
        self._anteroom = None if speaker is None else Anteroom(token)

    def warm_up(self, row: Mapping[str, Any] | None = None) -> None:
        """Take a row, a made-up one if None, through all stations, from the form of a request to that of an answer.

        Raises:
            StageError: a stage raised on it, or it lacks a column, or there was no answer within ten minutes.
        """
        try:
            data = table([sample(self._reads) if row is None else row], self._reads)
            body = Codec(self._reads, self._reads, rows=1).encode(data, [(0, 1, True, Content.JSON)])[0]
            incoming = self._codec.decode(body, Content.JSON)
        except ValueError as error:
            raise StageError(f"the row to warm up with is of no use: {error}") from error
        except Refused as refused:
            raise StageError(f"the row to warm up with is of no use: {refused}; {refused.failure.details}") from refused
        began_s = time.perf_counter()
        self._warm_up(incoming, len(body))
        self._floor.forget(pace=True)  # how long a first call takes says nothing about further ones
        if time.perf_counter() - began_s < 1:
            self._warm_up(incoming, len(body))
            self._floor.forget(pace=False)
        self._lookups.forget()

    def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen, in a thread of its own; returns the address.

        The interpreter then lets threads take turns more often: a stage in pure Python may keep the loop waiting for 0.5 ms each time, not 5.

        Raises:
            OSError: the address cannot be had.
        """
        ready: Future[tuple[str, int]] = Future()
        if self._talks is not None:  # its loop is that of the sockets, too: nothing is handed from thread to thread
            asyncio.run_coroutine_threadsafe(self._listen(host, port, ready), self._talks.speaker.loop)
        else:
            self._thread = threading.Thread(target=self._run, args=(host, port, ready), name="headrace-loop", daemon=True)
            self._thread.start()
        address = ready.result()
        self._turns_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        return address

    @property
    def beside(self) -> str:
        """The name of the Unix socket for `Endpoint.beside`."""
        return "" if self._anteroom is None else self._anteroom.name

    @property
    def alive(self) -> bool:
        """Whether the thread of the sockets runs."""
        return self._talks.speaker.alive if self._talks is not None else self._thread is not None and self._thread.is_alive()

    def stats(self) -> Stats:
        """What the replica is doing. May be called from any thread."""
        floor = self._floor
        in_flight = sum(len(connection.jobs) + len(connection.talks) for connection in list(self._connections))
        engine = None if self._talks is None else self._talks.figures()
        rows = floor.rows + (0 if self._scribe is None else self._scribe.rows)
        counted = floor.queued(), floor.oldest_call_s(), rows, floor.calls, floor.filled
        return Stats(in_flight, *counted, _memory_bytes(), self._draining, engine, self._lookups.told())

    def drain(self, timeout_s: float) -> bool:
        """Take nothing more, tell the doors, and finish what was taken; false if that took too long. May be called from any thread."""
        if self._loop is None:
            self._draining = True
            return True
        idle = threading.Event()
        self._loop.call_soon_threadsafe(self._drain, idle)
        return idle.wait(timeout_s)

    def close(self) -> None:
        """Close the port and the connections, and end the threads. What is under way is lost: `drain` first."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stop.set)
                self._ended.wait(5)
            if self._thread is not None:
                self._thread.join(5)
            sys.setswitchinterval(self._turns_s)
        self._stations.close()
        self._lookups.close()
        if self._anteroom is not None:
            self._anteroom.close()
        if self._scribe is not None:
            self._scribe.close()
        if self._parser is not None:
            self._parser.shutdown(wait=False)

    # For the stations, in their threads

    def deliver(self, answers: list[tuple[Job, Answer]]) -> None:
        """Send answers. The loop is told once for all that become ready before it gets to it."""
        if self._loop is None:
            for pair in answers:
                self._warm.put(pair)
            return
        self._answers.append(answers)
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._send)

    def announce(self, job: Job) -> bool:
        """Tell the door that the computation begins; returns when the door's machine has that."""
        if self._loop is None:
            return True
        told = threading.Event()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(job.owner.start, job, told)
            told.wait(5)
        return bool(job.owner.open) and told.is_set()

    # For the connections, on the loop

    def take(self, job: Job, body: memoryview, content: Content) -> None:
        """A request came."""
        # One whose replica died is not sent away: it was accepted long ago, and those are few.
        full_s = None if job.alone else self._floor.full_s()
        if self._draining or (full_s is not None and job.priority == LEAST_PRIORITY):
            self._answer(job, Busy(full_s or _RETRY_S))
        elif len(body) < LARGE_BYTES:
            self._let_in(job, parse(self._codec, body, content), full_s)
        else:
            if self._parser is None:
                self._parser = ThreadPoolExecutor(1, thread_name_prefix="headrace-parser")
            self._parser.submit(self._parse_aside, job, body, content, full_s)

    def ask(self, connection: Connection, number: int, question: Question, body: bytes, left_s: float, request_id: str) -> None:
        """A request of OpenAI's interface came."""
        if self._draining:
            connection.refuse(number, Busy(_RETRY_S))
        elif self._talks is None:
            connection.refuse(number, UNSPOKEN)
        else:
            self._talks.take(connection, number, question, body, left_s=left_s, request_id=request_id)

    def channel(self, key: str) -> Channel | None:
        """The Unix socket of the door that has told this key."""
        return None if self._anteroom is None else self._anteroom.channel(key)

    def taken(self) -> None:
        """All that came at once was given to `take`."""
        if self._new:
            new, self._new = self._new, []
            self._called = True  # by itself: what is delivered meanwhile is sent here
            try:
                if len(new) > 1 or not self._stations.compute_here(new[0]):
                    self._floor.put(new)
            finally:  # whatever goes wrong: with the flag set no answer would ever be sent again
                self._called = False
                self._send_answers()
        for connection in self._touched:
            connection.flush()
        self._touched.clear()
        if self._lone:
            lone, self._lone = self._lone, []
            for job in lone:
                self._release(job, time.perf_counter() + _OUT_S)

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more."""
        self._floor.cancel(jobs)

    def opened(self, connection: Connection) -> None:
        """A door has connected."""
        self._connections.add(connection)
        if self._draining:
            connection.send(Kind.DRAIN, 0, ())
            connection.flush()

    def closed(self, connection: Connection) -> None:
        """A door is gone."""
        self._connections.discard(connection)

    # Inside

    def _warm_up(self, incoming: Incoming, size: int) -> None:
        job = Job(None, 0, size, incoming=incoming, rows=1, single=True, group=incoming.group, arrived_s=time.perf_counter())
        self._floor.put([job])
        try:
            _, answer = self._warm.get(timeout=_WARM_S)
        except Empty:
            raise StageError(f"no answer to the row to warm up with after {_WARM_S:.0f} s") from None
        if isinstance(answer, Failure):
            fault = next(iter(job.faults.values()), None)
            raise StageError(answer.message, fault.stage if fault else "", fault.frames if fault else "")

    def _parse_aside(self, job: Job, body: memoryview, content: Content, full_s: float | None) -> None:
        incoming = parse(self._codec, body, content)
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._parsed_aside, job, incoming, full_s)

    def _parsed_aside(self, job: Job, incoming: Incoming | Failure, full_s: float | None) -> None:
        if full_s is None and not job.alone:
            full_s = self._floor.full_s()  # others have come in while it was parsed
        self._let_in(job, incoming, full_s)
        self.taken()

    def _let_in(self, job: Job, incoming: Incoming | Failure, full_s: float | None) -> None:
        if job.closed:  # while it was parsed
            return
        if isinstance(incoming, Failure):
            self._answer(job, incoming)
            return
        job.incoming, job.rows, job.single, job.group = incoming, incoming.rows, incoming.single, incoming.group
        if not job.rows:
            self._answer(job, self._nothing(incoming, job.accept))
        elif full_s is None:
            self._new.append(job)
        elif (instead := self._floor.put_instead(job)) is None:
            self._answer(job, Busy(full_s))
        else:
            for other in instead:
                self._answer(other, Busy(full_s))

    def _nothing(self, incoming: Incoming, accept: Content) -> bytes | memoryview:
        """The answer to a request without rows."""
        read = self._codec.table([incoming])
        same = {name for name in read.column_names if name in self._carries and self._carries[name].kind == "any"}
        out = {name: read[name] if name in same else pa.array([], column.arrow) for name, column in self._carries.items()}
        return self._codec.encode(pa.table(out), [(0, 0, False, accept)])[0]

    def _answer(self, job: Job, answer: Answer) -> None:
        if job.owner is None:
            self._warm.put((job, answer))
        else:
            if job.owner.answer(job, answer):
                self._touched.add(job.owner)
            if job.alone:
                self._lone.append(job)

    def _release(self, job: Job, until_s: float) -> None:
        """Let others begin once the answer is with the system, which delivers it whatever becomes of this process."""
        if job.owner.written() or time.perf_counter() > until_s:
            self._floor.release(job)
        else:
            asyncio.get_running_loop().call_later(0.001, self._release, job, until_s)

    def _send(self) -> None:
        self._called = False
        self._send_answers()
        self.taken()

    def _send_answers(self) -> None:
        while self._answers:
            for job, answer in self._answers.popleft():
                self._answer(job, answer)

    def _drain(self, idle: threading.Event) -> None:
        if not self._draining:
            self._draining = True
            for connection in self._connections:
                connection.send(Kind.DRAIN, 0, ())
                connection.flush()
        if any(connection.jobs or connection.talks or not connection.written() for connection in self._connections):
            asyncio.get_running_loop().call_later(_IDLE_S, self._drain, idle)
        else:
            idle.set()

    def _run(self, host: str, port: int, ready: Future[tuple[str, int]]) -> None:
        try:
            import uvloop
        except ImportError:
            make = asyncio.new_event_loop
        else:
            make = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=make) as runner:
            runner.run(self._listen(host, port, ready))

    async def _listen(self, host: str, port: int, ready: Future[tuple[str, int]]) -> None:
        loop = asyncio.get_running_loop()
        self._stop, self._ended = asyncio.Event(), threading.Event()
        try:
            server = await loop.create_server(lambda: Connection(self), host, port, backlog=1024)
        except OSError as error:
            ready.set_exception(error)
            return
        self._loop = loop
        ready.set_result(server.sockets[0].getsockname()[:2])
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _PONG_S)
            for connection in self._connections:
                connection.pong()
                connection.flush()
        server.close()
        for connection in list(self._connections):
            connection.transport.close()
        for _ in range(100):  # what is written already may still arrive
            if not self._connections:
                break
            await asyncio.sleep(0.002)
        for connection in list(self._connections):
            connection.transport.abort()
        self._ended.set()


def _memory_bytes() -> int:
    """What the process has in memory."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
