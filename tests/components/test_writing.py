"""Rows that are answered while a language model writes: through a real door, from real replicas over sockets; their engine only says words again."""

from __future__ import annotations

import asyncio
import gc
import http.client
import io
import json
import threading
from typing import Any

import pyarrow as pa
import pytest
from writers import Measure, clean, engine_of, events, plan_of, serving, soon, summary

import headrace as hr
from headrace.errors import DeadlineError, FailedError, RowError, ServiceError, UnavailableError
from headrace.serving.bodies.events import Events, event
from headrace.serving.bodies.openapi import contract
from headrace.serving.bodies.streams import write_stream
from headrace.serving.replica import outlets
from headrace.serving.routes import Limits
from headrace.serving.watch.logs import AccessLog


@hr.stage(out={"title": str}, apart=True)
def title(text: hr.Column[str]):
    return {"title": [each.title() for each in text]}


@hr.stage(out={"short": bool})
def short(summary: hr.Column[str]):
    return {"short": [len(each) < 20 for each in summary]}


ALONE = hr.Pipeline("alone", summary())
TWO = hr.Pipeline("two", clean, summary())
THREE = hr.Pipeline("three", clean, Measure(), summary(prompt="{length} {text}", reads={"length": int}))
APART = hr.Pipeline("apart", title, clean, summary(prompt="{title} {text}"))
EACH = [ALONE, TWO, THREE, APART]
ROW = {"text": "  so  much   to say "}


def parts(answer: http.client.HTTPResponse) -> tuple[list[str], Any]:
    """The pieces of a whole answer, and its row."""
    assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8", (answer.status, answer.read())
    *texts, (last, row) = events(answer.read())
    assert {name for name, _ in texts} == {"text"} and {piece["column"] for _, piece in texts} == {"summary"} and last == "row"
    return [piece["text"] for _, piece in texts], row


def error(answer: http.client.HTTPResponse) -> tuple[int, str, str]:
    told = json.loads(answer.read())["error"]
    return answer.status, told["code"], told["message"]


@pytest.mark.parametrize("pipeline", EACH, ids=lambda pipeline: pipeline.name)
def test_the_row_is_what_is_answered_without_streaming(pipeline: hr.Pipeline):
    with serving(pipeline) as made:
        connection = made.connection()
        plain = made.post(ROW, connection=connection, accept="application/json").read()
        answer = made.post(ROW, connection=connection)
        raw = answer.read()
        assert answer.headers["x-headrace-version"] == "1" and answer.headers["cache-control"] == "no-cache"
        assert raw.endswith(b"event: row\ndata: " + plain + b"\n\n")
        pieces, row = [piece["text"] for name, piece in events(raw) if name == "text"], json.loads(plain)
        assert len(pieces) == 6 and "".join(pieces) == row["summary"] and list(row) == list(pipeline.outputs)
        assert made.replicas[-1][0].stats().rows == 2 and not made.in_flight()
        assert json.loads(made.post(ROW, connection=connection, accept="*/*").read()) == row  # the connection lives on


def test_the_plans_of_these_tests_are_what_they_are_for():
    assert [len(plan_of(pipeline).groups) for pipeline in EACH] == [1, 1, 1, 2]
    assert [contract(pipeline).get("streams") for pipeline in EACH] == ["summary"] * 4
    assert [contract(pipeline).get("streams") for pipeline in (hr.Pipeline("p", clean), hr.Pipeline("p", summary(), short))] == [None, None]
    assert contract(hr.Pipeline("p", clean, summary(), outputs=["text"])).get("streams") is None


@pytest.mark.parametrize("direct", [True, False])
def test_long_answers(direct: bool, monkeypatch: pytest.MonkeyPatch):
    """The replica writes to the client itself where it can."""
    written: list[bytes] = []
    write = outlets.Outlet.write
    monkeypatch.setattr(outlets.Outlet, "write", lambda self, piece: (written.append(piece), write(self, piece)))
    pipeline = hr.Pipeline("long", clean, summary(sampling=hr.Sampling(max_tokens=300)))
    with serving(pipeline, direct=direct, word_s=0.0005) as made:
        pieces, row = parts(made.post(ROW))
        assert len(pieces) == 300 and "".join(pieces) == row["summary"] and row["text"] == "so much to say"
        assert bool(written) is direct


def test_many_at_once_beside_rows_that_are_not_streamed():
    with serving(THREE, sequences=64, limits=Limits(latency_s=30.0)) as made:
        made.post(ROW, accept="application/json").read()  # a replica that does not know yet how fast it is lets few wait
        found: dict[int, Any] = {}

        def ask(at: int) -> None:
            row = {"text": f" row  {at} "}
            found[at] = parts(made.post(row))[1] if at % 2 else json.loads(made.post(row, accept="application/json").read())

        threads = [threading.Thread(target=ask, args=(at,)) for at in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        said = {at: f"{len(f'row {at}')} row {at}".split() for at in range(40)}
        assert found == {at: {"text": f"row {at}", "length": len(f"row {at}"), "summary": " ".join((words * 6)[:6])} for at, words in said.items()}
        stats = made.replicas[0][0].stats()
        assert (stats.rows, stats.in_flight, stats.queued) == (41, 0, 0)
        floor = made.replicas[0][0]._floor
        assert [round(station.backlog, 6) for station in floor.stations] == [0, 0, 0] and not floor._held_bytes


def test_rows_in_arrow_and_lists_of_one():
    with serving(APART) as made:
        whole = json.loads(made.post(ROW, accept="application/json").read())
        body = bytes(write_stream(pa.table({"text": [ROW["text"]]}), single=True))
        assert parts(made.post(body, content_type="application/vnd.apache.arrow.stream"))[1] == whole
        assert parts(made.post({"rows": [ROW]}))[1] == {"rows": [whole]}
        status, code, message = error(made.post({"rows": [ROW, ROW]}))
        assert (status, code) == (406, "not_acceptable") and "one row, and there are 2" in message


@pytest.mark.parametrize("pipeline", EACH, ids=lambda pipeline: pipeline.name)
def test_errors_before_the_first_piece_are_those_of_any_row(pipeline: hr.Pipeline):
    with serving(pipeline) as made:
        for row in (
            {"text": 5},
            {"txt": "a"},
            {"text": "503: go away"} if "length" not in pipeline.outputs and "title" not in pipeline.outputs else {"text": 1},
        ):
            refused, plain = made.post(row), made.post(row, accept="application/json")
            told, wanted = json.loads(refused.read()), json.loads(plain.read())
            assert (refused.status, told["error"]) == (plain.status, wanted["error"])
        if pipeline is not ALONE:
            refused = made.post({"text": "boom"})
            assert error(refused) == (500, "stage_failed", "stage 'clean' raised ValueError: boom")
        assert error(made.post(b"{"))[:2] == (400, "not_json")
        assert not made.in_flight() and parts(made.post(ROW))


def test_what_the_users_code_raises_on_a_row_is_told():
    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text[:: int(text)]}]

    with serving(hr.Pipeline("asked", summary(prompt=None, messages=ask))) as made:
        assert error(made.post({"text": "x"})) == (500, "stage_failed", "stage 'summary' raised ValueError: invalid literal for int() with base 10: 'x'")


@pytest.mark.parametrize("direct", [True, False])
def test_an_engine_that_fails_in_the_middle_is_told_in_the_stream(direct: bool):
    with serving(TWO, direct=direct) as made:
        answer = made.post({"text": "break it"})
        *texts, last = events(answer.read())
        assert answer.status == 200 and [piece["text"] for _, piece in texts] == ["break", " it"]
        assert last == ("error", {"code": "stage_failed", "message": "stage 'summary' raised EngineError: out of ideas"})
        assert made.server.call(lambda: made.server.door.fleet.versions[1].report.errors) == 1


@pytest.mark.parametrize("direct", [True, False])
def test_a_deadline_in_the_middle(direct: bool):
    pipeline = hr.Pipeline("slow", clean, summary(sampling=hr.Sampling(max_tokens=10_000)))
    with serving(pipeline, direct=direct, word_s=0.01) as made:
        answer = made.post(ROW, x_request_timeout="0.5")
        try:
            found = events(answer.read())
        except http.client.IncompleteRead:
            assert direct
        else:
            assert found[0][0] == "text" and found[-1][0] == "error" and found[-1][1]["code"] == "deadline_exceeded"
        soon(lambda: made.engine.cancelled == 1 and not made.in_flight())
        assert error(made.post(ROW, x_request_timeout="0.001"))[:2] == (504, "deadline_exceeded")


@pytest.mark.parametrize("before", [[], [clean], [title, clean]], ids=len)
def test_a_client_that_goes_ends_the_computation(before: list[Any]):
    with serving(hr.Pipeline("endless", *before, summary(sampling=hr.Sampling(max_tokens=10**6))), word_s=0.001) as made:
        answer = made.post({"text": "on and on"})
        answer.close()
        made.opened[-1].close()
        soon(lambda: made.engine.cancelled == 1 and not made.in_flight() and not made.replicas[-1][0].stats().in_flight)


def test_another_replica_answers_what_had_not_begun():
    with serving(TWO, replicas=2) as made:
        one, other = made.replicas[-1]
        engine_of(one).pause()
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(parts(made.post(ROW)))) for _ in range(12)]
        for thread in threads:
            thread.start()
        soon(lambda: one.stats().in_flight and len(answers) + one.stats().in_flight == 12)
        one.close()
        for thread in threads:
            thread.join()
        assert len(answers) == 12 and {row["summary"] for _, row in answers} == {"so much to say so much"}
        assert not other.stats().in_flight


@pytest.mark.parametrize("direct", [True, False])
def test_a_replica_that_ends_in_the_middle_ends_the_stream_loudly(direct: bool):
    pipeline = hr.Pipeline("slow", clean, summary(sampling=hr.Sampling(max_tokens=10_000)))
    with serving(pipeline, direct=direct, word_s=0.001) as made:
        answer = made.post(ROW)
        answer.read(2000)
        made.replicas[0][0].close()
        rest = answer.read()
        assert events(b"event: x\ndata: 1\n\n" + rest[rest.find(b"event: ") :])[-1][0] == "error"


@pytest.mark.parametrize(
    ("pipeline", "headers", "said"),
    [
        (hr.Pipeline("plain", clean), {}, "the last stage of 'plain' is no language model that writes text"),
        (hr.Pipeline("ruled", summary(), short), {}, "the last stage of 'ruled'"),
        (TWO, {"content_type": "application/x-ndjson"}, "not to a stream of application/x-ndjson"),
    ],
)
def test_what_cannot_be_streamed_is_refused_with_406(pipeline: hr.Pipeline, headers: dict[str, str], said: str):
    with serving(pipeline) as made:
        status, code, message = error(made.post(ROW, **headers))
        assert (status, code) == (406, "not_acceptable") and said in message and "ask without Accept: text/event-stream" in message
        assert made.post(ROW, accept="application/json, text/event-stream").headers["content-type"] == "application/json"


def test_a_replica_refuses_what_its_door_should_not_have_asked():
    with serving(hr.Pipeline("ruled", summary(), short)) as made:
        made.server.call(lambda: made.server.door.fleet.versions[1].route.contract.update(streams="summary"))
        assert error(made.post(ROW))[:2] == (406, "not_acceptable")


def test_requests_beyond_what_can_be_answered_are_turned_away():
    with serving(TWO, limits=Limits(deadline_s=1.0), sequences=1, capacity=20) as made:
        made.engine.pause()
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(made.post(ROW))) for _ in range(20)]
        for thread in threads:
            thread.start()
        soon(lambda: len(answers) >= 8)
        made.engine.resume()
        for thread in threads:
            thread.join()
        statuses = {answer.status for answer in answers}
        assert 429 in statuses and statuses <= {200, 429, 504}
        assert all(answer.headers["retry-after"] for answer in answers if answer.status == 429)


def test_what_is_logged_and_counted():
    stream = io.StringIO()
    with serving(TWO) as made:
        made.server.door.log = AccessLog(stream)
        parts(made.post(ROW))
        made.post({"text": "break it"}).read()
        soon(lambda: stream.getvalue().count("\n") == 2)
        good, bad = map(json.loads, stream.getvalue().splitlines())
        assert (good["status"], good["rows"], good["completion_tokens"], good["prompt_tokens"]) == (200, 1, 6, 4) and "error" not in good
        assert good["first_ms"] > 0 and good["bytes_out"] > 300 and (bad["status"], bad["error"]) == (500, "stage_failed") and "rows" not in bad
        text = made.server.door.metrics.text().decode()
        assert 'headrace_rows_total{service="two",door="0",version="1"} 1\n' in text and 'code="500"} 1\n' in text
        assert 'headrace_gen_ai_tokens_total{service="two",door="0",version="1",model="two",type="output"} 8\n' in text


def test_events_in_pieces():
    whole = event("text", b'{"a":1}') + event("row", b"{}") + b": a comment\n\n"
    for size in (1, 2, 7, len(whole)):
        reader = Events()
        found = [one for at in range(0, len(whole), size) for one in reader.feed(whole[at : at + size])]
        assert found == [("text", b'{"a":1}'), ("row", b"{}"), ("", b"")]


# The client


@pytest.mark.parametrize("pipeline", EACH, ids=lambda pipeline: pipeline.name)
def test_the_client_gives_pieces_and_the_row_of_a_call(pipeline: hr.Pipeline):
    with serving(pipeline) as made, hr.Client(made.url) as client:
        remote = client[pipeline.name]
        answer = remote.write(ROW)
        pieces = list(answer)
        assert len(pieces) == 6 and "".join(pieces) == answer.row["summary"] and answer.row == remote(ROW)
        assert list(answer) == [] and remote.write(ROW).row == answer.row

        async def read() -> tuple[list[str], Any]:
            writing = remote.write(ROW)
            return [piece async for piece in writing], writing.row

        assert asyncio.run(read()) == (pieces, answer.row)


def test_a_single_column_named_rows():
    pipeline = hr.Pipeline("odd", summary(prompt="{rows}", out="rows"), outputs=["rows"])
    with serving(pipeline) as made, hr.Client(made.url) as client:
        assert client.odd.write({"rows": "a b"}).row == client.odd({"rows": "a b"}) == {"rows": "a b a b a b"}


def test_what_the_client_raises():
    with serving(TWO) as made, hr.Client(made.url, timeout_s=5) as client:
        with pytest.raises(RowError, match="'text'"):
            client.two.write({"txt": "a"}).row  # noqa: B018
        broken = client.two.write({"text": "break it"})
        assert next(broken) == "break" and next(broken) == " it"
        with pytest.raises(FailedError, match="out of ideas") as caught:
            next(broken)
        assert caught.value.code == "stage_failed" and caught.value.request_id
        with pytest.raises(FailedError, match="out of ideas"):
            broken.row  # noqa: B018
        with pytest.raises(FailedError, match="boom"):
            list(client.two.write({"text": "boom"}))
        made.engine.pause()
        with pytest.raises(DeadlineError):
            list(client.two.write(ROW, timeout_s=0.2))
        made.engine.resume()
    with serving(hr.Pipeline("plain", clean)) as made, hr.Client(made.url) as client, pytest.raises(ServiceError, match="no language model") as caught:
        list(client.plain.write(ROW))
    assert caught.value.status == 406


def test_the_client_asks_again_until_the_first_piece_and_not_after():
    with serving(hr.Pipeline("slow", summary(sampling=hr.Sampling(max_tokens=10**6))), word_s=0.001) as made, hr.Client(made.url) as client:
        replica = made.replicas[0][0]
        replica._draining = True  # it is busy, until it is not
        answer = client.slow.write(ROW)
        soon(lambda: made.server.call(lambda: made.server.door.fleet.versions[1].report.rejected))
        replica._draining = False
        assert next(answer) == "so"
        replica.close()
        with pytest.raises(UnavailableError):
            list(answer)


@pytest.mark.parametrize("way", ["close", "with", "forget"])
def test_the_client_hangs_up(way: str):
    with serving(hr.Pipeline("slow", summary(sampling=hr.Sampling(max_tokens=10**6))), word_s=0.001) as made, hr.Client(made.url) as client:
        answer = client.slow.write(ROW)
        if way == "with":
            with answer:
                assert next(answer) == "so"
        else:
            assert next(answer) == "so"
        if way == "close":
            answer.close()
        elif way == "forget":
            del answer
            gc.collect()
        soon(lambda: made.engine.cancelled == 1 and not made.in_flight())
