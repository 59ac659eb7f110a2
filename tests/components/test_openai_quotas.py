"""Limits, budgets and books of keys over HTTP: never more than the limit, never less than it leaves, and what is booked is what clients were told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai_services import CHAT, Service, chat, speaking, until

from headrace.gateway.accounts import teller, usage
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.openai.opening import Opening

PRICES = "[parrot]\nprompt = 1000.0\ncompletion = 10000.0\n"
ASK = 7  # tokens of a request: three words of the prompt, four of the answer


@dataclass
class Bank:
    """A service with accounts, and the accounts."""

    service: Service
    database: Database

    def key(self, name: str, **limits: Any) -> str:
        """A new key, once the door has heard of it."""
        made = Keys(self.database).create(name, limits=Limits(**limits))
        until(lambda: httpx2.get(self.service.url + "/v1/models", headers={"authorization": f"Bearer {made}"}).status_code == 200)
        return made

    def ask(self, key: str, **more: Any) -> httpx2.Response:
        return self.service.post(chat(max_tokens=4, **more), headers={"authorization": f"Bearer {key}"})

    def ask_at_once(self, key: str, count: int, **more: Any) -> list[httpx2.Response]:
        async def all_of_them() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(timeout=30, limits=httpx2.Limits(max_connections=count)) as client:
                heads = {"authorization": f"Bearer {key}"}
                asked = (client.post(self.service.url + CHAT, json=chat(max_tokens=4, **more), headers=heads) for _ in range(count))
                return list(await asyncio.gather(*asked))

        return asyncio.run(all_of_them())

    def booked(self, key: str, count: int) -> list[usage.Request]:
        """The log of a key, once there are so many in it."""
        until(lambda: len(usage.log(self.database, key=key, most=1000)) >= count)
        return usage.log(self.database, key=key, most=1000)

    def sum(self, key: str) -> usage.Sum:
        (found,) = usage.sums(self.database, by=("key",), key=key)
        return found


@contextlib.contextmanager
def banking(folder: Path, **settings: Any) -> Iterator[Bank]:
    (folder / "prices.toml").write_text(PRICES)
    where = str(folder / "accounts.db")
    database = Database(where)
    try:
        with pytest.MonkeyPatch.context() as patch, speaking(opening=Opening(where, str(folder / "prices.toml")), **settings) as service:
            patch.setattr(teller, "KEYS_S", 0.02)
            yield Bank(service, database)
    finally:
        database.close()


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    with banking(tmp_path_factory.mktemp("bank"), word_s=0.002, sequences=64) as running:
        yield running


def used(answers: list[httpx2.Response]) -> int:
    """Tokens that clients were told they used."""
    return sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)


def test_of_many_requests_at_once_as_many_pass_as_may(bank: Bank):
    key = bank.key("requests", requests_per_minute=20)
    answers = bank.ask_at_once(key, 50)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 20 and statuses.count(429) == 30
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded" and answer.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 61 and math.ceil(int(answer.headers["retry-after-ms"]) / 1000) == int(
                answer.headers["retry-after"]
            )
    assert sorted(int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers if answer.status_code == 200) == list(range(20))
    bank.booked("requests", 20)
    assert (bank.sum("requests").requests, bank.sum("requests").refused) == (20, 30)


@pytest.mark.parametrize("limit", [ASK - 1, ASK, 100, 1000, 5000])
def test_tokens_are_never_more_than_the_limit_and_never_fewer_than_it_leaves(bank: Bank, limit: int):
    """At once, what is held for requests under way may keep others from passing; one after the other, all of the limit can be used."""
    name = f"tokens-{limit}"
    key = bank.key(name, tokens_per_minute=limit)
    answers = bank.ask_at_once(key, 50)
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert used(answers) <= limit
    passed = sum(answer.status_code == 200 for answer in answers)
    assert passed >= min(50, limit // ASK, 1)
    if limit < 1000:  # no estimate fits: all were counted
        assert passed == min(50, limit // ASK)
    while used(answers) + ASK <= limit and passed < 150:
        bank.booked(name, passed)
        answers.append(bank.ask(key))
        assert answers[-1].status_code == 200, answers[-1].text
        passed += 1
    if used(answers) + ASK > limit:
        bank.booked(name, passed)
        last = bank.ask(key)
        assert last.status_code == 429 and ("x-should-retry" in last.headers) == (limit < ASK) != ("retry-after" in last.headers)


def test_what_is_booked_is_what_clients_were_told(bank: Bank):
    key = bank.key("books")
    answers = bank.ask_at_once(key, 40) + bank.ask_at_once(key, 20, n=1)
    rows = bank.booked("books", 60)
    assert {answer.status_code for answer in answers} == {200} and len(rows) == 60
    assert sum(row.prompt_tokens + row.completion_tokens for row in rows) == used(answers) == 60 * ASK
    assert all(row.status == 200 and row.usd == pytest.approx(3 * 1e-3 + 4 * 1e-2) and row.took_s > 0 for row in rows)


def test_streams_are_booked_also_those_that_are_left_early(tmp_path: Path):
    with banking(tmp_path, word_s=0.002) as bank:
        key = bank.key("streams")
        heads = {"authorization": f"Bearer {key}"}
        with httpx2.Client(timeout=20) as client:
            for read in (1, 5, 60):
                with client.stream("POST", bank.service.url + CHAT, json=chat(max_tokens=3000, stream=True), headers=heads) as answer:
                    lines = answer.iter_lines()
                    for _ in range(2 * read):  # each event is followed by an empty line
                        next(lines)
                (row, *_) = bank.booked("streams", 1 if read == 1 else 2 if read == 5 else 3)
                assert row.prompt_tokens == 3 and read <= row.completion_tokens <= bank.service.speaker._counts["generated_tokens"] < 3000
                assert row.status == 499
            whole = client.post(bank.service.url + CHAT, json=chat(max_tokens=100, stream=True), headers=heads)
            assert whole.text.count('"content"') == 100
        (row, *_) = bank.booked("streams", 4)
        assert (row.prompt_tokens, row.completion_tokens, row.status) == (3, 100, 200) and row.ttft_s is not None and row.ttft_s < row.took_s
        assert sum(each.completion_tokens for each in bank.booked("streams", 4)) == bank.service.speaker._counts["generated_tokens"]


def test_a_budget_is_spent_and_not_passed(bank: Bank):
    """A request costs 0.043 USD here."""
    key = bank.key("budget", budget_usd=1.0)
    answers = bank.ask_at_once(key, 50)
    passed = [answer for answer in answers if answer.status_code == 200]
    bank.booked("budget", len(passed))
    while (last := bank.ask(key)).status_code == 200:
        passed.append(last)
        bank.booked("budget", len(passed))
    assert len(passed) == 23 and 0.957 < bank.sum("budget").usd <= 1.0
    error = last.json()["error"]
    assert (last.status_code, error["code"], error["type"]) == (429, "insufficient_quota", "rate_limit_error")
    assert bank.ask(bank.key("poor", budget_usd=0)).headers["x-should-retry"] == "false"


def test_a_key_that_is_revoked_is_stopped_and_what_it_began_is_booked(tmp_path: Path):
    with banking(tmp_path, word_s=0.005) as bank:
        key = bank.key("gone")
        assert bank.ask(key).status_code == 200
        heads = {"authorization": f"Bearer {key}"}
        with httpx2.stream("POST", bank.service.url + CHAT, json=chat(max_tokens=400, stream=True), headers=heads, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            Keys(bank.database).revoke("gone")
            until(lambda: bank.ask(key).status_code == 401, within_s=3.0)
            assert list(lines)[-2] == "data: [DONE]"
        row, *_ = bank.booked("gone", 2)
        assert row.completion_tokens == 400
        error = bank.ask(key).json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


def test_a_key_of_some_models_may_ask_no_others_and_sees_no_others(bank: Bank):
    key = bank.key("elsewhere", models=("other",))
    denied = bank.ask(key)
    assert denied.status_code == 403 and denied.json()["error"]["code"] == "model_not_allowed"
    assert httpx2.get(bank.service.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).json()["data"] == []
    aliased = bank.key("aliased", models=("talk",))
    assert bank.ask(aliased, model="talk").status_code == 200 and bank.ask(aliased).status_code == 403
    assert httpx2.post(bank.service.url + "/talk", json={"text": "a"}, headers={"authorization": f"Bearer {key}"}).status_code == 403


def test_without_a_key_nothing_is_answered_but_whether_it_lives(bank: Bank):
    paths = ("/v1/models", "/v1/models/parrot", CHAT, "/v1/files", "/v1/nothing", "/status", "/metrics", "/docs", "/openapi.json", "/talk")
    presented = (b"Bearer hr_wrong", b"Basic aGk6", b"Bearer", b"Bearer \xff", b"Bearer " + b"x" * 5000, b"")
    for path in paths:
        for value in presented:
            answer = httpx2.request("POST" if path in (CHAT, "/talk") else "GET", bank.service.url + path, headers={"authorization": value})
            assert answer.status_code == 401, (path, value)
            if path.startswith("/v1/"):
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(bank.service.url + "/healthz").status_code == 200


def test_what_no_replica_began_costs_nothing_and_what_one_refused_no_tokens(tmp_path: Path):
    with banking(tmp_path, sequences=1, word_s=0.5, words=2) as bank:
        key = bank.key("crowd", requests_per_minute=1000, tokens_per_minute=100_000)
        answers = bank.ask_at_once(key, 30, messages=[{"role": "user", "content": "a"}])
        passed = sum(answer.status_code == 200 for answer in answers)
        assert 0 < passed < 30 and all("retry-after" in answer.headers for answer in answers if answer.status_code != 200)
        assert len(bank.booked("crowd", passed)) == passed
        until(lambda: bank.ask(key, messages=[{"role": "user", "content": "418: no"}]).headers["x-ratelimit-remaining-requests"] == str(1000 - passed - 1))
        row, *_ = bank.booked("crowd", passed + 1)
        assert (row.status, row.prompt_tokens, row.completion_tokens) == (418, 0, 0)


def test_accounts_that_cannot_be_asked_stop_requests_and_say_so(tmp_path: Path):
    with banking(tmp_path) as bank:
        key = bank.key("tester")
        assert bank.ask(key).status_code == 200
        bank.booked("tester", 1)
        bank.database.close()
        for file in tmp_path.glob("accounts.db*"):
            file.write_bytes(b"not a database" * 1000)
        until(lambda: bank.ask(key).status_code == 503, within_s=5.0)
        assert json.loads(bank.ask(key).content)["error"]["type"] == "server_error"
