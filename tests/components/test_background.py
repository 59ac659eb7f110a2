"""Batches through a door without HTTP to real replicas over sockets, whose engine only says words again."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from batches import CHAT, depot_in, order, over, request_line, shown, text_of, until, working
from speakers import MODEL, FakeSpeaker, Parrot

import headrace as hr
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits as KeyLimits
from headrace.gateway.accounts.prices import Price, Prices
from headrace.gateway.accounts.teller import Teller
from headrace.gateway.accounts.usage import sums
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.lines import Answered, Retry, open_line
from headrace.gateway.openai.background import PRIORITY, Background
from headrace.gateway.openai.files import NOBODY
from headrace.gateway.openai.tills import Till
from headrace.serving.bodies.openapi import contract
from headrace.serving.door.journey import Journey
from headrace.serving.door.side import SideDoor
from headrace.serving.door.talk import Whole
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute
from headrace.serving.watch.logs import AccessLog
from headrace.serving.wire import Failure, Question, Said


class Replica:
    """One that listens, and its engine."""

    def __init__(self, **settings: Any) -> None:
        self.pipeline = hr.Pipeline("talk", Parrot(**settings))
        self.server = ReplicaServer(self.pipeline.stages, reads=self.pipeline.inputs, carries=self.pipeline.outputs, group="all")
        host, port = self.server.start()
        self.endpoint = Endpoint(f"r{port}", host, port)
        assert self.server._talks is not None
        speaker = self.server._talks.speaker
        assert isinstance(speaker, FakeSpeaker)
        self.speaker = speaker

    @property
    def lines(self) -> int:
        """How many it has."""
        return int(self.server.stats().engine["background"])  # type: ignore[index]


class Service:
    """A side door before replicas, which come and go."""

    def __init__(self) -> None:
        self.door = SideDoor("talk", name="background")
        self.revision = 0
        self.opened: list[Replica] = []

    def replica(self, **settings: Any) -> Replica:
        self.opened.append(Replica(**settings))
        return self.opened[-1]

    async def route(self, *replicas: Replica, keys: dict[str, str] | None = None) -> None:
        """Serve from these, and wait until they are connected."""
        self.revision += 1
        group = GroupRoute("all", tuple(replica.endpoint for replica in replicas))
        version = VersionRoute(1, 1.0, (group,), contract(hr.Pipeline("talk", Parrot())))
        self.door.update(Routes("talk", self.revision, (version,), Limits(), keys))
        await soon(lambda: len(self.door.fleet.versions[1].pools[-1].usable) == len(replicas))

    async def ask(self, prompt: str, *, priority: int = 0, patient: bool = True, **body: Any) -> tuple[Said, memoryview] | Failure:
        """A request that somebody waits for."""
        asked = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}], **body}).encode()
        journey = Journey(asyncio.get_running_loop().time() + 20, priority, patient=patient)
        return await journey.ask(self.door.fleet.versions[1].pools[-1], asked, Whole(Question(CHAT, priority, 10)))


async def soon(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  what is waited for happens in another thread
            await asyncio.sleep(0.002)


def run(test: Callable[[Service], Awaitable[None]]) -> None:
    async def whole() -> None:
        service = Service()
        try:
            await asyncio.wait_for(test(service), 50)
        finally:
            await service.door.close(timeout_s=0.0)
            for replica in service.opened:
                await asyncio.to_thread(replica.server.close)
                replica.speaker.close()

    asyncio.run(whole())


def prompts(count: int, **more: Any) -> bytes:
    return b"".join(request_line(f"r{number}", model=MODEL, messages=[{"role": "user", "content": f"word {number}"}], **more) for number in range(count))


def said(line: dict[str, Any]) -> str:
    text: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return text


async def results(depot: Depot, batch: dict[str, Any], owner: str = "ann") -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines of the two files by their ids, each once."""
    found = []
    for name in ("output_file_id", "error_file_id"):
        lines = await text_of(depot, batch[name], owner)
        found.append({line["custom_id"]: line for line in lines})
        assert len(found[-1]) == len(lines)
    return found[0], found[1]


def test_each_line_is_answered_once_by_the_replicas_there_are(tmp_path: Path):
    async def test(service: Service) -> None:
        one, other = service.replica(), service.replica()
        await service.route(one, other)
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            batch = await order(depot, prompts(300))
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                done = await over(depot, batch)
            good, bad = await results(depot, done)
        assert not bad and {name: said(line) for name, line in good.items()} == {f"r{at}": f"word {at} word {at}" for at in range(300)}
        assert done["usage"]["input_tokens"] == 600 and done["usage"]["output_tokens"] == 1200
        assert one.speaker.seen and other.speaker.seen and {priority for *_, priority in one.speaker.seen + other.speaker.seen} == {PRIORITY}
        assert max(one.speaker.most_running, other.speaker.most_running) <= 7  # a place is kept for others

    run(test)


def test_what_becomes_of_lines_that_are_not_answered(tmp_path: Path):
    lines = [
        ("refused", MODEL, {"messages": [{"role": "user", "content": "400: no"}]}, (400, 400)),
        ("too-many", MODEL, {"n": 10_000}, (400, "invalid_value")),
        ("fetched", MODEL, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, (400, "invalid_url")),
        ("broken", MODEL, {"messages": [{"role": "user", "content": "500: no"}]}, (500, 500)),
        ("no-json", MODEL, {"messages": []}, (400, "missing_required_parameter")),
    ]

    async def test(service: Service) -> None:
        replica = service.replica()
        await service.route(replica)
        background = Background(service.door, patience_s=0)
        with depot_in(tmp_path, time.time, attempts=2) as depot:
            file = b"".join(request_line(name, model=model, **body) for name, model, body, _ in lines) + prompts(3)
            batch = await order(depot, file)
            strange = await order(depot, request_line("a", model="other"))
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                good, bad = await results(depot, await over(depot, batch))
                _, unknown = await results(depot, await over(depot, strange))
        told = {name: (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) for name, line in {**bad, **unknown}.items()}
        assert told == {**{name: expected for name, *_, expected in lines}, "a": (404, "model_not_found")}
        assert set(good) == {"r0", "r1", "r2"}
        assert sum(body["messages"][-1]["content"] == "500: no" for _, body, _ in replica.speaker.seen) == 2

    run(test)


def test_lines_use_what_is_idle_and_wait_while_others_ask(tmp_path: Path):
    async def test(service: Service) -> None:
        replica = service.replica(sequences=8)
        await service.route(replica)
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            replica.speaker.pause()
            people = [asyncio.create_task(service.ask("me first")) for _ in range(5)]
            await soon(lambda: replica.speaker.running == 5)
            batch = await order(depot, prompts(100))
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                await soon(lambda: replica.lines == 2)  # of eight places five are taken, and one is kept
                people += [asyncio.create_task(service.ask("me too")) for _ in range(3)]
                replica.speaker.resume()
                answers = await asyncio.gather(*people)
                done = await over(depot, batch)
            good, bad = await results(depot, done)
        assert all(not isinstance(answer, Failure) and answer[0].status == 200 for answer in answers)
        assert len(good) == 100 and not bad
        assert replica.speaker.most_running <= 8

    run(test)


def test_a_replica_that_refuses_gets_no_more_until_it_tells_again(tmp_path: Path):
    async def test(service: Service) -> None:
        replica = service.replica(sequences=8)
        await service.route(replica)
        background, people = Background(service.door), Service()
        await people.route(replica)
        await soon(lambda: background.slots() == 7)
        replica.speaker.pause()
        asking = [asyncio.create_task(people.ask("me first")) for _ in range(8)]
        await soon(lambda: replica.speaker.running == 8)
        refused = await service.ask("a line", priority=PRIORITY, patient=False)
        assert isinstance(refused, Failure) and refused.status == 429
        assert background.slots() == 0
        replica.speaker.resume()
        await asyncio.gather(*asking)
        await people.door.close(timeout_s=0.0)
        await soon(lambda: background.slots() == 7)

    run(test)


def test_a_replica_that_is_gone_loses_and_doubles_no_line(tmp_path: Path):
    async def test(service: Service) -> None:
        one, other = service.replica(), service.replica()
        await service.route(one, other)
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            one.speaker.pause()
            batch = await order(depot, prompts(60))
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                await soon(lambda: one.lines == 7)
                await asyncio.to_thread(one.server.close)
                await service.route(other)
                done = await over(depot, batch)
            good, bad = await results(depot, done)
        assert len(good) == 60 and not bad and done["usage"]["output_tokens"] == 240

    run(test)


def test_without_versions_lines_wait_and_without_replicas_one_asks_for_some(tmp_path: Path):
    async def test(service: Service) -> None:
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            batch = await order(depot, prompts(20))
            async with working(depot, background, background.slots):  # type: ignore[arg-type]

                async def begun() -> bool:
                    return (await shown(depot, batch))["status"] == "in_progress"

                await until(begun)
                assert background.slots() == 0
                await service.route()
                await soon(lambda: service.door.report().waiting == {(1, "all"): 1})
                assert (await shown(depot, batch))["request_counts"] == {"total": 20, "completed": 0, "failed": 0}
                await service.route(service.replica())
                done = await over(depot, batch)
        assert done["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
        assert not service.door.report().waiting and not service.door.report().versions

    run(test)


def test_lines_that_cannot_be_answered_yet_come_again(tmp_path: Path):
    async def test(service: Service) -> None:
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            known = depot.catalog.batch(await order(depot, prompts(2)))
            assert known is not None
            one, other = [open_line(known, at, line) for at, line in enumerate(prompts(2).splitlines(), 1)]
            strange = open_line(known, 3, request_line("a", model="not there yet"))
            await service.route()
            waiting = asyncio.create_task(background.send(one))
            await soon(lambda: service.door.report().waiting)
            assert isinstance(await background.send(other), Retry)  # one that waits is enough to have a replica started
            assert isinstance(await background.send(strange), Retry)
            await service.route(service.replica())
            answers = await waiting, await background.send(other)
        assert all(isinstance(answer, Answered) and answer.status == 200 for answer in answers)

    run(test)


def test_a_worker_that_is_cut_off_leaves_nothing_at_replicas(tmp_path: Path):
    async def test(service: Service) -> None:
        replica = service.replica()
        await service.route(replica)
        with depot_in(tmp_path, time.time, grace_s=0.05) as depot:
            replica.speaker.pause()
            batch = await order(depot, prompts(40))
            background = Background(service.door)
            async with working(depot, background, background.slots) as stopping:  # type: ignore[arg-type]
                await soon(lambda: replica.lines == 7)
                stopping.set()
            await soon(lambda: replica.lines == 0)
            replica.speaker.resume()
            background = Background(service.door)
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                good, bad = await results(depot, await over(depot, batch))
        assert len(good) == 40 and not bad and replica.speaker.cancelled == 7

    run(test)


class Accounts:
    """Accounts of which the key `ann` is, and what each has used."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.database = Database(str(folder / "accounts.sqlite"))
        self.keys = Keys(self.database)
        self.keys.create("ann", limits=KeyLimits(**limits))
        self.books = Books(self.database, prices=Prices({MODEL: Price(prompt=1.0, completion=1.0)}))

    @contextlib.asynccontextmanager
    async def till(self) -> AsyncIterator[Till]:
        async with Teller(self.books) as teller:
            till = Till(teller)
            yield till
            await till.close()

    def used(self) -> list[tuple[str, str, int, int, int]]:
        return [(row.key, row.model, row.requests, row.prompt_tokens, row.completion_tokens) for row in sums(self.database) if row.requests]


@pytest.mark.parametrize("budget_usd", [None, 1.0])
def test_each_line_is_booked_once_whatever_is_cut_off(tmp_path: Path, budget_usd: float | None):
    async def test(service: Service) -> None:
        accounts = Accounts(tmp_path, budget_usd=budget_usd, requests_per_minute=1, tokens_per_minute=1)  # which do not count here
        replica = service.replica(word_s=0.001)
        await service.route(replica, keys={})
        with depot_in(tmp_path, time.time, grace_s=0.001) as depot:
            batch = await order(depot, prompts(100))
            for share in (20, 50, 100):
                async with accounts.till() as till:
                    background = Background(service.door, till=till)
                    worker = working(depot, background, background.slots)  # type: ignore[arg-type]
                    async with worker as stopping:

                        async def far() -> bool:
                            return sum((await shown(depot, batch))["request_counts"].values()) - 100 >= share  # noqa: B023

                        await until(far)
                        stopping.set()
                        if share == 100:
                            await over(depot, batch)
            good, bad = await results(depot, await over(depot, batch))
        assert len(good) == 100 and not bad
        assert accounts.used() == [("ann", MODEL, 100, 200, 400)]
        key = accounts.keys.get("ann")
        assert key.spent_usd == pytest.approx(600e-6)

    run(test)


def test_a_key_pays_for_no_more_than_its_budget_and_for_none_once_it_is_revoked(tmp_path: Path):
    async def test(service: Service) -> None:
        accounts = Accounts(tmp_path, budget_usd=0.000_1)  # a hundred tokens, sixteen lines of six
        replica = service.replica()
        await service.route(replica, keys={})
        with depot_in(tmp_path, time.time) as depot:
            async with accounts.till() as till:
                background = Background(service.door, till=till)
                async with working(depot, background, background.slots):  # type: ignore[arg-type]
                    good, bad = await results(depot, await over(depot, await order(depot, prompts(30, max_tokens=4))))
                    assert len(good) == 16 and {line["error"]["code"] for line in bad.values()} == {"insufficient_quota"}
                    assert accounts.keys.get("ann").spent_usd == pytest.approx(96e-6)
                    accounts.keys.revoke("ann")

                    async def heard() -> bool:
                        return await till.teller.named("ann") is None

                    await until(heard)
                    good, bad = await results(depot, await over(depot, await order(depot, prompts(3))))
                    assert not good and {line["error"]["code"] for line in bad.values()} == {"invalid_api_key"}
        assert accounts.used() == [("ann", MODEL, 16, 32, 64)]

    run(test)


def test_a_key_asks_only_its_models_and_a_key_of_the_file_is_not_booked(tmp_path: Path):
    async def test(service: Service) -> None:
        accounts = Accounts(tmp_path, models=("other",))
        await service.route(service.replica(), keys={"hash": "bob"})
        with depot_in(tmp_path, time.time) as depot:
            async with accounts.till() as till:
                background = Background(service.door, till=till)
                async with working(depot, background, background.slots):  # type: ignore[arg-type]
                    _, bad = await results(depot, await over(depot, await order(depot, prompts(2))))
                    theirs = await order(depot, prompts(2), owner="bob")
                    good, none = await results(depot, await over(depot, theirs, "bob"), "bob")
        assert {line["response"]["status_code"] for line in bad.values()} == {403} and len(good) == 2 and not none
        assert accounts.used() == []

    run(test)


@pytest.mark.parametrize("prompts_too", [False, True])
def test_what_replicas_answer_is_logged_like_any_request(tmp_path: Path, prompts_too: bool):
    async def test(service: Service) -> None:
        log = io.StringIO()
        service.door.log = AccessLog(log, service="talk", door="background")
        accounts = Accounts(tmp_path, log_prompts=prompts_too)
        replica = service.replica()
        await service.route(replica)
        with depot_in(tmp_path, time.time, attempts=1) as depot:
            async with accounts.till() as till:
                background = Background(service.door, till=till)
                async with working(depot, background, background.slots):  # type: ignore[arg-type]
                    failing = request_line("f", model=MODEL, messages=[{"role": "user", "content": "500: no"}])
                    batch = await over(depot, await order(depot, prompts(2) + failing))
            good, bad = await results(depot, batch)
        await service.door.close(timeout_s=1.0)
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
        named = {line["request_id"]: line for line in lines}
        assert len(lines) == 3 and set(named) == {line["response"]["request_id"] for line in good.values()} | {bad["f"]["id"]}
        line = named[good["r1"]["response"]["request_id"]]
        assert {"time", "took_ms", "bytes_in", "bytes_out"} < set(line) and ("asked" in line) is prompts_too
        told = {"level": "info", "service": "talk", "door": "background", "method": "POST", "path": CHAT, "status": 200, "version": 1, "model": MODEL}
        told |= {"prompt_tokens": 2, "cached_tokens": 0, "completion_tokens": 4, "key": "ann", "replica": replica.endpoint.replica, "attempts": 1}
        assert line.items() >= told.items()
        if prompts_too:
            assert json.loads(line["asked"])["messages"] == [{"role": "user", "content": "word 1"}]
        assert (named[bad["f"]["id"]]["status"], named[bad["f"]["id"]]["level"]) == (500, "error")

    run(test)


def test_where_no_key_is_asked_for_the_log_names_none(tmp_path: Path):
    async def test(service: Service) -> None:
        log = io.StringIO()
        service.door.log = AccessLog(log)
        await service.route(service.replica())
        background = Background(service.door)
        with depot_in(tmp_path, time.time) as depot:
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                await over(depot, await order(depot, prompts(1), owner=NOBODY), NOBODY)
        await service.door.close(timeout_s=1.0)
        assert "key" not in json.loads(log.getvalue())

    run(test)


def test_lines_for_a_guest_go_to_its_replicas(tmp_path: Path):
    async def test(service: Service) -> None:
        host, guest = service.replica(), service.replica()
        await service.route(host)
        door = service.door.lobby.seat("other")
        background = Background(service.door, patience_s=0)
        with depot_in(tmp_path, time.time) as depot:
            asked = b"".join(request_line(f"r{at}", model="other", messages=[{"role": "user", "content": f"word {at}"}]) for at in range(50))
            batch = await order(depot, asked)
            async with working(depot, background, background.slots):  # type: ignore[arg-type]
                await soon(lambda: background.slots() == 7)  # lines wait while nothing is known of the guest
                group = GroupRoute("all", (guest.endpoint,))
                door.update(Routes("other", 1, (VersionRoute(1, 1.0, (group,), contract(hr.Pipeline("other", Parrot()))),), Limits()))
                good, bad = await results(depot, await over(depot, batch))
                await service.door.lobby.dismiss("other", timeout_s=5.0)
                _, gone = await results(depot, await over(depot, await order(depot, request_line("a", model="other"))))
        assert len(good) == 50 and not bad
        assert len(guest.speaker.seen) == 50 and not host.speaker.seen
        assert gone["a"]["response"]["body"]["error"]["code"] == "model_not_found"

    run(test)
