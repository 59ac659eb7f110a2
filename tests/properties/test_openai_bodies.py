"""Bodies of OpenAI's interface at a door: whatever comes, it is refused in OpenAI's form, or what it may take of the engine is known."""

import json

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.gateway.openai import asked, refusals
from headrace.gateway.openai.refusals import Refused
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

LENGTH = 512
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
NUMBER = st.integers(-2, 20) | st.integers(500, 600) | st.sampled_from([10**6, 10**30, 1.0, "3", True, None])
TEXT = st.text(max_size=40)
TOKENS = st.lists(st.integers(0, 2000), min_size=1, max_size=8)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio"])},
    optional={
        "text": TEXT,
        "image_url": st.sampled_from(["http://10.0.0.1/", {"url": "data:image/png;base64,"}, {"url": "file:///etc"}, " data:,", None, {}, [], 3]),
        "video_url": ANYTHING,
        "input_audio": ANYTHING,
    },
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": TEXT | st.lists(PART, max_size=3) | ANYTHING})
FIELDS = {
    "model": st.just("m") | ANYTHING,
    "messages": st.lists(MESSAGE, min_size=1, max_size=4) | ANYTHING,
    "prompt": TEXT | st.lists(TEXT, max_size=5) | TOKENS | st.lists(TOKENS, max_size=3) | ANYTHING,
    "input": TEXT | st.lists(TEXT, max_size=5) | ANYTHING,
    **dict.fromkeys(["n", "best_of", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "prompt_logprobs"], NUMBER | ANYTHING),
    "stream": st.booleans() | ANYTHING,
    "stop": TEXT | st.lists(TEXT, max_size=3) | ANYTHING,
    "tools": ANYTHING,
    "logit_bias": st.dictionaries(st.text(max_size=3), st.floats(-100, 100), max_size=3) | ANYTHING,
    "encoding_format": st.sampled_from(["float", "base64", "bytes", None]) | ANYTHING,
    "padding": st.sampled_from(["max_length", None]),
    **dict.fromkeys(["chat_template", "use_beam_search", "cache_salt", "request_id", "prompt_embeds"], st.sampled_from([None, "", False, "x", 1])),
}
USUAL = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}


def bodies(path):
    """Mostly such as are answered: what is needed is there, and some of the rest."""
    needed = {"model", USUAL[path]}
    return st.fixed_dictionaries({name: FIELDS[name] for name in needed}, optional={name: form for name, form in FIELDS.items() if name not in needed})


ASKED = st.sampled_from(list(USUAL)).flatmap(lambda path: st.tuples(st.just(path), bodies(path)))


def most_computed(path, found):
    """How many tokens an engine of vLLM's may write for a body that it takes."""
    if path == EMBEDDINGS:
        return 0
    if path == CHAT:
        limit = found.get("max_completion_tokens") or found.get("max_tokens") or LENGTH
        return min(limit, LENGTH) * (found.get("n") or 1)
    limit = 16 if found.get("max_tokens") is None else found["max_tokens"] or 1
    prompt = found["prompt"]
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return min(limit, LENGTH) * (found.get("n") or 1) * prompts


@given(ASKED)
@example((COMPLETIONS, {"model": "m", "prompt": "a", "max_tokens": 500, "max_completion_tokens": 1}))
@example((CHAT, {"model": "m", "messages": [{"content": "a"}], "n": 16}))
@example((CHAT, {"model": "m", "messages": [{"content": "a"}], "n": True}))
def test_what_is_taken_is_bounded_and_the_rest_refused(case):
    path, body = case
    raw = json.dumps(body).encode()
    try:
        found = asked.parse(raw)
        taken = asked.read(path, raw, found, length=LENGTH)
    except Refused as refused:
        check(refused)
        return
    assert 1 <= taken.choices <= asked.MOST_INPUTS
    assert taken.completion_tokens >= most_computed(path, found)
    assert 0 < taken.most_prompt_tokens <= max(len(raw) + asked.TEMPLATE_TOKENS, LENGTH * taken.choices)
    assert isinstance(found.get("n"), int | None) and not isinstance(found.get("n"), bool)
    assert b"http://10" not in raw or path != CHAT or not any("image_url" in part for part in parts(found) if isinstance(part, dict))


@given(st.binary(max_size=200) | ANYTHING.map(orjson.dumps) | st.text(max_size=100).map(lambda text: b'{"model": "m", "prompt": ' + text.encode() + b"}"))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"a": NaN}')
@example(b'{"a": 1e999}')
@example(b'{"a": "\\ud800"}')
@example(b'{"a": "\xff"}')
@example(b"\xef\xbb\xbf{}")
@example(b'{"messages": [0, ' + b"[0, " * 300 + b"]" * 301 + b"}")
def test_any_bytes_are_a_body_or_refused(raw):
    for path in USUAL:
        try:
            asked.read(path, raw, asked.parse(raw), length=LENGTH)
        except Refused as refused:
            check(refused)


@pytest.mark.parametrize("length", [0, LENGTH])
def test_a_body_that_says_nothing_of_its_length_is_bounded_by_the_models(length):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "n": 3}
    taken = asked.read(CHAT, orjson.dumps(body), body, length=length)
    assert taken.completion_tokens == (3 * length if length else None)
    images = {**body, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}
    taken = asked.read(CHAT, orjson.dumps(images), images, length=length)
    assert not length or taken.most_prompt_tokens == length


def test_more_brackets_than_anybody_needs_are_not_even_read():
    with pytest.raises(Refused) as refused:
        asked.parse(b'{"a": [' + b"[]," * asked.MOST_NESTED + b"[]]}")
    assert refused.value.status == 413
    asked.parse(b'{"a": "' + b"x" * 4 * asked.MOST_NESTED + b'"}')


def parts(found):
    for message in found["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else ()


def check(refused):
    assert 400 <= refused.status < 500
    told = json.loads(refusals.error(refused.failure))["error"]
    assert told.keys() == {"message", "type", "param", "code"} and told["message"] and told["type"] and told["code"]
