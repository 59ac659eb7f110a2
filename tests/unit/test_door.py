"""What a door says over HTTP, whatever the replicas do."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import io
import json

import pytest
from replicas import Call, FakeConnection, FakeReplica, ask, routes, run, service, several, until, version

import headrace as hr
from headrace.serving.bodies import openapi
from headrace.serving.door import exchange, heads
from headrace.serving.door.app import Door
from headrace.serving.routes import Limits
from headrace.serving.watch.logs import AccessLog
from headrace.serving.wire import Content


@hr.stage(out={"n": int})
def size(text: hr.Column[str]):
    return {"n": [len(each) for each in text]}


ARROW = "application/vnd.apache.arrow.stream"


def read(**headers: str) -> heads.Head:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return heads.read(heads.scan(raw), now=dt.datetime(2030, 1, 31, 12, tzinfo=dt.UTC))


def refused(**headers: str):
    with pytest.raises(heads.HeadError) as refusal:
        read(**headers)
    return refusal.value.failure


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", Content.JSON),
        ("Application/JSON; charset=utf-8", Content.JSON),
        ("application/ld+json", Content.JSON),
        ("", Content.JSON),
        (ARROW, Content.ARROW),
        ("application/x-ndjson", None),
    ],
)
def test_types_of_bodies(kind: str, content: Content | None):
    assert read(content_type=kind).content is content
    assert read().content is Content.JSON


def test_a_body_of_another_type_or_encoding_is_refused():
    assert (refused(content_type="text/plain").status, refused(content_encoding="gzip").status) == (415, 415)
    assert read(content_encoding="identity").content is Content.JSON


def test_arrow_comes_back_where_it_is_asked_for():
    assert read(accept=f"application/json;q=0.5, {ARROW}").accept is Content.ARROW
    assert read(accept="*/*").accept is Content.JSON
    assert read(content_type=ARROW).accept is Content.JSON


def test_events_are_sent_to_who_takes_nothing_else():
    assert read(accept="text/event-stream").events and read(accept="Text/Event-Stream; charset=utf-8, text/plain").events
    others = ("application/json, text/event-stream", "text/event-stream, */*;q=0.1", f"text/event-stream, {ARROW}", "text/html")
    assert not any(read(accept=accept).events for accept in others) and not read().events


@pytest.mark.parametrize(
    ("headers", "left_s"),
    [
        ({"x_request_timeout": "1.5"}, 1.5),
        ({"deadline": "2"}, 2.0),
        ({"x_request_timeout": "1", "deadline": "2"}, 1.0),
        ({"deadline": "2030-01-31T12:00:03Z"}, 3.0),
        ({"deadline": "2030-01-31t13:00:00.25+01:00"}, 0.25),
        ({"deadline": "2030-01-31T11:59:59z"}, -1.0),
        ({}, None),
    ],
)
def test_deadlines(headers: dict[str, str], left_s: float | None):
    assert read(**headers).timeout_s == left_s


@pytest.mark.parametrize(
    "headers",
    [
        {"x_request_timeout": "soon"},
        {"x_request_timeout": "0"},
        {"x_request_timeout": "-1"},
        {"x_request_timeout": "1e9"},
        {"x_request_timeout": "nan"},
        {"x_request_timeout": ""},
        {"deadline": "2030-13-31T12:00:03Z"},
        {"deadline": "2030-01-31T12:00:03"},
        {"x_priority": "urgent"},
        {"x_headrace_version": "latest"},
        {"x_headrace_version": "²"},
        {"x_headrace_version": "-1"},
    ],
)
def test_a_header_with_a_bad_value_is_a_mistake_of_the_clients(headers: dict[str, str]):
    failure = refused(**headers)
    assert (failure.status, failure.code) == (400, "bad_header")
    assert next(iter(headers)).split("_")[-1].lower() in failure.message.lower()


def test_request_ids_are_taken_made_and_always_returned():
    async def test():
        async with service(FakeReplica()) as door:
            assert (await ask(door, headers={"X-Request-ID": "a b~"})).headers["x-request-id"] == "a b~"
            made = [
                (await ask(door, headers=given)).headers["x-request-id"]
                for given in ({}, {"X-Request-ID": "x" * 129}, {"X-Request-ID": "\x7f"}, {"x-request-id": ""})
            ]
            assert len(set(made)) == 4 and all(len(each) == 32 for each in made)
            reply = await ask(door, method="GET", path="/none", headers={"X-Request-ID": "mine"})
            assert (reply.headers["x-request-id"], reply.json["request_id"]) == ("mine", "mine")

    run(test)


def test_paths_and_methods():
    async def test():
        async with service(FakeReplica()) as door:
            found = {}
            for method, path in [("GET", "/"), ("POST", "/q"), ("GET", "/p"), ("DELETE", "/p"), ("POST", "/healthz"), ("OPTIONS", "/p"), ("HEAD", "/healthz")]:
                reply = await ask(door, method=method, path=path)
                found[method, path] = reply.status, reply.headers.get("allow")
            assert found == {
                ("GET", "/"): (404, None),
                ("POST", "/q"): (404, None),
                ("GET", "/p"): (405, "POST, OPTIONS"),
                ("DELETE", "/p"): (405, "POST, OPTIONS"),
                ("POST", "/healthz"): (405, "GET, HEAD, OPTIONS"),
                ("OPTIONS", "/p"): (204, "POST, OPTIONS"),
                ("HEAD", "/healthz"): (200, None),
            }

    run(test)


def test_a_door_that_knows_no_version_yet_is_alive_and_not_ready():
    async def test():
        door = Door("s")
        assert (await ask(door, method="GET", path="/healthz")).status == 200
        assert (await ask(door, method="GET", path="/readyz")).status == 503
        reply = await ask(door)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "unavailable", "1")
        assert (await ask(door, method="GET", path="/docs")).status == 503

    run(test)


def test_keys_are_asked_for_everywhere_but_for_health():
    async def test():
        key = "hr_secret"
        replica = FakeReplica()
        async with service(replica) as door:
            door.update(routes(version(1, [replica]), revision=2, keys={hashlib.sha256(key.encode()).hexdigest(): "ann"}))
            for path, method in (("/p", "POST"), ("/metrics", "GET"), ("/status", "GET"), ("/openapi.json", "GET"), ("/p/schema", "GET"), ("/none", "GET")):
                for headers in ({}, {"authorization": "Bearer hr_wrong"}, {"authorization": f"Basic {key}"}):
                    reply = await ask(door, method=method, path=path, headers=headers)
                    assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "unauthorized", "Bearer")
            for path in ("/healthz", "/readyz"):
                assert (await ask(door, method="GET", path=path)).status == 200
            for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
                assert (await ask(door, headers=headers)).status == 200
            assert b'key="ann"' in door.metrics.text()
            assert key.encode() not in door.metrics.text()
            door.update(routes(version(1, [replica]), revision=3, keys={}))
            assert (await ask(door, headers={"x-api-key": key})).status == 401

    run(test)


def test_a_version_can_be_asked_for():
    async def test():
        replicas = [FakeReplica("1"), FakeReplica("2")]
        async with several(lambda: [version(1, [replicas[0]]), version(2, [replicas[1]], weight=0)], replicas) as door:
            assert (await ask(door)).headers["x-headrace-version"] == "1"
            assert (await ask(door, headers={"x-headrace-version": "2"})).headers["x-headrace-version"] == "2"
            reply = await ask(door, headers={"x-headrace-version": "3"})
            assert (reply.status, reply.code) == (404, "not_found")
            assert (await ask(door, method="GET", path="/readyz")).status == 200

    run(test)


def test_weights_share_requests_out():
    async def test():
        replicas = [FakeReplica("1"), FakeReplica("2")]
        async with several(lambda: [version(1, [replicas[0]], weight=0.7), version(2, [replicas[1]], weight=0.3)], replicas) as door:
            for _ in range(400):
                await ask(door)
            assert 60 < len(replicas[1].calls) < 190

    run(test)


def test_what_the_replica_refuses_reaches_the_client():
    async def test():
        details = ({"loc": ["rows", 3, "text"], "message": "not a string"},)
        replica = FakeReplica(behave=lambda call: call.fail(422, "invalid_row", "a row is wrong", details))
        async with service(replica) as door:
            reply = await ask(door)
            assert reply.status == 422
            assert reply.json["error"] == {"code": "invalid_row", "message": "a row is wrong", "details": list(details)}
            report = door.fleet.versions[1].report
            assert (report.answered, report.errors) == (1, 0)
            replica.behave = lambda call: call.fail(500, "stage_failed", "clean: no")
            assert (await ask(door)).code == "stage_failed"
            assert (report.answered, report.errors) == (2, 1)

    run(test)


def test_bodies_are_bounded_announced_or_not():
    async def test():
        replica = FakeReplica()
        async with service(replica, limits=Limits(body_bytes=10)) as door:
            unread = FakeConnection(whole=False)
            assert (await ask(door, b"x" * 11, connection=unread)).code == "too_large"
            assert (await ask(door, b"x" * 11)).status == 413
            assert (await ask(door, [b"xxxxxx", b"xxxxxx", None])).status == 413
            assert (await ask(door, [b"xxxxx", b"xxxxx"])).status == 200
            assert replica.calls[0].body == b"x" * 10
            assert door.memory.held_bytes == 0

    run(test)


def test_a_body_that_does_not_come_is_not_waited_for():
    async def test():
        replica = FakeReplica()
        async with service(replica, limits=Limits(body_s=0.02)) as door:
            reply = await ask(door, [b"{", None])
            assert (reply.status, reply.code, reply.headers["connection"]) == (408, "timeout_reading", "close")
            reply = await ask(door, [b"{", None], headers={"x-request-timeout": "0.01"})
            assert (reply.status, reply.headers["connection"]) == (504, "close")
            assert not replica.calls

    run(test)


def test_a_deadline_that_is_over_reaches_no_replica():
    async def test():
        replica = FakeReplica()
        async with service(replica) as door:
            assert (await ask(door, headers={"deadline": "2001-01-01T00:00:00Z"})).status == 504
            assert (await ask(door, headers={"deadline": "2001-01-01T00:00:00Z", "content-type": "application/x-ndjson"})).status == 504
            assert not replica.calls

    run(test)


def test_the_bytes_held_by_all_requests_are_bounded(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(exchange, "MOST_HELD_BYTES", 100)
        replica = FakeReplica(behave=lambda call: None)
        async with service(replica) as door:
            held = asyncio.get_running_loop().create_task(ask(door, b"x" * 80))
            call = await replica.got(1)
            assert door.memory.held_bytes == 80
            reply = await ask(door, b"x" * 80)
            assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "overloaded", "1")
            assert (await ask(door, [b"x" * 15, b"x" * 15])).status == 429
            call.done()
            assert (await held).status == 200
            assert door.memory.held_bytes == 0

    run(test)


def test_a_client_that_announces_100_continue_is_told_before_it_sends():
    async def test():
        async with service(FakeReplica(), limits=Limits(body_bytes=10)) as door:
            reply = await ask(door, b"x" * 11, headers={"expect": "100-continue"}, connection=FakeConnection(whole=False))
            assert (reply.status, reply.headers["connection"]) == (413, "close")

    run(test)


def test_a_large_answer_is_sent_as_the_client_reads_and_one_that_is_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(exchange, "STALLED_S", 0.02)
        body = b"x" * (3 * exchange.PIECE_BYTES + 1)
        async with service(FakeReplica(behave=lambda call: call.done(body))) as door:
            assert (await ask(door)).body == body
            connection = FakeConnection()
            sent = []

            async def receive():
                return {"type": "http.request", "body": b"{}", "more_body": False}

            async def send(message):
                if sent:
                    assert door.memory.held_bytes > len(body)
                    await asyncio.Event().wait()
                sent.append(message)

            await door({"type": "http", "method": "POST", "path": "/p", "headers": [], "headrace.connection": connection}, receive, send)
            assert connection.aborted
            assert door.memory.held_bytes == 0

    run(test)


def test_pages_of_metrics_status_and_the_contract():
    async def test():
        replica = FakeReplica()
        async with service(replica) as door:
            told = openapi.contract(hr.Pipeline("p", size))
            route = version(1, [replica])
            door.update(routes(type(route)(1, 1.0, route.groups, told), revision=2))
            door.peers = ['# HELP x y\n# TYPE x counter\nx{door="1"} 1\n']
            door.snapshot = {"events": [], "versions": [{"version": 1}]}
            await ask(door)
            await asyncio.sleep(0)
            text = (await ask(door, method="GET", path="/metrics")).body.decode()
            assert 'headrace_requests_total{service="s",door="0",version="1",code="200"} 1' in text
            assert 'x{door="1"} 1' in text
            status = (await ask(door, method="GET", path="/status")).json
            assert (status["service"], status["versions"], status["events"], status["door"]["name"]) == ("s", [{"version": 1}], [], "0")
            document = (await ask(door, method="GET", path="/openapi.json")).json
            assert document["openapi"].startswith("3.1") and "/p" in document["paths"]
            assert (await ask(door, method="GET", path="/p/schema")).json["pipeline"] == "p"
            page = await ask(door, method="GET", path="/docs")
            assert page.headers["content-type"].startswith("text/html") and b"<h1>" in page.body
            assert "securitySchemes" not in document["components"]
            door.update(routes(type(route)(1, 1.0, route.groups, told), revision=3, keys={hashlib.sha256(b"k").hexdigest(): "k"}))
            assert "securitySchemes" in (await ask(door, method="GET", path="/openapi.json", headers={"x-api-key": "k"})).json["components"]

    run(test)


def test_a_line_of_the_log_says_who_what_and_how_long():
    async def test():
        out = io.StringIO()
        log = AccessLog(out, service="s", door="0")
        replica = FakeReplica("r1")
        async with service(replica) as door:
            door.log = log
            await ask(door, b'{"x":"private"}')
            await ask(door, b"{}", headers={"x-priority": "no"})
            replica.behave = lambda call: call.fail(422, "invalid_row")
            await ask(door)
        log.close()
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [(line["status"], line.get("error"), line.get("replica")) for line in lines] == [
            (200, None, "r1"),
            (400, "bad_header", None),
            (422, "invalid_row", None),
        ]
        assert lines[0]["rows"] == 1 and lines[0]["version"] == 1 and lines[0]["bytes_in"] == 15 and lines[0]["bytes_out"] == 7
        assert "private" not in out.getvalue()

    run(test)


def test_a_report_says_what_control_wants_to_know():
    async def test():
        replica = FakeReplica("r1")
        async with service(replica) as door:
            await ask(door)
            report = door.report()
            assert report.door == "0" and report.versions[1].answered == 1 and sum(report.versions[1].latencies) == 1
            assert report.replicas["r1"]["memory_bytes"] == 1
            assert "headrace_requests_total" in report.metrics
            await ask(door)
            assert report.versions[1].answered == 1  # a copy: it is sent elsewhere

    run(test)


def test_a_span_goes_on_with_the_clients_trace():
    class Spans:
        def __init__(self):
            self.seen = []
            self.traceparent, self.trace_id = "00-t-s-01", "t"

        def begin(self, traceparent, name, **_):
            self.seen.append((traceparent, name))
            return self

        def offset_s(self):
            return 0.0

        def group(self, name, sent_s, done, *, attempt, replica, error=None):
            self.seen.append((name, done and done.rows, attempt, replica, error))

        def end(self, status, error=None, *, version=None):
            self.seen.append((status, error, version))

        def close(self):
            pass

    async def test():
        replica = FakeReplica("r1")
        async with service(replica) as door:
            door.traces = spans = Spans()
            await ask(door, headers={"traceparent": "00-a-b-01"})
            assert replica.calls[0].work.trace == "00-t-s-01"
            assert spans.seen == [("00-a-b-01", "POST /p"), ("g0", 1, 1, "r1", None), (200, None, 1)]
            replica.behave = lambda call: call.fail(422, "invalid_row")
            await ask(door)
            assert spans.seen[-2:] == [("g0", None, 1, "r1", "invalid_row"), (422, "invalid_row", 1)]

    run(test)


def test_other_kinds_of_connections_are_none_of_a_doors_business():
    async def test():
        with pytest.raises(ValueError, match="websocket"):
            await Door("s")({"type": "websocket"}, None, None)

    run(test)


def test_nothing_is_left_behind_by_requests_of_all_kinds():
    async def test():
        replica = FakeReplica(behave=lambda call: None)
        async with service(replica) as door:
            asked = [asyncio.get_running_loop().create_task(ask(door, headers={"x-request-timeout": "0.01"})) for _ in range(20)]
            await asyncio.gather(*asked)
            replica.behave = Call.done
            await ask(door)
            link = next(iter(door.fleet.versions[1].pools[0].links.values()))
            await until(lambda: len(replica.cancelled) == 20)
            assert not link.hops and not door.memory.held_bytes and not door.turnstile.inside and door.fleet.versions[1].report.in_flight == 0

    run(test)
