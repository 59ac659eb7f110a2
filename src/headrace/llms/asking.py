"""A row's question to the engine, and what becomes of it: an answer, another attempt, or a fault with a name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.llms.answers import Schema
from headrace.llms.faults import EngineError, InvalidAnswer, PromptTooLong
from headrace.llms.prompts import Message
from headrace.llms.sampling import Sampling
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS, Reply, Spent

_OF_LENGTH = ("input_tokens", "max_tokens", "input_text", "max_completion_tokens")
"""What vLLM names as the parameter at fault where a prompt does not fit."""


class Answering(Protocol):
    """What answers bodies of OpenAI's interface: the engine, or a test's."""

    async def speak(self, path: str, body: bytes | Mapping[str, Any], *, spent: Spent) -> Reply | AsyncIterator[str]:
        """See `headrace.speech.Speaker`."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a row asks: messages, or the `prompt` of a completion."""

    messages: tuple[Message, ...]
    prompt: str | None
    sampling: Sampling
    attempts: int

    def body(self, attempt: int, schema: Schema | None) -> dict[str, Any]:
        """The body of an attempt, from 0 on."""
        asked: dict[str, Any] = {"messages": list(self.messages)} if self.prompt is None else {"prompt": self.prompt}
        form = {} if schema is None else {"response_format": schema.format()}
        return {**asked, **form, **self.sampling.fields(attempt)}


async def ask(engine: Answering, request: Request, *, schema: Schema | None, out: str | None) -> dict[str, Any]:
    """The columns of a row's answer: its text as `out`, and the fields of the schema.

    Raises:
        PromptTooLong: the prompt does not fit.
        InvalidAnswer: no attempt gave an answer of the schema.
        EngineError: the engine refused the request, or failed on it.
    """
    for attempt in range(request.attempts):
        body = request.body(attempt, schema)
        reply = await engine.speak(CHAT if request.prompt is None else COMPLETIONS, body, spent=Spent())
        assert isinstance(reply, Reply)  # it was not asked for a stream
        choice = _choices(reply)[0]
        text = str((choice["text"] if "text" in choice else choice["message"]["content"]) or "")
        answer = {} if out is None else {out: text}
        if schema is None:
            return answer
        try:
            return {**answer, **schema.values(text)}
        except InvalidAnswer as error:
            cut = f"; it was cut off after max_tokens={request.sampling.max_tokens}" if choice.get("finish_reason") == "length" else ""
            last = f"not of the schema in {request.attempts} attempts: {error}{cut}"
    raise InvalidAnswer(last)


async def write(engine: Answering, request: Request, **asked: Any) -> AsyncIterator[str]:
    """The pieces of a row's answer, while it is written. `asked` goes to the engine with the request.

    Raises:
        PromptTooLong: the prompt does not fit.
        EngineError: the engine refused the request, or failed on it.
    """
    reply = await engine.speak(CHAT if request.prompt is None else COMPLETIONS, {**request.body(0, None), "stream": True}, **asked)
    if isinstance(reply, Reply):
        _choices(reply)  # raises: what was asked for is a stream
        raise EngineError("the engine answered at once, and was asked for a stream")
    async with aclosing(reply) as events:  # type: ignore[type-var]
        async for event in events:
            said = event.removeprefix("data: ").strip()
            if said != "[DONE]" and (piece := _piece(json.loads(said))):
                yield piece


async def embed(engine: Answering, texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
    """The texts' vectors, each of shape (size,).

    Raises:
        PromptTooLong: one of them does not fit.
        EngineError: the engine refused them, or failed on them.
    """
    reply = await engine.speak(EMBEDDINGS, {"input": list(texts)}, spent=Spent())
    assert isinstance(reply, Reply)
    return [np.asarray(one["embedding"], np.float32) for one in _content(reply)["data"]]


def _choices(reply: Reply) -> Sequence[Mapping[str, Any]]:
    choices: Sequence[Mapping[str, Any]] = _content(reply)["choices"]
    return choices


def _piece(event: Mapping[str, Any]) -> str:
    """The text that an event of a stream brings; its error as below."""
    if "error" in event:
        raise _fault(event["error"], "the engine failed in the middle of the answer")
    return "".join((choice["text"] if "text" in choice else choice["delta"].get("content")) or "" for choice in event["choices"])


def _content(reply: Reply) -> Mapping[str, Any]:
    """The reply's body; its error as the exception that a dead letter is named for."""
    content: Mapping[str, Any] = json.loads(reply.body)
    if reply.status == 200:
        return content
    raise _fault(content.get("error", {}), f"status {reply.status}")


def _fault(error: Mapping[str, Any], otherwise: str) -> PromptTooLong | EngineError:
    return (PromptTooLong if error.get("param") in _OF_LENGTH else EngineError)(str(error.get("message") or otherwise))
