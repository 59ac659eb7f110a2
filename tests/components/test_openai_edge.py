"""OpenAI's interface over real sockets, before an engine without a model: whatever a client sends, it is answered in OpenAI's form, and others as ever."""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai_services import CHAT, COMPLETIONS, USER, Service, chat, completion, speaking, until
from speakers import MODEL

from headrace.gateway.openai import asked
from headrace.serving.routes import Limits

LIMITS = Limits(body_bytes=4 << 20, header_s=2.0)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with speaking(LIMITS) as running:
        yield running


def deep(levels: int, start: Any = 1) -> Any:
    return b"[" * levels + json.dumps(start).encode() + b"]" * levels


def with_image(given: Any, name: str = "image_url", kind: str | None = "image_url") -> dict[str, Any]:
    part = {name: given} if kind is None else {"type": kind, name: given}
    return chat(messages=[USER, {"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}])


BAD: dict[str, tuple[str, Any, int, str | None]] = {
    "n is huge": (CHAT, chat(n=10**6), 400, "n"),
    "n is none": (CHAT, chat(n=0), 400, "n"),
    "n is a text": (CHAT, chat(n="2"), 400, "n"),
    "n is true": (CHAT, chat(n=True), 400, "n"),
    "n is a float": (CHAT, chat(n=1.5), 400, "n"),
    "n is beyond 64 bits": (CHAT, chat(n=2**70), 400, "n"),
    "too many sequences": (COMPLETIONS, completion(prompt=["a"] * 100, n=2), 400, "prompt"),
    **{f"max_tokens is {given!r}": (CHAT, chat(max_tokens=given), 400, "max_tokens") for given in (-1, 0, 10**9, True, False, "9", 1.5, [], {}, 2**64)},
    "max_completion_tokens is huge": (CHAT, chat(max_completion_tokens=10**9), 400, "max_completion_tokens"),
    "max_tokens of a completion is huge": (COMPLETIONS, completion(max_tokens=10**9, max_completion_tokens=1), 400, "max_tokens"),
    "logprobs are huge": (COMPLETIONS, completion(logprobs=10**6), 400, "logprobs"),
    "logprobs of the prompt are all": (COMPLETIONS, completion(prompt_logprobs=-1), 400, "prompt_logprobs"),
    "deep lists": (CHAT, b'{"model":"parrot","messages":' + deep(100_000) + b"}", 400, None),
    "deep objects": (CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, None),
    "deep lists as far as the parser goes": (CHAT, b'{"model":"parrot","messages":[{"content":' + deep(900) + b"}]}", 400, None),
    "deep lists behind a number": (CHAT, b'{"model":"parrot","messages":[{"content":' + b"[0," * 900 + b"1" + b"]" * 900 + b"}]}", 400, None),
    "deep tools": (CHAT, b'{"model":"parrot","messages":[{"content":"a"}],"tools":[1,' + deep(300) + b"]}", 400, None),
    "never closed": (CHAT, b"[" * 100_000, 400, None),
    "a million messages": (CHAT, b'{"model":"parrot","messages":[' + b",".join([b"{}"] * 10**6) + b"]}", 413, None),
    "as many messages as are read": (CHAT, chat(messages=[{}] * 20_000), 400, "messages"),
    "too many tools": (CHAT, chat(tools=[{}] * 300), 400, "tools"),
    "too many stops": (CHAT, chat(stop=["a"] * 100), 400, "stop"),
    "a huge logit_bias": (CHAT, chat(logit_bias={str(at): 1 for at in range(5000)}), 400, "logit_bias"),
    "no messages": (CHAT, {"model": MODEL}, 400, "messages"),
    "messages are none": (CHAT, chat(messages=[]), 400, "messages"),
    "messages are an object": (CHAT, chat(messages={"role": "user"}), 400, "messages"),
    "no prompt": (COMPLETIONS, {"model": MODEL}, 400, "prompt"),
    "no model": (CHAT, {"messages": [USER]}, 400, "model"),
    "the model is a list": (CHAT, chat(model=[MODEL]), 400, "model"),
    "a model that there is not": (CHAT, chat(model="gpt-9" * 1000), 404, "model"),
    "a path that the model does not answer": ("/v1/embeddings", {"model": MODEL, "input": "a"}, 404, "model"),
    "a prompt that cannot fit": (CHAT, chat(messages=[{"role": "user", "content": "word " * 200_000}]), 400, None),
    "NaN": (CHAT, b'{"model":"parrot","messages":[{"content":"a"}],"temperature":NaN}', 400, None),
    "Infinity": (CHAT, b'{"model":"parrot","messages":[{"content":"a"}],"temperature":-Infinity}', 400, None),
    "a comment": (CHAT, b'{"model":"parrot" /* m */}', 400, None),
    "UTF-8 that is none": (CHAT, b'{"model":"parrot","messages":[{"content":"\xff\xfe"}]}', 400, None),
    "UTF-16": (CHAT, json.dumps(chat()).encode("utf-16"), 400, None),
    "a lone surrogate": (CHAT, b'{"model":"parrot","messages":[{"content":"\\ud800"}]}', 400, None),
    "half an escape": (CHAT, b'{"model":"parrot","messages":[{"content":"\\u00"}]}', 400, None),
    "nothing": (CHAT, b"", 400, None),
    "white space": (CHAT, b"  \n ", 400, None),
    "null": (CHAT, b"null", 400, None),
    "a list": (CHAT, b"[]", 400, None),
    "two objects": (CHAT, b"{}{}", 400, None),
    "a cut off object": (CHAT, b'{"model":"parr', 400, None),
    "a body that is too large": (CHAT, b'{"model":"' + b"x" * (5 << 20) + b'"}', 413, None),
    **{f"{name} of the client's": (CHAT, chat(**{name: "{{ 1 }}"}), 400, name) for name in ("chat_template", "request_id", "cache_salt", "prompt_embeds")},
    **{f"{name} of the client's": (CHAT, chat(**{name: {"a": 1}}), 400, name) for name in ("kv_transfer_params", "mm_processor_kwargs", "media_io_kwargs")},
    "a beam search": (CHAT, chat(use_beam_search=True), 400, "use_beam_search"),
    **{
        f"an image at {address!r}": (CHAT, with_image({"url": address}), 400, "messages")
        for address in (
            "http://169.254.169.254/latest/meta-data/", "http://[::1]:8265/", "http://127.0.0.1/", "http://2130706433/", "https://example.com/a.png",
            "file:///etc/passwd", "ftp://10.0.0.1/", "gopher://a/", "//10.0.0.1/a", " data:image/png;base64,AAAA", "\tdata:,", "dat\na:,", "", "0",
        )
    },
    "an image that is a bare address": (CHAT, with_image("http://10.0.0.1/"), 400, "messages"),
    "an image of no type": (CHAT, with_image("http://10.0.0.1/", kind=None), 400, "messages"),
    "an image under another type": (CHAT, with_image("http://10.0.0.1/", kind="text"), 400, "messages"),
    "an address that is an object": (CHAT, with_image({"url": {"url": "http://10.0.0.1/"}}), 400, "messages"),
    "a film": (CHAT, with_image({"url": "http://10.0.0.1/"}, "video_url", "video_url"), 400, "messages"),
    "a sound": (CHAT, with_image({"url": "http://10.0.0.1/"}, "audio_url", "audio_url"), 400, "messages"),
    "an image in a tool's answer": (CHAT, chat(messages=[{"role": "tool", "content": [{"image_url": {"url": "http://a/"}}]}]), 400, "messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_allowed_is_told_in_openais_form_and_reaches_no_engine(service: Service, name: str):
    path, body, status, param = BAD[name]
    before = len(service.speaker.seen)
    answer = service.post(body, path)
    error = told(answer)
    assert (answer.status_code, error["param"]) == (status, param), error
    assert len(service.speaker.seen) == before
    assert len(answer.content) < 1000
    assert said(service.post(chat(max_tokens=2))) == "one two"


def told(answer: httpx2.Response) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's form."""
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"] and error["code"], error
    return error


def said(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_exotic_text_goes_through_as_it_is(service: Service):
    for text in ("\x00", "a\u0000b", "\U0001f469\u200d\U0001f469\u200d\U0001f466", "e" + "\u0301" * 5000, "\u202eabc", "\ufeff", "\ufffe", "\ufdfa" * 2000):
        assert said(service.post(chat(messages=[{"role": "user", "content": text}], max_tokens=1))) == (text.split() or [""])[0]


def test_of_two_fields_of_one_name_the_door_and_the_engine_read_the_last(service: Service):
    assert said(service.post(b'{"model":"nobody","max_tokens":100,"model":"parrot","messages":[{"content":"a b c"}],"max_tokens":2}')) == "a b"
    assert told(service.post(b'{"model":"parrot","messages":[{"content":"a"}],"n":1,"n":1000}'))["param"] == "n"


def test_a_client_chooses_neither_priority_nor_what_is_not_its_own(service: Service):
    service.post(chat(max_tokens=1, priority=-100, user="x" * 1000, metadata={"a": "b"}, chat_template=None, request_id=""))
    assert service.speaker.seen[-1][2] == 0
    service.post(chat(max_tokens=1), headers={"x-priority": "batch"})
    assert service.speaker.seen[-1][2] == 2


HEADS: dict[str, tuple[dict[str, str], int]] = {
    "another type": ({"content-type": "text/plain"}, 415),
    "a form": ({"content-type": "multipart/form-data; boundary=x"}, 415),
    "Arrow": ({"content-type": "application/vnd.apache.arrow.stream"}, 415),
    "lines": ({"content-type": "application/x-ndjson"}, 415),
    "gzip": ({"content-encoding": "gzip"}, 415),
    "two encodings": ({"content-encoding": "identity, br"}, 415),
    "an unknown priority": ({"x-priority": "first"}, 400),
    "a timeout that is none": ({"x-request-timeout": "soon"}, 400),
    "a timeout below zero": ({"x-request-timeout": "-1"}, 400),
    "a deadline that is over": ({"deadline": "2001-01-01T00:00:00Z"}, 504),
    "a version that is none": ({"x-headrace-version": "../1"}, 400),
    "a version that there is not": ({"x-headrace-version": "77"}, 404),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_ask_for_what_there_is_not(service: Service, name: str):
    more, status = HEADS[name]
    answer = service.post(chat(), headers=more)
    assert told(answer) and answer.status_code == status
    assert said(service.post(chat(max_tokens=1), headers={"content-type": "application/json; charset=utf-8", "content-encoding": "identity"})) == "one"


def test_a_body_that_unpacks_to_a_thousand_times_its_size_is_not_unpacked(service: Service):
    packed = zlib.compress(b"[" * (64 << 20))
    answer = service.post(packed, headers={"content-encoding": "deflate"})
    assert answer.status_code == 415 and told(answer)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Length: 99999999999999\r\n", b"413"),
        (b"Content-Length: -1\r\n", b"400"),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", b"400"),
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"400"),
        (b"Transfer-Encoding: gzip, chunked\r\n", b"400"),
        (b"X-A: b\r\n c\r\n", b"400"),
        (b"X-A : b\r\n", b"400"),
        (b"X-\xff: b\r\n", b"400"),
    ],
)
def test_heads_that_two_servers_would_read_differently(service: Service, head: bytes, status: bytes):
    """One request is answered at most, and the connection closed: what follows is never taken for a request of its own."""
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    back = service.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + head + b"\r\n{}" + smuggled)
    assert back.count(b"HTTP/1.1 ") <= 1 and b'"list"' not in back, back
    assert not back or back.split()[1] == status, back[:200]
    assert said(service.post(chat(max_tokens=1))) == "one"


def test_a_request_id_of_a_clients_is_no_more_than_that(service: Service):
    assert service.post(chat(max_tokens=1), headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("x" * 1000, "a\tb"):
        assert service.post(chat(max_tokens=1), headers={"x-request-id": odd}).headers["x-request-id"] != odd
    answers = [service.post(chat(max_tokens=1), headers={"x-request-id": "same"}) for _ in range(3)]
    assert [said(answer) for answer in answers] == ["one"] * 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/gpt-9", 404),
        ("GET", "/v1/models/a%2F..%2Fb", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1//chat/completions", 404),
        ("GET", "/v1/files", 404),
        ("POST", "/v1/batches", 404),
    ],
)
def test_paths_and_methods_that_there_are_not(service: Service, method: str, path: str, status: int):
    answer = httpx2.request(method, service.url + path)
    assert answer.status_code == status and told(answer)


def test_models_are_listed_and_found_by_their_names(service: Service):
    listed = httpx2.get(service.url + "/v1/models").json()
    assert [one["id"] for one in listed["data"]] == [MODEL, "talk"]
    for one in listed["data"]:
        assert httpx2.get(f"{service.url}/v1/models/{one['id']}").json() == one


def test_a_stream_is_events_and_ends(service: Service):
    answer = service.post(chat(stream=True, max_tokens=3))
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream") and events[-2:] == ["data: [DONE]", ""]
    assert "".join(json.loads(event.removeprefix("data: "))["choices"][0]["delta"]["content"] for event in events[:-2]) == "one two three"


def test_streams_that_are_asked_for_in_one_breath_come_one_after_the_other_and_whole(service: Service):
    body = json.dumps(chat(stream=True, max_tokens=20)).encode()
    one = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n" % len(body)
    back = service.raw((one + b"\r\n" + body) * 3 + one + b"Connection: close\r\n\r\n" + body)
    for _ in range(4):
        head, _, back = back.partition(b"\r\n\r\n")
        assert b"200 OK" in head and b"chunked" in head
        text = b""
        while True:
            size, _, back = back.partition(b"\r\n")
            count = int(size, 16)
            text, end, back = text + back[:count], back[count : count + 2], back[count + 2 :]
            assert end == b"\r\n"
            if not count:
                break
        assert text.count(b'"content"') == 20 and text.endswith(b"data: [DONE]\n\n")
    assert not back


def test_an_engines_refusal_is_passed_on_streamed_or_not(service: Service):
    for stream in (False, True):
        answer = service.post(chat(messages=[{"role": "user", "content": "418: a teapot"}], stream=stream))
        assert answer.status_code == 418 and answer.json()["error"]["message"] == "418: a teapot"


def test_whoever_goes_away_is_no_longer_worked_for():
    with speaking(LIMITS, words=100_000, word_s=0.001) as service:
        for given_up, stream in enumerate((True, False), 1):
            body = json.dumps(chat(stream=stream)).encode()
            with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                if stream:
                    assert connection.recv(1000)
                else:
                    until(lambda: service.speaker.running)
            until(lambda count=given_up: service.speaker.cancelled == count and not service.speaker.running)


def test_whoever_reads_nothing_is_cut_off_and_holds_up_nobody():
    with speaking(LIMITS, words=10**9, word_s=0.0) as service:
        long = {"role": "user", "content": "x" * 100_000}
        body = json.dumps(chat(messages=[long], stream=True)).encode()
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: service.speaker.cancelled == 1, within_s=30)
            assert said(service.post(chat(max_tokens=1))) == "one"


def test_a_time_that_is_up_is_told_before_the_answer_and_within_it():
    with speaking(LIMITS, words=100_000, word_s=0.01) as service:
        answer = service.post(chat(), headers={"x-request-timeout": "0.3"})
        assert answer.status_code == 504 and told(answer)["code"] == "deadline_exceeded"
        body = json.dumps(chat(stream=True)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Timeout: 0.6\r\nContent-Length: %d\r\n\r\n" % len(body)
        # The replica writes to the client itself by then. Whichever of the two is first at the deadline ends the answer.
        back = service.raw(head + body)
        *_, error, done, end = back.split(b"\n\n")
        assert json.loads(error.partition(b"data: ")[2])["error"]["code"] == "deadline_exceeded" and done == b"data: [DONE]" and end == b"\r\n0\r\n\r\n"
        assert back.count(b"data: {") > 20
        until(lambda: service.speaker.cancelled == 2)


def test_a_stage_of_a_chat_that_says_nothing_of_its_length_counts_as_the_models(service: Service):
    found = chat(n=2)
    assert asked.read(CHAT, json.dumps(found).encode(), found, length=4096).completion_tokens == 8192
