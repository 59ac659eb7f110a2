"""Rows that come and go as lines."""

from __future__ import annotations

import asyncio
import json

import pytest
from replicas import Call, FakeConnection, FakeReplica, ask, routes, run, service, until, version

from headrace.serving.door import streaming
from headrace.serving.routes import Limits

LINES = {"content-type": "application/x-ndjson"}


def double(call: Call) -> None:
    rows = call.value["rows"]
    bad = [at for at, row in enumerate(rows) if "bad" in row]
    if any("crash" in row for row in rows):
        call.fail(500, "stage_failed", "double: crash")
    elif bad:
        call.fail(422, "invalid_row", "unknown", tuple({"loc": ["rows", at, "bad"], "message": "unknown"} for at in bad))
    else:
        call.done(json.dumps({"rows": [{"y": 2 * row["x"]} for row in rows]}).encode(), rows=len(rows))


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def told(body: bytes) -> list:
    return [json.loads(line) for line in body.splitlines()]


def test_each_line_is_answered_in_order():
    async def test():
        async with service(FakeReplica(behave=double)) as door:
            body = lines(*({"x": x} for x in range(1000)))
            reply = await ask(door, [body[:3000], body[3000:3001], body[3001:]], headers=LINES)
            assert (reply.status, reply.headers["content-type"], reply.headers["x-headrace-version"]) == (200, "application/x-ndjson", "1")
            assert told(reply.body) == [{"y": 2 * x} for x in range(1000)]
            assert not door.memory.held_bytes

    run(test)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n"])
def test_the_last_line_needs_no_end_and_blank_ones_are_nothing(end: bytes):
    async def test():
        async with service(FakeReplica(behave=double)) as door:
            reply = await ask(door, [b'\n{"x":1}\r\n\r\n{"x":2}' + end], headers=LINES)
            assert told(reply.body) == [{"y": 2}, {"y": 4}]
            assert (await ask(door, [end], headers=LINES)).body == b""

    run(test)


def test_a_wrong_line_is_answered_in_its_place():
    async def test():
        replica = FakeReplica(behave=double)
        async with service(replica) as door:
            body = (
                lines({"x": 0}, {"bad": 1})
                + b"nonsense\n"
                + lines({"x": 3}, [1], {"bad": 1, "x": 1}, {"x": 6})
                + b"[" * 100_000
                + b"\n"
                + b'{"x":1},{"x":2}\n{"x":9}'
            )
            answers = told((await ask(door, [body], headers=LINES)).body)
            assert [answer.get("y") for answer in answers] == [0, None, None, 6, None, None, 12, None, None, 18]
            errors = [answer["error"] for answer in answers if "error" in answer]
            assert [(error["line"], error["code"]) for error in errors] == [
                (2, "invalid_row"),
                (3, "not_json"),
                (5, "invalid_row"),
                (6, "invalid_row"),
                (8, "not_json"),
                (9, "not_json"),
            ]
            assert errors[0]["details"] == [{"loc": ["bad"], "message": "unknown"}]
            assert len(replica.calls) == 3  # without the two wrong lines the second time; the last line came without an end

    run(test)


def test_a_failure_that_names_no_row_is_narrowed_down():
    async def test():
        async with service(FakeReplica(behave=double)) as door:
            answers = told((await ask(door, [lines(*({"x": x, **({"crash": 1} if x == 5 else {})} for x in range(9)))], headers=LINES)).body)
            assert [answer.get("y") for answer in answers] == [0, 2, 4, 6, 8, None, 12, 14, 16]
            assert answers[5]["error"]["code"] == "stage_failed"

    run(test)


class Slow:
    """A client that sends and reads step by step."""

    def __init__(self, door, **headers: str) -> None:
        self.door, self.sent, self.read = door, asyncio.Queue(), asyncio.Event()
        self.read.set()
        self.got = b""
        self.connection = FakeConnection(whole=False)
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"content_type": LINES["content-type"], **headers}.items()]
        scope = {"type": "http", "method": "POST", "path": "/p", "headers": raw, "headrace.connection": self.connection}
        self.task = asyncio.get_running_loop().create_task(door(scope, self.receive, self.send))
        self.received = 0
        self.status = 0

    async def receive(self):
        piece = await self.sent.get()
        self.received += 1
        return {"type": "http.disconnect"} if piece is None else {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def send(self, message):
        await self.read.wait()
        self.status = message.get("status", self.status)
        self.got += bytes(message.get("body", b""))


def test_lines_that_come_one_by_one_are_answered_one_by_one():
    async def test():
        async with service(FakeReplica(behave=double)) as door:
            client = Slow(door)
            for x in range(3):
                client.sent.put_nowait(lines({"x": x}))
                await until(lambda x=x: told(client.got) == [{"y": 2 * each} for each in range(x + 1)])
            client.sent.put_nowait(b"")
            await client.task

    run(test)


def test_a_client_that_does_not_read_is_not_read_from():
    async def test():
        async with service(FakeReplica(behave=double)) as door:
            client = Slow(door)
            client.read.clear()
            for _ in range(100):
                client.sent.put_nowait(lines({"x": 1}))
            client.sent.put_nowait(b"")
            await until(lambda: client.received > streaming.WINDOW)
            for _ in range(50):
                await asyncio.sleep(0)
            assert client.received <= streaming.WINDOW + 3
            client.read.set()
            await client.task
            assert told(client.got) == [{"y": 2}] * 100

    run(test)


def test_what_the_service_has_no_room_for_is_turned_away_at_first_and_waits_later():
    async def test():
        replica = FakeReplica(behave=Call.busy)
        async with service(replica) as door:
            reply = await ask(door, [lines({"x": 1})], headers=LINES)
            assert (reply.status, reply.code, "retry-after" in reply.headers) == (429, "overloaded", True)
            replica.behave = double
            client = Slow(door)
            client.sent.put_nowait(lines({"x": 1}))
            await until(lambda: client.got)
            replica.behave = Call.busy
            client.sent.put_nowait(lines({"x": 2}))
            await until(door.fleet.versions[1].waiting)
            replica.behave = double
            client.sent.put_nowait(b"")
            await client.task
            assert told(client.got) == [{"y": 2}, {"y": 4}]

    run(test)


def test_a_client_that_goes_away_cancels_what_is_under_way():
    async def test():
        replica = FakeReplica(behave=lambda call: None)
        async with service(replica) as door:
            client = Slow(door)
            for _ in range(3):
                client.sent.put_nowait(lines({"x": 1}))
            await replica.got(3)
            client.connection.lose()
            await client.task
            await until(lambda: sorted(replica.cancelled) == [1, 2, 3])
            assert not door.memory.held_bytes and client.status == 0

            client = Slow(door)
            client.sent.put_nowait(None)
            await client.task
            assert client.status == 0

    run(test)


def test_a_stream_in_which_nothing_comes_any_more_ends():
    async def test():
        async with service(FakeReplica(behave=double), limits=Limits(body_s=0.03)) as door:
            client = Slow(door)
            client.sent.put_nowait(lines({"x": 1}) + b'{"x":')
            await client.task
            first, last = told(client.got)
            assert first == {"y": 2}
            assert (last["error"]["code"], last["error"]["line"]) == ("timeout_reading", 2)

    run(test)


def test_a_line_without_end_ends_the_stream():
    async def test():
        async with service(FakeReplica(behave=double), limits=Limits(body_bytes=100)) as door:
            client = Slow(door)
            client.sent.put_nowait(lines({"x": 1}) + b'{"x":')
            client.sent.put_nowait(b"1" * 200)
            await client.task
            first, last = told(client.got)
            assert first == {"y": 2}
            assert (last["error"]["code"], last["error"]["line"]) == ("too_large", 2)

    run(test)


def test_the_deadline_is_each_chunks_unless_the_client_names_one():
    async def test():
        replica = FakeReplica(behave=lambda call: None)
        async with service(replica) as door:
            client = Slow(door, x_request_timeout="0.05")
            client.sent.put_nowait(lines({"x": 1}))
            client.sent.put_nowait(b"")
            await client.task
            assert told(client.got)[0]["error"]["code"] == "deadline_exceeded"
            assert replica.calls[0].work.left_s <= 0.05
            replica.behave = double
            client = Slow(door)
            client.sent.put_nowait(lines({"x": 1}))
            call = await replica.got(2)
            assert 59 < call.work.left_s <= 60
            client.sent.put_nowait(b"")
            await client.task

    run(test)


def test_a_replica_that_dies_costs_a_stream_nothing():
    async def test():
        first, second = FakeReplica("first", lambda call: None), FakeReplica("second", double)
        async with service(first) as door:
            client = Slow(door)
            client.sent.put_nowait(lines({"x": 1}))
            await first.got(1)
            await second.open()
            door.update(routes(version(1, [first, second]), revision=2))
            first.die()
            client.sent.put_nowait(b"")
            await client.task
            assert told(client.got) == [{"y": 2}]

    run(test)


@pytest.mark.parametrize("body", [b'{"rows":[{"y":1}]}', b'{"rows":[]}', b"[]", b'{"rows":[{"y":1},{"y":', b'{"rows":[1,2,3]}'])
def test_an_answer_that_does_not_fit_the_lines_is_not_passed_on(body: bytes):
    assert streaming.split(memoryview(body), 2) is None


def test_answers_are_passed_on_word_for_word():
    assert streaming.split(memoryview(' {"rows" : [ {"a": "],}\\u00e4ä"} , {"b":1.50}]}'.encode()), 2) == ['{"a": "],}\\u00e4ä"}\n'.encode(), b'{"b":1.50}\n']
