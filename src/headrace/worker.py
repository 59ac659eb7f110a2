"""What one replica does with one block: run a group's stages over a table, slice by slice.

Free of any engine: `local` and every target on Ray run this same code, so they cannot drift apart.

A block with the column `lineage.FAULT` isolates: rows that fail get a `Fault` and go past the further stages, the others go
on. In any other block a failure is raised. A row that kills the process is found with a `Guard`, in the block's next lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.batching import Indices, Tokens
from headrace.calls import Outcome, attempt, call, call_when_ready, encode, gather, out_of_memory, set_up, whole
from headrace.columns import from_arrow
from headrace.errors import StageError, WiringError
from headrace.events import BlockDone, BudgetHalved, Event
from headrace.lineage import FAULT, HIDDEN, ROW, UNIT, Fault
from headrace.stage import Stage

DEATHS = 2
"""From how many deaths on a block is watched call by call, and a row that ran alone is at fault.

A single death is usually somebody else's doing (a node taken away, a neighbour that used up the memory), and must not bury
a good row: two such deaths, both while the same row ran alone, are no coincidence.
"""

_MOST_DEATHS = 200  # in one block; more than its rows explain, unless dozens of them are deadly

_DIED = "ProcessDied"
T = TypeVar("T")


class Guard(Protocol):
    """Remembers, longer than a process lives, what it was doing."""

    def enter(self, key: str) -> int:
        """Note that the work `key` begins; returns how many earlier entries of it were never left: processes that died in it."""

    def leave(self, key: str) -> None:
        """Note that the work `key` has ended, well or with an exception. Whether earlier entries are forgotten with it is open."""


class Worker:
    """A group's stages, set up on one device.

    Instances of classes are copied before `setup`, so that a pipeline object can be run many times. `note` is what their
    `setup` returned, if that is text.

    With a `thread` of its own, stages are set up and called in that one, as libraries with state per thread need it, and
    several threads may run a block each: one is cut up or put together while another computes, and only one computes.

    A stage with a `concurrency` above 1 is called from as many threads instead, by all blocks that are under way together.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        group: str = "",
        device: str = "cpu",
        overlap: bool = True,
        emit: Callable[[Event], object] = lambda event: None,
        guard: Guard | None = None,
        thread: Executor | None = None,
    ) -> None:
        self.thread = thread
        self.depth = 1 if thread is None else 2  # calls that are under way or next in line
        self.turn = threading.Lock()
        ready = [self._submit(set_up, stage, device).result() for stage in stages]
        self.stages = [stage for stage, _ in ready]
        self.note = "; ".join(note for _, note in ready if note)
        self.group = group
        self.overlap = overlap
        self.emit = emit
        self.guard = guard
        self.shrink = {stage.name: 1 for stage in stages}
        self.busy = _Busy()
        most = max(stage.concurrency for stage in stages)
        self.pool = ThreadPoolExecutor(most, thread_name_prefix="headrace-call") if most > 1 else None

    def __call__(self, data: pa.Table, carries: Iterable[str] | None = None) -> pa.Table:
        """`data` with every stage's columns set, cut down to `carries` and lineage if given; as many rows, in the same order.

        Where `data` isolates, the columns of a row at fault are null, and nothing that a stage does with a row is raised.

        Raises:
            StageError: a stage raised, or (ContractError) returned something other than it declared.
        """
        if self.guard is None or FAULT not in data.column_names or not data.num_rows:
            return self._block(data, carries, None)
        key = _key(f"block of {self.group}", data, range(data.num_rows))
        deaths = self.guard.enter(key)
        with _leaving(self.guard, key):
            if deaths > _MOST_DEATHS:
                raise StageError(f"the process died {deaths} times in the {key}; the cause lies outside of single rows", self.group)
            return self._block(data, carries, self.guard if deaths >= DEATHS else None)

    def _submit(self, step: Callable[..., T], *given: Any) -> Future[T] | _Here[T]:
        """A step's result, from the worker's own thread if it has one, else from this one, when it is asked for."""
        return _Here(step, given) if self.thread is None else self.thread.submit(step, *given)

    def _block(self, data: pa.Table, carries: Iterable[str] | None, watch: Guard | None) -> pa.Table:
        """One stage after the other; `watch` is told of every call, and keeps those that were deadly from being made again."""
        turn = _Turn(self.turn)
        self.busy.begin()
        try:
            data, real, padded = self._through(data, watch, turn)
        finally:
            worked_s = self.busy.end()
        busy_s = worked_s if self.thread is None else turn.taken_s
        self.emit(BlockDone(self.group, data.num_rows, busy_s, real, padded))
        return data if carries is None else data.select([name for name in dict.fromkeys((*carries, *HIDDEN)) if name in data.column_names])

    def _through(self, data: pa.Table, watch: Guard | None, turn: _Turn) -> tuple[pa.Table, int, int]:
        """`data` with the columns of all stages; the tokens of its rows, and those that the stages were called with."""
        padded = real = 0
        for stage in self.stages:
            data = data.combine_chunks()
            lengths, rows = measure(stage, data), _good(data)
            widths = _widths(stage, data, lengths)
            results: list[tuple[Indices, dict[str, pa.Array]]] = []
            faults: dict[int, Fault] = {}
            for indices, outcome in self._run(stage, data, self._slices(stage, lengths, rows), lengths, watch, turn):
                if isinstance(outcome, Fault):
                    faults[int(indices[0])] = outcome
                else:
                    results.append((indices, outcome))
                padded += len(indices) * int(widths[indices].max(initial=0))
            real += int(widths[rows].sum())
            data = _mark(_merge(data, stage, results), faults)
        return data, real, padded

    def _slices(self, stage: Stage, lengths: Indices, rows: Indices) -> list[Indices]:
        return [rows[part] for part in stage.batch.slices(lengths[rows], shrink=self.shrink[stage.name])]

    def _run(
        self, stage: Stage, data: pa.Table, slices: list[Indices], lengths: Indices, watch: Guard | None, turn: _Turn
    ) -> Iterator[tuple[Indices, Outcome]]:
        """Every slice's row indices and outcome, where a fault is always that of a single row.

        A slice that fails is called again in halves, down to its rows; one that killed the process at once row by row, since a
        death costs more than a call. An accelerator out of memory halves the budget for all rows not yet done.
        """
        calls = np.zeros(data.num_rows, np.int64)  # that failed, for each row
        while slices:
            done = 0
            again: list[Indices] = []
            try:
                for outcome in self._stream(stage, data, slices, watch, turn):
                    indices = slices[done]
                    if isinstance(outcome, Fault):
                        calls[indices] += outcome.attempts
                        outcome = dataclasses.replace(outcome, stage=stage.name, attempts=int(calls[indices[0]]))
                    if isinstance(outcome, Fault) and len(indices) > 1:
                        again += np.array_split(indices, len(indices) if outcome.error == _DIED else 2)
                    else:
                        yield indices, outcome
                    done += 1
            except StageError as error:
                if not out_of_memory(error.__cause__) or len(slices[done]) == 1:
                    raise
            else:
                slices = again
                continue
            # The traceback, and with it the failed call's tensors, is gone by now: only then does freeing help.
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
                sys.modules["torch"].cuda.empty_cache()
            failed = slices[done]
            calls[failed] += 1
            while len(self._slices(stage, lengths, failed)[0]) > len(failed) // 2:
                self.shrink[stage.name] *= 2  # more than once where the slice was smaller than the rule allows
            self.emit(BudgetHalved(stage.name, str(stage.batch), self.shrink[stage.name]))
            slices = [part for rows in (*slices[done:], *again) for part in self._slices(stage, lengths, rows)]

    def _stream(self, stage: Stage, data: pa.Table, slices: Sequence[Indices], watch: Guard | None, turn: _Turn) -> Iterator[Outcome]:
        """Outcomes in order. With `overlap`, a thread cuts out the next slice and encodes the last while the stage computes."""
        isolate = FAULT in data.column_names
        if watch is None and stage.concurrency > 1 and self.pool is not None:
            yield from self._at_once(self.pool, stage, data, slices, isolate)
            return
        if watch is not None or not self.overlap or len(slices) == 1:
            with turn:
                for indices in slices:
                    one = (_slice, stage, data, indices, isolate) if watch is None else (_watched, stage, data, indices, watch)
                    yield self._submit(*one).result()
            return
        upcoming = iter(slices)
        cut: deque[tuple[int, Future[dict[str, Any]]]] = deque()  # rows and inputs, waiting to be called with
        called: deque[tuple[int, Future[Any] | _Here[Any]]] = deque()
        encoding: Future[Outcome] | None = None
        failed = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="headrace-overlap") as side:

            def ahead() -> None:
                if (indices := next(upcoming, None)) is not None:
                    cut.append((len(indices), side.submit(gather, stage, data, indices)))

            ahead()
            wait([cut[0][1]])  # before the turn is taken
            with turn:
                try:
                    while cut or called:
                        ahead()
                        while cut and len(called) < self.depth:
                            rows, inputs = cut.popleft()
                            called.append((rows, self._submit(_unless, failed, attempt, isolate, rows, call_when_ready, stage, inputs)))
                        rows, result = called.popleft()
                        try:
                            outputs = result.result()
                        finally:  # the slice before is complete whatever this one does: hand it over first
                            before, encoding = encoding, None
                            if before is not None:
                                yield before.result()
                        encoding = side.submit(attempt, isolate, rows, encode, stage, outputs, rows)
                finally:
                    wait([result for _, result in called if isinstance(result, Future) and not result.cancel()])  # none may run on after the turn
            if encoding is not None:
                yield encoding.result()

    def _at_once(self, pool: Executor, stage: Stage, data: pa.Table, slices: Sequence[Indices], isolate: bool) -> Iterator[Outcome]:
        """Outcomes in order, of calls as many at a time as the stage takes."""
        results = [pool.submit(_slice, stage, data, indices, isolate) for indices in slices]
        try:
            for result in results:
                yield result.result()
        finally:  # after an error, those that have not begun do not begin, and none runs on
            wait([result for result in results if not result.cancel()])


@dataclass(frozen=True, slots=True)
class _Here(Generic[T]):
    """Like a future of a step that runs in the thread that asks for its result."""

    step: Callable[..., T]
    given: tuple[Any, ...]

    def result(self) -> T:
        return self.step(*self.given)


def _unless(failed: threading.Event, step: Callable[..., T], *given: Any) -> T:
    """The step's result, unless one before it has raised: what was next in line then is not begun."""
    if failed.is_set():
        raise CancelledError
    try:
        return step(*given)
    finally:
        if sys.exception() is not None:
            failed.set()


class _Turn:
    """A block's turns at computing, and the time that they took in all."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock, self.taken_s, self.since = lock, 0.0, 0.0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.taken_s += time.perf_counter() - self.since
        self.lock.release()


class _Busy:
    """The time in which at least one block was worked on, given out piece by piece as blocks end."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.since, self.pending_s = threading.Lock(), 0, 0.0, 0.0

    def begin(self) -> None:
        """A block begins."""
        with self.lock:
            self._count(1)

    def end(self) -> float:
        """A block ends: seconds that no block before it was told."""
        with self.lock:
            self._count(-1)
            told, self.pending_s = self.pending_s, 0.0
            return told

    def _count(self, more: int) -> None:
        now = time.perf_counter()
        self.pending_s += now - self.since if self.blocks else 0.0
        self.since, self.blocks = now, self.blocks + more


def measure(stage: Stage, data: pa.Table) -> Indices:
    """The length of each row in the unit of the stage's batch rule: tokens for a token budget, else 1. Shape (rows,)."""
    rule = stage.batch
    if not isinstance(rule, Tokens):
        return np.ones(data.num_rows, np.int64)
    array = data[rule.of]
    kind = from_arrow(array.type).kind
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(data.num_rows, array.type.list_size)
    elif pa.types.is_null(array.type):
        lengths = np.ones(data.num_rows)
    elif kind in ("str", "bytes"):
        lengths = np.ceil(pc.fill_null(pc.binary_length(array), 0).to_numpy() / rule.bytes_per_token)
    elif kind in ("list", "vector"):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    else:
        raise WiringError(f"stage {stage.name!r}: hr.tokens cannot measure {rule.of!r}, which is {array.type}; it measures text, vectors and lists")
    return np.clip(lengths, 1, rule.longest).astype(np.int64)


def _widths(stage: Stage, data: pa.Table, lengths: Indices) -> Indices:
    """What each row is as wide as, where a call is as wide as its widest row: by the batch rule, else the one list of numbers that a model reads."""
    if isinstance(stage.batch, Tokens) or not stage.is_model:
        return lengths
    lists = [name for name in stage.reads if _is_ragged(data[name].type)]
    return np.clip(pc.fill_null(pc.list_value_length(data[lists[0]]), 0).to_numpy(), 1, None).astype(np.int64) if len(lists) == 1 else lengths


def _is_ragged(kind: pa.DataType) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)))


def _good(data: pa.Table) -> Indices:
    """The rows without a fault."""
    return np.flatnonzero(data[FAULT].is_null()) if FAULT in data.column_names else np.arange(data.num_rows)


def _slice(stage: Stage, data: pa.Table, indices: Indices, isolate: bool) -> Outcome:
    """What one call comes to, from the block's columns to the stage's."""
    outputs = attempt(isolate, len(indices), call, stage, gather(stage, data, indices))
    return attempt(isolate, len(indices), encode, stage, outputs, len(indices))


def _watched(stage: Stage, data: pa.Table, indices: Indices, watch: Guard) -> Outcome:
    """The same, known to `watch`. What a process died in is not called again: several rows at once after one death, one row after `DEATHS`."""
    key, most = _key(f"call of {stage.name}", data, indices), 1 if len(indices) > 1 else DEATHS
    if watch.enter(key) >= most:  # and is not left: it must stay known while further deaths in the block are looked into
        return Fault(stage.name, _DIED, f"the process died {most} times while it ran this row alone (a crash, os._exit, or out of memory)", attempts=most)
    with _leaving(watch, key):
        return _slice(stage, data, indices, isolate=True)


@contextlib.contextmanager
def _leaving(guard: Guard, key: str) -> Iterator[None]:
    """Leave `key` at the end, also where an exception is raised."""
    try:
        yield
    finally:
        if not isinstance(sys.exception(), SystemExit):  # which ends a worker's process: a death, be it by the row or by SIGTERM
            guard.leave(key)


def _key(what: str, data: pa.Table, rows: Sequence[int] | Indices) -> str:
    """A name for work on those rows that is the same in every process."""
    first, last = (f"{data[UNIT][at]}:{data[ROW][at]}" for at in (int(rows[0]), int(rows[-1])))
    return f"{what}, rows {first} to {last}, {len(rows)} in all"


def _mark(data: pa.Table, faults: dict[int, Fault]) -> pa.Table:
    """`data` with the faults of those rows."""
    if not faults:
        return data
    at = data.schema.get_field_index(FAULT)
    failed = np.isin(np.arange(data.num_rows), list(faults))
    texts = pa.array([faults[row].to_json() for row in sorted(faults)], data.schema.types[at])
    return data.set_column(at, FAULT, pc.replace_with_mask(whole(data[FAULT]), pa.array(failed), texts))


def _merge(data: pa.Table, stage: Stage, results: list[tuple[Indices, dict[str, pa.Array]]]) -> pa.Table:
    """`data` with the stage's columns, the slices put back into the rows' own order; null for rows without a result."""
    order = np.concatenate([indices for indices, _ in results]) if results else np.empty(0, np.int64)
    if len(order) < data.num_rows:
        absent = np.setdiff1d(np.arange(data.num_rows), order)
        results = [*results, (absent, {name: pa.nulls(len(absent), column.arrow) for name, column in stage.writes.items()})]
        order = np.concatenate([order, absent])
    back = None if (np.diff(order) == 1).all() else pa.array(np.argsort(order))
    for name, column in stage.writes.items():
        array = pa.concat_arrays([arrays[name] for _, arrays in results]) if results else pa.array([], column.arrow)
        array = array if back is None else array.take(back)
        at = data.schema.get_field_index(name)
        data = data.append_column(name, array) if at < 0 else data.set_column(at, name, array)
    return data
