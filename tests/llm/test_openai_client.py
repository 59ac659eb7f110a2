"""OpenAI's own client, LangChain and curl at a service with a real engine: what they know works, and fails as they expect it."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
from conftest import ENGINE
from endpoints import WORDS, Endpoint, until

import headrace as hr
from headrace.gateway.accounts import usage

HELLO = [{"role": "user", "content": "Say: hello"}]  # what the pipeline's prompt makes of a row


@pytest.fixture(scope="module")
def key(talk: Endpoint) -> str:
    return talk.key("tester", priority="interactive")


@pytest.fixture(scope="module")
def client(talk: Endpoint, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=talk.base, api_key=key, max_retries=0, timeout=60) as made:
        yield made


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": WORDS, "temperature": 0, **more})


def text(answer: Any) -> str:
    found = answer.choices[0].message.content
    assert isinstance(found, str)
    return found


def test_models(client: openai.OpenAI):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["tiny", "talk"] and found["tiny"].max_model_len == 512
    assert client.models.retrieve("talk").root == "tiny"
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("gpt-9")
    assert (told.value.param, told.value.code, told.value.type) == ("model", "model_not_found", "invalid_request_error")


def test_a_chat_says_what_the_row_says_and_what_local_says(client: openai.OpenAI, talk: Endpoint, tiny: Any):
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason in ("length", "stop") and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens and answer.usage.completion_tokens <= WORDS
    assert {text(answer)} == {text(chat(client, seed=seed)) for seed in (1, 2)} == {text(chat(client, model="talk"))}
    row = hr.Client(talk.url, key=talk.key("rows"))["talk"]({"text": "hello"})
    assert row["said"] == text(answer)
    stage = hr.LLM(out="said", model=tiny.lm, prompt="Say: {text}", on=hr.cpu(1), sampling=hr.Sampling(max_tokens=WORDS), engine=ENGINE)
    assert hr.Pipeline("talk", stage).local([{"text": "hello"}])[0]["said"] == text(answer)


def test_a_seed_repeats_what_chance_has_said(client: openai.OpenAI):
    said = [text(chat(client, temperature=1.0, seed=seed, max_tokens=24)) for seed in (7, 7, 8)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI, usage: bool):
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(chat(client, stream=True, max_tokens=64, **more))
    whole = chat(client, max_tokens=64)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([whole.usage] if usage else [])
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_with_the_async_client(talk: Endpoint, key: str, client: openai.OpenAI):
    texts = [f"Say: {'very ' * at}good" for at in range(24)]

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=talk.base, api_key=key, timeout=60) as made:

            async def one(at: int) -> str:
                asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": texts[at]}], "max_tokens": 32, "temperature": 0}
                if at % 2:
                    return text(await made.chat.completions.create(**asked))
                stream = await made.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(at) for at in range(len(texts))))

    assert asyncio.run(all_of_them()) == [text(chat(client, messages=[{"role": "user", "content": one}], max_tokens=32)) for one in texts]


def test_choices_stops_and_chances(client: openai.OpenAI):
    two = chat(client, n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].message.content != two.choices[1].message.content
    assert two.usage.completion_tokens > WORDS
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in chat(client, n=2, temperature=1.0, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == [choice.message.content for choice in two.choices]
    whole = text(chat(client))
    stop = whole[len(whole) // 2 :][:3]
    stopped = chat(client, stop=[stop, "\u2603"])
    assert text(stopped) == whole[: whole.index(stop)] and stopped.choices[0].finish_reason == "stop"
    chances = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(chances) <= WORDS and all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in chances)
    assert [one.token for one in chances] == [max(one.top_logprobs, key=lambda other: other.logprob).token for one in chances]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}}, "required": ["place", "days"]},
    },
}


def test_tools(client: openai.OpenAI):
    named = chat(client, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=100)
    (call,) = named.choices[0].message.tool_calls
    told = json.loads(call.function.arguments)
    assert call.function.name == "weather" and told["place"] in ("Rome", "Oslo") and told["days"] in (1, 2)
    streamed = chat(client, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=100, stream=True)
    pieces = [call for chunk in streamed for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == told
    free = chat(client, tools=[WEATHER], tool_choice="auto")
    assert text(free)
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": call.id, "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}
    assert text(chat(client, tools=[WEATHER], messages=[*HELLO, asked, {"role": "tool", "tool_call_id": call.id, "content": "fine"}]))


class Verdict(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


def test_answers_of_a_form(client: openai.OpenAI):
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Verdict, max_tokens=60).choices[0].message.parsed
    assert isinstance(parsed, Verdict)
    plain = chat(client, response_format={"type": "json_object"}, max_tokens=300, logit_bias={})
    assert text(plain).startswith("{") and (plain.choices[0].finish_reason == "length" or isinstance(json.loads(text(plain)), dict))
    one = chat(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert text(one) in ("yes", "no")


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": "def parse(", "max_tokens": 8, "temperature": 0, **more})


def test_completions(client: openai.OpenAI):
    one = complete(client)
    assert one.object == "text_completion" and one.choices[0].text and one.usage.completion_tokens <= 8
    many = complete(client, prompt=["def parse(", "class A", "def parse("])
    assert [choice.index for choice in many.choices] == [0, 1, 2] and many.choices[0].text == many.choices[2].text == one.choices[0].text
    assert complete(client, echo=True).choices[0].text == "def parse(" + one.choices[0].text
    ids = complete(client, prompt=[5, 6, 7], extra_body={"return_token_ids": True})
    assert ids.usage.prompt_tokens == 3 and complete(client, prompt=[[5, 6, 7], [8]]).choices[0].text == ids.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in complete(client, stream=True)) == one.choices[0].text
    assert complete(client, max_tokens=openai.omit).usage.completion_tokens <= 16
    chances = complete(client, logprobs=2, echo=True).choices[0].logprobs
    assert len(chances.tokens) == len(chances.token_logprobs) == len(chances.top_logprobs) and chances.token_logprobs[0] is None


def test_vectors(vectors: Endpoint, client: openai.OpenAI):
    with openai.OpenAI(base_url=vectors.base, api_key="none", max_retries=0) as made:
        texts = ["hello", "hello there", "something else"]
        found = np.array([one.embedding for one in made.embeddings.create(model="tiny-embed", input=texts).data])  # which the client asks for as base64
        assert found.shape == (3, 256) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
        plain = made.embeddings.create(model="vectors", input=texts, encoding_format="float")
        assert np.allclose(found, [one.embedding for one in plain.data], atol=1e-6) and plain.usage.prompt_tokens == plain.usage.total_tokens > 3
        raw = made.embeddings.with_raw_response.create(model="tiny-embed", input="hello", encoding_format="base64").http_response.json()
        assert np.allclose(np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), np.float32), found[0], atol=1e-3)
        one, other = (made.embeddings.create(model="tiny-embed", input=tokens).data[0].embedding for tokens in ([5, 6, 7], [[5, 6, 7]]))
        assert np.allclose(one, other)
        row = hr.Client(vectors.url)["vectors"]({"text": "hello"})
        assert np.allclose(row["vector"], found[0], atol=1e-3)
        for wrong, param in (
            ({"dimensions": 8}, None),
            ({"input": []}, "input"),
            ({"input": "word " * 2000}, None),
            ({"encoding_format": "bytes"}, "encoding_format"),
        ):
            with pytest.raises(openai.BadRequestError) as told:
                made.embeddings.create(**{"model": "tiny-embed", "input": texts, **wrong})
            assert told.value.body["message"] and (param is None or told.value.param == param)
        with pytest.raises(openai.NotFoundError, match="does not answer /v1/chat/completions"):
            chat(made, model="tiny-embed")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


def test_a_stream_that_is_left_early_is_no_longer_computed(client: openai.OpenAI, talk: Endpoint, key: str):
    for read in (1, 3, 40):  # the last one is written by the replica itself by then
        stream = chat(client, stream=True, max_tokens=450, extra_body={"ignore_eos": True})
        for _ in range(read):
            next(stream)
        began_s = time.monotonic()
        stream.close()
        until(lambda: not busy(talk), within_s=1.0, what=f"an end of the sequence, {time.monotonic() - began_s:.1f} s after it was left")


def busy(talk: Endpoint) -> bool:
    """Whether an engine computes: its process takes time."""
    before = [sum(one.cpu_times()[:2]) for one in talk.engines()]
    time.sleep(0.15)
    return any(sum(one.cpu_times()[:2]) - was > 0.05 for one, was in zip(talk.engines(), before, strict=True))


def test_a_client_that_waits_no_longer(client: openai.OpenAI, talk: Endpoint):
    with pytest.raises(openai.APITimeoutError):
        chat(client, max_tokens=450, timeout=0.2, extra_body={"ignore_eos": True})
    until(lambda: not busy(talk), within_s=1.0, what="an end of the sequence")
    with pytest.raises(openai.InternalServerError) as told:
        chat(client, max_tokens=450, extra_body={"ignore_eos": True}, extra_headers={"X-Request-Timeout": "0.2"})
    assert told.value.status_code == 504 and told.value.code == "deadline_exceeded"
    with pytest.raises(openai.APIError) as cut:
        list(chat(client, max_tokens=450, stream=True, extra_body={"ignore_eos": True}, extra_headers={"X-Request-Timeout": "0.4"}))
    assert cut.value.code == "deadline_exceeded"


def test_errors_have_their_classes(client: openai.OpenAI, talk: Endpoint):
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-9")
    assert (missing.value.status_code, missing.value.param, missing.value.code) == (404, "model", "model_not_found")
    for wrong, param in (
        ({"n": 100}, "n"),
        ({"messages": []}, "messages"),
        ({"temperature": 9.0}, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "input_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]}, "messages"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}}, None),
        ({"extra_body": {"structured_outputs": {"regex": "(["}}}, None),
    ):
        with pytest.raises(openai.BadRequestError) as told:
            chat(client, **wrong)
        assert told.value.param == param or param is None, told.value.body
        assert told.value.type and told.value.code is not None
    with pytest.raises(openai.AuthenticationError) as unknown:
        chat(client.with_options(api_key="hr_nobody"))
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as denied:
        chat(client.with_options(api_key=talk.key("elsewhere", models=("other",))))
    assert denied.value.code == "model_not_allowed"
    slow = client.with_options(api_key=talk.key("slow", requests_per_minute=1))
    assert text(chat(slow))
    with pytest.raises(openai.RateLimitError) as limited:
        chat(slow)
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 61 and limited.value.response.headers["x-ratelimit-limit-requests"] == "1"
    assert int(limited.value.response.headers["retry-after-ms"]) > 0 and limited.value.code == "rate_limit_exceeded"
    poor = client.with_options(api_key=talk.key("poor", budget_usd=0))
    with pytest.raises(openai.RateLimitError) as spent:
        chat(poor)
    assert spent.value.code == "insufficient_quota" and spent.value.response.headers["x-should-retry"] == "false"


def test_headers(client: openai.OpenAI, talk: Endpoint):
    limited = client.with_options(api_key=talk.key("headers", requests_per_minute=100, tokens_per_minute=100_000))
    raw = limited.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=4, extra_headers={"X-Request-ID": "mine"})
    heads = raw.headers
    assert heads["x-request-id"] == "mine" and raw.parse().id.endswith("mine") and heads["x-headrace-version"] == "1"
    assert heads["x-ratelimit-limit-requests"] == "100" and heads["x-ratelimit-remaining-requests"] == "99"
    assert heads["x-ratelimit-limit-tokens"] == "100000" and int(heads["x-ratelimit-remaining-tokens"]) < 100_000 and heads["x-ratelimit-reset-tokens"]
    with limited.chat.completions.with_streaming_response.create(model="tiny", messages=HELLO, max_tokens=4, stream=True) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream") and streamed.headers["x-ratelimit-remaining-requests"] == "98"


def test_what_is_booked_is_what_clients_were_told(client: openai.OpenAI, talk: Endpoint):
    """Of whole answers exactly; of streams that were left no less than was read, and no more than the engine computed."""
    asking = client.with_options(api_key=talk.key("booked", tokens_per_minute=10**6, budget_usd=100))
    used = [chat(asking, n=2, temperature=1.0).usage, chat(asking, messages=[{"role": "user", "content": "word " * 200}]).usage]
    used.append([*chat(asking, stream=True, max_tokens=40, stream_options={"include_usage": True})][-1].usage)
    used.append(complete(asking, prompt=["a", "b c"]).usage)
    used += [chat(asking, messages=[{"role": "user", "content": "word " * 200}]).usage]  # whose beginning the engine had computed before
    read = []
    for pieces in (2, 60):
        with chat(asking, stream=True, max_tokens=450, extra_body={"ignore_eos": True}) as stream:
            read.append([next(stream) for _ in range(pieces)])
    with pytest.raises(openai.BadRequestError):
        chat(asking, temperature=9)
    with talk.database() as database:
        until(lambda: len(usage.log(database, key="booked")) == 8, within_s=10, what="a row for each request")
        *left, refused = [*reversed(usage.log(database, key="booked"))][5:]
        whole = [*reversed(usage.log(database, key="booked"))][:5]
    assert [(row.prompt_tokens, row.completion_tokens) for row in whole] == [(one.prompt_tokens, one.completion_tokens) for one in used]
    assert whole[-1].cached_tokens >= 128 and all(row.status == 200 and row.ttft_s is not None for row in whole)
    for row in whole:
        assert row.usd == pytest.approx((row.prompt_tokens - row.cached_tokens / 2 + 10 * row.completion_tokens) / 1e6)
    for row, pieces in zip(left, read, strict=True):
        assert row.status == 499 and len(pieces) - 1 <= row.completion_tokens < 450 and row.prompt_tokens == used[2].prompt_tokens
    assert (refused.status, refused.prompt_tokens, refused.completion_tokens) == (400, 0, 0)


def test_curl(talk: Endpoint, key: str, client: openai.OpenAI):
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": WORDS, "temperature": 0})
    command = ["curl", "-sS", "-N", f"{talk.base}/chat/completions", "-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", body], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == text(chat(client))
    streamed = subprocess.run([*command, "-d", body[:-1] + ', "stream": true}'], capture_output=True, text=True, timeout=60, check=True)
    assert streamed.stdout.startswith("data: {") and streamed.stdout.endswith("data: [DONE]\n\n")


def test_langchain(talk: Endpoint, key: str, client: openai.OpenAI):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=talk.base, api_key=key, model="tiny", temperature=0, max_tokens=WORDS, max_retries=0)
    assert model.invoke("Say: hello").content == text(chat(client)) == "".join(str(chunk.content) for chunk in model.stream("Say: hello"))
    assert model.invoke("Say: hello").usage_metadata["output_tokens"] <= WORDS
    assert len(model.batch(["a", "b", "c"])) == 3
    longer = ChatOpenAI(base_url=talk.base, api_key=key, model="tiny", temperature=0, max_tokens=100, max_retries=0)
    assert isinstance(longer.with_structured_output(Verdict).invoke("How was it?"), Verdict)
    assert isinstance(longer.with_structured_output(Verdict, method="function_calling").invoke("How was it?"), Verdict)
    (call,) = longer.bind_tools([WEATHER], tool_choice="weather").invoke("Will it rain?").tool_calls
    assert call["name"] == "weather" and call["args"]["place"] in ("Rome", "Oslo")
