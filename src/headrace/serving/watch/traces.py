"""Traces: a span for each request, one below it for each group that it passed, and below that one each for where the time went.

They are on only where the environment names a receiver, as OpenTelemetry has it: `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`.
The other `OTEL_` variables (headers, sampler, resource attributes, sizes of batches) mean what they mean everywhere.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.errors import ServingError
from headrace.serving.wire import Done, Said

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def parse(traceparent: str) -> tuple[int, int, int] | None:
    """The trace, span and flags of a `traceparent` header; None where it is malformed (W3C Trace Context, 3.2)."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags = (int(part, 16) for part in found.groups()[:4])
    if version == 0xFF or (version == 0 and found[5] is not None) or not trace_id or not span_id:
        return None
    return trace_id, span_id, flags & 1  # other flags have no meaning that we could pass on


class Traces:
    """Where spans go. Methods of a span are called on one loop; what it records is sent by a thread of OpenTelemetry's."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headrace")

    @staticmethod
    def from_environment(service: str, *, door: str = "0") -> Traces | None:
        """Traces as the environment asks for them; None where it names no receiver.

        Raises:
            ServingError: OpenTelemetry's exporter is not installed, or another protocol than HTTP is asked for.
        """
        environment = os.environ
        off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environment.get("OTEL_TRACES_EXPORTER", "").strip() == "none"
        if off or not any(environment.get(name) for name in _ENDPOINTS):
            return None
        protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
        if protocol != "http/protobuf":
            raise ServingError(f"traces are sent as http/protobuf, not {protocol!r}; set {_PROTOCOLS[0]}=http/protobuf, or OTEL_TRACES_EXPORTER=none")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            name = next(name for name in _ENDPOINTS if environment.get(name))
            raise ServingError(f"{name} asks for traces, which needs opentelemetry-exporter-otlp-proto-http: `pip install 'headrace[serve]'`") from error
        named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": service}
        provider = TracerProvider(resource=Resource.create({**named, "service.instance.id": f"{service}-{door}"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return Traces(provider)

    def begin(self, traceparent: str | None, name: str, *, attributes: Mapping[str, Any] | None = None, tracestate: str | None = None) -> Span:
        """The span of a request that has just come. It goes on with the trace of `traceparent`, unless that is malformed."""
        from opentelemetry import trace

        context = None
        if traceparent and (parsed := parse(traceparent)):
            trace_id, span_id, flags = parsed
            state = trace.TraceState.from_header([tracestate]) if tracestate else None
            caller = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags), trace_state=state)
            context = trace.set_span_in_context(trace.NonRecordingSpan(caller))
        begun_ns = time.time_ns()
        span = self._tracer.start_span(name, context, trace.SpanKind.SERVER, attributes=attributes, start_time=begun_ns)
        return Span(self._tracer, span, begun_ns)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Send what is left, and wait for so long at most."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)  # a receiver that is away would hold us up for longer
        sending.start()
        sending.join(timeout_s)


class Span:
    """A request under way. Offsets are in seconds since it began."""

    __slots__ = ("_begun_ns", "_recording", "_span", "_started_s", "_tracer", "trace_id", "traceparent")

    def __init__(self, tracer: trace.Tracer, span: trace.Span, begun_ns: int) -> None:
        self._tracer, self._span, self._begun_ns = tracer, span, begun_ns
        self._started_s = time.perf_counter()
        self._recording = span.is_recording()
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def offset_s(self) -> float:
        """The time since the request came."""
        return time.perf_counter() - self._started_s

    def group(self, name: str, sent_s: float, done: Done | None, *, attempt: int = 1, replica: str = "", error: str | None = None) -> None:
        """A group answered now what was sent to it `sent_s` after the request came; without `done` it did not, because of `error`.

        The replica tells durations only. What the hop took beyond them is the way there and back, half of it each.
        """
        if not self._recording:
            return
        attributes: dict[str, Any] = {"headrace.group": name, "headrace.attempt": attempt, "headrace.replica": replica}
        parts: dict[str, float] = {}
        if done is not None:
            parts = {"queue": done.queue_s, "batch wait": done.wait_s, "compute": done.compute_s}
            attributes |= {"headrace.rows": done.rows, "headrace.batch_rows": done.batch_rows}
        self._hop(name, sent_s, parts, attributes, error)

    def talk(
        self, name: str, came_s: float, said: Said | None, *, waited_s: float = 0.0, attempt: int = 1, replica: str = "", error: str | None = None
    ) -> None:
        """As `group`, of a language model's answer: the request came to the group `came_s` after it came here, and waited for a replica with room at first."""
        if not self._recording:
            return
        parts: dict[str, float] = {}
        if said is not None:
            parts["queue"] = waited_s + said.queue_s
            if said.first_s:
                parts |= {"prefill": max(0.0, said.first_s - said.queue_s), "decode": said.took_s - said.first_s}
            else:
                parts["compute"] = max(0.0, said.took_s - said.queue_s)
        self._hop(name, came_s, parts, {"headrace.group": name, "headrace.attempt": attempt, "headrace.replica": replica}, error)

    def _hop(self, name: str, sent_s: float, parts: Mapping[str, float], attributes: Mapping[str, Any], error: str | None) -> None:
        """A span from then to now, and in its middle one for each part."""
        from opentelemetry import trace

        sent_ns, now_ns = self._at_ns(sent_s), self._at_ns(self.offset_s())
        attributes = {key: value for key, value in attributes.items() if value != ""}
        attributes |= {f"headrace.{part.replace(' ', '_')}_s": took_s for part, took_s in parts.items()}
        below = trace.set_span_in_context(self._span)
        hop = self._tracer.start_span(name, below, trace.SpanKind.CLIENT, attributes=attributes, start_time=sent_ns)
        if parts and hop.is_recording():
            inside = trace.set_span_in_context(hop)
            at_ns = sent_ns + max(0, now_ns - sent_ns - round(sum(parts.values()) * 1e9)) // 2
            for part, took_s in parts.items():
                end_ns = min(at_ns + round(took_s * 1e9), now_ns)
                self._tracer.start_span(part, inside, start_time=at_ns).end(end_ns)
                at_ns = end_ns
        if error is not None:
            hop.set_attribute("error.type", error)
            hop.set_status(trace.StatusCode.ERROR, error)
        hop.end(now_ns)

    def end(self, status: int, error: str | None = None, *, version: int | None = None, attributes: Mapping[str, Any] | None = None) -> None:
        """The request is answered, with an HTTP status and the code of the error, if it is one; with these attributes, too."""
        if self._recording:
            from opentelemetry import trace

            self._span.set_attributes({**(attributes or {}), "http.response.status_code": status})
            if version:
                self._span.set_attribute("headrace.version", version)
            if error is not None:
                self._span.set_attribute("error.type", error)
            if status >= 500:  # what a client did wrong is no error of the server's
                self._span.set_status(trace.StatusCode.ERROR, error or str(status))
        self._span.end(self._at_ns(self.offset_s()))

    def _at_ns(self, offset_s: float) -> int:
        return self._begun_ns + round(offset_s * 1e9)
