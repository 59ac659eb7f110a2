"""The stations of a replica: how stages are divided, what moves between them, and what one row's fault does to others."""

import threading
from typing import Any

import numpy as np
import pytest
from serving_doors import serving, until, visit

import headrace as hr
from headrace.serving.replica.floor import divide
from headrace.serving.replica.jobs import Cut, assemble
from headrace.serving.wire import Kind


@hr.stage(out={"clean": str})
def strip(text: hr.Column[str]):
    return {"clean": [one.strip() for one in text]}


@hr.stage(out={"size": int}, batch=3)
def count(clean: hr.Column[str]):
    return {"size": [len(one) for one in clean]}


@hr.stage(out={"vector": hr.Vector(2)}, batch=4)
class Embed:
    """Notes its calls, and the thread in which it is set up and called."""

    def setup(self, device):
        self.threads, self.calls = {threading.get_ident()}, []
        SEEN.append(self)

    def __call__(self, clean: hr.Column[str], size: hr.Column[int]):
        self.threads.add(threading.get_ident())
        self.calls.append(list(clean))
        return {"vector": np.stack([size, size + 1], axis=1).astype("float32")}


SEEN = []


@hr.stage(out={"mean": float})
def mean(vector: hr.Column[hr.Vector(2)]):
    return {"mean": vector.mean(axis=1)}


def test_neighbouring_functions_share_a_station_and_each_model_has_its_own():
    @hr.stage(out={"n": int}, batch=hr.tokens(10, of="clean"))
    def measured(clean: hr.Column[str]):
        return {"n": list(map(len, clean))}

    pipeline = hr.Pipeline("p", strip, count, Embed(), mean, measured)
    names = [[stage.name for stage in run] for run in divide(pipeline.stages)]
    assert names == [["strip", "count"], ["embed"], ["mean"], ["measured"]]


def test_rows_pass_all_stations_and_come_back_in_order():
    pipeline = hr.Pipeline("p", strip, count, Embed(), mean, outputs=["mean", "clean"])
    SEEN.clear()

    async def scenario(peer):
        many = peer.ask({"rows": [{"text": " " + "x" * at} for at in range(30)]})
        some = [peer.ask({"text": "y" * at + "  "}) for at in range(10)]
        answers = await peer.answers(11)
        return answers[many], [answers[number] for number in some]

    with serving(pipeline, threads=2) as server:
        server.warm_up()
        many, some = visit(server, scenario)
        assert [station.line.rule.count for station in server._floor.stations] == [3, 4, 1024]
        assert server.stats().rows == 40
        assert all(not station.backlog and not station.busy for station in server._floor.stations)
    assert many == {"rows": [{"mean": at + 0.5, "clean": "x" * at} for at in range(30)]}
    assert some == [{"mean": at + 0.5, "clean": "y" * at} for at in range(10)]
    (model,) = SEEN
    assert len(model.threads) == 1
    assert all(len(rows) <= 4 for rows in model.calls)


def test_what_is_not_needed_any_more_is_not_passed_on():
    with serving(hr.Pipeline("p", strip, count, Embed(), mean, outputs=["mean"])) as server:
        assert [station.passes for station in server._floor.stations] == [{"clean", "size", "vector", "mean"}, {"vector", "mean"}, {"mean"}]


def test_a_table_is_copied_only_where_rows_come_from_several_places():
    import pyarrow as pa

    one, other = pa.table({"x": [0, 1, 2, 3]}), pa.table({"x": [4]})
    assert assemble([Cut(one, 0, 2), Cut(one, 2, 4)]) is one
    part = assemble([Cut(one, 1, 2), Cut(one, 2, 4)])
    assert part["x"].to_pylist() == [1, 2, 3]
    assert part["x"].chunk(0).buffers()[1].address == one["x"].chunk(0).buffers()[1].address
    assert assemble([Cut(one, 2, 4), Cut(other, 0, 1), Cut(one, 0, 1)])["x"].to_pylist() == [2, 3, 4, 0]


class Held:
    """A stage that waits at its first call, so that all that a test sends comes into the second."""

    def __init__(self, compute, *, batch=16, out=int, of=int, model=False):
        self.go, self.entered, self.calls = threading.Event(), threading.Event(), []
        held = self

        def step(x):
            held.entered.set()
            assert held.go.wait(20)
            held.calls.append(list(x))
            return {"y": compute(x)}

        if model:

            class Step:
                def __call__(self, x: hr.Column[of]):
                    return step(x)

            stage = hr.stage(out={"y": out}, batch=batch, name="step")(Step)()
        else:

            def function(x: hr.Column[of]):
                return step(x)

            stage = hr.stage(out={"y": out}, batch=batch, name="step")(function)
        self.pipeline = hr.Pipeline("p", stage)

    def ask(self, first, requests, **options):
        """The answers to those requests, which met in one call."""

        async def scenario(peer):
            peer.ask(first)
            await until(self.entered.is_set)
            numbers = [peer.ask(request) for request in requests]
            await until(lambda: server.stats().queued == len(requests))
            self.go.set()
            answers = await peer.answers(len(requests) + 1)
            self.calls.pop(0)
            return [answers[number] for number in numbers], await peer.call(first)

        with serving(self.pipeline, **options) as server:
            server._floor.stations[0].pace.add(0.0001, 1, 1)
            answers, after = visit(server, scenario)
            assert isinstance(after, dict), "the station has not survived"
            assert all(abs(station.backlog) < 1e-6 and abs(station.busy) < 1e-6 for station in server._floor.stations)
        return answers


@pytest.mark.parametrize("model", [False, True])
def test_a_row_that_raises_fails_its_own_request_alone(model):
    def compute(x):
        if 7 in x or 9 in x:
            raise ValueError(f"no {7 if 7 in x else 9}")
        return [2 * int(one) for one in x]

    held = Held(compute, model=model)
    good, bad, many, mixed = held.ask({"x": 0}, [{"x": 1}, {"x": 7}, {"rows": [{"x": 2}, {"x": 3}]}, {"rows": [{"x": 4}, {"x": 9}, {"x": 5}]}])
    assert good == {"y": 2}
    assert many == {"rows": [{"y": 4}, {"y": 6}]}
    assert bad == (Kind.FAIL, [500, "stage_failed", "stage 'step' raised ValueError: no 7", [{"loc": [], "message": "stage 'step' raised ValueError: no 7"}]])
    assert mixed[1][3] == [{"loc": ["rows", 1], "message": "stage 'step' raised ValueError: no 9"}]


def test_a_stage_that_breaks_its_contract_is_told_so():
    held = Held(lambda x: ["wrong" if one == 7 else int(one) for one in x])
    good, bad = held.ask({"x": 0}, [{"x": 1}, {"x": 7}])
    assert good == {"y": 1}
    assert "returned a wrong 'y', declared as int" in bad[1][2]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_row_ends_the_thread(error):
    def compute(x):
        if 7 in x:
            raise error("enough")
        return list(map(int, x))

    good, bad = Held(compute).ask({"x": 0}, [{"x": 1}, {"x": 7}])
    assert good == {"y": 1}
    assert bad[1][2] == f"stage 'step' raised RuntimeError: {error.__name__}(enough)"


def test_a_call_that_does_not_fit_the_memory_is_halved_for_good():
    class OutOfMemoryError(RuntimeError):
        pass

    def compute(x):
        if len(x) > 3:
            raise OutOfMemoryError
        return list(map(int, x))

    held = Held(compute, model=True)
    answers = held.ask({"x": 0}, [{"x": at} for at in range(12)])
    assert answers == [{"y": at} for at in range(12)]
    assert held.calls[0] == list(range(12))
    assert max(map(len, held.calls[4:])) <= 2


def test_a_token_budget_holds_and_rows_of_like_length_meet():
    held = Held(lambda x: list(map(len, x)), of=str, batch=hr.tokens(40, of="x", bytes_per_token=1))
    sizes = [5, 30, 5, 9, 31, 5, 10, 100, 6, 5, 5]
    answers = held.ask({"x": "x"}, [{"x": "x" * size} for size in sizes])
    assert [answer["y"] for answer in answers] == sizes
    calls = [list(map(len, rows)) for rows in held.calls[:-1]]
    assert sorted(size for rows in calls for size in rows) == sorted(sizes)
    assert all(max(rows) * len(rows) <= 40 or len(rows) == 1 for rows in calls)
    assert len(calls) == 6
    assert 5 in calls[0]


def test_rows_of_one_request_are_put_back_in_order_whatever_calls_they_were_in():
    held = Held(lambda x: list(map(len, x)), of=str, batch=hr.tokens(40, of="x", bytes_per_token=1))
    sizes = [5, 30, 1, 9, 31, 5, 10, 100, 6, 7, 8]
    many, one = held.ask({"x": "x"}, [{"rows": [{"x": "x" * size} for size in sizes]}, {"x": "xx"}])
    assert many == {"rows": [{"y": size} for size in sizes]}
    assert one == {"y": 2}


def test_values_of_unlike_types_share_no_call():
    held = Held(lambda x: [str(one) for one in x], of=Any, out=str)
    answers = held.ask({"x": 0}, [{"x": 1}, {"x": "a"}, {"x": 2}])
    assert answers == [{"y": "1"}, {"y": "a"}, {"y": "2"}]
    assert held.calls[0] == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("model", [False, True])
def test_a_mistake_in_the_replica_itself_fails_the_call_and_no_more(model, monkeypatch):
    held = Held(lambda x: list(map(int, x)), model=model)
    held.go.set()

    async def scenario(peer):
        monkeypatch.setattr(server._codec, "encode", lambda *given: 1 / 0)
        kind, failure = await peer.call({"x": 1})
        monkeypatch.setattr(server._codec, "table", lambda *given: 1 / 0)
        second, _ = await peer.call({"x": 1})
        monkeypatch.undo()
        return kind, failure[:2], second, await peer.call({"x": 2})

    with serving(held.pipeline) as server:
        assert visit(server, scenario) == (Kind.FAIL, [500, "stage_failed"], Kind.FAIL, {"y": 2})
