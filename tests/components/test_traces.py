"""Traces: spans that nest, times that add up, traces of callers that go on, and a receiver that gets them over HTTP."""

from __future__ import annotations

import gzip
import http.server
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.errors import ServingError
from headrace.serving.watch.traces import Traces, parse
from headrace.serving.wire import Done, Said

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
DONE = Done(rows=2, queue_s=0.001, wait_s=0.002, compute_s=0.004, batch_rows=16)


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 1),
        (f"cc-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", 1),
    ],
)
def test_a_header_that_is_read(header: str, flags: int) -> None:
    assert parse(header) == (int(TRACE, 16), int(SPAN, 16), flags)


@pytest.mark.parametrize(
    "header",
    [
        "", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{SPAN}-01", f" 00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\n", f"cc-{TRACE}-{SPAN}-01.x",
        f"0x-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-\u0660\u0661",
    ],
)  # fmt: skip
def test_a_header_that_is_ignored(header: str) -> None:
    assert parse(header) is None


@pytest.fixture
def recorded() -> Iterator[tuple[Traces, Any]]:
    """Traces whose spans are kept here."""
    from opentelemetry.sdk.trace import TracerProvider, sampling
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampling.DEFAULT_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    traces = Traces(provider)
    yield traces, kept
    traces.close()


def test_a_request_and_the_groups_that_it_passed(recorded: tuple[Traces, Any]) -> None:
    traces, kept = recorded
    span = traces.begin(f"00-{TRACE}-{SPAN}-01", "POST /reviews", attributes={"http.request.method": "POST"}, tracestate="vendor=1")
    assert span.trace_id == TRACE and span.traceparent.startswith(f"00-{TRACE}-") and span.traceparent.endswith("-01")
    span.group("clean", span.offset_s(), None, attempt=1, replica="clean-1", error="connection_lost")
    span.group("clean", 0.0, DONE, attempt=2, replica="clean-2")
    span.end(200, version=3)
    spans = kept.get_finished_spans()
    assert [one.name for one in spans] == ["clean", "queue", "batch wait", "compute", "clean", "POST /reviews"]
    lost, *parts, hop, request = spans
    assert {f"{one.context.trace_id:032x}" for one in spans} == {TRACE}
    assert f"{request.parent.span_id:016x}" == SPAN and request.context.trace_state["vendor"] == "1"
    assert request.kind.name == "SERVER" and hop.kind.name == "CLIENT"
    assert f"{request.context.span_id:016x}" == span.traceparent.split("-")[2]
    assert [one.parent.span_id for one in (lost, hop)] == [request.context.span_id] * 2
    assert [one.parent.span_id for one in parts] == [hop.context.span_id] * 3
    assert hop.attributes == {
        "headrace.group": "clean", "headrace.attempt": 2, "headrace.replica": "clean-2", "headrace.queue_s": 0.001, "headrace.batch_wait_s": 0.002,
        "headrace.compute_s": 0.004, "headrace.rows": 2, "headrace.batch_rows": 16,
    }  # fmt: skip
    assert lost.status.status_code.name == "ERROR" and lost.attributes["error.type"] == "connection_lost"
    assert request.attributes == {"http.request.method": "POST", "http.response.status_code": 200, "headrace.version": 3}
    assert request.status.status_code.name == "UNSET"
    assert all(request.start_time <= one.start_time <= one.end_time <= request.end_time for one in spans)


def test_where_the_time_went(recorded: tuple[Traces, Any]) -> None:
    """Queue, wait and compute lie one after the other in the middle of the hop; if they claim more than it took, they end with it."""
    traces, kept = recorded
    span = traces.begin(None, "POST /reviews")
    span._started_s -= 1.0  # the request came a second ago
    span.group("embed", 0.9, DONE)
    span.group("embed", 0.999, Done(1, 5.0, 5.0, 5.0, 1))
    queue, wait, compute, hop, *claimed, short = kept.get_finished_spans()
    assert queue.end_time == wait.start_time and wait.end_time == compute.start_time
    assert [one.end_time - one.start_time for one in (queue, wait, compute)] == [1_000_000, 2_000_000, 4_000_000]
    assert abs((queue.start_time - hop.start_time) - (hop.end_time - compute.end_time)) <= 1
    assert hop.end_time - hop.start_time >= 100_000_000 and hop.start_time - span._begun_ns == 900_000_000
    assert all(short.start_time <= one.start_time <= one.end_time <= short.end_time for one in claimed)


def test_where_the_time_of_a_language_model_went(recorded: tuple[Traces, Any]) -> None:
    """The wait for a replica is part of the queue; vectors have no first token; who is refused has no parts."""
    traces, kept = recorded
    span = traces.begin(None, "POST /v1/chat/completions")
    span._started_s -= 1.0
    span.talk("say", 0.1, Said(200, 5, 0, 7, queue_s=0.01, first_s=0.05, took_s=0.5), waited_s=0.2, replica="say-1")
    span.talk("embed", 0.1, Said(200, 5, queue_s=0.01, took_s=0.03))
    span.talk("say", 0.9, None, attempt=0, error="overloaded")
    *parts, say, queue, compute, embed, refused = kept.get_finished_spans()
    assert [(one.name, round((one.end_time - one.start_time) / 1e6)) for one in (*parts, queue, compute)] == [
        ("queue", 210), ("prefill", 40), ("decode", 450), ("queue", 10), ("compute", 20),
    ]  # fmt: skip
    assert say.attributes == {
        "headrace.group": "say", "headrace.attempt": 1, "headrace.replica": "say-1",
        "headrace.queue_s": pytest.approx(0.21), "headrace.prefill_s": pytest.approx(0.04), "headrace.decode_s": pytest.approx(0.45),
    }  # fmt: skip
    assert "headrace.replica" not in embed.attributes and refused.attributes["error.type"] == "overloaded"


def test_errors(recorded: tuple[Traces, Any]) -> None:
    traces, kept = recorded
    for status, error in ((422, "invalid_row"), (504, "deadline_exceeded")):
        traces.begin("malformed", "POST /reviews").end(status, error)
    bad, late = kept.get_finished_spans()
    assert bad.parent is None and late.parent is None
    assert (bad.status.status_code.name, late.status.status_code.name) == ("UNSET", "ERROR")
    assert (bad.attributes["error.type"], late.attributes["error.type"]) == ("invalid_row", "deadline_exceeded")


def test_a_trace_that_the_caller_does_not_record_goes_on_unrecorded(recorded: tuple[Traces, Any]) -> None:
    traces, kept = recorded
    span = traces.begin(f"00-{TRACE}-{SPAN}-00", "POST /reviews")
    span.group("embed", 0.0, DONE)
    span.end(200)
    assert not kept.get_finished_spans()
    assert span.traceparent.startswith(f"00-{TRACE}-") and span.traceparent.endswith("-00")


class Receiver(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """An OTLP receiver that keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiving)
        self.received: list[tuple[str, dict[str, str], bytes]] = []


class Receiving(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Receiver)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append((self.path, headers, gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


def test_a_receiver_gets_the_spans(receiver: Receiver, environment: pytest.MonkeyPatch) -> None:
    """Over HTTP, as protobuf, with the headers and the service's name that the environment has."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    environment.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    environment.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    traces = Traces.from_environment("reviews", door="1")
    assert traces is not None
    for _ in range(3):
        span = traces.begin(f"00-{TRACE}-{SPAN}-01", "POST /reviews")
        span.group("embed", 0.0, DONE)
        span.end(200)
    traces.close(timeout_s=30)
    path, headers, _ = receiver.received[0]
    assert path == "/v1/traces" and headers["content-type"] == "application/x-protobuf" and headers["x-tenant"] == "blue"
    spans = []
    for _, _, body in receiver.received:
        for part in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {one.key: one.value.string_value for one in part.resource.attributes}
            assert (resource["service.name"], resource["service.instance.id"], resource["deployment.environment.name"]) == ("reviews", "reviews-1", "test")
            spans += [one for scope in part.scope_spans for one in scope.spans]
    assert sorted(one.name for one in spans) == sorted(["POST /reviews", "embed", "queue", "batch wait", "compute"] * 3)
    assert {one.trace_id.hex() for one in spans} == {TRACE}
    assert {one.parent_span_id.hex() for one in spans if one.name == "POST /reviews"} == {SPAN}


def test_a_receiver_that_is_away_holds_nobody_up(environment: pytest.MonkeyPatch) -> None:
    """Closing waits as long as it is told to, and no longer."""
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    environment.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    traces = Traces.from_environment("reviews")
    assert traces is not None
    traces.begin(None, "POST /reviews").end(200)
    traces.close(timeout_s=0.05)
    for thread in threading.enumerate():
        if thread.name == "traces":
            thread.join(20)  # it asks again after random pauses, and hypothesis wants nobody beside it to draw random numbers


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert Traces.from_environment("reviews") is None


def test_another_protocol_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    environment.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ServingError, match=r"http/protobuf, not 'grpc'"):
        Traces.from_environment("reviews")


def test_a_missing_exporter_is_told(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    environment.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ServingError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces.*headrace\[serve\]"):
        Traces.from_environment("reviews")


def test_nothing_is_loaded_while_off() -> None:
    code = "import sys, headrace.serving.watch.traces as t; assert t.Traces.from_environment('a') is None; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert done.stdout == "False\n"
