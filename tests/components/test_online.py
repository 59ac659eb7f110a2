"""A door and real replicas in one process: what a client gets for what it sends."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator

import httpx2
import pyarrow as pa
import pytest

import headrace as hr
from headrace.serving.bodies import openapi
from headrace.serving.door.app import Door
from headrace.serving.door.server import DoorServer
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.routes import Endpoint, GroupRoute, Limits, Routes, VersionRoute

ARROW = "application/vnd.apache.arrow.stream"


@hr.stage(out={"words": int, "clean": str})
def tidy(text: hr.Column[str]):
    return {"words": [len(each.split()) for each in text], "clean": [" ".join(each.split()) for each in text]}


@hr.stage(out={"score": float})
def judge(clean: hr.Column[str], weight: hr.Column[float | None]):
    for each in clean:
        if each == "crash":
            raise ValueError("no judgement of a crash")
    return {"score": [float(len(each)) * (1.0 if factor is None else factor) for each, factor in zip(clean, weight, strict=True)]}


PIPELINE = hr.Pipeline("reviews", tidy, judge)


class Service:
    """A pipeline's stages in replicas, one or several groups, behind a door."""

    def __init__(self, door: Door, url: str) -> None:
        self.door, self.url = door, url
        self.client = httpx2.Client(base_url=url, timeout=10)

    def post(self, value=None, **options) -> httpx2.Response:
        if value is not None:
            options["json"] = value
        return self.client.post("/reviews", **options)


def replicas(apart: bool, limits: Limits) -> list[ReplicaServer]:
    """One replica with both stages, or one with each."""
    reads, outputs = dict(PIPELINE.inputs), dict(PIPELINE.outputs)
    if not apart:
        return [ReplicaServer(PIPELINE.stages, reads=reads, carries=outputs, group="both", limits=limits)]
    first, second = PIPELINE.stages
    between = {**dict(first.writes), "weight": reads["weight"]}
    return [
        ReplicaServer([first], reads=reads, carries=between, group="tidy", limits=limits),
        ReplicaServer([second], reads=between, carries=outputs, group="judge", limits=limits),
    ]


@contextlib.contextmanager
def running(*, apart: bool, limits: Limits) -> Iterator[Service]:
    servers = replicas(apart, limits)
    groups = []
    for at, server in enumerate(servers):
        server.warm_up(None)
        host, port = server.start()
        groups.append(GroupRoute(f"g{at}", (Endpoint(f"r{at}", host, port),)))
    door = Door("reviews")
    front = DoorServer(door)
    url = f"http://127.0.0.1:{front.start()}"
    front.call(door.update, Routes("reviews", 1, (VersionRoute(1, 1.0, tuple(groups), openapi.contract(PIPELINE)),), limits))
    service = Service(door, url)
    while service.client.get("/readyz").status_code != 200:
        threading.Event().wait(0.002)
    try:
        yield service
    finally:
        service.client.close()
        front.stop(1)
        for server in servers:
            server.close()


@pytest.fixture(scope="module", params=[False, True], ids=["one group", "two groups"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with running(apart=request.param, limits=Limits(rows=100, body_bytes=100_000)) as it:
        yield it


ROWS = [{"text": " a  good one "}, {"text": "bad", "weight": 2}, {"text": "", "weight": 0.5}]
ANSWERS = PIPELINE.local([{"weight": None, **row} for row in ROWS])


def outputs(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in PIPELINE.outputs} for row in rows]


def test_one_row(service: Service):
    reply = service.post(ROWS[0])
    assert (reply.status_code, reply.json()) == (200, outputs(ANSWERS)[0])
    assert "compute;dur=" in reply.headers["server-timing"] and reply.headers["x-headrace-version"] == "1"


def test_rows(service: Service):
    assert service.post({"rows": ROWS}).json() == {"rows": outputs(ANSWERS)}
    assert service.post({"rows": []}).json() == {"rows": []}


def test_arrow_both_ways(service: Service):
    table = pa.table({"text": [row["text"] for row in ROWS], "weight": pa.array([None, 2.0, 0.5])})
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    reply = service.post(content=out.getvalue(), headers={"content-type": ARROW, "accept": ARROW})
    assert (reply.status_code, reply.headers["content-type"]) == (200, ARROW)
    assert pa.ipc.open_stream(reply.content).read_all().to_pylist() == outputs(ANSWERS)
    assert service.post(content=out.getvalue(), headers={"content-type": ARROW}).json() == {"rows": outputs(ANSWERS)}
    reply = service.post({"rows": ROWS}, headers={"accept": ARROW})
    assert pa.ipc.open_stream(reply.content).read_all().num_rows == 3


def test_lines(service: Service):
    body = b"\n".join(json.dumps(row).encode() for row in ROWS) + b'\n{"text": 5}\n{"text": "crash"}\n{"text": "last"}'
    reply = service.post(content=body, headers={"content-type": "application/x-ndjson"})
    got = [json.loads(line) for line in reply.content.splitlines()]
    assert got[:3] == outputs(ANSWERS)
    assert [line["error"]["code"] for line in got[3:5]] == ["invalid_row", "stage_failed"]
    assert got[3]["error"]["details"][0]["loc"] == ["text"]
    assert got[5] == {name: {"words": 1, "clean": "last", "score": 4.0}[name] for name in PIPELINE.outputs}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"text": 5}', 422, "invalid_row"),
        (b'{"txt": "a"}', 422, "invalid_row"),
        (b'{"rows": [{"text": "a"}, {"text": null}]}', 422, "invalid_row"),
        (b'{"rows": [' + b",".join([b'{"text":"a"}'] * 101) + b"]}", 413, "too_large"),
        (b'{"text": "', 400, "not_json"),
        (b"", 400, "not_json"),
        (b"[" * 50_000, 400, "not_json"),
        (b'{"text": "\xff"}', 400, "not_json"),
        (b'{"text": "' + b"x" * 100_000 + b'"}', 413, "too_large"),
    ],
)
def test_wrong_bodies(service: Service, body: bytes, status: int, code: str):
    reply = service.post(content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert service.post(ROWS[0]).status_code == 200


def test_a_stage_that_raises_fails_its_request_and_no_other(service: Service):
    reply = service.post({"rows": [{"text": "fine"}, {"text": "crash"}]})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (500, "stage_failed")
    assert "judge" in error["message"] and "no judgement of a crash" in error["message"] and ".py" not in error["message"]
    assert service.post(ROWS[0]).status_code == 200


def test_priorities_and_deadlines_are_taken(service: Service):
    for priority in ("interactive", "normal", "batch"):
        assert service.post(ROWS[0], headers={"x-priority": priority, "x-request-timeout": "5"}).status_code == 200
    assert service.post(ROWS[0], headers={"deadline": "2001-01-01T00:00:00Z"}).status_code == 504


def test_many_at_once_are_answered_each_with_its_own(service: Service):
    failed: list[object] = []

    def ask(at: int) -> None:
        with httpx2.Client(base_url=service.url, timeout=10) as client:
            for turn in range(10):
                text = f"{base64.b16encode(bytes([at, turn])).decode()} x"
                reply = client.post("/reviews", json={"text": text})
                if reply.status_code != 200 or reply.json()["clean"] != text:
                    failed.append((at, turn, reply.status_code, reply.text))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed
    assert service.door.memory.held_bytes == 0


def test_the_contract_is_served(service: Service):
    schema = service.client.get("/reviews/schema").json()
    assert schema["required"] == ["text"]
    assert service.post(schema["sample"]).status_code == 200
    assert "/reviews" in service.client.get("/openapi.json").json()["paths"]
    assert service.client.get("/docs").status_code == 200
    assert 'headrace_group_compute_seconds_count{service="reviews"' in service.client.get("/metrics").text
