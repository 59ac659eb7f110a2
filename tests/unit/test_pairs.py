"""Requests that are mirrored, and what is counted of the two answers."""

from __future__ import annotations

import asyncio
import io
import math

import pyarrow as pa
import pytest
from replicas import FakeReplica, ask, run, several, until, version

from headrace.serving.door import pairs
from headrace.serving.door.journey import Answer, Leg
from headrace.serving.routes import VersionReport
from headrace.serving.wire import Content, Done, Failure


def answer(compute_s: float = 0.1, body: bytes = b"{}") -> Answer:
    return Answer(memoryview(body), (Leg("g", Done(1, 9.0, 0.0, compute_s, 1), "r", 1),))


def alike(one: str, other: str) -> bool:
    return pairs.alike(memoryview(one.encode()), memoryview(other.encode()), Content.JSON)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a":1}', '{"a":1}'),
        ('{"a": 1, "b": null}', '{"b":null,"a":1.0}'),
        ('{"a":[0.5,100]}', '{"a":[0.50005,100.09]}'),
        ('{"a":"NaN"}', '{"a": "NaN"}'),
        ("[true, {}]", "[true,{}]"),
    ],
)
def test_answers_that_are_alike(one: str, other: str):
    assert alike(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"a":1}', '{"a":1.01}'),
        ('{"a":1}', '{"b":1}'),
        ('{"a":[1]}', '{"a":[1,1]}'),
        ('{"a":1}', '{"a":true}'),
        ('{"a":"1"}', '{"a":1}'),
        ('{"a":null}', '{"a":0}'),
        ('{"a":0}', '{"a":0.0002}'),
        ('{"a":"x"}', '{"a":"y"}'),
        ("{}", "nonsense"),
        ("{}", "[" * 100_000),
    ],
)
def test_answers_that_differ(one: str, other: str):
    assert not alike(one, other)
    assert not alike(other, one)


def test_arrow_answers_are_compared_by_their_values():
    def stream(*values: float) -> memoryview:
        out = io.BytesIO()
        table = pa.table({"v": pa.array(values)})
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        return memoryview(out.getvalue())

    assert pairs.alike(stream(1.0, math.nan), stream(1.00001, math.nan), Content.ARROW)
    assert not pairs.alike(stream(1.0), stream(2.0), Content.ARROW)
    assert not pairs.alike(stream(1.0), memoryview(b"no"), Content.ARROW)


def test_what_is_counted_of_a_pair():
    crash, wrong = Failure(500, "stage_failed", ""), Failure(422, "invalid_row", "")
    report = VersionReport()
    found = [
        pairs.count(report, new, old, same=same)
        for new, old, same in [
            (answer(0.2), answer(0.1), True),
            (answer(0.1), answer(0.2), False),
            (crash, answer(), True),
            (crash, wrong, True),
            (answer(), crash, True),
            (crash, crash, True),
            (wrong, answer(), True),
            (wrong, wrong, True),
        ]
    ]
    assert found == ["same", "different", "failed", "failed", "base_failed", "both_failed", "different", "same"]
    assert (report.pairs, report.pair_slower, report.pair_different, report.pair_errors, report.pair_base_errors) == (8, 1, 2, 2, 1)
    assert report.pair_log_ratio == pytest.approx(0.0)
    assert report.pair_log_ratio_squares == pytest.approx(2 * math.log(2) ** 2)


def two(new: FakeReplica, old: FakeReplica, *, weight: float = 0.0, shadow: float = 1.0):
    return several(lambda: [version(1, [old], weight=1 - weight), version(2, [new], weight=weight, shadow=shadow)], [new, old])


def test_a_mirrored_request_is_sent_after_the_one_it_copies_and_answers_nobody():
    async def test():
        old, new = FakeReplica("old"), FakeReplica("new", lambda call: call.done(b'{"y":2}', times=(0, 0, 0.1)))
        async with two(new, old) as door:
            reply = await ask(door, b'{"x":1}', headers={"x-priority": "interactive"})
            assert (reply.body, reply.headers["x-headrace-version"]) == (b'{"y":1}', "1")
            await until(lambda: door.fleet.versions[2].report.pairs == 1)
            (call,) = new.calls
            assert (call.body, call.work.priority, call.work.request_id) == (b'{"x":1}', 2, old.calls[0].work.request_id)
            report = door.fleet.versions[2].report
            assert (report.pair_different, report.pair_slower, report.answered) == (1, 1, 0)
            assert report.pair_log_ratio == pytest.approx(math.log(0.1 / 0.005))
            assert door.fleet.versions[1].report.pairs == 0
            assert b'headrace_shadow_pairs_total{service="s",door="0",outcome="different"} 1' in door.metrics.text()

    run(test)


def test_what_the_version_on_trial_answers_is_mirrored_to_the_other():
    async def test():
        old, new = FakeReplica("old"), FakeReplica("new", lambda call: call.fail(500, "stage_failed"))
        async with two(new, old, weight=0.999999999) as door:
            assert (await ask(door)).status == 500
            await until(lambda: door.fleet.versions[2].report.pairs == 1)
            assert door.fleet.versions[2].report.pair_errors == 1
            assert old.calls[0].work.priority == 2

    run(test)


def test_a_mirrored_request_waits_for_nothing_and_is_tried_once():
    async def test():
        old, new = FakeReplica("old"), FakeReplica("new", lambda call: call.connection.replica.die())
        async with two(new, old) as door:
            assert (await ask(door)).status == 200
            await new.got(1)
            await until(lambda: not door.fleet.versions[2].open)
            for _ in range(3):
                assert (await ask(door)).status == 200
            await until(lambda: not door.mirror._tasks)
            report = door.fleet.versions[2].report
            assert (report.pairs, report.retries, door.fleet.versions[2].waiting()) == (0, 0, 0)

    run(test)


def test_mirrored_requests_are_bounded_and_end_with_the_deadline(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(pairs, "MOST_MIRRORED", 2)
        old, new = FakeReplica("old"), FakeReplica("new", lambda call: None)
        async with two(new, old) as door:
            for _ in range(5):
                assert (await ask(door, headers={"x-request-timeout": "0.05"})).status == 200
            await until(lambda: len(new.cancelled) == 2)
            await until(lambda: not door.mirror._tasks)
            assert len(new.calls) == 2 and door.mirror._bytes == 0 and door.fleet.versions[2].report.pairs == 0

    run(test)


def test_one_who_asks_for_a_version_is_not_mirrored():
    async def test():
        old, new = FakeReplica("old"), FakeReplica("new")
        async with two(new, old) as door:
            await ask(door, headers={"x-headrace-version": "1"})
            for _ in range(20):
                await asyncio.sleep(0)
            assert not new.calls

    run(test)
