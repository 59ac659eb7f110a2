"""What a body of OpenAI's interface asks for, as far as a door must know; and what it may not ask for.

The engine checks the rest itself. Here is refused what would cost others: more sequences, words or bytes than one request may have,
addresses that a server would fetch, and fields by which a client would choose what the service is to choose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.gateway.openai.refusals import Refused
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

MOST_CHOICES = 16  # n
MOST_SEQUENCES = 128  # prompts times n
MOST_INPUTS = 2048  # of embeddings
MOST_DEPTH = 64  # of JSON in JSON
MOST_BYTES_PER_TOKEN = 64  # of a prompt: longer ones do not fit, whatever the tokenizer makes of them
BYTES_PER_TOKEN = 4  # of usual text
PREFIX_BYTES = 1024  # by which requests with a common beginning are known

_WHOLE = {"n": (1, MOST_CHOICES), "best_of": (1, MOST_CHOICES), "logprobs": (0, 20), "top_logprobs": (0, 20), "prompt_logprobs": (0, 20)}
_COUNTS = {"stop": 64, "tools": 256, "logit_bias": 4096, "stop_token_ids": 1024, "bad_words": 1024, "messages": 16_384}
_OURS = ("chat_template", "kv_transfer_params", "mm_processor_kwargs", "use_beam_search", "cache_salt", "request_id", "repetition_detection")
"""Fields of the engine that are not for clients, unless they are empty."""
_FETCHED = ("image_url", "video_url", "audio_url")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        model: by the name that the client knows.
        stream: whether the answer is to be streamed.
        prompt_tokens: about how many there are.
        most_prompt_tokens: more than there can be.
        completion_tokens: of all choices together at most; None where the client leaves it to the engine.
        choices: how many answers there will be.
        prefix: requests that begin alike have the same.
    """

    model: str
    stream: bool
    prompt_tokens: int
    most_prompt_tokens: int
    completion_tokens: int | None
    choices: int
    prefix: int

    def answer_tokens(self, path: str, length: int) -> int:
        """How many tokens the answer of a model of this context length may have."""
        if path == EMBEDDINGS:
            return 0
        return self.completion_tokens if self.completion_tokens is not None else length


def parse(body: bytes) -> dict[str, Any]:
    """The body as an object.

    Raises:
        Refused: it is none, or nested too deep.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    _check_depth(found)
    return found


def read(path: str, body: bytes, found: dict[str, Any], *, length: int) -> Asked:
    """What is asked for, of a model of this context length (0 where that is not known).

    Raises:
        Refused: something that is not allowed.
    """
    model = model_of(found)
    for name, (least, most) in _WHOLE.items():
        _whole(found, name, least, most)
    for name, most in _COUNTS.items():
        value = found.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise Refused(f"{name} has {len(value):,} entries; at most {most:,} are allowed", name)
    for name in _OURS:
        if found.get(name):
            raise Refused(f"{name} is not for clients of this service: leave it out", name, code="unsupported_parameter")
    choices, start = _READS[path](found)
    bodies = 1 if path == CHAT else choices
    if length and len(body) > MOST_BYTES_PER_TOKEN * length * bodies:
        raise Refused(f"the request has {len(body):,} bytes, and the model takes {length:,} tokens", code="context_length_exceeded")
    each = _limit(found, length)
    return Asked(
        model,
        found.get("stream") is True,
        len(body) // BYTES_PER_TOKEN,
        len(body) + 64,
        None if each is None else each * choices,
        choices,
        _prefix(start),
    )


def _chat(found: dict[str, Any]) -> tuple[int, Any]:
    """How many answers a chat asks for, and how it begins."""
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", "messages", code="missing_required_parameter")
    _check_addresses(messages)
    return int(found.get("n") or 1), [found.get("tools"), messages[:8]]


def _completion(found: dict[str, Any]) -> tuple[int, Any]:
    """How many answers a completion asks for, and how it begins."""
    choices = int(found.get("n") or 1) * _texts(found, "prompt")
    if choices > MOST_SEQUENCES:
        raise Refused(f"prompts times n are {choices:,}; at most {MOST_SEQUENCES} are allowed", "prompt")
    return choices, found["prompt"]


def _embedding(found: dict[str, Any]) -> tuple[int, Any]:
    """How many vectors are asked for, and of what."""
    texts = _texts(found, "input")
    if texts > MOST_INPUTS:
        raise Refused(f"input has {texts:,} entries; at most {MOST_INPUTS:,} are allowed", "input")
    return texts, found["input"]


_READS = {CHAT: _chat, COMPLETIONS: _completion, EMBEDDINGS: _embedding}


def model_of(found: dict[str, Any]) -> str:
    """The model that is asked.

    Raises:
        Refused: none is.
    """
    model = found.get("model")
    if not isinstance(model, str) or not model:
        raise Refused("model must name the model to ask; GET /v1/models lists them", "model", code="missing_required_parameter")
    return model


def _limit(found: dict[str, Any], length: int) -> int | None:
    """How many tokens an answer may have."""
    limit = None
    for name in ("max_tokens", "max_completion_tokens"):
        if found.get(name) is not None:
            limit = _whole(found, name, 1, length or 10**7)
    return limit


def _whole(found: dict[str, Any], name: str, least: int, most: int) -> int | None:
    value = found.get(name)
    if value is None or isinstance(value, bool):
        return None  # `logprobs: true` is chat's
    if not isinstance(value, int) or not least <= value <= most:
        shown = repr(value)[:40]
        raise Refused(f"{name} must be a whole number from {least:,} to {most:,}, got {shown}", name)
    return value


def _texts(found: dict[str, Any], name: str) -> int:
    """How many texts there are, each as words or as tokens."""
    texts = found.get(name)
    if not texts or not isinstance(texts, str | list):
        raise Refused(f"{name} must be a text, or a list of them", name, code="missing_required_parameter")
    return len(texts) if isinstance(texts, list) and not isinstance(texts[0], int) else 1


def _check_addresses(messages: Iterable[Any]) -> None:
    """Refuse what the server would have to fetch: whoever asks could reach through it what only the server can reach."""
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            for name in _FETCHED if isinstance(part, dict) else ():
                given = part.get(name)
                address = given.get("url") if isinstance(given, dict) else given
                if address is not None and not str(address)[:5].lower() == "data:":
                    raise Refused(f"{name} must be a data: URL; this service fetches nothing from addresses that it is given", "messages", code="invalid_url")


def _check_depth(found: dict[str, Any]) -> None:
    level: list[Any] = [found]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict) or (isinstance(inner, list) and inner and not isinstance(inner[0], int | float))
        ]
        if not level:
            return
    raise Refused(f"the body is nested more than {MOST_DEPTH} levels deep", code="invalid_json")


def _prefix(start: Any) -> int:
    """Of what the engine reads first."""
    said = start[:PREFIX_BYTES].encode("utf-8", "replace") if isinstance(start, str) else orjson.dumps(start[:8])[:PREFIX_BYTES]
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())
