"""Batches behind OpenAI's Batch API: from the order to the files of results."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from batches import CHAT, Clock, FakeEngine, ask, depot_in, order, over, request_line, requests, shown, text_of, until, upload, working
from test_gateway_files import served

from headrace.errors import StorageError
from headrace.gateway.batches import results
from headrace.gateway.batches.lines import Answered, Line, Lost, Outcome, Retry
from headrace.gateway.batches.records import Usage
from headrace.gateway.batches.results import Results


async def ran(tmp_path: Path, content: bytes, engine: FakeEngine | None = None, **limits: float) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """A batch once it is over, its output, and its errors."""
    with depot_in(tmp_path, **limits) as depot:
        batch = await order(depot, content)
        async with working(depot, engine or FakeEngine()):
            found = await over(depot, batch)
        return found, await text_of(depot, found["output_file_id"]), await text_of(depot, found["error_file_id"])


def test_a_batch_is_answered_line_by_line(tmp_path: Path):
    async def test():
        engine = FakeEngine()
        with depot_in(tmp_path) as depot:
            batch = await order(depot, requests(1000), metadata={"a": "b"}, output_expires_after={"anchor": "created_at", "seconds": 7200})
            begun = await shown(depot, batch)
            assert (begun["status"], begun["request_counts"]["total"], begun["output_file_id"]) == ("validating", 0, None)
            async with working(depot, engine):
                found = await over(depot, batch)
            times = dict.fromkeys(("in_progress_at", "finalizing_at", "completed_at"), 1_800_000_000)
            times |= dict.fromkeys(("failed_at", "expired_at", "cancelling_at", "cancelled_at"))
            assert found == begun | times | {
                "status": "completed",
                "model": "m",
                "output_file_id": found["output_file_id"],
                "request_counts": {"total": 1000, "completed": 1000, "failed": 0},
                "usage": {
                    "input_tokens": 500_500,
                    "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens": 1000,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": 501_500,
                },
            }
            output = await text_of(depot, found["output_file_id"])
            name = f"batch_req_{batch[6:22]}000003e8"
            assert {line["custom_id"]: line for line in output}["r1000"] == {
                "id": name,
                "custom_id": "r1000",
                "response": {"status_code": 200, "request_id": name, "body": {"id": "x", "echo": "r1000", "usage": {"times": 1}}},
                "error": None,
            }
            assert sorted(line["custom_id"] for line in output) == sorted(f"r{number}" for number in range(1, 1001))
            file = (await ask(depot, "GET", f"/v1/files/{found['output_file_id']}")).value
            assert (file["purpose"], file["filename"], file["expires_at"]) == ("batch_output", f"{batch}_output.jsonl", 1_800_007_200)
            assert sorted(engine.booked) == sorted(f"batch:{batch}:{number}" for number in range(1, 1001))
            assert {charge.owner for charge in engine.booked.values()} == {"ann"}
        assert engine.most_under_way <= 8
        assert len(list((tmp_path / "contents").iterdir())) == 2  # the input and the output; no errors, no file for them

    asyncio.run(test())


def test_openais_own_client_brings_a_batch_to_its_end(tmp_path: Path):
    openai = pytest.importorskip("openai")
    with depot_in(tmp_path) as depot, served(depot, key="ann") as url, openai.OpenAI(base_url=url, api_key="key", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", requests(20)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

        async def work():
            async with working(depot, FakeEngine(lambda line, _: Answered(200 if line.number % 2 else 400, b"{}", Usage(1, 2, 3, 4)))):
                await over(depot, batch.id)

        worker = threading.Thread(target=lambda: asyncio.run(work()))
        worker.start()
        worker.join()
        done = client.batches.retrieve(batch.id)
        assert (done.status, done.request_counts.completed, done.request_counts.failed, done.request_counts.total) == ("completed", 10, 10, 20)
        assert (done.usage.total_tokens, done.usage.input_tokens_details.cached_tokens, done.usage.output_tokens_details.reasoning_tokens) == (60, 60, 80)
        output, errors = (client.files.content(name).text.splitlines() for name in (done.output_file_id, done.error_file_id))
        assert {json.loads(line)["response"]["status_code"] for line in output} == {200}
        assert {json.loads(line)["response"]["status_code"] for line in errors} == {400}
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
            client.batches.cancel(batch.id)

        batch = client.batches.create(input_file_id=client.files.create(file=b"{}", purpose="batch").id, endpoint=CHAT, completion_window="24h")
        worker = threading.Thread(target=lambda: asyncio.run(work()))
        worker.start()
        worker.join()
        done = client.batches.retrieve(batch.id)
        assert (done.status, done.errors.data[0].code, done.errors.data[0].line) == ("failed", "missing_required_parameter", 1)


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"", [("empty_file", None, None)]),
        (b"nonsense\n" + requests(1), [("invalid_json_line", 1, None)]),
        (requests(1) + b"\n" + request_line("x"), [("invalid_json_line", 2, None)]),
        (requests(1) + b"[1]", [("invalid_json_line", 2, None)]),
        (requests(1) + b'{"custom_id":"\xff"}', [("invalid_json_line", 2, None)]),
        (requests(1) + b'{"custom_id":"\0"}', [("invalid_json_line", 2, None)]),
        (requests(1) + b'{"a":' * 30_000, [("invalid_json_line", 2, None)]),
        (requests(1) + b"[" * 99_000 + b"]" * 99_000, [("invalid_json_line", 2, None)]),
        (requests(1) + b"x" * 300_000 + b"\n" + b"y", [("line_too_long", 2, None), ("invalid_json_line", 3, None)]),
        (b"{}", [("missing_required_parameter", 1, name) for name in ("custom_id", "method", "url", "body")]),
        (b'{"custom_id":1,"method":[],"url":null,"body":"x"}', [("invalid_type", 1, name) for name in ("custom_id", "method", "url", "body")]),
        (requests(2).replace(b"POST", b"GET", 1), [("invalid_method", 1, "method")]),
        (requests(1) + request_line("x", url="/v1/embeddings"), [("invalid_url", 2, "url")]),
        (requests(1) + request_line("x", model=None), [("missing_required_parameter", 2, "body.model")]),
        (requests(1) + request_line("x", model="n"), [("mismatched_model", 2, "body.model")]),
        (requests(1) + request_line("x", stream=True), [("invalid_value", 2, "body.stream")]),
        (request_line("") + request_line("x" * 513), [("invalid_value", 1, "custom_id"), ("invalid_value", 2, "custom_id")]),
        (requests(3) + requests(2) + b"x", [("duplicate_custom_id", 4, "custom_id"), ("duplicate_custom_id", 5, "custom_id"), ("invalid_json_line", 6, None)]),
        (request_line("x") * 300, [("duplicate_custom_id", number, "custom_id") for number in range(2, 102)]),
        (b"x\n" * 300, [("invalid_json_line", number, None) for number in range(1, 101)]),
        (requests(2001), [("too_many_lines", None, None)]),
    ],
)
def test_a_file_that_is_not_fit_fails_with_its_lines(tmp_path: Path, content: bytes, faults: list[tuple[str, int | None, str | None]]):
    async def test():
        engine = FakeEngine()
        found, output, errors = await ran(tmp_path, content, engine, line_bytes=200_000, lines=2000)
        assert (found["status"], found["failed_at"], found["in_progress_at"]) == ("failed", 1_800_000_000, None)
        assert found["errors"]["object"] == "list" and all(fault["message"] for fault in found["errors"]["data"])
        assert [(fault["code"], fault["line"], fault["param"]) for fault in found["errors"]["data"]] == faults
        assert found["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
        assert not engine.sent and not output and not errors

    asyncio.run(test())


def test_a_line_of_a_hundred_megabytes_costs_no_memory(tmp_path: Path):
    class Endless:
        """A file of one line that has no end for long."""

        left = 100 << 20

        def readline(self, most: int) -> bytes:
            size = min(most, self.left)
            assert size <= 1 << 20
            self.left -= size
            return b"x" * size

    from headrace.gateway.batches.lines import Lines

    assert Lines(Endless(), line_bytes=1000).take() == [(1, None)]  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_the_last_line_needs_no_end(tmp_path: Path, end: bytes):
    found, output, _ = asyncio.run(ran(tmp_path, requests(3).replace(b"\n", b"\r\n").removesuffix(b"\r\n") + end))
    assert found["status"] == "completed" and len(output) == 3


def test_what_becomes_of_a_line(tmp_path: Path):
    def behave(line: Line, times: int) -> Outcome:
        return {
            "r1": Answered(404, b'{"error":{"message":"no such model"}}', request_id='re"q'),
            "r2": Answered(200, b'{\n"pretty": 1.50\r\n}', Usage(1, 1)),
            "r3": Answered(500, b"{}") if times < 3 else FakeEngine.good(line, times),
            "r4": Answered(502, b"<html>\xff"),
            "r5": Lost("its replica died"),
            "r6": Lost("its replica died") if times < 5 else FakeEngine.good(line, times),
            "r7": Answered(429 if times % 2 else 503, b"") if times < 9 else FakeEngine.good(line, times),
            "r8": Retry(0.001) if times < 30 else FakeEngine.good(line, times),
            "r9": Answered(200, b"nonsense"),
        }[line.custom_id]

    async def test():
        engine = FakeEngine(behave)
        found, output, errors = await ran(tmp_path, requests(9), engine, most_retry_s=0.002)
        assert found["request_counts"] == {"total": 9, "completed": 5, "failed": 4}
        good = {line["custom_id"]: line["response"]["body"] for line in output}
        assert good.keys() == {"r2", "r3", "r6", "r7", "r8"} and good["r2"] == {"pretty": 1.5}
        bad = {line["custom_id"]: (line["response"], line["error"]) for line in errors}
        assert bad["r1"] == ({"status_code": 404, "request_id": 're"q', "body": {"error": {"message": "no such model"}}}, None)
        assert (bad["r4"][0]["status_code"], bad["r4"][0]["body"]["error"]["message"]) == (502, "<html>\ufffd")
        assert bad["r5"] == (None, {"code": "server_error", "message": "There was no answer after 5 attempts: its replica died"})
        assert bad["r9"] == (None, {"code": "server_error", "message": "There was no answer after 5 attempts: the answer was not JSON"})
        assert [engine.sent[number] for number in range(1, 10)] == [1, 1, 3, 5, 5, 5, 9, 30, 5]
        assert {charge.line: charge.usage.output_tokens for charge in engine.booked.values()} == {2: 1, 3: 3, 6: 5, 7: 9, 8: 30}

    asyncio.run(test())


def test_batches_wait_while_there_are_no_slots(tmp_path: Path):
    async def test():
        slots, gate, engine = 0, asyncio.Event(), FakeEngine()

        async def behave(line: Line, times: int) -> Outcome:
            await gate.wait()
            return FakeEngine.good(line, times)

        engine.behave = behave
        with depot_in(tmp_path) as depot:
            batches = [await order(depot, requests(30), owner=owner) for owner in ("ann", "bob")]
            async with working(depot, engine, lambda: slots):

                async def under_way(count: int) -> bool:
                    return engine.under_way == count

                await until(lambda: asyncio.sleep(0.05, True))
                assert not engine.sent
                slots = 4
                await until(lambda: under_way(4))
                slots = 0  # interactive traffic comes: those at the engine end, no other begins
                gate.set()
                await until(lambda: under_way(0))
                await asyncio.sleep(0.05)
                assert engine.sent.total() == 4
                slots = 3
                for batch, owner in zip(batches, ("ann", "bob"), strict=True):
                    assert (await over(depot, batch, owner))["request_counts"]["completed"] == 30
            assert engine.most_under_way == 4

    asyncio.run(test())


def halted(tmp_path: Path, window: str = "24h"):
    """A batch of 20 lines of which 5 are done and 3 at the engine, which answer once `gate` is set."""
    clock, gate = Clock(), asyncio.Event()

    async def behave(line: Line, times: int) -> Outcome:
        if line.number > 5:
            await gate.wait()
        return FakeEngine.good(line, times)

    return clock, gate, FakeEngine(behave), depot_in(tmp_path, clock, grace_s=0.12)


async def begun(depot: Any, batch: str, engine: FakeEngine) -> bool:
    return (await shown(depot, batch))["request_counts"]["completed"] == 5 and engine.under_way == 3


@pytest.mark.parametrize(("answered", "done"), [(True, 8), (False, 5)])
@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_what_is_cancelled_or_expires_keeps_what_is_done(tmp_path: Path, status: str, answered: bool, done: int):
    async def test():
        clock, gate, engine, depot = halted(tmp_path)
        with depot:
            batch = await order(depot, requests(20), window="2h")
            async with working(depot, engine, lambda: 3):
                await until(lambda: begun(depot, batch, engine))
                if status == "cancelled":
                    told = await ask(depot, "POST", f"/v1/batches/{batch}/cancel")
                    assert (told.status, told.value["status"], told.value["cancelling_at"]) == (200, "cancelling", 1_800_000_000)
                    assert (await ask(depot, "POST", f"/v1/batches/{batch}/cancel")).status == 200
                else:
                    clock.now += 7200
                if answered:
                    await asyncio.sleep(0.03)  # the worker has seen it, and its grace lasts
                    gate.set()
                found = await over(depot, batch)
            assert (found["status"], found[f"{status}_at"]) == (status, int(clock.now))
            assert found["request_counts"] == {"total": 20, "completed": done, "failed": 20 - done}
            output, errors = await text_of(depot, found["output_file_id"]), await text_of(depot, found["error_file_id"])
            assert {line["custom_id"] for line in output} | {line["custom_id"] for line in errors} == {f"r{number}" for number in range(1, 21)}
            assert len(output) == done == len(engine.booked) and len(errors) == 20 - done
            assert {line["error"]["code"] for line in errors} == {f"batch_{status}"} and {line["response"] for line in errors} == {None}
            assert (await ask(depot, "POST", f"/v1/batches/{batch}/cancel")).status == (200 if status == "cancelled" else 409)

    asyncio.run(test())


def test_a_worker_that_stops_leaves_the_rest_to_the_next(tmp_path: Path):
    async def test():
        _, gate, engine, depot = halted(tmp_path)
        with depot:
            batch = await order(depot, requests(20))
            async with working(depot, engine, lambda: 3) as stopping:
                await until(lambda: begun(depot, batch, engine))
                stopping.set()
                await asyncio.sleep(0.05)
                gate.set()
            assert (await shown(depot, batch))["status"] == "in_progress"
            assert (await shown(depot, batch))["request_counts"]["completed"] == 8
            async with working(depot, engine, lambda: 3):
                found = await over(depot, batch)
            assert found["request_counts"]["completed"] == 20 == len(await text_of(depot, found["output_file_id"]))
            assert set(engine.sent.values()) == {1}

    asyncio.run(test())


def test_one_worker_at_a_time_has_a_batch(tmp_path: Path):
    async def test():
        engine = FakeEngine()
        with depot_in(tmp_path) as one, depot_in(tmp_path) as other:
            batches = [await order(one, requests(200)) for _ in range(4)]
            async with working(one, engine), working(other, engine), working(other, engine):
                found = [await over(one, batch) for batch in batches]
            assert [len(await text_of(other, batch["output_file_id"])) for batch in found] == [200] * 4
            assert len(engine.booked) == 800 == engine.sent.total()

    asyncio.run(test())


def test_owners_have_turns(tmp_path: Path):
    async def test():
        engine = FakeEngine()
        with depot_in(tmp_path, runs=2) as depot:
            first = [await order(depot, requests(1), owner="ann") for _ in range(3)]
            last = await order(depot, requests(1), owner="bob")
            slots = 0
            async with working(depot, engine, lambda: slots):

                async def taken() -> bool:
                    return all([(await shown(depot, batch, owner))["status"] == "in_progress" for batch, owner in ((first[0], "ann"), (last, "bob"))])

                await until(taken)
                assert [(await shown(depot, batch))["status"] for batch in first] == ["in_progress", "validating", "validating"]
                slots = 1
                for batch in first:
                    await over(depot, batch)

    asyncio.run(test())


@pytest.mark.parametrize("step", ["cancelled", "expired"])
def test_a_batch_may_end_before_anybody_took_it(tmp_path: Path, step: str):
    async def test():
        clock = Clock()
        with depot_in(tmp_path, clock) as depot:
            batch = await order(depot, requests(3))
            if step == "cancelled":
                await ask(depot, "POST", f"/v1/batches/{batch}/cancel")
            else:
                clock.now += 86_400
            engine = FakeEngine()
            async with working(depot, engine):
                found = await over(depot, batch)
            assert found["status"] == step and not engine.sent
            left = 0 if step == "cancelled" else 3  # nobody had looked whether there were lines
            assert len(await text_of(depot, found["error_file_id"])) == left == found["request_counts"]["failed"]

    asyncio.run(test())


def test_a_full_disk_holds_a_run_up_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def test():
        engine, failed = FakeEngine(), 0
        add = Results.add

        def full(self: Results, group: Any) -> Any:
            nonlocal failed
            failed += 1
            if failed % 3:
                raise StorageError("the disk is full")
            return add(self, group)

        monkeypatch.setattr(results.Results, "add", full)
        found, output, _ = await ran(tmp_path, requests(100), engine, open_lines=10)
        assert (found["status"], len(output), failed > 3) == ("completed", 100, True)
        assert set(engine.sent.values()) == {1} and len(engine.booked) == 100

    asyncio.run(test())


def test_a_run_that_fails_is_taken_up_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test():
        failed = 0

        def behave(line: Line, times: int) -> Outcome:
            nonlocal failed
            if line.number == 50 and failed < 2:
                failed += 1
                raise RuntimeError("a mistake in the engine's adapter")
            return FakeEngine.good(line, times)

        found, output, _ = await ran(tmp_path, requests(100), FakeEngine(behave))
        assert (found["status"], len(output)) == ("completed", 100)
        assert "its run failed" in caplog.text and "a mistake in the engine's adapter" in caplog.text

    asyncio.run(test())


def test_a_bill_that_cannot_be_written_holds_a_run_up(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Forgetful(FakeEngine):
        failed = 0

        async def book(self, charges: Any) -> None:
            self.failed += 1
            if self.failed <= 3:
                raise FileNotFoundError("the bill")
            await super().book(charges)

    engine = Forgetful()
    found, output, _ = asyncio.run(ran(tmp_path, requests(100), engine))
    assert (found["status"], len(output), len(engine.booked)) == ("completed", 100, 100)
    assert caplog.text.count("its run failed") == 3

    told = {line["custom_id"]: line["response"]["body"]["usage"]["times"] for line in output}
    assert told == {f"r{charge.line}": charge.usage.output_tokens for charge in engine.booked.values()}


def test_a_batch_whose_input_is_gone_fails(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            batch = await order(depot, requests(3))
            depot.shelf.delete((await shown(depot, batch))["input_file_id"])
            async with working(depot, FakeEngine()):
                found = await over(depot, batch)
            assert (found["status"], found["errors"]["data"][0]["code"]) == ("failed", "file_not_found")

    asyncio.run(test())


def test_results_that_the_disk_has_lost_are_not_papered_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def test():
        _, _, engine, depot = halted(tmp_path)
        with depot:
            batch = await order(depot, requests(20))
            async with working(depot, engine, lambda: 3) as stopping:
                await until(lambda: begun(depot, batch, engine))
                stopping.set()
            output = depot.catalog.batch(batch).output_id
            (tmp_path / "contents" / output).write_bytes(b"")
            async with working(depot, engine, lambda: 3):
                await until(lambda: asyncio.sleep(0.01, "has 0 bytes, but" in caplog.text))
            assert (await shown(depot, batch))["status"] == "in_progress"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"input_file_id": None}, (400, "invalid_type", "input_file_id")),
        ({"input_file_id": "file-x"}, (400, "file_not_found", "input_file_id")),
        ({"endpoint": "/v1/responses"}, (400, "invalid_value", "endpoint")),
        ({"completion_window": "0h"}, (400, "invalid_value", "completion_window")),
        ({"completion_window": "169h"}, (400, "invalid_value", "completion_window")),
        ({"completion_window": "1d"}, (400, "invalid_value", "completion_window")),
        ({"metadata": []}, (400, "invalid_value", "metadata")),
        ({"metadata": {"a": 1}}, (400, "invalid_value", "metadata")),
        ({"metadata": {"a" * 65: ""}}, (400, "invalid_value", "metadata")),
        ({"metadata": {"a": "b" * 513}}, (400, "invalid_value", "metadata")),
        ({"metadata": {str(at): "" for at in range(17)}}, (400, "invalid_value", "metadata")),
        ({"output_expires_after": 5}, (400, "invalid_type", "output_expires_after")),
        ({"output_expires_after": {"anchor": "created_at", "seconds": True}}, (400, "invalid_value", "output_expires_after.seconds")),
        ({"output_expires_after": {"anchor": "later", "seconds": 3600}}, (400, "invalid_value", "output_expires_after.anchor")),
    ],
)
def test_an_order_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, Any], error: tuple[int, str, str]):
    async def test():
        with depot_in(tmp_path) as depot:
            good = {"input_file_id": await upload(depot, requests(1)), "endpoint": CHAT, "completion_window": "24h"}
            assert (await ask(depot, "POST", "/v1/batches", good | change)).error == error
            for name in good:
                less = {key: value for key, value in good.items() if key != name}
                assert (await ask(depot, "POST", "/v1/batches", less)).error == (400, "missing_required_parameter", name)
            assert (await ask(depot, "GET", "/v1/batches")).value["data"] == []

    asyncio.run(test())


def test_an_order_is_bounded(tmp_path: Path):
    async def test():
        with depot_in(tmp_path, live_batches=2) as depot:
            for body in ([], "x", {"input_file_id": "x" * 2_000_000}):
                assert (await ask(depot, "POST", "/v1/batches", body)).status in (400, 413)
            for _ in range(2):
                await order(depot, requests(1))
            with pytest.raises(AssertionError, match="batch_limit_exceeded"):
                await order(depot, requests(1))
            await order(depot, requests(1), owner="bob")

    asyncio.run(test())


def test_batches_are_listed_by_pages_and_for_their_owner(tmp_path: Path):
    async def test():
        with depot_in(tmp_path) as depot:
            batches = [await order(depot, requests(1)) for _ in range(3)]
            page = (await ask(depot, "GET", "/v1/batches", limit=2)).value
            assert ([one["id"] for one in page["data"]], page["has_more"]) == (batches[:0:-1], True)
            page = (await ask(depot, "GET", "/v1/batches", limit=2, after=page["last_id"])).value
            assert ([one["id"] for one in page["data"]], page["has_more"]) == (batches[:1], False)
            assert (await ask(depot, "GET", "/v1/batches", limit=101)).error == (400, "invalid_value", "limit")
            assert (await ask(depot, "GET", "/v1/batches", after="x")).error == (400, "invalid_value", "after")
            for method, path in (("GET", ""), ("POST", "/cancel")):
                assert (await ask(depot, method, f"/v1/batches/{batches[0]}{path}", owner="bob")).error == (404, None, "id")
            assert (await ask(depot, "GET", "/v1/batches", owner="bob")).value["data"] == []

    asyncio.run(test())
