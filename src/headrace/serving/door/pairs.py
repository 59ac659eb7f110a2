"""Requests that two versions compute: one answers, the other is mirrored to, and both are compared."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable
from typing import Any

from headrace.serving.door.fleet import Mix, Version
from headrace.serving.door.journey import GONE, Answer, Journey
from headrace.serving.routes import VersionReport
from headrace.serving.wire import Content, Failure

MOST_MIRRORED = 64  # under way at once
MOST_MIRRORED_BYTES = 64 << 20
ABSOLUTE, RELATIVE = 1e-4, 1e-3
LOWEST_PRIORITY = 2

_AT_ONCE_BYTES = 32 << 10  # answers beyond this are compared beside the loop
_NO_VERDICT = (429, 499, 503, 504)  # these say nothing of a version
_SHORTEST_S = 1e-6

Outcome = Answer | Failure


class Pair:
    """A request that is mirrored. Whoever answers it tells what the answering version made of it."""

    __slots__ = ("answered", "by_candidate", "report")

    def __init__(self, report: VersionReport, *, by_candidate: bool) -> None:
        self.report = report
        self.by_candidate = by_candidate
        self.answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def tell(self, outcome: Outcome) -> None:
        """What the answering version made of it."""
        if not self.answered.done():
            self.answered.set_result(outcome)


class Mirror:
    """What a door mirrors. A mirrored request never waits and is not tried twice; where there is no room for it, it is left out."""

    def __init__(self, *, paired: Callable[[str], None]) -> None:
        self._paired = paired
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, mix: Mix, answering: Version, journey: Journey, body: bytes, *, content: Content, accept: Content) -> Pair | None:
        """Mirror this request, which `answering` is about to compute, if its turn has come.

        It is sent from a task of its own, which starts after the request itself was sent. What the version on trial answers is mirrored to
        the one it is compared with, so that pairs arise both ways.
        """
        candidate = answering if answering.route.shadow > 0 else next((version for version in mix.mirrored if version is not answering), None)
        if candidate is None or random.random() >= candidate.route.shadow:  # noqa: S311
            return None
        other = mix.base_for(answering) if candidate is answering else candidate
        if other is None or len(self._tasks) >= MOST_MIRRORED or self._bytes + len(body) > MOST_MIRRORED_BYTES:
            return None
        pair = Pair(candidate.report, by_candidate=candidate is answering)
        copy = Journey(journey.deadline, LOWEST_PRIORITY, request_id=journey.request_id, shadow=True)
        self._bytes += len(body)
        task = asyncio.get_running_loop().create_task(self._run(pair, other, copy, body, content=content, accept=accept))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return pair

    def close(self) -> None:
        """Drop what is under way."""
        for task in self._tasks:
            task.cancel()

    async def _run(self, pair: Pair, version: Version, journey: Journey, body: bytes, *, content: Content, accept: Content) -> None:
        try:
            mirrored = await journey.through(version.pools, body, content=content, accept=accept)
            answered = await pair.answered
        finally:
            self._bytes -= len(body)
            journey.stop(GONE)
        new, old = (answered, mirrored) if pair.by_candidate else (mirrored, answered)
        if any(isinstance(outcome, Failure) and outcome.status in _NO_VERDICT for outcome in (new, old)):
            return
        same = True
        if isinstance(new, Answer) and isinstance(old, Answer):
            if max(len(new.body), len(old.body)) <= _AT_ONCE_BYTES:
                same = alike(new.body, old.body, accept)
            else:
                same = await asyncio.get_running_loop().run_in_executor(None, alike, new.body, old.body, accept)
        self._paired(count(pair.report, new, old, same=same))


def count(report: VersionReport, new: Outcome, old: Outcome, *, same: bool) -> str:
    """Count a pair in the report of the version on trial, and say in a word what it was. Time in queues is left out: it is the service's, not the version's."""
    report.pairs += 1
    if isinstance(new, Answer) and isinstance(old, Answer):
        ratio = math.log(_computed_s(new) / _computed_s(old))
        report.pair_slower += ratio > 0
        report.pair_log_ratio += ratio
        report.pair_log_ratio_squares += ratio * ratio
        report.pair_different += not same
        return "same" if same else "different"
    failed, other_failed = (isinstance(outcome, Failure) and outcome.status >= 500 for outcome in (new, old))
    if failed != other_failed:
        report.pair_errors += failed
        report.pair_base_errors += other_failed
        return "failed" if failed else "base_failed"
    if failed:
        return "both_failed"
    refused = isinstance(new, Failure) and isinstance(old, Failure)
    report.pair_different += not refused  # one took the request, the other did not
    return "same" if refused else "different"


def alike(one: memoryview, other: memoryview, content: Content) -> bool:
    """Whether two answers are equal but for rounding: numbers within `ABSOLUTE` or `RELATIVE`, all else as it is."""
    if one == other:
        return True
    try:
        return _close(_values(one, content), _values(other, content))
    except (ValueError, RecursionError):
        return False


def _values(body: memoryview, content: Content) -> Any:
    if content is Content.JSON:
        return json.loads(bytes(body))
    import pyarrow as pa  # only where somebody asks for Arrow

    try:
        table = pa.ipc.open_stream(body).read_all()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return {name: table[name].to_pylist() for name in table.column_names}


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int) and not isinstance(one, bool) and not isinstance(other, bool):
        return one == other or math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _computed_s(answer: Answer) -> float:
    return max(_SHORTEST_S, sum(leg.done.wait_s + leg.done.compute_s for leg in answer.legs))
