"""A door's connection to one replica."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from replicas import Call, FakeReplica, run, until

from headrace.serving.door import link as links
from headrace.serving.door.journey import Hop, Journey
from headrace.serving.door.link import Link
from headrace.serving.wire import Content, Failure, Kind


class Told:
    """An owner that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def changed(self, link) -> None:
        self.said.append(("changed", link.usable))

    def answered(self, link, done) -> None:
        self.said.append(("answered", done.rows))

    def refused(self, link, hop, retry_after_s) -> None:
        self.said.append(("refused", hop.number, retry_after_s))

    def lost(self, link, hops) -> None:
        self.said.append(("lost", [hop.number for hop in hops]))


def hop(deadline_s: float = 5.0) -> Hop:
    return Hop(Journey(asyncio.get_running_loop().time() + deadline_s), b"{}", Content.JSON, Content.JSON)


async def linked(behave=Call.done) -> tuple[FakeReplica, Link, Told]:
    replica, owner = await FakeReplica(behave=behave).open(), Told()
    link = Link(replica.endpoint, owner)
    await until(lambda: link.ready)
    return replica, link, owner


def test_it_is_ready_when_the_replica_has_answered_and_gone_when_it_is_closed():
    async def test():
        _, link, owner = await linked()
        assert owner.said == [("changed", True)] and link.local and link.stats.memory_bytes == 1
        link.close()
        await until(lambda: ("lost", []) in owner.said)
        assert not link.usable

    run(test)


def test_outcomes_find_their_requests():
    async def test():
        def behave(call: Call) -> None:
            [call.done, lambda: call.fail(422, "invalid_row", "no", ({"loc": ["x"]},)), lambda: call.busy(0.5), call.started][call.number - 1]()

        replica, link, owner = await linked(behave)
        hops = [hop() for _ in range(4)]
        for each in hops:
            link.send(each)
        assert link.load() == 4
        await until(lambda: hops[3].started)
        done, body = await hops[0].future
        assert (done.rows, bytes(body)) == (1, b'{"y":1}')
        assert await hops[1].future == Failure(422, "invalid_row", "no", ({"loc": ["x"]},))
        assert owner.said[1:] == [("answered", 1), ("refused", 3, 0.5)]
        assert list(link.hops) == [4] and hops[0].link is None and hops[3].link is link
        hops[3].withdraw(Failure(504, "", ""))
        assert not link.hops
        await until(lambda: replica.cancelled == [4])
        link.close()

    run(test)


def test_what_comes_too_late_or_for_nobody_is_ignored():
    async def test():
        replica, link, owner = await linked(lambda call: None)
        late = hop()
        link.send(late)
        call = await replica.got(1)
        late.withdraw(Failure(504, "deadline_exceeded", ""))
        for say in (call.started, call.busy, lambda: call.fail(500, "x"), call.done, call.done):
            say()
        await until(lambda: owner.said.count(("answered", 1)) == 2)
        assert (await late.future).status == 504
        assert link.usable
        link.close()

    run(test)


@pytest.mark.parametrize("kind", [Kind.WORK, Kind.PING])
def test_a_replica_that_speaks_out_of_turn_is_left(kind: Kind):
    async def test():
        _replica, link, owner = await linked(lambda call: call.connection.send(kind, 0, ()))
        link.send(hop())
        await until(lambda: ("lost", [1]) in owner.said)
        link.close()

    run(test)


def test_when_half_of_what_kept_a_replica_busy_is_done_it_is_not_busy():
    async def test():
        replica, link, _ = await linked(lambda call: None)
        hops = [hop() for _ in range(4)]
        for each in hops:
            link.send(each)
        await replica.got(4)
        link.turn_away(1, 1e12)
        assert link.busy_until == [0.0, 1e12, 1e12]
        replica.calls[0].done()
        await hops[0].future
        assert link.busy_until[1]
        replica.calls[1].done()
        await hops[1].future
        assert link.busy_until == [0.0] * 3
        link.close()

    run(test)


def test_attempts_to_connect_are_made_at_growing_intervals(monkeypatch: pytest.MonkeyPatch):
    async def test():
        slept: list[float] = []
        real = asyncio.sleep

        async def sleep(delay_s: float) -> None:
            if delay_s >= 0.01:
                slept.append(delay_s)
                delay_s = 0
            await real(delay_s)

        monkeypatch.setattr(links, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
        replica = await FakeReplica().open()
        replica.die()
        link = Link(replica.endpoint, Told())
        await until(lambda: len(slept) >= 8)
        link.close()
        assert 0.03 < slept[0] < 0.07 and 0.7 < slept[7] < 1.3
        assert all(slept[at + 1] > slept[at] for at in range(3))

    run(test)


def test_bytes_that_a_replica_does_not_take_count_as_load():
    async def test():
        _, link, _ = await linked()
        link.pause_writing()
        assert link.load() > 500
        link.resume_writing()
        assert link.load() == 0
        link.close()

    run(test)
