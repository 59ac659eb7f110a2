"""Several services behind one address, over real sockets: who is asked for a path or a model, and what is each one's own."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any

import httpx2
import pytest
from addresses import Named, address
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

import headrace as hr
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits as KeyLimits
from headrace.gateway.openai.first import first_answer
from headrace.gateway.openai.opening import Opening
from headrace.serving.routes import Limits


@hr.stage(out={"length": int})
def measure(text: hr.Column[str]) -> dict[str, list[int]]:
    return {"length": [len(each) for each in text]}


ALPHA = hr.Pipeline("alpha", Named(model="acme/alpha"))
BETA = hr.Pipeline("beta", Named(model="acme/beta", words=3))
ROWS = hr.Pipeline("rows", measure)


def client(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


def say(url: str, model: str, text: str = "one two three", *, key: str = "none", **more: Any) -> Any:
    with client(url, key) as asking:
        return asking.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **more)


def stream(url: str, model: str, words: int) -> list[str]:
    with client(url) as asking:
        chunks = asking.chat.completions.create(model=model, messages=[{"role": "user", "content": "a b c"}], stream=True, max_tokens=words)
        return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]


def models(url: str, key: str = "none") -> dict[str, str]:
    """Who answers, by the model's name."""
    with client(url, key) as asking:
        return {model.id: model.owned_by for model in asking.models.list()}


def test_models_of_all_services_answer_by_their_names_and_aliases():
    with address(ALPHA, BETA, ROWS) as there:
        assert models(there.url) == {"acme/alpha": "alpha", "acme/beta": "beta", "alpha": "alpha", "beta": "beta"}
        for model, words in (("acme/alpha", 4), ("alpha", 4), ("acme/beta", 3), ("beta", 3)):
            assert say(there.url, model).usage.completion_tokens == words
        assert len(stream(there.url, "beta", 5)) == 5
        assert len(there["alpha"].speaker().seen) == 2 and len(there["beta"].speaker().seen) == 3
        with pytest.raises(NotFoundError, match="'gamma' does not exist; there are 'acme/alpha', 'acme/beta', 'alpha', 'beta'"):
            say(there.url, "gamma")
        with pytest.raises(NotFoundError, match="the model 'rows' does not exist"):
            say(there.url, "rows")


def test_rows_go_to_the_service_of_their_path():
    with address(ALPHA, BETA, ROWS) as there:
        assert httpx2.post(f"{there.url}/rows", json={"text": "four"}).json() == {"length": 4}
        assert httpx2.post(f"{there.url}/beta", json={"rows": [{"text": "a"}, {"text": "b"}]}).json()["rows"][1] == {"answer": "acme/beta says b"}
        with hr.Client(there.url) as asking:
            assert asking["rows"]({"text": "12345"}) == {"length": 5}
        assert httpx2.get(f"{there.url}/rows/schema").json()["pipeline"] == "rows"
        assert httpx2.get(f"{there.url}/openapi.json").json()["info"]["title"] == "alpha"
        assert httpx2.get(f"{there.url}/rows").status_code == 405
        missing = httpx2.post(f"{there.url}/row", json={})
        assert missing.status_code == 404 and "POST /alpha, POST /beta, POST /rows" in missing.text


def test_nothing_is_said_to_be_missing_while_a_service_is_not_known_yet():
    with address(ALPHA) as there:
        there.seat("beta")
        for path, body in (("/beta", {"text": "a"}), ("/v1/chat/completions", {"model": "beta", "messages": [{"role": "user", "content": "a"}]})):
            answer = httpx2.post(there.url + path, json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert say(there.url, "alpha").usage.completion_tokens == 4
        there["beta"].serve(1, BETA)
        assert say(there.url, "beta").usage.completion_tokens == 3


def test_metrics_and_status_tell_of_all_each_under_its_name():
    with address(ALPHA, BETA, ROWS) as there:
        say(there.url, "beta")
        httpx2.post(f"{there.url}/rows", json={"text": "four"})
        families = {family.name: family for family in text_string_to_metric_families(httpx2.get(f"{there.url}/metrics").text)}
        answered = {
            (sample.labels["service"], sample.labels["version"], sample.labels["code"]): sample.value
            for sample in families["headrace_requests"].samples
            if sample.name == "headrace_requests_total"
        }
        assert answered[("beta", "1", "200")] == answered[("rows", "1", "200")] == 1
        assert not [place for place in answered if place[0] == "alpha" and place[1] == "1"]
        assert {sample.labels["service"] for sample in families["process_resident_memory_bytes"].samples} == {"alpha"}
        status = httpx2.get(f"{there.url}/status").json()
        assert status["service"] == "alpha"
        counts = {guest["service"]: guest["versions"][0]["counts"]["answered"] for guest in status["guests"]}
        assert counts == {"beta": 1, "rows": 1}
        assert status["door"]["in_flight"] == 1  # this request, and not one more for each service


def test_an_address_is_ready_while_its_host_is_and_says_what_a_guest_lacks():
    with address(ALPHA, BETA) as there:
        assert httpx2.get(f"{there.url}/readyz").text == "ready\n"
        there["beta"].versions[1][0].close()
        there.until(lambda: not there["beta"].door.fleet.versions[1].open)
        ready = httpx2.get(f"{there.url}/readyz")
        assert (ready.status_code, ready.text) == (200, "ready\nbeta: version 1: no replica of all\n")
        assert say(there.url, "alpha").usage.completion_tokens == 4


def test_limits_are_each_services_own():
    slow = hr.Pipeline("beta", Named(model="acme/beta", words=1000, word_s=0.01))
    with address(ALPHA, limits=Limits(body_bytes=2000, deadline_s=0.2)) as there:
        there.seat("beta", limits=Limits(body_bytes=500, deadline_s=20.0)).serve(1, slow)
        assert say(there.url, "acme/beta", max_tokens=60).usage.completion_tokens == 60  # takes longer than the host allows
        body = {"messages": [{"role": "user", "content": "a" * 600}]}
        large = httpx2.post(f"{there.url}/v1/chat/completions", json={"model": "beta", **body})
        assert large.status_code == 413 and "500 bytes" in large.json()["error"]["message"]
        assert httpx2.post(f"{there.url}/v1/chat/completions", json={"model": "alpha", **body}).status_code == 200


def test_one_is_updated_while_the_other_answers():
    slow = hr.Pipeline("alpha", Named(model="acme/alpha", words=1000, word_s=0.005))
    with address(slow, BETA) as there:
        said: list[str] = []
        talking = threading.Thread(target=lambda: said.extend(stream(there.url, "alpha", 60)))
        talking.start()
        there.until(lambda: there["alpha"].speaker().seen)
        there["beta"].serve(2, hr.Pipeline("beta", Named(model="acme/beta-2", words=7)))
        assert say(there.url, "beta").usage.completion_tokens == 7
        assert "acme/beta-2" in models(there.url)
        there["beta"].retire(1)
        with pytest.raises(NotFoundError, match="'acme/beta' does not exist"):
            say(there.url, "acme/beta")
        talking.join(20)
        assert len(said) == 60


def test_a_guest_that_leaves_finishes_what_it_has():
    slow = hr.Pipeline("beta", Named(model="acme/beta", words=1000, word_s=0.005))
    with address(ALPHA, slow) as there:
        said: list[str] = []
        talking = threading.Thread(target=lambda: said.extend(stream(there.url, "beta", 60)))
        talking.start()
        there.until(lambda: there["beta"].speaker().seen)
        there.server.run(there.lobby.dismiss("beta", timeout_s=20))  # returns when that is finished
        talking.join(20)
        assert len(said) == 60
        with pytest.raises(NotFoundError, match="there are 'acme/alpha', 'alpha'"):
            say(there.url, "beta")
        assert httpx2.post(f"{there.url}/beta", json={"text": "a"}).status_code == 404
        assert say(there.url, "alpha").usage.completion_tokens == 4


def test_keys_are_those_of_the_address():
    with address(ALPHA, BETA, ROWS) as there:
        there["alpha"].keys = {hashlib.sha256(b"hr_mine").hexdigest(): "mine"}
        there["alpha"].publish()
        assert httpx2.post(f"{there.url}/rows", json={"text": "four"}).status_code == 401
        assert httpx2.post(f"{there.url}/rows", json={"text": "four"}, headers={"x-api-key": "hr_mine"}).json() == {"length": 4}
        assert say(there.url, "beta", key="hr_mine").usage.completion_tokens == 3
        assert httpx2.post(f"{there.url}/v1/chat/completions", json={"model": "beta"}).status_code == 401


def test_accounts_are_those_of_the_address(tmp_path):
    where = str(tmp_path / "accounts.db")
    database = Database(where)
    key = Keys(database).create("ann", limits=KeyLimits(models=("beta",)))
    database.close()
    with address(ALPHA, BETA, opening=Opening(accounts=where)) as there:
        assert models(there.url, key) == {"beta": "beta"}
        assert say(there.url, "beta", key=key).usage.completion_tokens == 3
        refused = httpx2.post(
            f"{there.url}/v1/chat/completions", json={"model": "alpha", "messages": [{"role": "user", "content": "a"}]}, headers={"x-api-key": key}
        )
        assert refused.status_code == 403, refused.text


def test_a_first_answer_waits_for_doors_to_hear_of_the_model():
    with address(ALPHA) as there:
        timer = threading.Timer(0.3, lambda: there.seat("beta").serve(1, BETA))
        timer.start()
        path, took_s = first_answer(there.url, "acme/beta", ("/v1/chat/completions", "/v1/completions"))
        timer.join()
        assert path == "/v1/chat/completions" and 0 < took_s < 0.3
        (_, body, _), *_ = there["beta"].speaker().seen
        assert body == {"model": "acme/beta", "messages": [{"role": "user", "content": "Good"}], "max_tokens": 1, "stream": True}


def test_a_closing_address_finishes_what_guests_have():
    slow = hr.Pipeline("beta", Named(model="acme/beta", words=1000, word_s=0.005))
    with address(ALPHA, slow) as there:
        answers: list[Any] = []
        talking = threading.Thread(target=lambda: answers.append(say(there.url, "beta", max_tokens=60)))
        talking.start()
        there.until(lambda: there["beta"].speaker().seen)
        there.server.stop(timeout_s=20)
        talking.join(20)
        assert answers[0].usage.completion_tokens == 60
        assert json.loads(answers[0].model_dump_json())["model"] == "parrot"
