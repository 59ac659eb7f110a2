"""What a body of OpenAI's interface asks for, as far as a door must know; and what it may not ask for.

The engine checks the rest itself. Here is refused what would cost others: more sequences, words or bytes than one request may have,
addresses that a server would fetch, and fields by which a client would choose what the service is to choose.
"""

from __future__ import annotations

import contextlib
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
MOST_NESTED = 1 << 18  # objects and lists of a body: reading more of them would hold up everybody else at this door
MOST_FORM_BYTES = 256 << 10  # of the form that an answer is to have, and of tools
MOST_FORM_ITEMS = 1 << 14  # that lists of such a form must or may have, all together
BYTES_PER_TOKEN = 4  # of usual text
TEMPLATE_TOKENS = 512  # that a chat template may say of its own
COMPLETED_TOKENS = 16  # of a completion that does not say how many
PREFIX_BYTES = 1024  # by which requests with a common beginning are known

_WHOLE = {"n": (1, MOST_CHOICES), "best_of": (1, MOST_CHOICES), "logprobs": (0, 20), "top_logprobs": (0, 20), "prompt_logprobs": (0, 20)}
_COUNTS = {
    "stop": 64, "tools": 256, "logit_bias": 4096, "stop_token_ids": 1024, "bad_words": 1024, "logprob_token_ids": 1024, "messages": 16_384,
}  # fmt: skip
_LIMITS = {CHAT: ("max_tokens", "max_completion_tokens"), COMPLETIONS: ("max_tokens",), EMBEDDINGS: ()}
"""Which fields say how long an answer may be; of two that are given, the last one counts."""
_OURS = (
    "cache_salt", "chat_template", "ec_transfer_params", "kv_transfer_params", "media_io_kwargs", "mm_processor_kwargs", "prompt_embeds",
    "repetition_detection", "request_id", "session_id", "use_beam_search",
)  # fmt: skip
"""Fields of the engine that are not for clients, unless they are empty."""
_FORMS = ("response_format", "structured_outputs", "tools")
_FETCHED = frozenset(("image_url", "video_url", "audio_url"))
_ITEMS = ("minItems", "maxItems")
_NESTED = frozenset((dict, list))
_MEDIA = _FETCHED | {"audio_embeds", "image_embeds", "input_audio", "prompt_embeds", "video_embeds"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        model: by the name that the client knows.
        stream: whether the answer is to be streamed.
        prompt_tokens: about how many there are.
        most_prompt_tokens: more than there can be.
        completion_tokens: of all choices together at most; None where the client leaves it to the engine, and it is not known what that takes.
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
        Refused: it is none, or nested too deep, or of too many parts.
    """
    if len(body) > MOST_NESTED and body.count(b"[") + body.count(b"{") > MOST_NESTED:
        raise Refused(f"the body has more than {MOST_NESTED:,} brackets", status=413, code="too_large")
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
    for name in _FORMS:
        if (given := found.get(name)) is not None:
            _check_form(given, name)
    prompts, start, media = _READS[path](found)
    choices = prompts * (found.get("n") or 1) if path != EMBEDDINGS else prompts
    if choices > MOST_SEQUENCES and path == COMPLETIONS:
        raise Refused(f"prompts times n are {choices:,}; at most {MOST_SEQUENCES} are allowed", "prompt")
    if length and len(body) > MOST_BYTES_PER_TOKEN * length * prompts and not media:
        raise Refused(f"the request has {len(body):,} bytes, and the model takes {length:,} tokens", code="context_length_exceeded")
    room = length * prompts
    most = len(body) + TEMPLATE_TOKENS
    each = _limit(path, found, length)
    return Asked(
        model,
        found.get("stream") is True,
        len(body) // BYTES_PER_TOKEN,
        room if room and (media or found.get("padding") or room < most) else most,
        None if each is None else each * choices,
        choices,
        _prefix(start),
    )


def _chat(found: dict[str, Any]) -> tuple[int, Any, bool]:
    """How many prompts a chat has, how it begins, and whether there are images, sounds or the like in it."""
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", "messages", code="missing_required_parameter")
    media = _check_media(messages)
    return 1, [found.get("tools"), messages[:8]], media


def _completion(found: dict[str, Any]) -> tuple[int, Any, bool]:
    """The same of texts to complete."""
    return _texts(found, "prompt"), found["prompt"], False


def _embedding(found: dict[str, Any]) -> tuple[int, Any, bool]:
    """The same of texts to embed."""
    texts = _texts(found, "input")
    if texts > MOST_INPUTS:
        raise Refused(f"input has {texts:,} entries; at most {MOST_INPUTS:,} are allowed", "input")
    if found.get("encoding_format") not in (None, "float", "base64"):
        raise Refused(f"encoding_format must be float or base64, got {str(found['encoding_format'])[:40]!r}", "encoding_format")
    return texts, found["input"], False


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


def _limit(path: str, found: dict[str, Any], length: int) -> int | None:
    """How many tokens an answer may have."""
    if path == EMBEDDINGS:
        return 0
    limit = COMPLETED_TOKENS if path == COMPLETIONS else length or None
    least = 0 if path == COMPLETIONS else 1  # none at all: the prompt alone is told again, of which the engine makes one token
    for name in _LIMITS[path]:
        if found.get(name) is not None:
            limit = max(1, _whole(found, name, least, length or 10**7))
    return limit


def _whole(found: dict[str, Any], name: str, least: int, most: int) -> int:
    """A number; the least one where it is not given."""
    value = found.get(name)
    if value is None or (name == "logprobs" and isinstance(value, bool)):  # as chat has it
        return least
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        shown = repr(value)[:40]
        raise Refused(f"{name} must be a whole number from {least:,} to {most:,}, got {shown}", name)
    return value


def _texts(found: dict[str, Any], name: str) -> int:
    """How many texts there are, each as words or as tokens."""
    texts = found.get(name)
    if not texts or not isinstance(texts, str | list):
        raise Refused(f"{name} must be a text, or a list of them", name, code="missing_required_parameter")
    return len(texts) if isinstance(texts, list) and not isinstance(texts[0], int) else 1


def _check_media(messages: Iterable[Any]) -> bool:
    """Whether there is more than text. What the server would have to fetch is refused: through it whoever asks could reach what only the server can."""
    media = False
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            for name in _MEDIA.intersection(part) if isinstance(part, dict) else ():
                media = True
                given = part[name]
                address = given.get("url") if isinstance(given, dict) else given
                if name in _FETCHED and address is not None and not str(address)[:5].lower() == "data:":
                    raise Refused(f"{name} must be a data: URL; this service fetches nothing from addresses that it is given", "messages", code="invalid_url")
    return media


def _check_form(given: Any, name: str) -> None:
    """Refuse a form for answers that would take the engine long to make ready, while others wait."""
    if len(orjson.dumps(given)) > MOST_FORM_BYTES:
        raise Refused(f"{name} has more than {MOST_FORM_BYTES:,} bytes", name)
    items, level = 0, [given]
    while level:
        for each in level:
            if isinstance(each, dict):
                items += sum(int(each[key]) for key in _ITEMS if isinstance(each.get(key), int | float))
        level = [inner for each in level for inner in _inside(each)]
    if items > MOST_FORM_ITEMS:
        raise Refused(f"lists in {name} have minItems and maxItems of {items:,} in all; at most {MOST_FORM_ITEMS:,} are allowed", name)


def _inside(each: Any) -> Iterable[Any]:
    """What is in a part of a form, which may be JSON in a text itself."""
    if isinstance(each, dict | list):
        return each.values() if isinstance(each, dict) else each
    if isinstance(each, str) and '"' in each:
        with contextlib.suppress(orjson.JSONDecodeError):
            return (orjson.loads(each),)
    return ()


def _check_depth(found: dict[str, Any]) -> None:
    level: list[Any] = [found]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in _nested(each)]
        if not level:
            return
    raise Refused(f"the body is nested more than {MOST_DEPTH} levels deep", code="invalid_json")


def _nested(each: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """The objects and lists in one; a long list of numbers is seen through quickly."""
    values = each.values() if isinstance(each, dict) else each
    return () if _NESTED.isdisjoint(map(type, values)) else [value for value in values if type(value) in _NESTED]


def _prefix(start: Any) -> int:
    """Of what the engine reads first."""
    said = start[:PREFIX_BYTES].encode("utf-8", "replace") if isinstance(start, str) else orjson.dumps(start[:8])[:PREFIX_BYTES]
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())
