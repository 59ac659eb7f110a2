"""The client: typed values both ways, every retry, every error, and never a request beyond deadline or budget."""

import asyncio
import datetime as dt
import json
import pickle
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from conformance import CASES
from pretend import ARROW, LINES, Pretend, Reply, refusal, serving

import headrace as hr
from headrace.client.attempts import Answer, Budget, Lost, World, error_of, exchange
from headrace.client.contract import parse
from headrace.columns import type_of
from headrace.errors import (
    DeadlineError,
    FailedError,
    HeadraceError,
    OverloadedError,
    RowError,
    ServiceError,
    SettingError,
    StageError,
    UnauthorizedError,
    UnavailableError,
    WiringError,
)
from headrace.parity import compare

ROWS = [{"text": "a"}, {"text": "bbb"}, {"text": ""}]


@hr.stage(out={"size": int})
def measure(text: hr.Column[str]):
    if "boom" in text:
        raise ValueError("boom")
    return {"size": [len(t) for t in text]}


@hr.stage(out={"vector": hr.Vector(3), "at": dt.datetime})
def vectors(image: hr.Column[hr.Image]):
    return {"vector": np.array([[len(i), 1.5, -0.0] for i in image]), "at": [dt.datetime(2024, 2, 29, 12, 0, 0, 5)] * len(image)}


SIZES = hr.Pipeline("sizes", measure)


class Clock:
    """Time that passes only by sleeping, and chance that always draws the most."""

    def __init__(self):
        self.at_s = 0.0
        self.slept = []

    def world(self) -> World:
        return World(now=lambda: self.at_s, sleep=self.sleep, draw=lambda most: most)

    async def sleep(self, pause_s):
        self.slept.append(round(pause_s, 6))
        self.at_s += pause_s


@pytest.fixture
def service() -> Pretend:
    return Pretend(SIZES)


@pytest.fixture
def url(service) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(url, clock) -> Iterator[hr.Client]:
    with hr.Client(url, timeout_s=10) as made:
        made._session.world = clock.world()
        yield made


# Values


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_values_are_those_of_local(case):
    """Every column type, in both forms, alone, together and as a stream."""
    rows = [{name: row[name] for name in case.pipeline.inputs} for row in case.rows][:40]
    expected = case.pipeline.local(rows)
    with serving(Pretend(case.pipeline)) as url, hr.Client(url) as client:
        remote = client[case.pipeline.name]
        found = {
            "one by one": [remote(row) for row in rows[:3]] + expected[3:],
            "chosen": remote(rows),
            "json": remote(rows, form="json"),
            "arrow": remote(rows, form="arrow"),
            "stream": list(remote.stream(rows, chunk=7)),
        }
    for way, answer in found.items():
        assert not compare(expected, answer, case.pipeline.outputs, target=way)
        assert [list(row) for row in answer] == [list(row) for row in expected]
        assert [list(map(type, row.values())) for row in answer] == [list(map(type, row.values())) for row in expected], way


def test_sync_and_async_give_the_same(client, service):
    """One row as a row, many in order, none without a request; awaited in any loop."""

    async def ask():
        return await asyncio.gather(client.sizes.aio(ROWS[1]), client.sizes.aio(ROWS), client.sizes.aio([]))

    assert client.sizes(ROWS[1]) == {"size": 3}
    assert client.sizes(ROWS) == client["sizes"](tuple(ROWS)) == [{"size": 1}, {"size": 3}, {"size": 0}]
    assert asyncio.run(ask()) == [{"size": 3}, [{"size": 1}, {"size": 3}, {"size": 0}], []]
    assert len(service.posts) == 5 and len(service.seen) == 6  # the schema is asked for once


def test_small_rows_travel_as_json_and_bulky_or_many_ones_as_arrow(client, service):
    """Told from the schema and the number of rows."""
    client.sizes(ROWS)
    client.sizes(ROWS * 20)
    assert [seen.headers["content-type"] for seen in service.posts] == ["application/json", ARROW]
    assert [seen.headers["accept"] for seen in service.posts] == ["application/json", ARROW]
    service.change(hr.Pipeline("bulky", vectors), 2)
    found = client.bulky({"image": b"png"})
    assert found["vector"].dtype == np.float32 and found["vector"].tolist() == [3, 1.5, 0] and found["at"].tzinfo is not None
    assert service.posts[-1].headers["content-type"] == ARROW


def test_requests_say_who_and_how_long(url, service):
    """Key, priority, version, deadline and an id of its own travel with each."""
    with hr.Client(url, key="hr_secret", timeout_s=7, priority="batch", version=1) as client:
        client.sizes(ROWS[0])
        client.sizes(ROWS[0], timeout_s=2)
        assert "secret" not in repr(client) + repr(client.sizes)
    first, second = (seen.headers for seen in service.posts)
    assert (first["authorization"], first["x-priority"], first["x-headrace-version"]) == ("Bearer hr_secret", "batch", "1")
    assert 6 < float(first["x-request-timeout"]) <= 7 and 1 < float(second["x-request-timeout"]) <= 2
    assert first["x-request-id"] != second["x-request-id"]


def test_a_list_beyond_the_services_limit_is_parted(client, service):
    """Too large an answer halves the parts, which is remembered; order stays; a row that is too large by itself is an error."""
    service.rows = 10
    service.change(SIZES, 1)
    rows = [{"text": "x" * n} for n in range(37)]
    assert client.sizes(rows) == [{"size": n} for n in range(37)]
    asked = len(service.posts)
    assert client.sizes(rows) == [{"size": n} for n in range(37)]
    assert len(service.posts) - asked <= 5
    service.script.append(refusal(413, "too_large"))
    with pytest.raises(ServiceError) as caught:
        client.sizes(rows[:1])
    assert caught.value.status == 413


# Retries


@pytest.mark.parametrize("reply", [Reply(drop=True), Reply(200, b'{"size": 1}', cut=True), refusal(503, "unavailable"), Reply(502, b"<html>")])
def test_what_may_pass_is_tried_again(client, service, clock, reply):
    """A lost or cut connection, and statuses of a service that has nobody ready, with pauses that double."""
    service.script.extend([reply, reply, reply])
    assert client.sizes(ROWS[1]) == {"size": 3}
    assert clock.slept == [0.05, 0.1, 0.2]
    assert len({seen.headers["x-request-id"] for seen in service.posts}) == 1
    assert [float(seen.headers["x-request-timeout"]) for seen in service.posts] == pytest.approx([10, 9.95, 9.85, 9.65])


def test_retry_after_is_kept_to(client, service, clock):
    """The pause is what the service asks for, and the jitter on top; one that does not fit the time left is not begun."""
    service.script.append(refusal(429, "overloaded", retry_after="3"))
    assert client.sizes(ROWS[1]) == {"size": 3}
    assert clock.slept == [3.05]
    service.script.append(refusal(429, "overloaded", "full up", retry_after="11"))
    with pytest.raises(OverloadedError, match="full up") as caught:
        client.sizes(ROWS[1])
    assert clock.slept == [3.05] and not service.script
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (429, "overloaded", "asked")


def test_nothing_is_tried_beyond_the_deadline(client, service, clock):
    """The last refusal is what is raised, and all attempts lie within the time allowed."""
    client.sizes(ROWS[0])
    service.script.extend([refusal(503, "unavailable", "nobody")] * 99)
    began_s = clock.at_s
    with pytest.raises(UnavailableError, match="nobody"):
        client.sizes(ROWS[1])
    assert clock.at_s - began_s < 10 and len(clock.slept) == 7  # 0.05 * (1 + 2 + ... + 64) is 6.35 s; 5 s more would be too much


def test_retries_end_with_their_budget(url, service, clock):
    """A reserve, and a tenth of a token for each request."""
    with hr.Client(url, retries=2) as client:
        client._session.world = clock.world()
        client.sizes(ROWS[0])
        service.script.extend([refusal(503, "unavailable")] * 3)
        with pytest.raises(UnavailableError):
            client.sizes(ROWS[0])
        assert len(clock.slept) == 2
        for _ in range(20):
            client.sizes(ROWS[0])
        service.script.extend([refusal(503, "unavailable")])
        client.sizes(ROWS[0])
        assert len(clock.slept) == 3


def test_a_refused_connection_costs_no_budget(clock):
    """Nobody is burdened by it: a client waits for a service that is being started, as long as its deadline allows."""
    left = [Lost("refused", reached=False)] * 6

    async def send(left_s):
        if left:
            raise left.pop()
        return Answer(200, {}, b"")

    budget = Budget(0)
    answer = asyncio.run(exchange(send, end_s=10, budget=budget, world=clock.world()))
    assert answer.status == 200 and len(clock.slept) == 6


def test_nobody_there_is_unavailable(url, service, clock):
    """Said with the address, once the time is up."""
    with hr.Client("http://127.0.0.1:1", timeout_s=1) as client:
        client._session.world = clock.world()
        with pytest.raises(UnavailableError, match="127.0.0.1:1"):
            client.sizes(ROWS[0])


def test_a_silent_service_costs_no_more_than_the_deadline(url, service):
    """The call ends by itself, in real time."""
    released = threading.Event()
    with hr.Client(url) as client:
        client.sizes(ROWS[0])
        service.script.append(Reply(wait=released))
        with pytest.raises(DeadlineError):
            client.sizes(ROWS[0], timeout_s=0.03)
        released.set()


def test_a_hedge_answers_in_place_of_a_slow_attempt(url, service):
    """The second attempt's answer counts, and a good one rather than a bad one."""
    released = threading.Event()
    with hr.Client(url, hedge_s=0.01) as client:
        client.sizes(ROWS[0])
        service.script.extend([Reply(wait=released), None])
        assert client.sizes(ROWS[1]) == {"size": 3}
        assert len(service.posts) == 3
        released.set()
    budget, gate = Budget(1), []

    async def send(left_s):
        gate.append(asyncio.Event())
        if len(gate) == 1:
            await gate[0].wait()
            return Answer(200, {}, b"first")
        gate[0].set()
        return Answer(503, {}, b"second")

    answer = asyncio.run(exchange(send, end_s=World().now() + 9, budget=budget, hedge_s=0.001))
    assert answer.content == b"first" and budget.left < 1


def test_without_budget_nothing_is_hedged():
    """A second attempt is a retry like any other."""
    sent = []

    async def send(left_s):
        sent.append(left_s)
        await asyncio.sleep(0.005)
        return Answer(200, {}, b"")

    asyncio.run(exchange(send, end_s=World().now() + 9, budget=Budget(0), hedge_s=0.001))
    assert len(sent) == 1


# Errors


@pytest.mark.parametrize(
    ("reply", "kind", "also"),
    [
        (refusal(400, "bad_header"), ServiceError, HeadraceError),
        (refusal(401, "unauthorized"), UnauthorizedError, ServiceError),
        (refusal(404, "not_found"), ServiceError, HeadraceError),
        (refusal(422, "invalid_row", details=[{"loc": ["text"], "message": "expected a string"}]), RowError, WiringError),
        (refusal(500, "stage_failed", "stage 'measure' raised ValueError: boom"), FailedError, StageError),
        (refusal(500, "deadly_row"), ServiceError, HeadraceError),
        (refusal(504, "deadline_exceeded"), DeadlineError, ServiceError),
        (Reply(500, b"<html>not ours</html>"), ServiceError, HeadraceError),
        (Reply(500, b'["odd"]'), ServiceError, HeadraceError),
    ],
)
def test_errors(client, service, clock, reply, kind, also):
    """Each refusal that it makes no sense to repeat is an error of its own kind, and of headrace's kind where there is one, with what the service said."""
    service.script.append(reply)
    with pytest.raises(also) as caught:
        client.sizes(ROWS[0])
    error = caught.value
    assert type(error) is kind and error.status == reply.status and error.request_id and not clock.slept
    if isinstance(reply.body, dict):
        assert error.code == reply.body["error"]["code"] and list(error.details) == reply.body["error"]["details"]
        assert all(detail["message"] in str(error) for detail in error.details)
    if kind is FailedError:
        assert error.stage == "measure"


def test_a_stage_that_raises_is_told(client):
    """As `local` would raise it."""
    with pytest.raises(StageError, match="boom"):
        client.sizes([*ROWS, {"text": "boom"}])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"txt": "a"}, ["'txt'", "did you mean 'text'?"]),
        ([{"text": "a"}, {"text": 5}], ["'text'", "int", "expected str"]),
        ([{"text": "a"}, {"text": None}], ["null"]),
        ([{"text": "a"}, {"text": "b", "txt": 1}], ["row 1", "'txt'"]),
        (["text"], ["must map column names"]),
    ],
)
def test_wrong_rows_are_refused_before_they_are_sent(client, service, rows, said):
    """With the words of `local`, and the same kind of error."""
    with pytest.raises(WiringError) as caught:
        client.sizes(rows)
    assert isinstance(caught.value, RowError) and all(part in str(caught.value) for part in said), str(caught.value)
    assert not service.posts


@pytest.mark.parametrize(
    "body", [b"{}", b'{"size": "one"}', b'{"rows": []}', b"\xff", b'{"size": 1, "more": 2}'], ids=["empty", "type", "none", "bytes", "more"]
)
def test_an_answer_that_breaks_the_schema_is_an_error(client, service, body):
    """Never a wrong value."""
    service.script.append(Reply(200, body))
    with pytest.raises(ServiceError):
        client.sizes(ROWS[0])


def test_a_stranger_is_no_service(client, service):
    """A schema that none of ours would tell."""
    service.honest = lambda seen: Reply(200, b'{"openapi": "3.1.0"}')
    with pytest.raises(ServiceError, match="none of a headrace service"):
        client.sizes(ROWS[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "ftp://host"},
        {"key": "a b"},
        {"priority": "high"},
        {"timeout_s": 0},
        {"retries": -1},
        {"hedge_s": 0},
        {"url": "http://h?x"},
    ],
)
def test_wrong_settings(wrong):
    """Refused when the client is made."""
    with pytest.raises((SettingError, HeadraceError), match=next(iter(wrong))):
        hr.Client(**{"url": "http://127.0.0.1:8000", **wrong})


# Versions


@hr.stage(out={"size": float})
def other_outputs(text: hr.Column[str]):
    return {"size": [len(t) / 2 for t in text]}


@hr.stage(out={"size": int})
def other_inputs(text: hr.Column[str], bonus: hr.Column[int]):
    return {"size": [len(t) for t in text] + bonus}


def test_a_new_version_is_understood(client, service):
    """Its outputs are read by its own schema; rows of its inputs are taken, and those of the old one refused."""
    assert client.sizes(ROWS[1]) == {"size": 3}
    service.change(hr.Pipeline("sizes", other_outputs), 2)
    assert client.sizes(ROWS[1]) == {"size": 1.5}
    service.change(hr.Pipeline("sizes", other_inputs), 3)
    assert client.sizes({"text": "abc", "bonus": 4}) == {"size": 7}
    with pytest.raises(RowError, match="bonus"):
        client.sizes(ROWS[1])


# Streams


def test_a_stream_reads_no_more_than_it_must(client, service):
    """At most eight chunks lie between what is read and what is given; a stream that is left is stopped."""
    read = []

    def endless():
        n = 0
        while True:
            read.append(n)
            yield {"text": "x" * (n % 9)}
            n += 1

    stream = client.sizes.stream(endless(), chunk=4)
    for at in range(40):
        assert next(stream) == {"size": at % 9}
        assert len(read) <= at + 4 * 9
    stream.close()
    assert all(seen.headers["content-type"] == LINES for seen in service.posts)


def test_streams_from_async_code(client):
    """From both kinds of iterables."""

    async def some():
        for row in ROWS * 3:
            yield row

    async def ask(rows):
        return [row async for row in client.sizes.stream_aio(rows, chunk=2)]

    assert asyncio.run(ask(some())) == asyncio.run(ask(ROWS * 3)) == client.sizes(ROWS * 3)


def test_a_row_that_fails_stops_no_other(client, service):
    """Its error is raised in its place, or yielded there; a row of the wrong type never leaves."""
    rows = [{"text": "a"}, {"text": "boom"}, {"text": 5}, {"text": "bbb"}]
    found = list(client.sizes.stream(iter(rows), errors="yield"))
    assert [found[0], found[3]] == [{"size": 1}, {"size": 3}]
    assert isinstance(found[1], FailedError) and isinstance(found[2], RowError) and "row 2 of the stream" in str(found[2])
    stream = client.sizes.stream(rows)
    assert next(stream) == {"size": 1}
    with pytest.raises(StageError, match="boom"):
        next(stream)


def test_lines_that_are_missing_are_asked_for_again(client, service, clock):
    """An answer that is cut, one that ends early, and lines that the service had no room for; never a row twice."""
    full = json.dumps({"error": {"code": "overloaded", "message": "full", "line": 2}}).encode()
    service.script.extend([Reply(200, b'{"size": 1}\n{"size"', cut=True), Reply(200, b'{"size": 1}\n' + full + b"\n"), Reply(200, b'{"size": 3}\n')])
    assert list(client.sizes.stream(ROWS)) == [{"size": 1}, {"size": 3}, {"size": 0}]
    assert [seen.body.count(b"\n") for seen in service.posts] == [3, 3, 2, 1]


def test_what_stays_missing_is_an_error_of_its_row(client, service):
    """What came is given all the same."""
    full = json.dumps({"error": {"code": "overloaded", "message": "full"}}).encode()
    service.script.append(Reply(200, b'{"size": 1}\n' + full + b'\n{"size": 0}\n'))
    service.script.extend([refusal(429, "overloaded", "full", retry_after="60")] * 2)
    found = list(client.sizes.stream(ROWS, errors="yield"))
    assert [found[0], found[2]] == [{"size": 1}, {"size": 0}] and isinstance(found[1], OverloadedError)


# Pieces


@pytest.mark.parametrize(
    "annotation",
    [str, int | None, hr.Vector(3), hr.Vector() | None, hr.Vector(2, "float64"), hr.Vector(dtype="int8"), hr.Image, list[str | None] | None, list[list[bytes]]],
)
def test_types_are_read_as_they_are_written(annotation):
    """The text of a column type is parsed to that type."""
    assert parse(str(type_of(annotation))) == type_of(annotation)


@pytest.mark.parametrize("text", ["", "text", "Vector(x)", "Vector(0)", "Vector(2, complex64)", "list[]", "list[str"])
def test_other_texts_are_no_types(text):
    """A ValueError."""
    with pytest.raises(ValueError, match="."):
        parse(text)


def test_a_client_travels(url):
    """A stage may hold one."""
    with hr.Client(url) as client:
        client.sizes(ROWS[0])
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.sizes(ROWS[1]) == {"size": 3}


def test_details_of_a_part_are_those_of_the_whole():
    """Rows are counted from where the part began."""
    body = {"error": {"code": "invalid_row", "message": "no", "details": [{"loc": ["rows", 2, "text"], "message": "odd"}]}}
    error = error_of(Answer(422, {}, json.dumps(body).encode()), "id", first_row=10)
    assert error.details[0]["loc"] == ["rows", 12, "text"] and "row 12, 'text': odd" in str(error) and error.request_id == "id"
