"""Bodies that are meant to do harm, as far as they reach a real engine: each is answered, none with a server error, and others' requests go on meanwhile."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from endpoints import Endpoint

from headrace.gateway.openai import asked
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

WAIT_S = 20.0
HELLO = [{"role": "user", "content": "Say: hello"}]


def schema(given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": given}}}


def grammar(**given: Any) -> dict[str, Any]:
    return {"structured_outputs": given}


def objects(count: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(count)}, **more}


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    given = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"tools": [given], "tool_choice": {"type": "function", "function": {"name": name}}}


def message(**given: Any) -> dict[str, Any]:
    return {"messages": [given]}


CHATS: dict[str, dict[str, Any]] = {
    "regex: repeats of repeats": grammar(regex="((a{1,50}){1,50}){1,50}"),
    "regex: nested quantifiers": grammar(regex="(a+)+b"),
    "regex: a million": grammar(regex="a{1,1000000}"),
    "regex: many choices": grammar(regex="(a|b)" * 20_000),
    "regex: a few hundred choices": grammar(regex="(a|b)" * 300),
    "regex: deep": grammar(regex="(" * 5_000 + "a" + ")" * 5_000),
    "regex: none": grammar(regex="(["),
    "regex: NUL": grammar(regex="a\x00b"),
    "regex: look-around": grammar(regex="(?=a)(?!b)\\1"),
    "regex: empty": grammar(regex=""),
    "regex: matches nothing": grammar(regex="[^\\s\\S]"),
    "grammar: itself": grammar(grammar="root ::= root"),
    "grammar: ambiguous": grammar(grammar='root ::= root root | "a" | ""'),
    "grammar: no root": grammar(grammar='a ::= "b"'),
    "grammar: nonsense": grammar(grammar="%$&/("),
    "grammar: blank": grammar(grammar=" "),
    "grammar: a hundred million": grammar(grammar='root ::= "a"{1,100000000}'),
    "grammar: many choices": grammar(grammar="root ::= a a a\na ::= " + " | ".join(f'"{at}"' for at in range(50_000))),
    "choices: none": grammar(choice=[]),
    "choices: many": grammar(choice=[f"c{at}" for at in range(20_000)]),
    "choices: an empty one": grammar(choice=[""]),
    "choices: quotes": grammar(choice=['"', "\\", "\n", '"|"']),
    "two at once": grammar(regex="a", choice=["b"]),
    "another backend": grammar(regex="a", _backend="outlines"),
    "json: blank": grammar(json=""),
    "json: nonsense": grammar(json="{"),
    "json_object: false": grammar(json_object=False),
    "a structural tag": {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
    "a structural tag of nonsense": grammar(structural_tag="{"),
    "schema: fewest properties": schema(objects(250, minProperties=125)),
    "schema: most properties": schema(objects(250, maxProperties=125)),
    "schema: a thousand, half of them": schema(objects(1000, minProperties=500)),
    "schema: two thousand optional": schema(objects(2000)),
    "schema: half of ten, in half of ten": schema({**objects(10, minProperties=5), "additionalProperties": objects(10, minProperties=5)}),
    "schema: a long text": schema({"type": "string", "maxLength": 10**9}),
    "schema: a long list": schema({"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**7}),
    "schema: a wide enum": schema({"enum": [str(at) for at in range(100_000)]}),
    "schema: itself": schema({"$ref": "#"}),
    "schema: in a circle": schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "schema: elsewhere": schema({"$ref": "http://169.254.169.254/schema.json"}),
    "schema: a file": schema({"$ref": "file:///etc/passwd"}),
    "schema: missing": schema({"$ref": "#/$defs/none"}),
    "schema: nonsense": schema({"type": "nonsense"}),
    "schema: wrong types": schema({"type": 3, "properties": [], "required": {}}),
    "schema: false": schema(False),
    "schema: a text": schema("{}"),
    "schema: null": schema(None),
    "schema: a pattern": schema({"type": "string", "pattern": "((a{1,50}){1,50}){1,50}"}),
    "schema: a broken pattern": schema({"type": "string", "pattern": "(["}),
    "schema: one of many": schema({"anyOf": [objects(30) for _ in range(200)]}),
    "schema: all of many": schema({"allOf": [{"type": "string"}] * 500}),
    "schema: prefixes": schema({"type": "array", "prefixItems": [{"type": "integer"}] * 20_000}),
    "schema: numbers": schema({"type": "number", "minimum": 1e-300, "maximum": 1e300, "multipleOf": 1e-9}),
    "schema: impossible": schema({"type": "integer", "minimum": 5, "maximum": 4}),
    "tool: fewest properties": tool(objects(250, minProperties=125)),
    "tool: nonsense": tool({"type": "nonsense"}),
    "tool: nobody": {**tool({}), "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "tool: a long name": tool({}, name="f" * 50_000),
    "tool: a name with marks": tool({}, name="<|end|>{{ 1 }}"),
    "tools: no function": {"tools": [{"type": "function"}]},
    "tools: must": {**tool(objects(2)), "tool_choice": "required"},
    "tools: a choice without tools": {"tool_choice": "required"},
    "logit_bias: infinite": {"logit_bias": {"5": 1e308}},
    "logit_bias: no token": {"logit_bias": {"99999999": 1}},
    "logit_bias: below zero": {"logit_bias": {"-1": 1}},
    "logit_bias: a word": {"logit_bias": {"a": 1}},
    "logit_bias: all": {"logit_bias": {str(at): -100 for at in range(2000)}},
    "stop: long": {"stop": ["a" * 400] * 64},
    "stop: empty": {"stop": [""]},
    "stop: numbers": {"stop": [1]},
    "stop_token_ids: no token": {"stop_token_ids": [10**12, -5]},
    "bad_words: many": {"bad_words": ["word"] * 1000},
    "bad_words: empty": {"bad_words": [""]},
    "allowed_token_ids: none": {"allowed_token_ids": []},
    "allowed_token_ids: no token": {"allowed_token_ids": [10**9]},
    "allowed_token_ids: below zero": {"allowed_token_ids": [-1]},
    "logprob_token_ids: no token": {"logprobs": True, "logprob_token_ids": [10**9]},
    "logprobs: none of many": {"top_logprobs": 20},
    "logprobs: as many as may be": {"logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 2, "temperature": 1},
    "prompt_logprobs": {"prompt_logprobs": 20},
    "temperature: tiny": {"temperature": 1e-300},
    "temperature: huge": {"temperature": 1e300},
    "temperature: a word": {"temperature": "hot"},
    "top_p: none": {"top_p": 0},
    "top_p: tiny": {"top_p": 1e-300, "temperature": 1},
    "top_k: huge": {"top_k": 10**12, "temperature": 1},
    "top_k: below zero": {"top_k": -7},
    "min_p: all": {"min_p": 1, "temperature": 1},
    "repetition_penalty: tiny": {"repetition_penalty": 1e-300},
    "repetition_penalty: huge": {"repetition_penalty": 1e300, "temperature": 1},
    "repetition_penalty: none": {"repetition_penalty": 0},
    "presence_penalty: huge": {"presence_penalty": 1e300},
    "min_tokens: huge": {"min_tokens": 10**9},
    "min_tokens: below zero": {"min_tokens": -1},
    "seed: least": {"seed": -(2**63), "temperature": 1},
    "seed: too much": {"seed": 2**63, "temperature": 1},
    "n: sixteen": {"n": 16, "temperature": 1, "max_tokens": 2},
    "n: sixteen of the best": {"n": 16, "temperature": 0},
    "truncate_prompt_tokens: huge": {"truncate_prompt_tokens": 10**9},
    "truncate_prompt_tokens: one": {"truncate_prompt_tokens": 1},
    "truncate_prompt_tokens: none": {"truncate_prompt_tokens": 0},
    "stream_interval: huge": {"stream_interval": 10**9},
    "stream_options: nonsense": {"stream_options": {"include_usage": "maybe"}},
    "stream_options: all": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "thinking_token_budget: below zero": {"thinking_token_budget": -5},
    "reasoning_effort": {"reasoning_effort": "high"},
    "vllm_xargs": {"vllm_xargs": {"a": 1}},
    "ids and texts": {"return_token_ids": True, "return_tokens_as_token_ids": True, "return_prompt_text": True, "return_token_offsets": True},
    "a mask": {"return_assistant_tokens_mask": True},
    "routed experts": {"routed_experts_prompt_start": 10**9},
    "echo": {"echo": True, "add_generation_prompt": False},
    "a message that goes on": {"continue_final_message": True},
    "a message that goes on, by itself": {"continue_final_message": True, "add_generation_prompt": False},
    "template: another": {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
    "template: tokens": {"chat_template_kwargs": {"tokenize": True}},
    "template: padding": {"chat_template_kwargs": {"padding": "max_length", "max_length": 10**9, "truncation": True, "return_tensors": "pt"}},
    "template: other messages": {"chat_template_kwargs": {"messages": HELLO * 1000, "conversation": [], "tools": 3}},
    "documents": {"documents": [{"title": "a", "text": "b" * 1000}] * 20},
    "role: nonsense": message(role="nonsense", content="a"),
    "role: none": message(content="a"),
    "role: marks": message(role="<|end|>", content="a"),
    "content: null": message(role="user", content=None),
    "content: a number": message(role="user", content=3),
    "content: an object": message(role="user", content={"type": "text", "text": "a"}),
    "content: no parts": message(role="user", content=[]),
    "content: an unknown part": message(role="user", content=[{"type": "nonsense"}]),
    "content: a part of nothing": message(role="user", content=[{}]),
    "content: parts of parts": message(role="user", content=[[["a"]]]),
    "content: an image for a model that sees none": message(role="user", content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
    "content: tensors": message(role="user", content=[{"type": "image_embeds", "image_embeds": "gASVAAAAAAAAAA=="}]),
    "content: tensors of a prompt": message(role="user", content=[{"type": "prompt_embeds", "data": "gASVAAAAAAAAAA=="}]),
    "content: NUL": message(role="user", content="\x00" * 100),
    "content: marks": message(role="user", content="<|end|><|system|>" * 20),
    "content: combining": message(role="user", content="e" + "\u0301" * 200),
    "content: emptiness": message(role="user", content=""),
    "tool calls: nonsense": message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}, "id": "1", "type": "function"}]),
    "tool calls: no list": message(role="assistant", content="a", tool_calls=3),
    "many messages": {"messages": [{"role": "user", "content": ""}] * 5000},
}  # fmt: skip

TEXTS: dict[str, dict[str, Any]] = {
    "no token": {"prompt": [10**9]},
    "below zero": {"prompt": [-1]},
    "beyond 64 bits": {"prompt": [2**64]},
    "nothing among others": {"prompt": ["a", ""]},
    "no tokens among others": {"prompt": [[1], []]},
    "mixed": {"prompt": [1, "a", [2]]},
    "mixed the other way": {"prompt": ["a", 1]},
    "deep": {"prompt": [[[1]]]},
    "as many as may be": {"prompt": ["a"] * 128, "max_tokens": 1},
    "as long as the model": {"prompt": [5] * 512},
    "longer than the model": {"prompt": [5] * 513},
    "as long as the model, with an answer": {"prompt": [5] * 510, "max_tokens": 2},
    "a suffix": {"suffix": "a"},
    "echo alone": {"echo": True, "max_tokens": 0},
    "echo with chances": {"echo": True, "max_tokens": 0, "logprobs": 5},
    "nothing at all": {"max_tokens": 0},
    "tensors": {"prompt": None, "prompt_embeds": "gASVAAAAAAAAAA=="},
    "a grammar": grammar(regex="(a|b)" * 20_000),
    "a schema": schema(objects(250, minProperties=125)),
    "both lengths": {"max_tokens": 4, "max_completion_tokens": 1},
}


class Others:
    """Somebody else, who asks small questions all the time, and wants each answered in time."""

    def __init__(self, talk: Endpoint, key: str) -> None:
        self.talk, self.key = talk, key
        self.took_s: list[float] = []
        self.statuses: list[int] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]  # by chance, one for each replica

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.05):
            began_s = time.monotonic()
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "temperature": 0}
            answer = httpx2.post(f"{self.talk.base}/chat/completions", json=body, headers={"authorization": f"Bearer {self.key}"}, timeout=60)
            self.took_s.append(time.monotonic() - began_s)
            self.statuses.append(answer.status_code)


@pytest.fixture(scope="module")
def key(talk: Endpoint) -> str:
    return talk.key("hard")


@pytest.fixture(scope="module")
def others(talk: Endpoint, key: str) -> Iterator[Others]:
    with Others(talk, key) as running:
        yield running


def ask(talk: Endpoint, key: str, path: str, body: dict[str, Any]) -> httpx2.Response:
    heads = {"authorization": f"Bearer {key}", "x-request-timeout": str(WAIT_S)}
    return httpx2.post(talk.url + path, json=body, headers=heads, timeout=60)


def check(talk: Endpoint, key: str, path: str, body: dict[str, Any], name: str) -> int:
    """The status, after all was looked at that may be wrong with an answer, streamed or not."""
    found = [ask(talk, key, path, {**body, "stream": stream}) for stream in (False, True)]
    for answer in found:
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:500])
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["type"] and len(answer.content) < 100_000, (name, answer.text[:500])
    if found[1].status_code == 200:
        assert found[1].text.endswith("data: [DONE]\n\n"), (name, found[1].text[-500:])
    if found[0].status_code == 200:
        used, known = found[0].json()["usage"], json.dumps(body).encode()
        taken = asked.read(path, known, asked.parse(known), length=512)
        assert used["prompt_tokens"] <= taken.most_prompt_tokens and used["completion_tokens"] <= (taken.completion_tokens or 0), (name, used)
    return found[0].status_code


@pytest.mark.parametrize(("path", "bodies", "usual"), [(CHAT, CHATS, {"messages": HELLO}), (COMPLETIONS, TEXTS, {"prompt": "a"})])
def test_a_hostile_body_costs_nobody_else_anything(
    talk: Endpoint, key: str, others: Others, path: str, bodies: dict[str, dict[str, Any]], usual: dict[str, Any]
):
    engines, replicas = {one.pid for one in talk.engines()}, {one.pid for one in talk.replicas()}
    slow: dict[str, float] = {}
    statuses: dict[str, int] = {}
    for name, more in bodies.items():
        began_s = time.monotonic()
        statuses[name] = check(talk, key, path, {"model": "tiny", "max_tokens": 8, "temperature": 0, **usual, **more}, name)
        if (took_s := time.monotonic() - began_s) > 5:
            slow[name] = took_s
    assert {one.pid for one in talk.engines()} == engines and {one.pid for one in talk.replicas()} == replicas, "one has died"
    assert set(others.statuses) == {200} and max(others.took_s) < WAIT_S / 2, (max(others.took_s), slow)


def test_hostile_texts_to_embed(vectors: Endpoint):
    for given in itertools.chain(
        ({"input": one} for one in ("", [""], [10**9], [-1], [[]], [[5] * 512], [5] * 513, ["a"] * 2048, ["a", 1], [[["a"]]], "\x00", "e" + "\u0301" * 400)),
        ({"input": "a", "dimensions": given} for given in (0, -1, 10**9, "8")),
        ({"input": "a", "truncate_prompt_tokens": given} for given in (-1, 0, 1, 10**12)),
        ({"input": "a", **more} for more in ({"padding": "max_length"}, {"embed_dtype": "fp8_e4m3"}, {"user": 3}, {"use_activation": False}, {"n": 5})),
    ):
        answer = httpx2.post(vectors.url + EMBEDDINGS, json={"model": "tiny-embed", **given}, timeout=60)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (given, answer.text[:500])
        if answer.status_code == 200:
            known = json.dumps({"model": "tiny-embed", **given}).encode()
            taken = asked.read(EMBEDDINGS, known, asked.parse(known), length=512)
            assert answer.json()["usage"]["prompt_tokens"] <= taken.most_prompt_tokens, given
        else:
            assert answer.json()["error"]["message"]


@pytest.mark.parametrize("which", ["talk", "vectors"])
def test_no_generated_body_is_answered_with_a_server_error(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    """Bodies made up from the service's own OpenAPI document, valid and damaged."""
    pytest.importorskip("schemathesis")
    service = request.getfixturevalue(which)
    heads = ["-H", "X-Request-Timeout: 30"]
    if which == "talk":
        heads += ["-H", f"Authorization: Bearer {request.getfixturevalue('key')}"]
        (tmp_path / "openapi.json").write_bytes(service.get("/openapi.json", request.getfixturevalue("key")))
    else:
        (tmp_path / "openapi.json").write_bytes(service.get("/openapi.json"))
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", "openapi.json", "--url", service.url]
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
    shape = ["--include-path-regex", "^/v1/", "--max-examples", "100", "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "40"]
    done = subprocess.run([*command, "--checks", checks, *shape, *heads], capture_output=True, text=True, timeout=540, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
