"""What is known of requests of OpenAI's interface when they have gone over real sockets: counts, figures of the engine, the log, and traces."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from speakers import FakeSpeaker, Parrot

import headrace as hr
from headrace.gateway.openai.opening import Opening
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.serving.watch.logs import AccessLog
from headrace.serving.watch.traces import Traces
from headrace.speech import Reply, Spent

PATIENCE_S = 20


class Measured(FakeSpeaker):
    """One that tells times and cached tokens, and figures of a memory."""

    async def speak(
        self, path: str, body: bytes | Mapping[str, Any], *, priority: int = 1, request_id: str | None = None, spent: Spent
    ) -> Reply | AsyncIterator[str]:
        spent.cached_tokens, spent.queue_s, spent.first_s = 2, 1e-6, 2e-6
        return await super().speak(path, body, priority=priority, request_id=request_id, spent=spent)

    def figures(self) -> dict[str, float]:
        return {**super().figures(), "kv_cache": 0.25, "prefix_tokens": 40.0, "prefix_hits": 10.0, "preempted": 1.0}


@hr.stage(out={"answer": str}, concurrency=4)
class Told(Parrot):
    def setup(self, device: str) -> None:
        self._speaker = Measured(words=self.words)
        weakref.finalize(self, self._speaker.close)


@dataclasses.dataclass
class Service:
    """Doors before one replica, each on a port of its own."""

    servers: list[DoorServer]
    speaker: FakeSpeaker
    logged: io.StringIO

    def ask(self, *, path: str = "/v1/chat/completions", prompt: str = "one two three", at: int = 0, **more: Any) -> http.client.HTTPResponse:
        """The answer to a request at a door, of which the head is there. Closing it closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.servers[at]._port, timeout=PATIENCE_S)
        said = {"prompt": prompt} if path == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
        connection.request("POST", path, json.dumps({"model": "parrot", **said, **more}), {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def series(self, at: int = 0, *, peers: tuple[int, ...] = ()) -> dict[str, float]:
        """What a door counts, joined with that of others, by name and labels."""
        door = self.servers[at].door
        self.servers[at].call(setattr, door, "peers", [self.servers[peer].call(self.servers[peer].door.report).metrics for peer in peers])
        self.servers[at].call(door.report)  # which looks at the gauges
        connection = http.client.HTTPConnection("127.0.0.1", self.servers[at]._port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "service")
                assert f"{sample.name}{{{labels}}}" not in found
                found[f"{sample.name}{{{labels}}}"] = sample.value
        return found

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what is about to hold."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline_s, "it never came true"
            time.sleep(0.005)


@contextlib.contextmanager
def talking(*, doors: int = 1, words: int = 4, traces: Traces | None = None, beside: bool = True) -> Iterator[Service]:
    """`beside` is whether the replica may write to clients itself."""
    pipeline = hr.Pipeline("talk", Told(words=words))
    replica = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs, group="say")
    logged = io.StringIO()
    servers: list[DoorServer] = []
    try:
        host, port = replica.start()
        group = GroupRoute("say", (Endpoint("say-1", host, port, beside=replica.beside if beside else ""),))
        routes = Routes("talk", 1, (VersionRoute(1, 1.0, (group,), contract(pipeline)),), Limits())
        for number in range(doors):
            server = DoorServer(Door("talk", name=str(number), log=AccessLog(logged)))
            server.start()
            servers.append(server)
            server.door.traces = traces
            server.run(Opening().open(server.door))
            server.call(server.door.update, routes)
        assert replica._talks is not None and isinstance(replica._talks.speaker, FakeSpeaker)
        service = Service(servers, replica._talks.speaker, logged)
        service.until(lambda: all(server.call(lambda door=server.door: all(one.open for one in door.fleet.versions.values())) for server in servers))
        yield service
    finally:
        for server in servers:
            server.stop(timeout_s=0.5)
            if server.door.log is not None:
                server.door.log.close()
        replica.close()


def test_streams_and_whole_answers_are_counted() -> None:
    with talking() as service:
        streamed = service.ask(stream=True).read()
        assert streamed.count(b"data: {") == 4 and streamed.endswith(b"data: [DONE]\n\n")
        assert service.ask(path="/v1/completions", model="talk", max_tokens=3).status == 200  # by the pipeline's name
        assert service.ask(model="other").status == 404 and service.ask(prompt="418: no").status == 418
        series = service.series()
        here = "door=0"
        for model, output in (("parrot", 4), ("talk", 3)):
            assert series[f"headrace_gen_ai_tokens_total{{{here},model={model},type=input,version=1}}"] == 3
            assert series[f"headrace_gen_ai_tokens_total{{{here},model={model},type=output,version=1}}"] == output
        assert series[f"headrace_gen_ai_cached_tokens_total{{{here},model=talk,version=1}}"] == 2
        names = (
            "queue_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds", "output_tokens_per_second",
            "overhead_seconds,until=end", "overhead_seconds,until=first_token",
        )  # fmt: skip
        found = [series[f"headrace_gen_ai_{name.partition(',')[0]}_count{{{here}{''.join(name.partition(',')[1:])},version=1}}"] for name in names]
        assert found == [2, 1, 3, 2, 2, 1]
        took_s = series[f"headrace_request_duration_seconds_sum{{{here},version=1}}"]
        assert 0 < series[f"headrace_gen_ai_overhead_seconds_sum{{{here},until=end,version=1}}"] < took_s
        assert 0 < series[f"headrace_gen_ai_time_to_first_token_seconds_sum{{{here},version=1}}"] < took_s
        assert service.speaker.cancelled == 0 and not any("cancelled" in name and value for name, value in series.items())


@pytest.mark.parametrize("beside", [False, True])
def test_times_between_tokens_are_counted_whoever_writes_them(beside: bool) -> None:
    """All but the few that lie between two writers, and none for pieces without tokens."""
    with talking(words=200, beside=beside) as service:
        service.speaker.word_s = 0.001
        assert service.ask(stream=True).read().count(b"data: {") == 200
        series = service.series()
        number = series["headrace_gen_ai_inter_token_latency_seconds_count{door=0,version=1}"]
        assert number == 199 if not beside else 150 < number <= 199
        assert 0.1 < series["headrace_gen_ai_inter_token_latency_seconds_sum{door=0,version=1}"] < PATIENCE_S
        assert series["headrace_gen_ai_tokens_total{door=0,model=parrot,type=output,version=1}"] == 200


@pytest.mark.parametrize("beside", [False, True])
def test_who_leaves_is_counted_with_what_the_engine_had_computed(beside: bool) -> None:
    with talking(words=2, beside=beside) as service:
        service.speaker.pause()
        connection = http.client.HTTPConnection("127.0.0.1", service.servers[0]._port, timeout=PATIENCE_S)
        body = {"model": "parrot", "messages": [{"role": "user", "content": "one two"}], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        service.until(lambda: service.speaker.running == 1)
        connection.close()
        waiting, streaming = (f"headrace_gen_ai_cancelled_total{{door=0,model=parrot,phase={phase},version=1}}" for phase in ("waiting", "streaming"))
        service.until(lambda: service.series().get(waiting) == 1)
        service.speaker.resume()
        service.speaker.word_s = 0.02
        left = service.ask(stream=True, max_tokens=4000)
        assert b"".join(left.readline() for _ in range(20)).count(b"data: ") == 10
        left.close()
        service.until(lambda: service.series().get(streaming) == 1 and service.speaker.running == 0)
        computed = service.speaker.figures()["generated_tokens"]
        output = "headrace_gen_ai_tokens_total{door=0,model=parrot,type=output,version=1}"
        service.until(lambda: service.series()[output] == computed)
        series = service.series()
        assert series["headrace_gen_ai_tokens_total{door=0,model=parrot,type=input,version=1}"] == 2 + 3
        assert series["headrace_requests_total{code=499,door=0,version=1}"] == 2
        assert series["headrace_gen_ai_queue_seconds_count{door=0,version=1}"] == 0


def test_an_engine_is_told_once_by_all_doors() -> None:
    with talking(doors=2) as service:
        for at in (0, 1):
            assert service.ask(at=at).status == 200
        here = "replica=say-1"
        service.until(lambda: service.series().get(f"headrace_engine_tokens_total{{{here},type=output,version=1}}") == 8)
        series = service.series(peers=(1,))
        engine = {name: value for name, value in series.items() if name.startswith("headrace_engine")}
        assert engine == {
            f"headrace_engine_running{{{here},version=1}}": 0,
            f"headrace_engine_waiting{{{here},version=1}}": 0,
            f"headrace_engine_sequences{{{here},version=1}}": 8,
            f"headrace_engine_capacity_tokens{{{here},version=1}}": 100_000,
            f"headrace_engine_kv_cache_usage_ratio{{{here},version=1}}": 0.25,
            f"headrace_engine_tokens_total{{{here},type=input,version=1}}": 6,
            f"headrace_engine_tokens_total{{{here},type=output,version=1}}": 8,
            f"headrace_engine_prefix_cache_lookup_tokens_total{{{here},version=1}}": 40,
            f"headrace_engine_prefix_cache_hit_tokens_total{{{here},version=1}}": 10,
            f"headrace_engine_preemptions_total{{{here},version=1}}": 1,
        }
        assert [series[f"headrace_gen_ai_tokens_total{{door={at},model=parrot,type=output,version=1}}"] for at in (0, 1)] == [4, 4]
        report = service.servers[0].call(service.servers[0].door.report)
        assert report.replicas["say-1"]["engine"]["kv_cache"] == 0.25 and list(report.paces) == [1]


def test_a_trace_and_a_line_of_the_log() -> None:
    from opentelemetry.sdk.trace import TracerProvider, sampling
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampling.DEFAULT_ON, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with talking(traces=Traces(provider)) as service:
        for stream in (True, False):
            service.ask(stream=stream).read()
        service.speaker.pause()
        assert service.ask(prompt="503: away").status == 503
        service.until(lambda: len(kept.get_finished_spans()) == 15)
    spans = kept.get_finished_spans()
    assert [one.name for one in spans] == ["queue", "prefill", "decode", "say", "POST /v1/chat/completions"] * 3
    for *parts, hop, request in (spans[:5], spans[5:10], spans[10:]):
        assert [one.parent.span_id for one in parts] == [hop.context.span_id] * 3 and hop.parent.span_id == request.context.span_id
        assert all(request.start_time <= one.start_time <= one.end_time <= request.end_time for one in (*parts, hop))
        assert hop.attributes["headrace.replica"] == "say-1" and hop.attributes["headrace.attempt"] == 1
    assert spans[4].attributes == spans[9].attributes == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "parrot", "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 4,
        "headrace.cached_tokens": 2, "headrace.replica": "say-1", "headrace.version": 1,
    }  # fmt: skip
    first, *_ = (json.loads(line) for line in service.logged.getvalue().splitlines())
    logged = {name: first[name] for name in ("status", "model", "prompt_tokens", "cached_tokens", "completion_tokens", "replica", "version", "attempts")}
    assert logged == {
        "status": 200, "model": "parrot", "prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 4, "replica": "say-1", "version": 1, "attempts": 1,
    }  # fmt: skip
    assert 0 < first["first_ms"] < first["took_ms"]
