"""Requests inside a replica: what is known of each, how its rows are cut over calls, and how they are joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headrace.batching import Indices
from headrace.lineage import Fault
from headrace.serving.wire import Content, Failure

LEAST_PRIORITY = 2
AGE_S = 5.0
"""After this long a waiting request counts one priority class up, so that a steady stream of better ones cannot starve it."""


class Cut(NamedTuple):
    """Rows of a table, which is not copied."""

    table: pa.Table
    start: int
    stop: int


class Share(NamedTuple):
    """Rows of a request that one call computes."""

    job: Job
    rows: range | Indices


@dataclass(frozen=True, slots=True)
class Busy:
    """A request is not taken, or given back unbegun; another try has a chance after `retry_after_s`."""

    retry_after_s: float


Answer = bytes | memoryview | Failure | Busy
"""What becomes of a request: its body, or why there is none."""


@dataclass(slots=True, eq=False)
class Job:
    """A request that the replica has taken, on its way from station to station.

    `owner` is who asked, under `number`. One that is `alone` is computed with nothing beside it; it is `answered` when the door's answer is
    with the system, or nobody waits for one. One that `leaves` ends before the last station, with what is to be computed there as its `data`;
    its answer is empty. `incoming` is the parsed body, `data` its rows as the current station reads them; only requests of
    the same `group` may share a call.
    Of the current station are: `at`, its place, -1 before the first; `taken` and `done`, rows that calls hold or held, and that are computed;
    `left`, for a token budget, the rows not taken with the `widths` of each; `parts`, what came out; `passed_s`, when a call that could have
    held it was first filled with rows of other lengths. Times are of
    `time.perf_counter`; `queue_s`, `wait_s` and `compute_s` add up over the stations.
    """

    owner: Any
    number: int
    size: int
    accept: Content = Content.JSON
    priority: int = 1
    alone: bool = False
    leaves: bool = False
    deadline_s: float = float("inf")
    arrived_s: float = 0.0
    incoming: Any = None
    rows: int = 0
    single: bool = False
    group: tuple[Any, ...] = ()
    data: Cut | None = None
    closed: bool = False
    answered: bool = False
    started: bool = False
    at: int = -1
    queued_s: float = 0.0
    passed_s: float = 0.0
    began_s: float = 0.0
    taken: int = 0
    done: int = 0
    left: Indices | None = None
    widths: Indices | None = None
    parts: list[tuple[range | Indices, Cut]] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)
    queue_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    batch_rows: int = 0

    def rank(self, now_s: float) -> int:
        """Its priority class, 0 first, with its age."""
        return max(0, self.priority - int((now_s - self.arrived_s) / AGE_S)) if self.priority else 0

    def enter(self, at: int, now_s: float) -> None:
        """Begin to wait at a station."""
        self.at, self.queued_s, self.passed_s, self.began_s = at, now_s, 0.0, 0.0
        self.taken = self.done = 0
        self.left = self.widths = None
        self.parts = []

    def measured(self, lengths: Indices) -> None:
        """Take note of the lengths of its rows in tokens."""
        self.widths, self.left = lengths, np.arange(len(lengths))

    def join(self) -> None:
        """Make `data` of what the calls of a station made of its rows, in their order."""
        self.incoming = None
        if len(self.parts) == 1 and isinstance(self.parts[0][0], range):
            self.data = self.parts[0][1]
            return
        table = assemble([cut for _, cut in self.parts])
        order = np.concatenate([np.asarray(rows) for rows, _ in self.parts])
        if (np.diff(order) < 0).any():
            table = table.take(pa.array(np.argsort(order)))
        self.data = Cut(table, 0, self.rows)


def cut(share: Share) -> Cut:
    """The rows of a share, which are copied if they do not adjoin."""
    data, rows = share.job.data, share.rows
    assert data is not None
    if isinstance(rows, range):
        return Cut(data.table, data.start + rows.start, data.start + rows.stop)
    return Cut(data.table.take(pa.array(rows + data.start)), 0, len(rows))


def assemble(cuts: Sequence[Cut]) -> pa.Table:
    """One table of all the rows, in that order; a copy only if they come from several places."""
    joined: list[Cut] = []
    for table, start, stop in cuts:
        if joined and joined[-1].table is table and joined[-1].stop == start:
            joined[-1] = Cut(table, joined[-1].start, stop)
        else:
            joined.append(Cut(table, start, stop))
    if len(joined) == 1:
        table, start, stop = joined[0]
        return table if stop - start == table.num_rows else table.slice(start, stop - start)
    return pa.concat_tables([table.slice(start, stop - start) for table, start, stop in joined]).combine_chunks()
