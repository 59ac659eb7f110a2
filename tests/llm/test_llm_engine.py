"""One real engine: OpenAI's bodies in, answers, errors and streams out; adapters, priorities, cancelling, figures, and its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import psutil
import pydantic
import pytest
from conftest import ENGINE, SOURCE

import headrace as hr
from headrace.errors import EngineLostError, SettingError
from headrace.llms.asking import EngineError, PromptTooLong
from headrace.llms.engine import Engine
from headrace.llms.options import EngineConfig
from headrace.speech import CHAT, EMBEDDINGS, FILLER, RIDER, TOKENIZE, Reply, Spent

NAME = "acme/tiny"


@pytest.fixture(scope="module")
def engine(tiny: Any) -> Iterator[Engine]:
    made = Engine.start(EngineConfig(model=tiny.lm, name=NAME, arguments=ENGINE, sequences=8, stall_s=4.0))
    assert made.figures()["prompt_tokens"] == made.figures()["generated_tokens"] == 0  # of what it was asked to get warm, nobody sees anything
    yield made
    made.close()


def body(text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0, **more}


def chat(engine: Engine, given: Any, **more: Any) -> Any:
    return engine.speak(CHAT, given, **{"spent": Spent(), **more})


def content(reply: Any) -> str:
    assert isinstance(reply, Reply) and reply.status == 200, reply
    return str(json.loads(reply.body)["choices"][0]["message"]["content"])


def test_the_same_text_alone_and_among_others_and_as_bytes(engine: Engine):
    async def together() -> list[str]:
        return [content(one) for one in await asyncio.gather(*(chat(engine, body(text)) for text in texts))]

    texts = [f"{'word ' * at}hello" for at in range(24)]
    assert engine.call(together()) == [content(engine.call(chat(engine, json.dumps(body(text)).encode()))) for text in texts]


def test_errors_have_openais_form(engine: Engine):
    def error(given: Any, **more: Any) -> tuple[int, Any]:
        reply = engine.call(chat(engine, given, **more))
        assert isinstance(reply, Reply)
        return reply.status, json.loads(reply.body)["error"]

    assert error(b'{"model":')[0] == 400 and error(b"\xff")[0] == 400
    status, told = error(body("word " * 1000))
    assert status == 400 and told["param"] == "input_tokens"
    assert error(body(temperature=-1))[0] == 400
    vectors = engine.call(engine.speak(EMBEDDINGS, {"input": "a"}, spent=Spent()))
    assert vectors.status >= 400 and "writes text" in json.loads(vectors.body)["error"]["message"]


def test_a_stream(engine: Engine):
    async def read() -> list[str]:
        return [event async for event in await chat(engine, body(stream=True))]

    events = engine.call(read())
    assert events[-1] == "data: [DONE]\n\n" and len(events) > 10
    said = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(said) == content(engine.call(chat(engine, body())))


def test_what_a_request_comes_to_is_known_also_of_one_that_ends_early(engine: Engine):
    async def early() -> tuple[Spent, Spent, int]:
        whole, part = Spent(), Spent()
        await chat(engine, body(n=2, temperature=1.0, ignore_eos=True), spent=whole)
        events = await chat(engine, body(max_tokens=200, ignore_eos=True, stream=True), spent=part)
        for _ in range(6):
            await anext(events)
        await events.aclose()
        told = await engine.speak(TOKENIZE, body(), spent=Spent())
        return whole, part, json.loads(told.body)["count"]

    whole, part, counted = engine.call(early())
    assert (whole.prompt_tokens, whole.completion_tokens) == (counted, 32) and whole.first_s > 0
    assert part.prompt_tokens == counted and 4 <= part.completion_tokens < 200


def test_cancelling_ends_the_computation(engine: Engine):
    async def cancelled() -> None:
        task = asyncio.create_task(chat(engine, body(max_tokens=400, ignore_eos=True)))
        stream = await chat(engine, body(max_tokens=400, ignore_eos=True, stream=True))
        await anext(stream)
        assert engine._client.get_num_unfinished_requests() == 2
        task.cancel()
        await stream.aclose()
        for _ in range(100):
            if not engine._client.get_num_unfinished_requests():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it goes on")

    engine.call(cancelled())


def test_priorities_go_first(engine: Engine):
    async def race() -> list[str]:
        ended: list[str] = []

        async def one(name: str, priority: int) -> None:
            await chat(engine, body(max_tokens=64, ignore_eos=True), priority=priority)
            ended.append(name)

        crowd = [asyncio.create_task(one("crowd", 5)) for _ in range(64)]
        await asyncio.sleep(0.05)
        await asyncio.gather(*crowd, asyncio.create_task(one("urgent", 0)))
        return ended

    assert engine.call(race()).index("urgent") < 40


@pytest.mark.parametrize(
    ("running", "prompts", "begun"),
    [(0, [], 0), (0, [128], 1), (0, [128] * 9, 3), (32, [128], 1), (32, [128] * 2, 1), (32, [128] * 7, 3), (100, [10] * 6, 6), (100, [40] * 5, 3)],
)
def test_prompts_take_turns(running: int, prompts: list[int], begun: int):
    """A third of what waits, or what is no longer in all than there are sequences that run, of those that take part in the step."""
    from vllm.v1.request import RequestStatus

    from headrace.llms.yielding import Yielding

    def request(tokens: int, status: RequestStatus, priority: int = 0) -> Any:
        return SimpleNamespace(num_tokens=tokens, status=status, priority=priority)

    requests = [request(200, RequestStatus.RUNNING) for _ in range(running)]
    requests += [request(tokens, RequestStatus.WAITING) for tokens in prompts] + [request(5, RequestStatus.WAITING, RIDER)] * 9
    scheduler = object.__new__(Yielding)  # of which this asks no more
    scheduler.requests, scheduler.running = dict(enumerate(requests)), requests[:running]
    assert scheduler._turn(RIDER) == begun


def test_a_prompt_with_a_seed_may_be_read_in_parts(engine: Engine):
    def tokens(words: int) -> int:  # which depends on what the tokeniser has been made of
        return int(json.loads(engine.call(engine.speak(TOKENIZE, body("word " * words), spent=Spent())).body)["count"])

    words = 400 * 100 // tokens(100)
    assert 256 < tokens(words) < 480
    asked = body("word " * words, seed=7, temperature=1.0, max_tokens=24, ignore_eos=True)
    whole = content(engine.call(chat(engine, asked)))
    parts = content(engine.call(chat(engine, {**asked, "cache_salt": "anew"}, priority=FILLER)))  # of at most 256 tokens
    assert parts == whole != content(engine.call(chat(engine, {**asked, "seed": 8})))


def test_background_sequences_wait_between_steps_and_lose_nothing(engine: Engine):
    assert engine.figures()["yields"]
    fillers, riders = [f"filler {at}" for at in range(4)], [f"rider {at}" for at in range(2)]
    longest = {"max_tokens": 200, "ignore_eos": True}
    alone = {text: content(engine.call(chat(engine, body(text, **longest)))) for text in [*fillers, *riders]}

    async def together() -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
        pieces: dict[str, list[str]] = {text: [] for text in alone}
        begun = asyncio.Event()

        async def background(text: str) -> None:
            async for event in await chat(engine, body(text, **longest, stream=True), priority=FILLER if text in fillers else RIDER):
                if event.startswith("data: {"):
                    pieces[text].append(json.loads(event[6:])["choices"][0]["delta"].get("content") or "")
                if min(map(len, pieces.values())) > 3:
                    begun.set()

        async with asyncio.TaskGroup() as group:
            for text in alone:
                group.create_task(background(text))
            await begun.wait()
            events = await chat(engine, body("who waits", max_tokens=60, ignore_eos=True, stream=True), priority=0)
            looks = [{text: len(some) for text, some in pieces.items()} async for _ in events]
        return {text: "".join(some) for text, some in pieces.items()}, looks[3], looks[50]

    texts, early, late = engine.call(together())
    assert texts == alone
    assert all(early[text] == late[text] < 150 for text in fillers)
    assert all(late[text] - early[text] > 30 for text in riders)


def test_figures_grow(engine: Engine):
    before = engine.figures()
    for _ in range(2):
        content(engine.call(chat(engine, body("word " * 150, ignore_eos=True))))
    after = engine.figures()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["generated_tokens"] == 32 and grown["prompt_tokens"] >= 300 and grown["prefix_hits"] >= 128


class Verdict(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


def test_a_stage_on_it(engine: Engine):
    """Schema, text, and faults by name, through the stage itself."""
    typed = hr.LLM(model=NAME, prompt="{text}", schema=Verdict, sampling=hr.Sampling(max_tokens=60))
    typed._engine = engine
    found = typed(text=["a good room", "a bad one"])
    assert set(found["mood"]) <= {"good", "bad"} and set(found["stars"]) <= {1, 2, 3}
    plain = hr.LLM(model=NAME, prompt="def {text}", chat=False, out="code", sampling=hr.Sampling(max_tokens=5))
    plain._engine = engine
    assert plain(text=["parse("])["code"][0]
    with pytest.raises(PromptTooLong, match="maximum context length is 512 tokens"):
        plain(text=["word " * 1000])
    wrong = hr.LLM(model=NAME, messages=_wrong_role, out="x")
    wrong._engine = engine
    with pytest.raises(EngineError):
        wrong(text=["a"])


def _wrong_role(text: str):
    return [{"role": "user", "content": {"type": "nonsense"}}]


def test_an_unknown_argument_is_told_before_anything_starts(tiny: Any):
    with pytest.raises(SettingError, match="did you mean 'max_model_len'"):
        Engine.start(EngineConfig(model=tiny.lm, name=NAME, arguments={"max_model_length": 3}))


def test_a_pipeline_with_an_adapter(tiny: Any, engine: Engine):
    """As a user has it: `lora` changes the text, and an adapter that is none is told before anything starts."""
    stage = hr.LLM(out="said", model=tiny.lm, prompt="{text}", on=hr.cpu(1), engine=ENGINE, lora=tiny.lora, sampling=hr.Sampling(max_tokens=16))
    (row,) = hr.Pipeline("p", stage).local([{"text": "hello there"}])
    assert row["said"] != content(engine.call(chat(engine, body())))
    with pytest.raises(SettingError, match="holds no adapter_config.json"):
        hr.Pipeline("p", hr.LLM(out="said", model=tiny.lm, prompt="{text}", lora=tiny.lm)).local([{"text": "a"}])


SCRIPT = """
import headrace as hr

print("once")
said = hr.LLM(out="said", model={model!r}, prompt="{{text}}", on=hr.cpu(1), engine={engine!r}, sampling=hr.Sampling(max_tokens=4))
print(len(hr.Pipeline("p", said).local([{{"text": "hello"}}])))
"""


def test_a_script_needs_no_guard(tiny: Any, tmp_path: Path):
    """The engine's processes do not run it again, though it has no `if __name__ == "__main__"`."""
    (tmp_path / "script.py").write_text(SCRIPT.format(model=tiny.lm, engine=ENGINE))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["once", "1"], done.stderr


def test_it_ends_with_all_its_processes(tiny: Any):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    stage = hr.LLM(model=tiny.embedder, embed=True, on=hr.cpu(1), engine=ENGINE)
    assert (row := hr.Pipeline("p", stage).local([{"text": "hello"}, {"text": "there"}])[0])["vector"].shape == (256,)
    assert np.isclose(np.linalg.norm(row["vector"]), 1, atol=1e-3)
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before and "tracker" not in " ".join(process.cmdline())]
    assert not left


def test_on_a_cpu_it_computes_in_the_process_that_schedules(engine: Engine):
    """With one for each, the second would use up a core by asking whether the first has ended its step."""
    core = psutil.Process(engine._client.engine_core.resources.engine_manager.processes[0].pid)
    assert not [child for child in core.children(recursive=True) if "tracker" not in " ".join(child.cmdline())]


def test_one_that_is_stopped_is_given_up_and_then_says_so(engine: Engine):
    """Last, since it is the end of the engine that the tests before share."""
    core = engine._client.engine_core.resources.engine_manager.processes[0].pid
    os.kill(core, signal.SIGSTOP)
    began_s = time.monotonic()
    with pytest.raises(EngineLostError, match="has work and made no step for 4 s"):
        engine.call(chat(engine, body()))
    assert time.monotonic() - began_s < 20 and not engine.alive and not psutil.pid_exists(core)
    with pytest.raises(EngineLostError, match="made no step"):
        engine.call(chat(engine, body()))
