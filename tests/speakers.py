"""An engine that speaks OpenAI's interface without a model: it says the words of a prompt again, one after the other, at a pace that a test sets."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

import headrace as hr
from headrace.speech import CHAT, COMPLETIONS, TOKENIZE, Reply, Speech, Spent

MODEL = "parrot"


class FakeSpeaker:
    """Computes `sequences` answers at a time, lower priorities first, each of `words` words unless the body says `max_tokens`; each word takes `word_s`.

    A prompt that begins with a number and a colon, such as `503: go away`, is answered with an error of that status, and one that is `die` ends
    the process. `seen` are the requests that were begun on, as (path, body, priority), `cancelled` counts those that were given up before their end.
    """

    def __init__(self, *, sequences: int = 8, capacity: int = 100_000, length: int = 4096, words: int = 4, word_s: float = 0.0, yields: bool = False) -> None:
        self.words, self.word_s = words, word_s
        self.alive = True
        self.seen: list[tuple[str, dict[str, Any], int]] = []
        self.cancelled = self.answered = self.running = self.most_running = 0
        self._bounds = {"sequences": float(sequences), "capacity": float(capacity), "length": float(length), "yields": float(yields)}
        self._counts = {"prompt_tokens": 0.0, "generated_tokens": 0.0}
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._going = threading.Event()
        self._going.set()
        self._resumed: asyncio.Event | None = None
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="speaker", daemon=True)
        self._thread.start()

    async def speak(
        self, path: str, body: bytes | Mapping[str, Any], *, priority: int = 1, request_id: str | None = None, spent: Spent
    ) -> Reply | AsyncIterator[str]:
        asked = json.loads(body) if isinstance(body, bytes) else dict(body)
        prompt = prompt_of(asked)
        if path == TOKENIZE:
            return Reply(200, json.dumps({"count": len(prompt.split())}).encode())
        if prompt == "die":
            os._exit(3)
        self.seen.append((path, asked, priority))
        status, colon, _ = prompt.partition(":")
        if colon and status.isdigit():
            return Reply(int(status), json.dumps({"error": {"message": prompt, "type": "told", "param": None, "code": int(status)}}).encode())
        said = self._say(path, prompt, asked.get("max_tokens") or self.words, priority, request_id or "r", spent)
        if asked.get("stream"):
            return _events(said)
        answers = [answer async for _, answer in said]
        return Reply(200, json.dumps(answers[-1]).encode())

    async def _say(self, path: str, prompt: str, words: int, priority: int, name: str, spent: Spent) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Each word, and the answer so far as it would be if it were whole."""
        done = False
        try:
            await self._begin(priority)
            try:
                said = prompt.split() or [""]
                spent.prompt_tokens += len(prompt.split())
                self._counts["prompt_tokens"] += len(prompt.split())
                text = ""
                for number in range(words):
                    await asyncio.sleep(self.word_s)
                    await self._go()
                    word = ("" if not number else " ") + said[number % len(said)]
                    text += word
                    spent.completion_tokens += 1
                    self._counts["generated_tokens"] += 1
                    usage = {"prompt_tokens": spent.prompt_tokens, "completion_tokens": number + 1, "total_tokens": spent.prompt_tokens + number + 1}
                    yield word, _answer(path, name, text, usage)
                done = True
                self.answered += 1
            finally:
                self._end()
        finally:
            if not done:
                self.cancelled += 1

    async def _begin(self, priority: int) -> None:
        if self.running < self._bounds["sequences"]:
            self.running += 1
        else:
            turn = self.loop.create_future()
            heapq.heappush(self._waiting, (priority, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._end()
                raise
        self.most_running = max(self.most_running, self.running)

    def _end(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    async def _go(self) -> None:
        if not self._going.is_set():
            if self._resumed is None:
                self._resumed = asyncio.Event()
            await self._resumed.wait()

    def pause(self) -> None:
        """Say nothing more until `resume`. For any thread, like all below."""
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

        def wake() -> None:
            if self._resumed is not None:
                self._resumed.set()
                self._resumed = None

        self.loop.call_soon_threadsafe(wake)

    def figures(self) -> dict[str, float]:
        waiting = sum(not turn.done() for _, _, turn in list(self._waiting))
        return {**self._counts, "running": float(self.running), "waiting": float(waiting), **self._bounds}

    def close(self) -> None:
        if self._thread.is_alive():
            self.alive = False
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


def prompt_of(body: Mapping[str, Any]) -> str:
    """The text of its last message, or its prompt."""
    prompt = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _answer(path: str, name: str, text: str, usage: dict[str, int]) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    kind = "chat.completion" if path == CHAT else "text_completion"
    return {
        "id": name, "object": kind, "created": 0, "model": MODEL, "choices": [{"index": 0, "finish_reason": "length", **choice}], "usage": usage
    }  # fmt: skip


async def _events(said: AsyncIterator[tuple[str, dict[str, Any]]]) -> AsyncIterator[str]:
    last: dict[str, Any] = {}
    try:
        async for word, last in said:
            chat = last["object"] == "chat.completion"
            choice = {"index": 0, "finish_reason": None, **({"delta": {"content": word}} if chat else {"text": word})}
            event = {**last, "object": "chat.completion.chunk" if chat else last["object"], "choices": [choice], "usage": None}
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        await said.aclose()  # type: ignore[attr-defined]


@hr.stage(out={"answer": str}, concurrency=4)
class Parrot:
    """A stage that is such an engine: a pipeline of it alone answers OpenAI's interface as the model `parrot`."""

    words: int = 4
    word_s: float = 0.0
    sequences: int = 8
    capacity: int = 100_000
    length: int = 4096
    yields: bool = False

    def setup(self, device: str) -> None:
        room = {"sequences": self.sequences, "capacity": self.capacity, "length": self.length}
        self._speaker = FakeSpeaker(**room, words=self.words, word_s=self.word_s, yields=self.yields)
        weakref.finalize(self, self._speaker.close)

    def speaks(self) -> Speech:
        return Speech(MODEL, (CHAT, COMPLETIONS))

    def speaker(self) -> FakeSpeaker:
        return self._speaker

    def __call__(self, text: hr.Column[str]) -> dict[str, list[str]]:
        return {"answer": [" ".join(each.split()[: self.words]) for each in text]}


parrot = hr.Pipeline("parrot", Parrot())
