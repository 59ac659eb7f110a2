"""Engines, replicas and doors that die under a load of streams: what had not begun is answered all the same, what had says that it ends too early."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import psutil
import pytest
from endpoints import Endpoint, until

STREAMS, WHOLES = 20, 20
LONG, SHORT = 300, 100  # tokens
BROKEN = (openai.APIError, httpx2.HTTPError)  # the client passes on what its transport raises in the middle of an answer
READY_S = 120  # for what has died to be there again


@dataclass
class Outcome:
    """What came of a request. `pieces` of a stream were read; `error` is what the client raised, if it did."""

    stream: bool
    question: int
    text: str = ""
    pieces: int = 0
    ended: bool = False
    error: Exception | None = None


@pytest.fixture(scope="module")
def key(talk: Endpoint) -> str:
    return talk.key("struck")


def asked(question: int, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Say: {'very ' * (question % 5)}good"}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}


async def ask(client: openai.AsyncOpenAI, outcome: Outcome, begun: asyncio.Semaphore) -> Outcome:
    try:
        if not outcome.stream:
            answer = await client.chat.completions.create(**asked(outcome.question, SHORT))
            outcome.text, outcome.ended = str(answer.choices[0].message.content), answer.choices[0].finish_reason == "length"
            return outcome
        async with await client.chat.completions.create(**asked(outcome.question, LONG), stream=True) as stream:
            async for chunk in stream:
                outcome.pieces += 1
                if outcome.pieces == 6:
                    begun.release()
                outcome.text += chunk.choices[0].delta.content or ""
                outcome.ended = outcome.ended or chunk.choices[0].finish_reason == "length"
    except BROKEN as error:
        outcome.error = error
    return outcome


def under_load(talk: Endpoint, key: str, strike: Callable[[], None], *, retries: int) -> list[Outcome]:
    """What came of streams and other requests in the middle of which something was struck."""

    async def load() -> list[Outcome]:
        async with openai.AsyncOpenAI(base_url=talk.base, api_key=key, max_retries=retries, timeout=120) as client:
            outcomes = [Outcome(stream=at < STREAMS, question=at) for at in range(STREAMS + WHOLES)]
            begun = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(ask(client, outcome, begun)) for outcome in outcomes]
            for _ in range(STREAMS // 2):
                await begun.acquire()
            strike()
            return await asyncio.gather(*tasks)

    return asyncio.run(load())


@pytest.fixture(scope="module")
def expected(talk: Endpoint, key: str) -> dict[tuple[bool, int], str]:
    """The text of each question, when nothing dies."""
    with openai.OpenAI(base_url=talk.base, api_key=key, timeout=120) as client:
        found = {}
        for stream, tokens in ((True, LONG), (False, SHORT)):
            for question in range(5):
                found[stream, question] = str(client.chat.completions.create(**asked(question, tokens)).choices[0].message.content)
        return found


def check(outcomes: list[Outcome], expected: dict[tuple[bool, int], str]) -> list[Outcome]:
    """Hold that nothing ended silently; the streams that broke."""
    broken = []
    for outcome in outcomes:
        whole = expected[outcome.stream, outcome.question % 5]
        if outcome.error is None:
            assert outcome.ended and outcome.text == whole, outcome
        else:
            assert not outcome.ended and whole.startswith(outcome.text), outcome
            assert outcome.stream and outcome.pieces, outcome
            broken.append(outcome)
    return broken


def recovered(talk: Endpoint, key: str) -> None:
    """Wait until both engines and both doors are there again, and doors ask both engines."""

    def ready() -> bool:
        with contextlib.suppress(OSError):
            told = [json.loads(talk.get("/status", key)) for _ in range(8)]  # by chance of both doors
            return all(version["groups"][-1]["ready"] == 2 for status in told for version in status["versions"])
        return False

    until(lambda: len(talk.engines()) == len(talk.doors()) == 2 and ready(), within_s=READY_S, what="a new process")

    def answers() -> bool:
        with contextlib.suppress(*BROKEN), openai.OpenAI(base_url=talk.base, api_key=key, max_retries=0, timeout=30) as client:
            return bool(client.chat.completions.create(**asked(0, 4)).choices)
        return False

    until(answers, within_s=READY_S, what="an answer")


@pytest.mark.parametrize(("who", "number"), [("engines", signal.SIGKILL), ("replicas", signal.SIGKILL), ("replicas", signal.SIGSTOP)])
def test_what_had_not_begun_is_answered_by_another_replica(talk: Endpoint, key: str, expected: dict[tuple[bool, int], str], who: str, number: signal.Signals):
    recovered(talk, key)
    struck: list[psutil.Process] = getattr(talk, who)()
    outcomes = under_load(talk, key, lambda: struck[0].send_signal(number), retries=0)
    broken = check(outcomes, expected)
    assert broken, "none was struck"
    for outcome in broken:
        assert isinstance(outcome.error, openai.APIError) and outcome.error.code == "unavailable", repr(outcome.error)
    if number == signal.SIGSTOP:
        until(lambda: not struck[0].is_running() or struck[0].status() == psutil.STATUS_ZOMBIE, within_s=READY_S, what="an end of the one that hangs")
    recovered(talk, key)


def test_a_door_that_dies_breaks_its_own_streams_and_nothing_more(talk: Endpoint, key: str, expected: dict[tuple[bool, int], str]):
    recovered(talk, key)
    struck = talk.doors()[0]
    outcomes = under_load(talk, key, struck.kill, retries=5)
    assert check(outcomes, expected), "none was struck"  # what had not begun the client has tried again, at the other door
    recovered(talk, key)
    until(lambda: not busy(talk), within_s=5.0, what="an end of what nobody waits for")


def busy(talk: Endpoint) -> bool:
    before = {one.pid: sum(one.cpu_times()[:2]) for one in talk.engines()}
    time.sleep(0.3)
    return any(sum(one.cpu_times()[:2]) - before.get(one.pid, 0.0) > 0.1 for one in talk.engines())


def memory_mb(talk: Endpoint) -> dict[str, float]:
    return {"doors": max(one.memory_info().rss for one in talk.doors()) / 1e6, "replicas": max(one.memory_info().rss for one in talk.replicas()) / 1e6}


def handles(talk: Endpoint) -> int:
    return sum(len(os.listdir(f"/proc/{one.pid}/fd")) for one in [*talk.doors(), *talk.replicas()])


def test_clients_that_leave_at_random_leave_nothing_behind(talk: Endpoint, key: str):
    """Two hundred streams at once, several times; memory and open files are those after the first time."""
    recovered(talk, key)
    chance = random.Random(0)

    async def one(client: openai.AsyncOpenAI, question: int) -> str:
        try:
            async with await client.chat.completions.create(**asked(question, LONG), stream=True) as stream:
                leave_at = chance.choice([0, 1, 3, 30, 60, LONG])
                read = 0
                async for _ in stream:
                    read += 1
                    if read > leave_at:
                        return "left"
                return "read"
        except openai.RateLimitError:
            return "refused"

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=talk.base, api_key=key, max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, question) for question in range(200)))

    found, opened = [], []
    for _ in range(4):
        outcomes = asyncio.run(crowd())
        assert outcomes.count("left") > 20 and set(outcomes) <= {"left", "read", "refused"}
        until(lambda: not busy(talk), within_s=10.0, what="an end of what nobody waits for")
        found.append(memory_mb(talk))
        until(lambda: not opened or handles(talk) <= opened[0] + 4, within_s=10.0, what="an end of open files")
        opened.append(handles(talk))
    print(found, opened)
    for who in ("doors", "replicas"):
        assert found[-1][who] - found[1][who] < 20, (who, found)
