"""Batch jobs with an engine in the middle: the same text as `local` and online, dead letters by name, and nothing lost when the engine dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from conftest import ENGINE

import headrace as hr
from headrace.events import EngineSampled, Event
from headrace.report import Report
from headrace.serving.replica.caller import Caller
from headrace.serving.replica.server import ReplicaServer
from headrace.serving.wire import Content, Work

ROWS, TOO_LONG = 240, (17, 101, 239)


class Verdict(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]
    words: list[Literal["quiet", "clean", "near"]] = pydantic.Field(min_length=1, max_length=3)


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"keep": bool})
def rule(mood: hr.Column[str], stars: hr.Column[int]):
    return {"keep": [one == "good" and count > 1 for one, count in zip(mood, stars, strict=True)]}


def judged(model: str, **settings: Any) -> hr.Pipeline:
    judge = hr.LLM(out="said", model=model, prompt="Judge: {text}", schema=Verdict, on=hr.cpu(1), replicas=1, engine=ENGINE, **settings)
    return hr.Pipeline("reviews", clean, judge, rule)


def texts() -> list[str]:
    return ["word " * 2000 if at in TOO_LONG else f"  the {'very ' * (at % 7)}good   room {at}" for at in range(ROWS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("in") / "reviews.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "text": texts()}), path)
    return str(path)


@pytest.fixture(scope="module")
def expected(tiny: Any) -> list[dict[str, Any]]:
    """What `local` makes of the rows that are not too long: the definition of correct."""
    return judged(tiny.lm).local([{"text": text} for at, text in enumerate(texts()) if at not in TOO_LONG])


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The output's rows without their numbers, which must be all that are not too long, each once."""
    found = pq.read_table(output).sort_by("id")
    assert found["id"].to_pylist() == [at for at in range(ROWS) if at not in TOO_LONG]
    return found.drop_columns("id").to_pylist()


def run(pipeline: hr.Pipeline, source: str, output: Path, **more: Any) -> Report:
    return hr.run(pipeline, input=source, output=str(output), keep=["id"], max_dead_letters=10, price="cpu=0.04", **more)


def cores() -> Iterator[psutil.Process]:
    """The processes of engines in replicas of this Ray."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()) and "ray::" in " ".join(process.parent().cmdline()):  # type: ignore[union-attr]
                yield process


def test_a_run_gives_what_local_gives(tiny: Any, source: str, expected: list[dict[str, Any]], shared_ray: None, tmp_path: Path):
    report = run(judged(tiny.lm), source, tmp_path / "out")
    assert rows_of(tmp_path / "out") == expected
    assert report.causes == {"PromptTooLong in said": len(TOO_LONG)} and report.process_deaths == 0
    (group,) = [group for group in report.stages if group.kind == "model"]
    assert group.engine is not None and group.engine.generated_tokens > 5 * ROWS and group.engine.prompt_tokens > 5 * ROWS
    assert 0 < group.engine.kv_cache <= 1 and report.usd_per_million_tokens
    assert "tokens/s; KV cache at most" in str(report) and "vLLM" in group.notes[0]
    again = run(judged(tiny.lm), source, tmp_path / "out")
    assert "nothing to do" in str(again)


def test_a_replica_answers_what_local_gives(tiny: Any, expected: list[dict[str, Any]]):
    pipeline = judged(tiny.lm)
    server = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs)
    try:
        server.warm_up({"text": "a room"})
        host, port = server.start()
        asked = [{"text": text} for at, text in enumerate(texts()) if at not in TOO_LONG][:64]

        async def ask() -> tuple[list[Any], Any]:
            caller = Caller(host, port, "")
            work = Work(Content.JSON, Content.JSON, left_s=120.0)
            answers = await asyncio.gather(*(caller.ask(work, memoryview(json.dumps(row).encode())) for row in asked))
            return answers, await caller.ask(work, memoryview(json.dumps({"text": "word " * 2000}).encode()))

        answers, refused = asyncio.run(ask())
        assert [json.loads(bytes(answer)) for answer in answers] == expected[:64]
        assert refused.status == 500 and "PromptTooLong" in refused.message
    finally:
        server.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_loses_nothing(
    number: signal.Signals, tiny: Any, source: str, expected: list[dict[str, Any]], shared_ray: None, tmp_path: Path
):
    struck: list[psutil.Process] = []

    def watch(events: Sequence[Event], rows: int | None) -> None:
        if not struck and any(isinstance(event, EngineSampled) and event.running for event in events):
            struck.append(next(cores()))
            os.kill(struck[0].pid, number)

    slow = judged(tiny.lm, concurrency=2, stall_s=5.0)  # so that the run is still going on when it is struck
    report = run(slow, source, tmp_path / "out", watch=watch)
    assert struck and not struck[0].is_running()
    assert rows_of(tmp_path / "out") == expected
    assert report.causes == {"PromptTooLong in said": len(TOO_LONG)}
    assert report.process_deaths >= 1 or report.stages[1].replicas > 1
