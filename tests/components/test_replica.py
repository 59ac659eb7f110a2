"""A replica's server: frames in, frames out, over real sockets."""

import asyncio
import contextlib
import threading
import time

import orjson
import pyarrow as pa
import pytest
from serving_doors import Peer, serving, until, visit

import headrace as hr
from headrace.errors import StageError
from headrace.serving.replica import hearing
from headrace.serving.replica import server as replica
from headrace.serving.replica.parsing import LARGE_BYTES
from headrace.serving.replica.station import Stations
from headrace.serving.routes import Limits
from headrace.serving.wire import Content, Kind, encode


@hr.stage(out={"loud": str})
def shout(text: hr.Column[str]):
    return {"loud": [one.upper() for one in text]}


SHOUT = hr.Pipeline("shout", shout)


class Gate:
    """A stage that computes when it is let, and remembers what it was called with."""

    def __init__(self, batch=4):
        self.open, self.calls, self.entered = threading.Event(), [], threading.Event()
        gate = self

        @hr.stage(out={"y": int}, batch=batch, name="held")
        def held(x: hr.Column[int]):
            gate.calls.append(list(map(int, x)))
            gate.entered.set()
            assert gate.open.wait(20)
            return {"y": [2 * int(one) for one in x]}

        self.pipeline = hr.Pipeline("held", held)

    async def busy(self, peer, x=0):
        """Have the stage under way with this row."""
        number = peer.ask({"x": x})
        await until(self.entered.is_set)
        return number


def takes(server, seconds):
    """Make the replica believe that a row takes so long."""
    server._floor.stations[0].pace.add(seconds, 1, 1)


def test_a_row_is_answered_with_where_its_time_went():
    async def scenario(peer):
        peer.ask({"text": "one"})
        return await peer.next()

    with serving(SHOUT) as server:
        frame = visit(server, scenario)
    assert frame.kind is Kind.DONE
    assert orjson.loads(frame.body) == {"loud": "ONE"}
    rows, queue_s, wait_s, compute_s, batch_rows = frame.head
    assert (rows, wait_s, batch_rows) == (1, 0, 1)
    assert queue_s >= 0
    assert compute_s > 0


def test_many_requests_at_once_each_get_their_own_answer():
    async def scenario(peer):
        numbers = [peer.ask({"text": f"t{at}"}) if at % 2 else peer.ask({"rows": [{"text": f"t{at}"}, {"text": "x"}]}) for at in range(60)]
        return numbers, await peer.answers(60)

    with serving(SHOUT) as server:
        numbers, answers = visit(server, scenario)
        assert server.stats().rows == 90
    for at, number in enumerate(numbers):
        assert answers[number] == ({"loud": f"T{at}"} if at % 2 else {"rows": [{"loud": f"T{at}"}, {"loud": "X"}]})


def test_arrow_goes_in_and_out():
    sink = pa.BufferOutputStream()
    data = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)

    async def scenario(peer):
        peer.ask(sink.getvalue().to_pybytes(), content=Content.ARROW, accept=Content.ARROW)
        return await peer.next()

    with serving(SHOUT) as server:
        frame = visit(server, scenario)
    assert pa.ipc.open_stream(frame.body).read_all().to_pydict() == {"loud": ["A", "B"]}


def test_no_rows_are_no_work():
    async def scenario(peer):
        return await peer.call({"rows": []})

    gate = Gate()
    with serving(gate.pipeline) as server:
        assert visit(server, scenario) == {"rows": []}
    assert not gate.calls


def test_what_is_wrong_with_a_body_is_said():
    async def scenario(peer):
        return await peer.call(b"{"), await peer.call({"text": 5}), await peer.call({"text": "fine"})

    with serving(SHOUT) as server:
        (_, broken), (_, wrong), fine = visit(server, scenario)
    assert broken[:2] == [400, "not_json"]
    assert wrong[:2] == [422, "invalid_row"]
    assert wrong[3][0]["loc"] == ["text"]
    assert fine == {"loud": "FINE"}


def test_a_large_body_is_parsed_aside_and_answered():
    text = "x" * LARGE_BYTES

    async def scenario(peer):
        large, small = peer.ask({"text": text}), peer.ask({"text": "b"})
        answers = await peer.answers(2)
        return answers[large], answers[small], await peer.call(b"[" + text.encode())

    with serving(SHOUT) as server:
        large, small, (kind, failure) = visit(server, scenario)
    assert large == {"loud": text.upper()}
    assert small == {"loud": "B"}
    assert (kind, failure[0]) == (Kind.FAIL, 400)


def test_a_free_replica_waits_for_no_company_and_a_busy_one_gathers_it():
    gate = Gate(batch=8)

    async def scenario(peer):
        await gate.busy(peer, 1)
        for x in range(2, 8):
            peer.ask({"x": x})
        await until(lambda: server.stats().queued == 6)
        gate.open.set()
        return await peer.answers(7)

    with serving(gate.pipeline) as server:
        answers = visit(server, scenario)
        stats = server.stats()
    assert answers == {x: {"y": 2 * x} for x in range(1, 8)}
    assert gate.calls == [[1], [2, 3, 4, 5, 6, 7]]
    assert (stats.rows, stats.calls, stats.filled) == (7, 2, 7 / 8)


def test_better_classes_go_first():
    gate = Gate(batch=1)

    async def scenario(peer):
        await gate.busy(peer)
        for x, priority in ((1, 2), (2, 1), (3, 0), (4, 1), (5, 0)):
            peer.ask({"x": x}, priority=priority)
        await until(lambda: server.stats().queued == 5)
        gate.open.set()
        await peer.answers(6)

    with serving(gate.pipeline) as server:
        takes(server, 0.001)
        visit(server, scenario)
    assert gate.calls == [[0], [3], [5], [2], [4], [1]]


def test_a_request_that_is_too_late_is_not_computed():
    gate = Gate()

    async def scenario(peer):
        first, late, good = await gate.busy(peer), peer.ask({"x": 1}, left_s=0.0), peer.ask({"x": 2}, left_s=60.0)
        await until(lambda: server.stats().queued == 2)
        gate.open.set()
        answers = await peer.answers(3)
        return answers[late], answers[good], answers[first]

    with serving(gate.pipeline) as server:
        (kind, failure), good, _ = visit(server, scenario)
    assert (kind, failure[:2]) == (Kind.FAIL, [504, "deadline_exceeded"])
    assert good == {"y": 4}
    assert gate.calls == [[0], [2]]


def test_a_cancelled_request_is_neither_computed_nor_answered():
    gate = Gate()

    async def scenario(peer):
        under_way, waiting, good = await gate.busy(peer), peer.ask({"x": 1}), peer.ask({"x": 2})
        for number in (under_way, waiting, 999):
            peer.send(Kind.CANCEL, number)
        await until(lambda: server.stats().in_flight == 1)
        gate.open.set()
        return good, await peer.answers(1)

    with serving(gate.pipeline) as server:
        good, answers = visit(server, scenario)
        floor = server._floor
        assert (floor.stations[0].backlog, floor._held_bytes) == (0, 0)
    assert answers == {good: {"y": 4}}
    assert gate.calls == [[0], [2]]


def test_a_full_replica_says_busy_and_when_it_may_not_be():
    gate = Gate(batch=1)

    async def scenario(peer):
        await gate.busy(peer)
        takes(server, 1.0)
        peer.ask({"x": 1}), peer.ask({"x": 2})
        await until(lambda: server.stats().queued == 2)
        answer = await peer.call({"x": 3})
        worst = await peer.call({"x": 4}, priority=2)
        suspect = peer.ask({"x": 5}, alone=True)  # was accepted long ago, and lost its replica
        await until(lambda: server.stats().in_flight == 4)
        gate.open.set()
        answers = await peer.answers(4)
        return answer, worst, answers[suspect]

    with serving(gate.pipeline, limits=Limits(latency_s=2.5)) as server:
        answer, worst, suspect = visit(server, scenario)
    assert answer[0] is Kind.BUSY
    assert 1 < answer[1][0] < 4
    assert worst[0] is Kind.BUSY
    assert suspect == {"y": 10}


def test_a_better_request_takes_the_place_of_the_newest_of_a_worse_class():
    gate = Gate(batch=1)

    async def scenario(one, other):
        await gate.busy(one)
        takes(server, 1.0)
        old = one.ask({"x": 1}, priority=2)
        await until(lambda: server.stats().queued == 1)
        new = other.ask({"x": 2}, priority=2)
        await until(lambda: server.stats().queued == 2)
        good = one.ask({"x": 3})
        out = await other.answers(1)
        much = await one.call({"rows": [{"x": 4}, {"x": 5}, {"x": 6}]}, priority=0)  # more than all that would go for it
        gate.open.set()
        answers = await one.answers(3)
        return out[new], much, answers[old], answers[good]

    with serving(gate.pipeline, limits=Limits(latency_s=2.5)) as server:
        out, much, old, good = visit(server, scenario, peers=2)
    assert out[0] is Kind.BUSY
    assert (old, good) == ({"y": 2}, {"y": 6})
    assert much[0] is Kind.BUSY
    assert gate.calls == [[0], [3], [1]]


def test_requests_that_ask_for_it_are_computed_alone_and_say_so_before():
    gate = Gate(batch=8)

    async def scenario(peer):
        await gate.busy(peer)
        lone = [peer.ask({"x": x}, alone=True) for x in (1, 2)]
        peer.ask({"x": 3}), peer.ask({"x": 4})
        await until(lambda: server.stats().queued == 4)
        gate.entered.clear()
        gate.open.set()
        started = [await peer.next(Kind.STARTED, Kind.DONE) for _ in range(6)]
        return lone, started, await peer.answers(1)

    with serving(gate.pipeline) as server:
        lone, frames, _ = visit(server, scenario)
    assert gate.calls == [[0], [1], [2], [3, 4]]
    assert [frame.number for frame in frames if frame.kind is Kind.STARTED] == lone
    assert [(frame.kind, frame.number) for frame in frames[:5]] == [
        (Kind.DONE, 1),
        (Kind.STARTED, 2),
        (Kind.DONE, 2),
        (Kind.STARTED, 3),
        (Kind.DONE, 3),
    ]


def test_the_door_knows_that_a_lone_computation_begins_before_the_code_does():
    """The stage goes on only when the door has heard of its beginning."""
    gate = Gate()

    async def scenario(peer):
        number = peer.ask({"x": 1}, alone=True)
        frame = await peer.next()
        assert (frame.kind, frame.number) == (Kind.STARTED, number)
        await until(lambda: gate.calls == [[1]])
        gate.open.set()
        return await peer.answers(1)

    with serving(gate.pipeline) as server:
        assert visit(server, scenario) == {1: {"y": 2}}


def test_draining_finishes_what_was_taken_and_takes_nothing_more():
    gate = Gate()

    async def scenario(peer, other):
        await gate.busy(peer)
        waiting = peer.ask({"x": 1})
        await until(lambda: server.stats().queued == 1)
        drained = asyncio.get_running_loop().run_in_executor(None, server.drain, 20)
        assert (await peer.next()).kind is Kind.DRAIN
        assert (await other.next()).kind is Kind.DRAIN
        late = Peer(*await asyncio.open_connection(*address(other)))
        assert (await late.next()).kind is Kind.DRAIN
        await late.close()
        refused = await other.call({"x": 2})
        assert not drained.done()
        gate.open.set()
        answers = await peer.answers(2)
        return refused, answers[waiting], await drained, server.stats()

    with serving(gate.pipeline) as server:
        refused, waiting, drained, stats = visit(server, scenario, peers=2)
    assert refused[0] is Kind.BUSY
    assert waiting == {"y": 2}
    assert drained
    assert stats.draining
    assert gate.calls == [[0], [1]]


def address(peer):
    return peer.writer.get_extra_info("peername")


def test_draining_in_vain_says_so():
    gate = Gate()

    async def scenario(peer):
        await gate.busy(peer)
        drained = await asyncio.get_running_loop().run_in_executor(None, server.drain, 0.01)
        gate.open.set()
        await peer.answers(1)
        return drained

    with serving(gate.pipeline) as server:
        assert not visit(server, scenario)


def test_a_ping_is_answered_while_a_stage_computes():
    gate = Gate()

    async def scenario(peer):
        await gate.busy(peer)
        peer.ask({"rows": [{"x": 1}, {"x": 2}]})
        peer.send(Kind.PING)
        frame = await peer.next(Kind.PONG)
        gate.open.set()
        await peer.answers(2)
        return frame.head

    with serving(gate.pipeline) as server:
        stats = visit(server, scenario)
    assert (stats["in_flight"], stats["queued"], stats["calls"], stats["draining"]) == (2, 1, 0, False)
    assert stats["oldest_call_s"] > 0
    assert stats["memory_bytes"] > 1 << 20


def test_a_pong_comes_unasked(monkeypatch):
    monkeypatch.setattr(replica, "_PONG_S", 0.01)

    async def scenario(peer):
        return [(await peer.next(Kind.PONG)).head["rows"] for _ in range(3)]

    with serving(SHOUT) as server:
        assert visit(server, scenario) == [0, 0, 0]


@pytest.mark.parametrize(
    "send",
    [
        lambda peer: peer.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        lambda peer: peer.send(Kind.DONE, 1),
        lambda peer: peer.send(Kind.WORK, 1, ()),
        lambda peer: peer.send(Kind.WORK, 1, (7, 0, None, 1, False, None, "")),
        lambda peer: peer.send(Kind.WORK, 1, (0, 0, "soon", 1, False, None, "")),
        lambda peer: peer.send(Kind.WORK, 1, 5),
        lambda peer: peer.writer.write(2 * b"".join(encode(Kind.WORK, 1, (0, 0, None, 1, False, None, ""), b'{"text":"a"}'))),
    ],
)
def test_a_door_that_talks_nonsense_is_cut_off_and_others_are_not(send):
    async def scenario(bad, good):
        send(bad)
        while (await bad.next()) is not None:
            pass
        return await good.call({"text": "a"})

    with serving(SHOUT) as server:
        assert visit(server, lambda bad, good: quietly(scenario(bad, good)), peers=2) == {"loud": "A"}


@contextlib.contextmanager
def sleepy():
    """A service of a function that sleeps x seconds, and the threads in which it was called."""
    names = []

    @hr.stage(out={"y": float}, name="sleepy")
    def sleepy(x: hr.Column[float]):
        names.append(threading.current_thread().name)
        time.sleep(float(x[0]))
        return {"y": x}

    with serving(hr.Pipeline("sleepy", sleepy)) as server:
        yield server, names


def test_quick_functions_are_called_by_the_loop_until_one_turns_out_slow():
    async def scenario(peer):
        for _ in range(4):
            await peer.call({"x": 0.0})
        assert set(names) == {"headrace-station"}  # it is not known yet that they are quick
        while names[-1] != "headrace-loop":  # as soon as the machine has a moment
            assert len(names) < 5_000
            await peer.call({"x": 0.0})
        await peer.call({"x": 0.05})
        count = len(names)
        for _ in range(10):
            await peer.call({"x": 0.0})
        assert set(names[count:]) == {"headrace-station"}

    with sleepy() as (server, names):
        visit(server, scenario)


def test_slow_ones_are_not():
    async def scenario(peer):
        for _ in range(12):
            await peer.call({"x": 0.002})

    with sleepy() as (server, names):
        visit(server, scenario)
    assert set(names) == {"headrace-station"}


def test_a_mistake_of_ours_in_the_loop_costs_the_connection_and_no_more(monkeypatch):
    async def scenario(door, other):
        with monkeypatch.context() as patch:
            patch.setattr(Stations, "compute_here", lambda stations, job: 1 / 0)
            door.ask({"text": "a"})
            assert await ended(door)
        return await other.call({"text": "a"})  # answers are sent as before

    with serving(SHOUT) as server:
        assert visit(server, lambda door, other: quietly(scenario(door, other)), peers=2) == {"loud": "A"}


def test_a_request_that_is_to_be_announced_is_not():
    async def scenario(peer):
        for _ in range(20):
            await peer.call({"x": 0.0}, alone=True)

    with sleepy() as (server, names):
        visit(server, scenario)
    assert set(names) == {"headrace-station"}


def test_others_begin_when_the_answer_of_one_that_was_alone_is_out_of_the_process(monkeypatch):
    gate, out = Gate(), threading.Event()
    monkeypatch.setattr(hearing.Connection, "written", lambda connection: out.is_set())

    async def scenario(peer):
        gate.open.set()
        first, second = peer.ask({"x": 1}, alone=True), peer.ask({"x": 2})
        assert await peer.answers(1) == {first: {"y": 2}}
        await asyncio.sleep(0.05)
        assert gate.calls == [[1]]
        out.set()
        return await peer.answers(1) == {second: {"y": 4}}

    with serving(gate.pipeline) as server:
        assert visit(server, scenario)


def test_a_model_that_waits_takes_several_calls_at_once_and_is_set_up_once():
    made = []

    @hr.stage(out={"y": int}, batch=1, concurrency=3)
    class Meeting:
        def setup(self, device):
            made.append(self)
            self.barrier = threading.Barrier(3, timeout=20)

        def __call__(self, x: hr.Column[int]):
            self.barrier.wait()
            return {"y": x * 2}

    async def scenario(peer):
        found = {}
        for first in (0, 3):  # a replica that has measured nothing yet takes as many as it can begin on at once
            for x in range(first, first + 3):
                peer.ask({"x": x})
            found |= await peer.answers(3)
        return found

    with serving(hr.Pipeline("meeting", Meeting())) as server:
        assert visit(server, scenario) == {number: {"y": 2 * number - 2} for number in range(1, 7)}
    assert len(made) == 1


@pytest.mark.parametrize(
    "send",
    [
        lambda peer: peer.ask({"text": "a"}),
        lambda peer: peer.send(Kind.PING),
        lambda peer: peer.send(Kind.HELLO, head=("another",)),
        lambda peer: peer.send(Kind.HELLO, head=()),
        lambda peer: peer.send(Kind.HELLO, head=(7,)),
        lambda peer: peer.send(Kind.HELLO, head=7),
        lambda peer: peer.writer.write(b"".join(encode(Kind.WORK, 1, (), b"x" * 5_000))[:2_000]),
        lambda peer: None,
    ],
)
def test_whoever_does_not_name_the_token_is_cut_off(send, monkeypatch):
    monkeypatch.setattr(hearing, "_UNKNOWN_S", 0.5)

    async def scenario(stranger, door):
        send(stranger)
        door.send(Kind.HELLO, head=("secret",))
        assert await ended(stranger)  # and was not told anything
        return await door.call({"text": "a"})

    with serving(SHOUT, token="secret") as server:
        assert visit(server, lambda stranger, door: quietly(scenario(stranger, door)), peers=2) == {"loud": "A"}


async def ended(peer):
    """Whether the connection ends before anything is heard."""
    try:
        return await asyncio.wait_for(peer.reader.read(1), 20) == b""
    except ConnectionResetError:
        return True


async def quietly(steps):
    try:
        return await steps
    except ConnectionResetError:
        pytest.fail("the connection was reset while it was read")


def test_the_requests_of_a_lost_door_are_not_computed():
    gate = Gate()

    async def scenario(lost, other):
        await gate.busy(lost)
        lost.ask({"x": 1})
        await until(lambda: server.stats().queued == 1)
        lost.writer.transport.abort()
        await until(lambda: server.stats().in_flight == 0)
        good = other.ask({"x": 2})
        await until(lambda: server.stats().queued == 1)
        gate.open.set()
        return (await other.answers(1))[good]

    with serving(gate.pipeline) as server:
        assert visit(server, scenario, peers=2) == {"y": 4}
    assert gate.calls == [[0], [2]]


def test_a_door_that_does_not_listen_is_not_read_from_and_others_are_served(monkeypatch):
    monkeypatch.setattr(hearing, "_HIGH_BYTES", 1 << 16)
    text = "x" * 100_000

    async def scenario(deaf, other):
        deaf.writer.transport.pause_reading()
        for _ in range(100):
            deaf.ask({"text": text})
        await until(lambda: any(not connection.transport.is_reading() for connection in server._connections))
        answer = await other.call({"text": "a"})
        deaf.writer.transport.resume_reading()
        return answer, len(await deaf.answers(100))

    with serving(SHOUT) as server:
        assert visit(server, scenario, peers=2) == ({"loud": "A"}, 100)


def test_a_door_that_never_listens_is_cut_off(monkeypatch):
    monkeypatch.setattr(hearing, "_HIGH_BYTES", 1 << 16)
    monkeypatch.setattr(hearing, "_DEAF_S", 0.01)
    text = "x" * 100_000

    async def scenario(deaf):
        deaf.writer.transport.pause_reading()
        for _ in range(100):
            deaf.ask({"text": text})
        await until(lambda: not server._connections)
        await until(lambda: server.stats().in_flight == 0 and not server._floor.stations[0].backlog)

    with serving(SHOUT) as server:
        visit(server, scenario)


def test_a_row_to_warm_up_with_goes_all_the_way_and_is_not_counted():
    gate = Gate()
    gate.open.set()
    with serving(gate.pipeline) as server:
        server.warm_up()
        server.warm_up({"x": 7})
        assert gate.calls == [[1], [1], [7], [7]]
        assert server.stats().rows == 0
        with pytest.raises(StageError, match="no use"):
            server.warm_up({"z": 7})


def test_a_stage_that_fails_on_the_row_to_warm_up_with_fails_the_replica():
    @hr.stage(out={"y": int})
    def broken(x: hr.Column[int]):
        raise ZeroDivisionError("never")

    with serving(hr.Pipeline("p", broken)) as server, pytest.raises(StageError, match="'broken' raised ZeroDivisionError: never") as raised:
        server.warm_up()
    assert raised.value.stage == "broken"
    assert "in broken" in raised.value.frames


def test_a_set_up_that_fails_fails_the_replica():
    @hr.stage(out={"y": int})
    class Broken:
        how: str = "raise"

        def setup(self, device):
            if self.how == "exit":
                raise SystemExit(1)
            raise OSError("no weights")

        def __call__(self, x: hr.Column[int]):
            return {"y": x}

    before = threading.active_count()
    for how, said in (("raise", "no weights"), ("exit", "set-up ended with SystemExit")):
        with pytest.raises(StageError, match=said):
            serving(hr.Pipeline("p", Broken(how=how))).__enter__()
    assert threading.active_count() <= before + 1  # the last is about to end


def test_a_port_that_is_taken_is_an_error():
    with serving(SHOUT) as server, serving(SHOUT) as other:
        host, port = server.start()
        with pytest.raises(OSError, match="in use"):
            other.start(host, port)


def test_a_server_is_alive_from_its_start_to_its_end_and_may_be_closed_twice():
    with serving(SHOUT) as server:
        assert not server.alive
        server.start()
        assert server.alive
        server.close()
        assert not server.alive
