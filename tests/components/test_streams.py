"""Streams of a language model through a real door from real replicas over sockets; their engine only says words again."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving_doors import Peer
from speakers import MODEL, FakeSpeaker, Parrot

import headrace as hr
from headrace.gateway.openai.edge import Edge
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica import outlets
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.serving.wire import Kind, Said
from headrace.speech import CHAT, FILLER, RIDER

BATCH = 2


class Replica:
    """One that listens, and its engine."""

    def __init__(self, *, direct: bool = True, limits: Limits | None = None, **settings: Any) -> None:
        self.pipeline = hr.Pipeline("talk", Parrot(**settings))
        limits = limits or Limits()
        self.server = ReplicaServer(self.pipeline.stages, reads=self.pipeline.inputs, carries=self.pipeline.outputs, group="all", limits=limits, token="secret")
        host, port = self.server.start()
        self.endpoint = Endpoint(f"r{port}", host, port, token="secret", beside=self.server.beside if direct else "")
        assert self.server._talks is not None
        speaker = self.server._talks.speaker
        assert isinstance(speaker, FakeSpeaker)
        self.speaker = speaker

    def close(self) -> None:
        self.server.close()
        self.speaker.close()


class Service:
    def __init__(self, *replicas: Replica) -> None:
        self.opened: list[http.client.HTTPConnection] = []
        self.door = Door("talk")
        self.server = DoorServer(self.door)
        self.port = self.server.start()
        self.door.edge = Edge(self.door)
        group = GroupRoute("all", tuple(replica.endpoint for replica in replicas))
        version = VersionRoute(1, 1.0, (group,), contract(replicas[0].pipeline))
        self.server.call(self.door.update, Routes("talk", 1, (version,), Limits()))
        soon(lambda: len(self.server.call(lambda: self.door.fleet.versions[1].pools[-1].usable)) == len(replicas))

    def post(self, prompt: str, connection: http.client.HTTPConnection | None = None, **body: Any) -> http.client.HTTPResponse:
        connection = connection or self.connection()
        asked = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **body}
        connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
        return connection.getresponse()

    def connection(self) -> http.client.HTTPConnection:
        self.opened.append(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30))
        return self.opened[-1]

    def in_flight(self) -> int:
        return self.server.call(lambda: self.door.fleet.versions[1].report.in_flight)


@contextlib.contextmanager
def service(*replicas: Replica) -> Iterator[Service]:
    made = Service(*replicas)
    try:
        yield made
    finally:
        for connection in made.opened:
            connection.close()
        made.server.stop(timeout_s=0.5)
        for replica in replicas:
            replica.close()


def soon(true: Callable[[], Any]) -> None:
    until_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until_s, "it never became so"
        time.sleep(0.002)


def words(text: bytes) -> list[str]:
    events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"]["content"] for event in events).split()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What replicas write to clients themselves."""
    pieces: list[bytes] = []
    write = outlets.Outlet.write

    def noted(self: outlets.Outlet, piece: bytes) -> None:
        pieces.append(piece)
        write(self, piece)

    monkeypatch.setattr(outlets.Outlet, "write", noted)
    return pieces


@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_is_whole_and_the_connection_lives_on(written: list[bytes], direct: bool):
    with service(Replica(direct=direct, words=300, word_s=0.0005)) as made:
        connection = made.connection()
        for _ in range(2):
            answer = made.post("one two three", connection, stream=True)
            text = answer.read()
            assert answer.status == 200 and words(text) == ["one", "two", "three"] * 100 and text.endswith(b"data: [DONE]\n\n")
            assert json.loads(made.post("whole", connection, max_tokens=2).read())["usage"]["completion_tokens"] == 2
        assert (len(written) > 300) is direct


def test_short_answers_go_through_the_door(written: list[bytes]):
    with service(Replica(words=2)) as made:
        assert words(made.post("a b", stream=True).read()) == ["a", "b"] and not written


@pytest.mark.parametrize("direct", [True, False])
def test_a_client_that_goes_ends_the_computation(direct: bool):
    replica = Replica(direct=direct, words=100_000, word_s=0.001)
    with service(replica) as made:
        answers = [made.post("on and on", stream=True) for _ in range(4)]
        for answer in answers:
            answer.read(2000)
        assert made.in_flight() == 4
        for answer, connection in zip(answers, made.opened, strict=True):
            answer.close()
            connection.close()
        soon(lambda: replica.speaker.cancelled == 4 and not replica.speaker.running and not made.in_flight())
        assert replica.server.stats().in_flight == 0


def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outlets, "MOST_UNREAD_BYTES", 100_000)
    replica = Replica(words=10**6)
    with service(replica) as made, socket.create_connection(("127.0.0.1", made.port)) as client:
        body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "word " * 1000}]}).encode()
        client.sendall(b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
        soon(lambda: replica.speaker.cancelled == 1)
        soon(lambda: not made.in_flight())


@pytest.mark.parametrize("direct", [True, False])
def test_a_replica_that_ends_in_a_stream_ends_it_loudly(direct: bool):
    replica = Replica(direct=direct, words=100_000, word_s=0.001)
    with service(replica) as made:
        answer = made.post("on and on", stream=True)
        answer.read(4000)
        replica.server.close()
        rest = answer.read()
        assert b'"error"' in rest and rest.endswith(b"data: [DONE]\n\n")


def test_another_replica_answers_what_had_not_begun():
    slow, other = Replica(words=3, word_s=0.05), Replica(words=3)
    with service(slow, other) as made:
        slow.speaker.pause()
        answers: list[bytes] = []

        def ask_one(at: int) -> None:
            answers.append(made.post(f"prefix {at} end", stream=True).read())

        threads = [threading.Thread(target=ask_one, args=(at,)) for at in range(12)]
        for thread in threads:
            thread.start()
        soon(lambda: slow.server.stats().in_flight and len(answers) + slow.server.stats().in_flight == 12)
        slow.server.close()
        for thread in threads:
            thread.join()
        assert all(len(words(answer)) == 3 and b'"error"' not in answer for answer in answers)


def test_requests_that_begin_alike_go_to_one_replica():
    replicas = [Replica(words=1) for _ in range(3)]
    with service(*replicas) as made:
        for conversation in range(6):
            before = [len(replica.speaker.seen) for replica in replicas]
            for _ in range(4):
                made.post(f"conversation {conversation}").read()
            grown = sorted(len(replica.speaker.seen) - had for replica, had in zip(replicas, before, strict=True))
            assert grown == [0, 0, 4]
        assert sum(bool(replica.speaker.seen) for replica in replicas) > 1


# At the replica alone


def alone(test: Callable[[Replica, Any], Any], **settings: Any) -> None:
    async def whole(replica: Replica) -> None:
        reader, writer = await asyncio.open_connection(replica.endpoint.host, replica.endpoint.port)
        peer = Peer(reader, writer)
        peer.send(Kind.HELLO, head=("secret",))
        await asyncio.wait_for(test(replica, peer), 30)
        await peer.close()

    replica = Replica(**settings)
    try:
        asyncio.run(whole(replica))
    finally:
        replica.close()


def ask(peer: Any, *, priority: int = 0, tokens: int = 10, left_s: float = 60.0, **body: Any) -> int:
    peer.number += 1
    asked = json.dumps({"messages": [{"role": "user", "content": "a b c"}], **body}).encode()
    peer.send(Kind.ASK, peer.number, (CHAT, left_s, priority, tokens, f"r{peer.number}", None), asked)
    return int(peer.number)


async def outcome(peer: Any) -> tuple[int, Any]:
    frame = await peer.next(Kind.SAID, Kind.BUSY, Kind.FAIL)
    return frame.number, Said(*frame.head).status if frame.kind is Kind.SAID else frame.kind


def test_more_than_could_begin_in_time_is_refused_at_once():
    async def test(replica: Replica, peer: Any) -> None:
        for _ in range(4):  # from which it learns its pace: two at a time, 0.1 s each
            ask(peer)
            assert (await outcome(peer))[1] == 200
        replica.speaker.pause()
        numbers = [ask(peer, left_s=2.0) for _ in range(40)]
        number, what = await outcome(peer)
        assert what is Kind.BUSY and 6 < number < 40 + 4
        peer.ahead.clear()
        replica.speaker.resume()
        assert numbers

    alone(test, sequences=2, words=2, word_s=0.05)


def test_tokens_in_flight_are_bounded_and_one_request_always_fits():
    async def test(replica: Replica, peer: Any) -> None:
        replica.speaker.pause()
        ask(peer, tokens=10**6)  # the engine itself would say if it is too long
        refused = ask(peer, tokens=1)
        assert await outcome(peer) == (refused, Kind.BUSY)
        replica.speaker.resume()

    alone(test, capacity=1000)


def test_background_requests_make_way():
    async def test(replica: Replica, peer: Any) -> None:
        engine: dict[str, float] = replica.server.stats().engine or {}
        assert engine["background_room"] == 14  # of 16 places
        replica.speaker.pause()
        background = [ask(peer, priority=BATCH) for _ in range(15)]
        assert await outcome(peer) == (background[-1], Kind.BUSY)
        better = ask(peer)
        back = {(await outcome(peer)) for _ in range(10)}  # a quarter of the places stays
        assert back == {(number, Kind.BUSY) for number in background[4:14]}
        refused = ask(peer, priority=BATCH)
        assert await outcome(peer) == (refused, Kind.BUSY)
        replica.speaker.resume()
        assert {(await outcome(peer)) for _ in range(5)} == {(number, 200) for number in [*background[:4], better]}

    alone(test, sequences=16)


def test_background_requests_stay_in_an_engine_that_yields():
    async def test(replica: Replica, peer: Any) -> None:
        replica.speaker.pause()
        background = [ask(peer, priority=BATCH) for _ in range(15)]
        assert await outcome(peer) == (background[-1], Kind.BUSY)  # one place of 16 is kept free
        better = [ask(peer) for _ in range(12)]  # beside four that step on with them there is room for as many
        replica.speaker.resume()
        assert {(await outcome(peer)) for _ in range(26)} == {(number, 200) for number in [*background[:-1], *better]}
        priorities = [priority for *_, priority in replica.speaker.seen]
        assert sorted(priorities) == [0] * 12 + [RIDER] * 4 + [FILLER] * 10

    alone(test, sequences=16, yields=True)


def test_a_deadline_ends_a_stream():
    async def test(replica: Replica, peer: Any) -> None:
        number = ask(peer, left_s=0.2, stream=True)
        assert await outcome(peer) == (number, 504)
        assert replica.speaker.cancelled == 1

    alone(test, words=1000, word_s=0.01)


def test_a_cancelled_request_tells_what_it_came_to():
    async def test(replica: Replica, peer: Any) -> None:
        number = ask(peer, stream=True)
        for _ in range(3):
            await peer.next(Kind.PART)
        peer.send(Kind.CANCEL, number)
        frame = await peer.next(Kind.SAID)
        said = Said(*frame.head)
        assert (frame.number, said.status, said.prompt_tokens) == (number, 499, 3) and 3 <= said.completion_tokens < 100

    alone(test, words=1000, word_s=0.005)
