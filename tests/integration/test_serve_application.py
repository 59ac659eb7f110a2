"""A pipeline as a native application of Ray Serve: by handle, behind Serve's proxy, and as the version of a service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.cli.loading import load
from headrace.errors import DefinitionError, FailedError, RowError
from headrace.hardware import Cluster, Node
from headrace.on_ray import compat, deployments
from headrace.on_ray.naming import NAMESPACE, control_name
from headrace.on_ray.serve import application
from headrace.plan import resolve
from headrace.scaling.policy import Scale
from headrace.serving.door.heads import ARROW_TYPE
from headrace.serving.replica.caller import Caller
from headrace.serving.replica.jobs import Busy
from headrace.serving.routes import Endpoint, Limits
from headrace.serving.wire import Content, Work

ARROW = ARROW_TYPE.decode()
WAIT_S = 60
LIMITS = Limits(body_bytes=1 << 20, rows=8, deadline_s=20)


@hr.stage(out={"words": list[str]})
def split(text: hr.Column[str]):
    if "boom" in text:
        raise ValueError("no boom here")
    return {"words": [t.split() for t in text]}


@hr.stage(out={"vector": hr.Vector(2), "process": int, "threads": str}, apart=True, batch=4)
class Embed:
    scale: float = 1.0

    def setup(self, device: str):
        self.device = device

    def __call__(self, words: hr.Column[list[str]]):
        time.sleep(max(float(w[0][4:]) if w and w[0].startswith("wait") else 0 for w in words))
        vectors = np.array([[len(w), sum(map(len, w))] for w in words], np.float32) * self.scale
        return {"vector": vectors, "process": [os.getpid()] * len(words), "threads": [os.environ.get("OMP_NUM_THREADS", "")] * len(words)}


@hr.stage(out={"first": str})
def first(words: hr.Column[list[str]]):
    return {"first": [w[0] if w else "" for w in words]}


TWO = hr.Pipeline("two", split, Embed(scale=2.0), first, outputs=["first", "vector", "process", "threads"])
ONE = hr.Pipeline("one", split, first)
EIGHT = Cluster((Node("one", cpus=8),))


@pytest.fixture(scope="module")
def serving(shared_ray: None) -> Iterator[str]:
    """Serve with a proxy of its own; its URL."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": free})
    try:
        yield f"http://127.0.0.1:{free}"
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def two(serving: str) -> Iterator[tuple[Any, str]]:
    """The pipeline of three groups, deployed: its handle and its URL."""
    from ray import serve

    handle = serve.run(hr.serve(TWO, limits=LIMITS), name="two", route_prefix="/two")
    yield handle, serving + "/two"
    handle.shutdown()  # or its thread goes on when Ray is gone
    serve.delete("two")


def ask(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of the answer to a POST."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def until(found: Callable[[], Any]) -> Any:
    """What `found` returns, once that is true."""
    deadline_s = time.monotonic() + WAIT_S
    while not (answer := found()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return answer


def test_rows_by_handle(two: tuple[Any, str]):
    """Rows in, rows out, in order; one mapping gives one; columns have the types that `local` gives."""
    handle, _ = two
    rows = [{"text": text} for text in ("a bc", "", "def g hij")]
    found, local = handle.remote(rows).result(), TWO.local(rows)
    assert [row["first"] for row in found] == ["a", "", "def"]
    assert all(np.array_equal(one["vector"], other["vector"]) and one["vector"].dtype == np.float32 for one, other in zip(found, local, strict=True))
    assert handle.remote(rows[0]).result()["first"] == "a"
    assert found[0]["process"] != os.getpid() and found[0]["threads"] == "1"
    assert handle.remote([]).result() == []


def test_mistakes_by_handle(two: tuple[Any, str]):
    """As `hr.Client` raises them."""
    handle, _ = two
    with pytest.raises(RowError, match="no column 'text'"):
        handle.remote({"txt": "a"}).result()
    with pytest.raises(FailedError, match="no boom here"):
        handle.remote({"text": "boom"}).result()


def test_http_behind_serves_own_proxy(two: tuple[Any, str]):
    """JSON and Arrow, one row and several, as a service answers."""
    _, url = two
    status, headers, body = ask(url, b'{"text": "a bc"}', x_request_id="mine")
    answer = json.loads(body)
    assert (status, headers["x-request-id"], answer["first"], answer["vector"]) == (200, "mine", "a", [4.0, 6.0])
    status, _, body = ask(url, b'{"rows": [{"text": "a"}, {"text": "b c"}]}')
    assert [row["first"] for row in json.loads(body)["rows"]] == ["a", "b"]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["a", "b c"]}))
    status, headers, body = ask(url, sink.getvalue().to_pybytes(), content_type=ARROW, accept=ARROW)
    table = pa.ipc.open_stream(body).read_all()
    assert (status, headers["content-type"]) == (200, ARROW)
    assert (table["first"].to_pylist(), table.schema.field("vector").type) == (["a", "b"], pa.list_(pa.float32(), 2))
    with urllib.request.urlopen(url + "/schema", timeout=WAIT_S) as answer:
        assert list(json.load(answer)["inputs"]) == ["text"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "not_json"),
        (b"{", {}, 400, "not_json"),
        (b'{"text": 3}', {}, 422, "invalid_row"),
        (b'{"txt": "a"}', {}, 422, "invalid_row"),
        (b'{"rows": [{"text": "a"}, {"text": null}]}', {}, 422, "invalid_row"),
        (json.dumps({"rows": [{"text": "a"}] * 9}).encode(), {}, 413, "too_large"),
        (b'{"text": "' + b"a" * (1 << 20) + b'"}', {}, 413, "too_large"),
        (b"a,b", {"content_type": "text/csv"}, 415, "unsupported_media_type"),
        (b'{"text": "a"}', {"content_type": "application/x-ndjson"}, 415, "unsupported_media_type"),
        (b'{"text": "a"}', {"accept": "text/event-stream"}, 406, "not_acceptable"),
        (b'{"text": "a"}', {"x_request_timeout": "soon"}, 400, "bad_header"),
        (b'{"text": "boom"}', {}, 500, "stage_failed"),
        (b'{"text": "wait1.5"}', {"x_request_timeout": "0.3"}, 504, "deadline_exceeded"),
    ],
)
def test_mistakes_over_http(two: tuple[Any, str], body: bytes, headers: dict[str, str], status: int, code: str):
    """The statuses and bodies of a service."""
    found, _, answer = ask(two[1], body, **headers)
    error = json.loads(answer)
    assert (found, error["error"]["code"]) == (status, code), answer
    assert error["request_id"] and error["error"]["message"]


def test_many_at_once_share_calls(two: tuple[Any, str]):
    """Requests that come while a call is under way are answered together."""
    handle, _ = two
    answers = [handle.remote({"text": f"wait0.2 {n}"}) for n in range(16)]
    began_s = time.monotonic()
    assert [answer.result()["first"] for answer in answers] == ["wait0.2"] * 16
    assert time.monotonic() - began_s < 16 * 0.2


def test_what_serve_cannot_take_is_refused(shared_ray: None):
    """A plan for a batch job, and Ray arguments that only tasks have: before anything is deployed."""
    with pytest.raises(DefinitionError, match="resolve it with online=True"):
        hr.serve(resolve(ONE, EIGHT))
    odd = hr.stage(out={"first": str}, ray={"max_retries": 3})(first)
    with pytest.raises(DefinitionError, match="group 'first' cannot be deployed: .*max_retries"):
        hr.serve(hr.Pipeline("odd", odd))


def test_a_replica_asks_ray_for_what_its_group_needs():
    """The hardware chosen, and a stage's own arguments as they stand."""
    heavy = hr.stage(out={"first": str}, on=[hr.gpu(0.5, "L4", cpus=2, memory_gb=3)], ray={"resources": {"slot": 1}})(first)
    plan = resolve(hr.Pipeline("heavy", split, heavy), Cluster((Node("one", cpus=8, gpus=1, kinds=("L4",)),)), online=True)
    made = application(plan, service="svc", version=1, limits=LIMITS, scales={group.name: Scale(1, 2) for group in plan.groups})
    options = made._bound_deployment
    asked = {"num_cpus": 2, "num_gpus": 0.5, "accelerator_type": "L4", "memory": 3e9, "resources": {"slot": 1}}
    assert (options.name, {name: options.ray_actor_options[name] for name in asked}) == ("split+first", asked)


@pytest.fixture
def control(serving: str) -> Iterator[Callable[[], dict[str, Endpoint]]]:
    """What control would hear: the latest announcement of each replica."""
    import ray

    @ray.remote(num_cpus=0)
    class Control:
        def __init__(self) -> None:
            self.heard: dict[str, Any] = {}

        def joined(self, version: int, group: str, endpoint: Endpoint) -> None:
            self.heard[endpoint.replica] = (version, group, endpoint)

        def all(self) -> dict[str, Any]:
            return self.heard

    actor = Control.options(name=control_name("svc"), namespace=NAMESPACE).remote()
    yield lambda: ray.get(actor.all.remote())
    ray.kill(actor)


@pytest.fixture
def version(serving: str) -> Iterator[Callable[..., Callable[[], dict[str, deployments.Deployed]]]]:
    """Deploys a pipeline as version 1 of a service, and gives what tells how it fares. It is gone after the test."""

    def begin(pipeline: hr.Pipeline, **least: int) -> Callable[[], dict[str, deployments.Deployed]]:
        plan = resolve(pipeline, EIGHT, online=True)
        scales = {group.name: Scale(least.get(group.name, 1), 8) for group in plan.groups}
        deployments.deploy(application(plan, service="svc", version=1, limits=LIMITS, scales=scales), "svc-1")
        return lambda: deployments.deployed().get("svc-1", {})

    yield begin
    deployments.delete("svc-1")
    until(lambda: "svc-1" not in deployments.deployed())


def running(seen: deployments.Deployed) -> set[int]:
    """The processes of its replicas, if those that it is to have run and no other is left, else none."""
    pids = {replica.pid for replica in seen.replicas if replica.state == "RUNNING" and replica.pid}
    return pids if len(seen.replicas) == len(pids) == seen.target else set()


def call(endpoint: Endpoint, *rows: dict[str, Any]) -> Any:
    """What a replica answers to rows, as a door would ask it."""

    async def ask() -> Any:
        caller = Caller(endpoint.host, endpoint.port, endpoint.token)
        try:
            return await caller.ask(Work(Content.JSON, Content.JSON), json.dumps({"rows": rows}).encode())
        finally:
            caller.close()

    return json.loads(bytes(asyncio.run(ask())))["rows"]


def test_replicas_announce_themselves_and_scale(version: Any, control: Any):
    """Each tells control where it listens; their number changes without a restart, down to none and up again."""
    seen = version(TWO)
    until(lambda: all(running(group) for group in seen().values()) and seen())
    assert set(seen()) == {"split", "embed", "first"}
    heard = until(lambda: len(control()) == 3 and control())
    assert {(number, group) for number, group, _ in heard.values()} == {(1, "split"), (1, "embed"), (1, "first")}
    endpoint = next(endpoint for _, group, endpoint in heard.values() if group == "split")
    assert call(endpoint, {"text": "a b"}) == [{"words": ["a", "b"]}]
    assert endpoint.host == compat.node_address() and {endpoint.pid} == running(seen()["split"])
    deployments.scale("svc-1", "split", 2)
    both = until(lambda: seen()["split"].target == 2 and running(seen()["split"]))
    assert endpoint.pid in both
    deployments.scale("svc-1", "split", 0)
    until(lambda: not seen()["split"].replicas)
    deployments.scale("svc-1", "split", 1)
    assert until(lambda: running(seen()["split"])).isdisjoint(both)
    for name in ("svc-1", "svc-9"):
        with pytest.raises(LookupError, match="'nowhere'"):
            deployments.scale(name, "nowhere", 1)


@pytest.mark.parametrize("stopped", [False, True], ids=["alive", "stopped"])
def test_a_killed_replica_is_replaced(version: Any, stopped: bool):
    """Even one that SIGSTOP has stopped ends at once, and Serve starts another."""
    seen = version(ONE)
    until(lambda: seen() and running(seen()["split+first"]))
    (replica,) = seen()["split+first"].replicas
    if stopped:
        os.kill(replica.pid, signal.SIGSTOP)
    began_s = time.monotonic()
    deployments.kill(replica)
    until(lambda: not Path(f"/proc/{replica.pid}").exists())
    assert time.monotonic() - began_s < 4
    until(lambda: running(seen()["split+first"]) - {replica.pid})


def test_a_process_that_is_another_is_not_killed():
    """A process number may be used again by the time that the order arrives."""
    deployments.end_process(os.getpid(), "ray::ServeReplica:svc-1:split")


def test_what_was_taken_is_answered_before_a_replica_ends(version: Any, control: Any):
    """On deletion a replica refuses new work and finishes what it has, however long that takes."""
    seen = version(TWO)
    until(lambda: all(running(group) for group in seen().values()) and seen())
    endpoint = until(lambda: [endpoint for _, group, endpoint in control().values() if group == "embed"])[0]

    async def ask() -> Any:
        caller = Caller(endpoint.host, endpoint.port, endpoint.token)
        answer = asyncio.create_task(caller.ask(Work(Content.JSON, Content.JSON), b'{"words": ["wait4"]}'))
        await asyncio.sleep(0.5)
        deployments.delete("svc-1")
        await asyncio.sleep(1.5)
        try:
            return await answer, await caller.ask(Work(Content.JSON, Content.JSON), b'{"words": ["a"]}')
        finally:
            caller.close()

    answered, refused = asyncio.run(ask())
    assert json.loads(bytes(answered))["process"] == endpoint.pid
    assert isinstance(refused, Busy) or refused.status == 503
    until(lambda: not Path(f"/proc/{endpoint.pid}").exists())


@hr.stage(out={"y": str})
class Broken:
    dies: bool = False

    def setup(self, device: str):
        if self.dies:
            os._exit(3)
        raise FileNotFoundError("no weights here")

    def __call__(self, text: hr.Column[str]):
        return {"y": text}


def test_why_a_version_cannot_start(version: Any):
    """The user's error with the user's own frames, once Serve gives up, and after each try before."""
    seen = version(hr.Pipeline("broken", Broken()))
    failed = until(lambda: seen().get("broken") and seen()["broken"].failed)
    assert failed.endswith("stage 'broken' setup failed: FileNotFoundError: no weights here")
    assert "test_serve_application.py" in failed and "replica.py" not in failed


def test_a_set_up_that_ends_the_process_is_told_too(version: Any):
    seen = version(hr.Pipeline("dying", Broken(dies=True)))
    assert "its process ended while it started" in until(lambda: seen().get("broken") and seen()["broken"].failed)


def test_a_version_keeps_its_code(version: Any, control: Any, tmp_path: Path):
    """A replica that is started after the file has changed runs the code that was deployed, modules beside the file included."""
    (tmp_path / "beside_it.py").write_text("def mark(text):\n    return text + ' old'\n")
    file = tmp_path / "my-pipeline.py"
    file.write_text(
        "import headrace as hr\nimport beside_it\n\n@hr.stage(out={'y': str})\ndef mark(text: hr.Column[str]):\n"
        "    return {'y': [beside_it.mark(t) for t in text]}\n\nmarked = hr.Pipeline('marked', mark)\n"
    )
    seen = version(load(str(file)))
    until(lambda: seen() and running(seen()["mark"]))
    (tmp_path / "beside_it.py").unlink()
    file.unlink()
    deployments.kill(seen()["mark"].replicas[0])
    first = set(control())
    endpoint = until(lambda: [control()[name][2] for name in set(control()) - first])[0]
    assert call(endpoint, {"text": "a"}) == [{"y": "a old"}]
