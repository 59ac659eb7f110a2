"""Requests for rows: which version computes one, what is counted of it, and how the answer goes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from headrace.serving.door import heads
from headrace.serving.door.exchange import CLOSE, Ask, Exchange
from headrace.serving.door.fleet import Fleet, Mix, Version
from headrace.serving.door.journey import EXPIRED, GONE, MOVED, Answer, Journey
from headrace.serving.door.pairs import Mirror, Pair
from headrace.serving.door.retries import Retries
from headrace.serving.door.routing import NO_ROOM
from headrace.serving.door.streaming import Stream
from headrace.serving.door.writing import NOT_OF_LINES, Writing, refusal
from headrace.serving.routes import Limits
from headrace.serving.wire import Content, Failure

if TYPE_CHECKING:
    from headrace.serving.door.talk import Talk
    from headrace.serving.watch.logs import AccessLog
    from headrace.serving.watch.metrics import DoorMetrics
    from headrace.serving.watch.traces import Traces

T = TypeVar("T")

NOTHING_SERVED = Failure(503, "unavailable", "no version of the service answers requests at the moment")

_KINDS = {Content.JSON: (b"content-type", heads.JSON_TYPE), Content.ARROW: (b"content-type", heads.ARROW_TYPE)}
_MOST_MOVES = 3


class Desk(Protocol):
    """The door, as far as requests for rows need it."""

    fleet: Fleet
    metrics: DoorMetrics
    mirror: Mirror
    retries: Retries
    log: AccessLog | None
    traces: Traces | None
    closing: bool

    def now(self) -> float:
        """The time of the loop."""


class Rows:
    """Answers requests for rows."""

    def __init__(self, door: Desk) -> None:
        self._door = door

    @property
    def limits(self) -> Limits:
        """The bounds of the service."""
        return self._door.fleet.limits

    async def answer(self, exchange: Exchange, path: str, key: str | None) -> None:
        """Answer a POST to a pipeline's path."""
        head = heads.read(exchange.found)
        limits = self.limits
        left_s = limits.deadline_s if head.timeout_s is None else min(limits.deadline_s, head.timeout_s)
        ask = Ask(exchange, path, head, key, exchange.began + left_s)
        version = self.choose(ask)
        if isinstance(version, Failure):
            await self.turn_away(ask, version, None)
        elif left_s <= 0:
            await self.turn_away(ask, EXPIRED, version)
        elif head.events:
            await self._write(ask, head.content, version)
        elif head.content is None:
            await Stream(self, ask, version).run()
        else:
            await self._one(ask, head.content, version)

    async def _one(self, ask: Ask, content: Content, version: Version) -> None:
        exchange, head = ask.exchange, ask.head
        body = await self._read(ask, version)
        if isinstance(body, Failure):
            await self.turn_away(ask, body, version)
            return
        journey = self.journey(ask)
        exchange.stop_with_client(journey)
        outcome, version = await self.compute(ask, journey, version, body, content=content, accept=head.accept)
        exchange.watch(None)
        if isinstance(outcome, Failure):
            await self.turn_away(ask, outcome, version, journey)
            return
        queue_s = wait_s = compute_s = 0.0
        for leg in outcome.legs:
            queue_s += leg.done.queue_s
            wait_s += leg.done.wait_s
            compute_s += leg.done.compute_s
        timing = b"queue;dur=%.2f, wait;dur=%.2f, compute;dur=%.2f" % (queue_s * 1e3, wait_s * 1e3, compute_s * 1e3)
        self.count(ask, version, 200, rows=outcome.rows)
        await exchange.reply(200, outcome.body, _KINDS[head.accept], (b"x-headrace-version", b"%d" % version.number), (b"server-timing", timing))
        self._end(ask, journey, version, outcome)

    async def _write(self, ask: Ask, content: Content | None, version: Version) -> None:
        """Answer one row while the answer is written."""
        if content is None:
            await self.turn_away(ask, NOT_OF_LINES, version)
            return
        body = refusal(version) or await self._read(ask, version)
        if isinstance(body, Failure):
            await self.turn_away(ask, body, version)
            return
        journey = self.journey(ask)
        writing = Writing(ask, journey, body, content, metrics=self._door.metrics)
        ask.exchange.stop_with_client(journey)
        failure, version = await self._tried(ask, journey, version, writing.through)
        ask.exchange.watch(None)
        status = 200 if failure is None else failure.status
        if writing.talk is not None:
            writing.talk.count(version.pipeline, status, read_s=writing.asked_s, now_s=self._door.now())
        if failure is not None and not writing.begun:
            await self.turn_away(ask, failure, version, journey)
            return
        ask.exchange.status = status  # what the client was told in the stream
        self.count(ask, version, status, rows=failure is None)
        self._end(ask, journey, version, failure, writing.talk)

    async def _read(self, ask: Ask, version: Version) -> bytes | Failure:
        """The request's body, or why it is not taken."""
        exchange, head, limits = ask.exchange, ask.head, self.limits
        if not exchange.whole and version.full(head.priority):
            return NO_ROOM
        return await exchange.body(length=head.length, most_bytes=limits.body_bytes, until=exchange.began + limits.body_s, expires=ask.deadline)

    def choose(self, ask: Ask) -> Version | Failure:
        """The version that answers."""
        mix = self._door.fleet.mixes.get(ask.path)
        wanted = ask.head.version
        if wanted is not None:
            version = mix.versions.get(wanted) if mix is not None else None
            return version or Failure(404, "not_found", f"version {wanted} is not served here")
        return (mix.choose() if mix is not None else None) or NOTHING_SERVED

    def journey(self, ask: Ask) -> Journey:
        """A request on its way, with its span where traces are on."""
        head, request_id, traces = ask.head, ask.exchange.request_id, self._door.traces
        if traces is None:
            return Journey(ask.deadline, head.priority, head.trace, request_id=request_id)
        span = traces.begin(head.trace, f"POST {ask.path}", attributes={"http.request.method": "POST", "http.route": ask.path})
        return Journey(ask.deadline, head.priority, span.traceparent, span, request_id)

    async def compute(
        self, ask: Ask, journey: Journey, version: Version, body: bytes, *, content: Content, accept: Content
    ) -> tuple[Answer | Failure, Version]:
        """What came of a request, and the version that it came from."""

        async def through(version: Version) -> Answer | Failure:
            outcome: Answer | Failure = NO_ROOM
            mix = self._door.fleet.mixes.get(ask.path)
            pair = self._mirrored(mix, version, ask, journey, body) if mix is not None and mix.mirrored else None
            try:
                outcome = await journey.through(version.pools, body, content=content, accept=accept)
            finally:
                if pair is not None:
                    pair.tell(GONE if journey.stopped is GONE else outcome)
            return outcome

        return await self._tried(ask, journey, version, through)

    async def _tried(self, ask: Ask, journey: Journey, version: Version, through: Callable[[Version], Awaitable[T | Failure]]) -> tuple[T | Failure, Version]:
        """What came of a request, and the version that it came from: another than the first one where that went out of service meanwhile."""
        outcome: T | Failure = NO_ROOM
        for _ in range(_MOST_MOVES):
            if version.saturated() and not journey.patient:
                return NO_ROOM, version
            report = version.report
            report.in_flight += 1
            try:
                outcome = await through(version)
            finally:
                report.in_flight -= 1
            if outcome is not MOVED or ask.head.version is not None:
                break
            other = self.choose(ask)
            if isinstance(other, Failure):
                return other, version
            version = other
        return outcome, version

    async def compute_chunk(self, ask: Ask, version: Version, body: bytes, *, patient: bool) -> Answer | Failure:
        """What came of a part of a stream, which is counted like a request."""
        began = self._door.now()
        journey = self.journey(ask)
        journey.patient = patient
        if ask.head.timeout_s is None:
            journey.deadline = began + self.limits.deadline_s
        outcome, version = await self.compute(ask, journey, version, body, content=Content.JSON, accept=Content.JSON)
        status = outcome.status if isinstance(outcome, Failure) else 200
        self.count(ask, version, status, rows=0 if isinstance(outcome, Failure) else outcome.rows, began=began)
        if journey.span is not None:
            journey.span.end(status, outcome.code if isinstance(outcome, Failure) else None, version=version.number)
        return outcome

    def end_stream(self, ask: Ask, version: Version, *, rows: int, failure: Failure | None) -> None:
        """A stream is over: write the line of the log."""
        self._log(ask, version, error=failure.code if failure is not None else None, rows=rows)

    def count(self, ask: Ask, version: Version | None, status: int, *, rows: int = 0, began: float | None = None) -> None:
        """Count a request that is about to be answered."""
        door = self._door
        took_s = door.now() - (ask.exchange.began if began is None else began)
        number = 0
        if version is not None:
            number = version.number
            version.count(status, took_s)
        if status < 300:
            door.retries.earn()
        elif status in (429, 503):
            door.metrics.shed("overloaded" if status == 429 else "unavailable")
        elif status == 504:
            door.metrics.expired()
        door.metrics.answered(number, status, took_s, rows, key=ask.key)

    async def turn_away(self, ask: Ask, failure: Failure, version: Version | None, journey: Journey | None = None) -> None:
        """Answer with an error."""
        more: list[tuple[bytes, bytes]] = []
        if version is not None:
            more.append((b"x-headrace-version", b"%d" % version.number))
        if failure.status in (429, 503):
            more.append((b"retry-after", b"%d" % (version.retry_after_s() if version is not None else 1)))
        if failure.status == 503 and self._door.closing:
            more.append(CLOSE)
        self.count(ask, version, failure.status)
        await ask.exchange.fail(failure, *more)
        self._end(ask, journey, version, failure)

    def _end(self, ask: Ask, journey: Journey | None, version: Version | None, outcome: Answer | Failure | None, talk: Talk | None = None) -> None:
        """Write the line of the log, and end the span. What was streamed without a failure has no outcome of its own."""
        span = journey.span if journey is not None else None
        error = outcome.code if isinstance(outcome, Failure) else None
        if span is not None:
            span.end(ask.exchange.status, error, version=version.number if version is not None else None)
        if self._door.log is not None:
            last = outcome.legs[-1] if isinstance(outcome, Answer) else None
            rows = last.done.rows if last is not None else None if outcome is not None else 1
            self._log(ask, version, error=error, rows=rows, replica=last.replica if last is not None else None, journey=journey, talk=talk)

    def _log(
        self,
        ask: Ask,
        version: Version | None,
        *,
        error: str | None,
        rows: int | None,
        replica: str | None = None,
        journey: Journey | None = None,
        talk: Talk | None = None,
    ) -> None:
        log, exchange = self._door.log, ask.exchange
        if log is None:
            return
        said, first_s = (talk.said, talk.first_s) if talk is not None else (None, None)
        log.request(
            request_id=exchange.request_id,
            method="POST",
            path=ask.path,
            status=exchange.status,
            error=error,
            took_ms=(self._door.now() - exchange.began) * 1e3,
            first_ms=first_s * 1e3 if first_s is not None else None,
            version=version.number if version is not None else None,
            rows=rows,
            prompt_tokens=said.prompt_tokens if said is not None else None,
            cached_tokens=said.cached_tokens if said is not None else None,
            completion_tokens=said.completion_tokens if said is not None else None,
            bytes_in=exchange.bytes_in,
            bytes_out=exchange.bytes_out,
            key=ask.key,
            replica=replica,
            attempts=1 + (journey.retries if journey is not None else 0),
            trace_id=journey.span.trace_id if journey is not None and journey.span is not None else None,
        )

    def _mirrored(self, mix: Mix, version: Version, ask: Ask, journey: Journey, body: bytes) -> Pair | None:
        content = ask.head.content
        if content is None or ask.head.version is not None:
            return None  # a stream, or one who asked for this very version
        return self._door.mirror.begin(mix, version, journey, body, content=content, accept=ask.head.accept)
