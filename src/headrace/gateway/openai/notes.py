"""A request of OpenAI's interface at a door, and what is written down of it: counts, the line of the log, and the attributes of its span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

if TYPE_CHECKING:
    from headrace.gateway.openai.asked import Asked
    from headrace.serving.door.app import Door
    from headrace.serving.door.callers import Caller
    from headrace.serving.door.exchange import Exchange
    from headrace.serving.door.fleet import Version
    from headrace.serving.door.journey import Journey
    from headrace.serving.door.talk import Talk
    from headrace.serving.wire import Failure, Said

_OPERATIONS = {CHAT: "chat", COMPLETIONS: "text_completion", EMBEDDINGS: "embeddings"}


@dataclass(slots=True)
class Case:
    """A request for an answer of a model: who asks, what, of which version behind which door; and what became of it.

    `read_s` is when its body was there, `declined` whether its key has not enough left for it.
    """

    exchange: Exchange
    path: str
    caller: Caller
    priority: int
    door: Door
    asked: Asked | None = None
    version: Version | None = None
    talk: Talk | None = None
    journey: Journey | None = None
    failure: Failure | None = None
    declined: bool = False
    body: bytes = b""
    read_s: float = 0.0


def attributes(path: str, asked: Asked | None) -> dict[str, str]:
    """Of the span of a request under a path, as OpenTelemetry's conventions have them."""
    named = {"http.request.method": "POST", "http.route": path, "gen_ai.operation.name": _OPERATIONS[path]}
    return named if asked is None else {**named, "gen_ai.request.model": asked.model}


def note(case: Case) -> None:
    """Count a request that was answered, write the line of the log, and end the span."""
    door, exchange, version, talk, journey = case.door, case.exchange, case.version, case.talk, case.journey
    status, number = exchange.status, version.number if version is not None else 0
    error = case.failure.code if case.failure is not None else None
    if talk is not None and talk.begun and case.failure is not None:
        status = case.failure.status  # what the client was told in the stream
    now_s = door.now()
    took_s = now_s - exchange.began
    if version is not None:
        version.count(status, took_s)
        if case.asked is not None and talk is not None:
            talk.count(case.asked.model, status, read_s=case.read_s, now_s=now_s)
    if status < 300:
        door.retries.earn()
    elif status in (429, 503):
        door.metrics.shed("overloaded" if status == 429 else "unavailable")
    elif status == 504:
        door.metrics.expired()
    door.metrics.answered(number, status, took_s, key=case.caller.name)
    said, hop = talk.said if talk is not None else None, journey.asked if journey is not None else None
    span = journey.span if journey is not None else None
    if span is not None:
        span.end(status, error, version=number or None, attributes=_spent(said, hop.replica if hop is not None else ""))
    if door.log is not None:
        door.log.request(
            request_id=exchange.request_id,
            method="POST",
            path=case.path,
            status=status,
            error=error,
            took_ms=took_s * 1e3,
            first_ms=talk.first_s * 1e3 if talk is not None and talk.first_s is not None else None,
            version=number or None,
            model=case.asked.model if case.asked is not None else None,
            prompt_tokens=said.prompt_tokens if said is not None else None,
            cached_tokens=said.cached_tokens if said is not None else None,
            completion_tokens=said.completion_tokens if said is not None else None,
            bytes_in=exchange.bytes_in,
            bytes_out=exchange.bytes_out,
            key=case.caller.name,
            replica=(hop.replica if hop is not None else "") or None,
            attempts=1 + (journey.retries if journey is not None else 0),
            trace_id=span.trace_id if span is not None else None,
            asked=case.body.decode("utf-8", "replace") if case.caller.logged else None,
        )


def _spent(said: Said | None, replica: str) -> dict[str, Any]:
    found: dict[str, Any] = {"headrace.replica": replica} if replica else {}
    if said is not None:
        found |= {
            "gen_ai.usage.input_tokens": said.prompt_tokens,
            "gen_ai.usage.output_tokens": said.completion_tokens,
            "headrace.cached_tokens": said.cached_tokens,
        }
    return found
