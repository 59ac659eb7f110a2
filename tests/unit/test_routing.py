"""Where requests go: choice of replica, shedding, retries, ejection, poison, waiting."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from replicas import IDLE, Call, FakeConnection, FakeReplica, ask, routes, run, service, several, until, version

from headrace.serving import words
from headrace.serving.door import retries, routing
from headrace.serving.door.journey import GONE, Hop, Journey
from headrace.serving.routes import Limits
from headrace.serving.wire import Content, Failure, Kind


def hang(call: Call) -> None:
    """Never answer."""


def busy(call: Call) -> None:
    call.busy()


def named(name: str):
    return lambda call: call.done(json.dumps({"by": name}).encode())


def begin(door, **options) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(ask(door, **options))


def test_a_request_goes_to_a_replica_and_its_answer_comes_back_word_for_word():
    async def test():
        replica = FakeReplica(behave=lambda call: call.done(b'{"y": 2.50}', rows=1))
        async with service(replica) as door:
            reply = await ask(door, b'{"x": 1.0}', headers={"traceparent": "00-a-b-01", "x-request-id": "mine", "x-priority": "batch"})
        assert (reply.status, reply.body) == (200, b'{"y": 2.50}')
        assert reply.headers["server-timing"] == "queue;dur=1.00, wait;dur=2.00, compute;dur=3.00"
        assert reply.headers["x-headrace-version"] == "1"
        (call,) = replica.calls
        assert call.body == b'{"x": 1.0}'
        assert (call.work.content, call.work.accept, call.work.priority, call.work.alone) == (Content.JSON, Content.JSON, 2, False)
        assert (call.work.trace, call.work.request_id) == ("00-a-b-01", "mine")
        assert 59 < call.work.left_s <= 60

    run(test)


def test_work_goes_to_the_replica_with_less_of_it():
    async def test():
        replicas = [FakeReplica(name, hang) for name in "ab"]
        async with service(*replicas) as door:
            asked = [begin(door) for _ in range(8)]
            await until(lambda: sum(len(replica.calls) for replica in replicas) == 8)
            assert [len(replica.calls) for replica in replicas] == [4, 4]
            for replica in replicas:
                for call in replica.calls:
                    call.done()
            assert {(await each).status for each in asked} == {200}

    run(test)


def test_requests_of_one_turn_share_a_write():
    async def test():
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            link = next(iter(door.fleet.versions[1].pools[0].links.values()))
            writes = []
            link._transport = type("", (), {"is_closing": lambda self: False, "writelines": lambda self, pieces: writes.append(len(pieces))})()
            asked = [begin(door, body=b"{}") for _ in range(5)]
            await until(lambda: writes)
            assert writes == [10]  # a head and a body each
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            link._transport = None

    run(test)


def test_a_busy_replica_is_passed_over():
    async def test():
        full, free = FakeReplica("full", busy), FakeReplica("free", named("free"))
        async with service(full, free) as door:
            replies = [await ask(door) for _ in range(6)]
            assert {reply.status for reply in replies} == {200}
            assert len(full.calls) <= 1

    run(test)


def test_where_all_are_busy_requests_are_shed_without_asking(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(routing, "PROBE_S", 60.0)
        replicas = [FakeReplica(name, lambda call: call.busy(2.2)) for name in "ab"]
        async with service(*replicas) as door:
            for _ in range(6):
                reply = await ask(door)
                assert (reply.status, reply.code, reply.headers["retry-after"]) == (429, "overloaded", "3")
            assert sum(len(replica.calls) for replica in replicas) <= 3  # the first asked both, and one went to see
            assert door.fleet.versions[1].report.rejected == 6
            assert (await ask(door, headers={"x-priority": "interactive"})).status == 429
            assert {call.work.priority for replica in replicas for call in replica.calls} == {0, 1}  # nobody had said no to this class

    run(test)


def test_a_probe_finds_out_that_there_is_room_again(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(routing, "PROBE_S", 0.0)
        replica = FakeReplica(behave=busy)
        async with service(replica) as door:
            assert (await ask(door)).status == 429
            replica.behave = Call.done
            assert (await ask(door)).status == 200
            assert (await ask(door)).status == 200

    run(test)


@pytest.mark.parametrize("said", [None, "Fatal Python error: Segmentation fault"])
def test_a_request_whose_replica_dies_is_computed_by_another_and_alone_if_it_killed_itself(said: str | None, monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(words, "read", lambda pid: said)
        first, second = FakeReplica("first", hang, pid=1), FakeReplica("second", hang, pid=2)
        async with service(first, second) as door:
            asked = [begin(door) for _ in range(2)]
            await first.got(1)
            await second.got(1)
            first.die()
            call = await second.got(2)
            assert call.work.alone == (said is not None)
            for each in second.calls:
                each.done()
            assert [(await each).status for each in asked] == [200, 200]
            assert door.fleet.versions[1].report.retries == 1

    run(test)


def test_requests_wait_for_a_replica_in_order_of_priority():
    async def test():
        replica = FakeReplica(behave=Call.done)
        async with service(replica) as door:
            door.update(routes(version(1, []), revision=2))
            asked = []
            for priority in ("batch", "normal", "interactive"):
                asked.append(begin(door, headers={"x-priority": priority}))
                await asyncio.sleep(0)
            await until(lambda: door.report().waiting == {(1, "g0"): 3})
            assert door.fleet.versions[1].report.queued == 3
            assert (await ask(door, method="GET", path="/readyz")).status == 503
            door.update(routes(version(1, [replica]), revision=3))
            assert [(await each).status for each in asked] == [200, 200, 200]
            assert [call.work.priority for call in replica.calls] == [0, 1, 2]
            assert door.report().waiting == {}

    run(test)


def test_the_waiting_room_is_bounded_but_not_for_those_that_a_death_sent_there(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(routing, "MOST_WAITING", 1)
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            asked = [begin(door) for _ in range(3)]
            await replica.got(3)
            replica.die()
            await until(lambda: door.fleet.versions[1].waiting() == 3)
            reply = await ask(door)
            assert (reply.status, reply.code) == (503, "unavailable")
            assert reply.headers["retry-after"] == "1"
            back = await FakeReplica("back").open()
            door.update(routes(version(1, [back]), revision=2))
            assert [(await each).status for each in asked] == [200] * 3

    run(test)


def test_one_death_fails_nobody_even_without_a_budget():
    async def test():
        first = FakeReplica("first", hang)
        async with service(first) as door:
            asked = [begin(door) for _ in range(50)]
            await first.got(50)
            door.retries.tokens = 3.0
            first.die()
            second = await FakeReplica("second", hang).open()
            door.update(routes(version(1, [second]), revision=2))
            await second.got(50)
            second.die()  # the second time there is no budget left
            replies = [await each for each in asked]
            assert {(reply.status, reply.code) for reply in replies} == {(503, "unavailable")}

    run(test)


def deadly(call: Call) -> None:
    if call.work.alone:
        call.started()
    call.connection.replica.die()


@pytest.mark.parametrize("evidence", ["words", "memory", "asked"])
def test_a_request_that_kills_its_replicas_is_answered_so(evidence: str, monkeypatch: pytest.MonkeyPatch):
    async def test():
        if evidence == "words":
            monkeypatch.setattr(words, "read", lambda pid: "Fatal Python error: Segmentation fault")
        replicas = [FakeReplica(name, deadly, pid=pid if evidence == "words" else 0) for name, pid in (("a", 71), ("b", 72), ("c", 73))]
        async with service(*replicas) as door:
            if evidence == "memory":
                door.retries._full_bytes = 0.5

            if evidence == "asked":
                for pool in door.fleet.versions[1].pools:
                    for link in pool.links.values():
                        link.local = False

                async def ask_words(endpoint):
                    return f"{endpoint.replica} called os._exit(3)"

                door.retries._ask_words = ask_words
            reply = await ask(door)
            assert (reply.status, reply.code) == (500, "deadly_row")
            said = {"words": "Segmentation fault", "memory": "GB of memory", "asked": "os._exit(3)"}[evidence]
            assert said in reply.json["error"]["message"]
            assert door.fleet.versions[1].report.errors == 1
            deaths = 3 if evidence == "asked" else 2  # another machine is asked only from the second death on
            assert sum(len(replica.calls) for replica in replicas) == deaths

    run(test)


def test_a_suspect_is_convicted_at_its_second_death_and_not_those_whose_turn_had_not_come(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(words, "read", lambda pid: "Fatal Python error")

        def behave(call: Call) -> None:
            if call.value == "innocent":
                hang(call)  # its turn has not come
            else:
                deadly(call)

        replicas = [FakeReplica(str(at), behave, pid=1) for at in range(2)]
        async with service(replicas[0]) as door:
            link = door.fleet.versions[1].pools[0].links[replicas[0].endpoint]
            innocent = begin(door, body=b'"innocent"')
            await replicas[0].got(1)
            suspect = Hop(Journey(door.now() + 10), b'"guilty"', Content.JSON, Content.JSON, alone=True, deaths=1)
            link.send(suspect)
            await replicas[0].got(2)
            failure = await suspect.future
            assert suspect.deaths == 2
            assert (failure.status, failure.code) == (500, "deadly_row")
            await until(lambda: door.fleet.versions[1].waiting() == 1)
            await replicas[1].open()
            door.update(routes(version(1, [replicas[1]]), revision=2))
            call = await replicas[1].got(1)
            assert call.value == "innocent" and call.work.alone
            call.done()
            assert (await innocent).status == 200

    run(test)


def test_deaths_that_say_nothing_are_outside_kills_until_there_are_eight(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(words, "read", lambda pid: None)
        replicas = [FakeReplica(str(at), deadly, pid=at + 1) for at in range(10)]
        async with service(*replicas) as door:
            reply = await ask(door)
            assert (reply.status, reply.code) == (500, "deadly_row")
            assert "8 replicas died" in reply.json["error"]["message"]
            calls = sorted((call for replica in replicas for call in replica.calls), key=lambda call: call.work.alone)
            assert [call.work.alone for call in calls] == [False] * 5 + [True] * 3

    run(test)


def test_a_suspect_that_had_not_begun_is_not_blamed(monkeypatch: pytest.MonkeyPatch):
    async def test():
        monkeypatch.setattr(words, "read", lambda pid: "Fatal Python error")

        def die_before(call: Call) -> None:
            call.connection.replica.die()

        replicas = [FakeReplica(str(at), die_before, pid=1) for at in range(7)]
        async with service(*replicas) as door:
            asked = begin(door)
            await until(lambda: sum(len(replica.calls) for replica in replicas) == 7)
            healthy = await FakeReplica("healthy").open()
            door.update(routes(version(1, [healthy]), revision=2))
            assert (await asked).status == 200

    run(test)


async def tick(door, times: int = 1, *, silent: tuple[str, ...] = ()) -> None:
    """Let the door look after its replicas, each time with the answers to the last PINGs there, but for those of `silent` ones."""
    links = [link for pool in door.fleet.versions[1].pools for link in pool.links.values()]
    for _ in range(times):
        await until(lambda: all(link.unanswered == 0 for link in links if link.endpoint.replica not in silent))
        door.fleet.tick()


def test_a_replica_that_answers_no_pings_is_ejected_and_comes_back():
    async def test():
        frozen, other = FakeReplica("frozen", hang), FakeReplica("other")
        async with service(frozen) as door:
            asked = begin(door)
            await frozen.got(1)
            frozen.silent = True
            await other.open()
            door.update(routes(version(1, [frozen, other]), revision=2))
            await until(lambda: len(door.fleet.versions[1].pools[0].usable) == 2)
            await tick(door, routing.MOST_UNANSWERED + 1, silent=("frozen",))
            assert door.report().hung == ("frozen",)
            assert (await asked).status == 200
            assert not other.calls[0].work.alone  # no death
            await until(lambda: frozen.cancelled)
            assert {(await ask(door)).status for _ in range(5)} == {200}
            assert len(frozen.calls) == 1
            frozen.silent = False
            frozen.connections[0].pong()
            await until(lambda: (door.fleet.tick(), not door.report().hung)[1])
            assert len(door.fleet.versions[1].pools[0].usable) == 2

    run(test)


def test_a_replica_that_never_answered_gets_no_work():
    async def test():
        frozen, other = FakeReplica("frozen"), FakeReplica("other")
        frozen.silent = True
        async with service(frozen, other, ready=False) as door:
            await until(lambda: door.fleet.versions[1].pools[0].usable)
            assert {(await ask(door)).status for _ in range(8)} == {200}
            assert not frozen.calls
            await tick(door, routing.MOST_UNANSWERED + 1, silent=("frozen",))
            assert door.report().hung == ("frozen",)

    run(test)


async def hear(door, replica: FakeReplica, oldest_call_s: float) -> None:
    """Let the door hear how long the replica has been at a call, and look after its replicas."""
    link = door.fleet.versions[1].pools[0].links[replica.endpoint]
    replica.stats = dataclasses.replace(IDLE, in_flight=1, oldest_call_s=oldest_call_s)
    await until(lambda: (replica.connections[0].pong(), link.stats.oldest_call_s == oldest_call_s)[1])
    await tick(door)


@pytest.mark.parametrize("first", ["the other", "itself", "the other, which refuses"])
def test_of_a_call_that_takes_far_too_long_another_replica_is_asked_as_well(first: str):
    """Whoever is done first tells whether it was the replica."""

    async def test():
        slow, second = FakeReplica("slow", lambda call: call.done(times=(0, 0, 0.1))), FakeReplica("second", hang)
        async with service(slow) as door:
            await ask(door)  # a call takes 0.1 s here
            slow.behave = hang
            asked, beside = begin(door), begin(door)
            await slow.got(3)
            await second.open()
            door.update(routes(version(1, [slow, second]), revision=2))
            await until(lambda: len(door.fleet.versions[1].pools[0].usable) == 2)
            await hear(door, slow, 3.9)
            assert not second.calls
            await hear(door, slow, 4.1)
            calls = [await second.got(1), await second.got(2)]
            assert all(call.work.alone for call in calls)  # one of them may be to blame for the other
            assert [link.endpoint.replica for link in door.fleet.versions[1].pools[0].usable] == ["second"]
            assert door.report().hung == ()
            if first == "itself":
                for call in slow.calls[1:]:
                    call.done()
                await hear(door, slow, 0.0)
                assert door.report().hung == () and len(door.fleet.versions[1].pools[0].usable) == 2
                await until(lambda: len(second.cancelled) == 2)
            elif first == "the other":
                door.retries.tokens = 0.0  # nobody has to be asked again
                for call in calls:
                    call.done()
                await until(lambda: door.report().hung == ("slow",))
            else:
                for call in calls:
                    call.fail(500, "stage_failed", "as it was told")
                await tick(door)
                assert door.report().hung == ()
                for call in slow.calls[1:]:
                    call.done()
            assert [(await each).status for each in (asked, beside)] == [200, 200]

    run(test)


def test_a_request_is_not_lost_when_both_replicas_that_are_at_it_go():
    async def test():
        slow, second, third = FakeReplica("slow", lambda call: call.done(times=(0, 0, 0.1))), FakeReplica("second", hang), FakeReplica("third")
        async with service(slow) as door:
            await ask(door)
            slow.behave = hang
            asked = begin(door)
            await slow.got(2)
            await second.open()
            door.update(routes(version(1, [slow, second]), revision=2))
            await until(lambda: len(door.fleet.versions[1].pools[0].usable) == 2)
            await hear(door, slow, 4.1)
            await second.got(1)
            slow.die()
            await until(lambda: len(door.fleet.versions[1].pools[0].links[slow.endpoint].hops) == 0)
            second.die()
            await third.open()
            door.update(routes(version(1, [third]), revision=3))
            assert (await asked).status == 200

    run(test)


def test_a_replica_of_which_nobody_can_tell_is_given_up_after_half_a_minute():
    async def test():
        stuck = FakeReplica("stuck", lambda call: call.done(times=(0, 0, 0.1)))
        async with service(stuck) as door:
            await ask(door)
            stuck.behave = hang
            asked = begin(door)
            await stuck.got(2)
            await hear(door, stuck, 29.0)
            assert door.report().hung == ()
            await hear(door, stuck, 31.0)
            assert door.report().hung == ("stuck",)
            healthy = await FakeReplica("healthy", Call.done).open()
            door.update(routes(version(1, [healthy]), revision=2))
            assert (await asked).status == 200

    run(test)


def test_suspects_behind_a_slow_one_are_sent_elsewhere():
    async def test():
        slow, second = FakeReplica("slow", lambda call: call.done(times=(0, 0, 0.1))), FakeReplica("second")
        async with service(slow) as door:
            await ask(door)
            slow.behave = hang
            link = door.fleet.versions[1].pools[0].links[slow.endpoint]
            first, behind = (Hop(Journey(door.now() + 30), b"1", Content.JSON, Content.JSON, alone=True, hangs=1) for _ in range(2))
            for hop in (first, behind):
                link.send(hop)
            (await slow.got(2)).started()
            await slow.got(3)
            await second.open()
            door.update(routes(version(1, [slow, second]), revision=2))
            await until(lambda: len(door.fleet.versions[1].pools[0].usable) == 2)
            await hear(door, slow, 40.0)
            assert not isinstance(await behind.future, Failure)
            assert door.report().hung == () and first.link is link  # which is given its time
            first.withdraw(GONE)

    run(test)


def test_before_any_call_has_ended_a_long_one_is_nothing_odd():
    async def test():
        replica = FakeReplica(behave=hang)
        replica.stats = dataclasses.replace(IDLE, oldest_call_s=20.0)
        async with service(replica) as door:
            await tick(door)
            assert door.report().hung == ()

    run(test)


def test_the_deadline_ends_a_request_whatever_the_replica_does():
    async def test():
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            reply = await ask(door, headers={"x-request-timeout": "0.02"})
            assert (reply.status, reply.code) == (504, "deadline_exceeded")
            await until(lambda: replica.cancelled == [1])
            assert door.fleet.versions[1].report.expired == 1
            assert replica.calls[0].work.left_s <= 0.02
            replica.calls[0].done()  # too late: nobody hears it
            replica.behave = Call.done
            assert (await ask(door)).status == 200

    run(test)


def test_a_client_that_goes_away_cancels_its_request():
    async def test():
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            connection = FakeConnection()
            asked = begin(door, connection=connection)
            await replica.got(1)
            connection.lose()
            assert (await asked).status == 0  # nothing was sent
            await until(lambda: replica.cancelled == [1])
            assert door.memory.held_bytes == 0
            assert door.fleet.versions[1].report.in_flight == 0

    run(test)


def test_a_replica_off_the_routes_finishes_what_it_has():
    async def test():
        old, new = FakeReplica("old", hang), FakeReplica("new")
        async with service(old) as door:
            asked = begin(door)
            call = await old.got(1)
            await new.open()
            door.update(routes(version(1, [new]), revision=2))
            await until(lambda: door.fleet.versions[1].open)
            assert (await ask(door)).status == 200
            assert old.connections
            call.done(b'{"by":"old"}')
            assert (await asked).body == b'{"by":"old"}'
            await until(lambda: not old.connections)
            assert len(new.calls) == 1

    run(test)


def test_a_draining_replica_gets_nothing_more_and_what_it_refuses_waits():
    async def test():
        old = FakeReplica("old", hang)
        async with service(old) as door:
            asked = [begin(door) for _ in range(2)]
            await old.got(2)
            old.drain()
            await until(lambda: not door.fleet.versions[1].open)
            old.calls[0].busy()  # it crossed with the DRAIN: not a reason to shed
            old.calls[1].done()
            assert (await asked[1]).status == 200
            new = await FakeReplica("new").open()
            door.update(routes(version(1, [new]), revision=2))
            assert (await asked[0]).status == 200

    run(test)


def test_requests_that_wait_for_a_version_that_goes_are_answered_by_another():
    async def test():
        gone, stays = FakeReplica("gone"), FakeReplica("stays", named("stays"))
        async with several(lambda: [version(1, []), version(2, [stays], weight=0)], [gone, stays], ready=False) as door:
            asked = [begin(door), begin(door, headers={"x-headrace-version": "1"})]
            await until(lambda: door.fleet.versions[1].waiting() == 2)
            door.update(routes(version(2, [stays]), revision=2))
            reply = await asked[0]
            assert (reply.status, reply.headers["x-headrace-version"]) == (200, "2")
            assert (await asked[1]).status == 503  # it wanted that very version

    run(test)


def test_a_version_without_replicas_is_passed_over_for_one_that_has_them():
    async def test():
        replica = FakeReplica()
        async with several(lambda: [version(1, [replica], weight=0.01), version(2, [], weight=0.99)], [replica], ready=False) as door:
            await until(lambda: door.fleet.versions[1].open)
            assert {(await ask(door)).headers["x-headrace-version"] for _ in range(10)} == {"1"}

    run(test)


def test_groups_are_passed_in_order_with_arrow_between_them():
    async def test():
        first = FakeReplica("first", lambda call: call.done(b"ARROW", rows=2))
        second = FakeReplica("second", lambda call: call.done(b"{}", rows=2))
        async with several(lambda: [version(1, [first], [second])], [first, second]) as door:
            reply = await ask(door, b"[]")
            assert reply.status == 200
            assert reply.headers["server-timing"] == "queue;dur=2.00, wait;dur=4.00, compute;dur=6.00"
            assert (first.calls[0].work.content, first.calls[0].work.accept) == (Content.JSON, Content.ARROW)
            assert (second.calls[0].work.content, second.calls[0].work.accept, second.calls[0].body) == (Content.ARROW, Content.JSON, b"ARROW")
            assert door.report().hops.keys() == {(1, "g0"), (1, "g1")}

    run(test)


def test_what_one_group_has_computed_waits_for_the_next_and_new_requests_are_shed_meanwhile():
    async def test():
        first, second = FakeReplica("first"), FakeReplica("second", busy)
        async with several(lambda: [version(1, [first], [second])], [first, second]) as door:
            asked = begin(door)
            await until(door.fleet.versions[1].saturated)
            assert (await ask(door)).status == 429
            assert len(first.calls) == 1
            second.behave = Call.done
            assert (await asked).status == 200

    run(test)


def test_a_replica_that_talks_nonsense_is_left():
    async def test():
        odd, other = FakeReplica("odd", lambda call: call.connection.transport.write(b"HTTP/1.1 200 OK\r\n\r\n" * 9)), FakeReplica("other")
        async with service(odd) as door:
            asked = begin(door)
            await odd.got(1)
            await other.open()
            door.update(routes(version(1, [other]), revision=2))
            assert (await asked).status == 200

    run(test)


def test_a_lost_connection_is_made_again():
    async def test():
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            asked = begin(door)
            await replica.got(1)
            replica.die()
            await until(lambda: not door.fleet.versions[1].open)
            replica.behave = Call.done
            await replica.open()
            assert (await asked).status == 200
            assert replica.frames.count(Kind.WORK) == 2

    run(test)


def test_a_door_that_closes_finishes_what_it_has():
    async def test():
        replica = FakeReplica(behave=hang)
        async with service(replica) as door:
            asked = begin(door)
            call = await replica.got(1)
            closing = asyncio.get_running_loop().create_task(door.close(timeout_s=5))
            await asyncio.sleep(0)
            assert (await ask(door)).status == 503
            call.done()
            await closing
            assert (await asked).status == 200
            await until(lambda: not replica.connections)

    run(test)


def test_the_budget_grows_with_what_is_answered():
    async def test():
        async with service(FakeReplica(), limits=Limits()) as door:
            door.retries.tokens = 0.0
            for _ in range(5):
                await ask(door)
            assert door.retries.tokens == pytest.approx(1.0)
            door.retries.tokens = retries.MOST_TOKENS
            await ask(door)
            assert door.retries.tokens == retries.MOST_TOKENS

    run(test)
