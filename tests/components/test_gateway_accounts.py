"""Keys, quotas, bills and usage of a gateway. tests/integration runs the same on a PostgreSQL."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from headrace.errors import AccountsError
from headrace.gateway.accounts import tables, usage
from headrace.gateway.accounts.books import BOOKED_DAYS, GRANT_S, Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Expire, Release, Reserve, Settle, Used
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Grant, Refusal

START = dt.datetime(2026, 1, 31, 23, 0, 0, tzinfo=dt.UTC).timestamp()
PRICES = Prices.of({"small": {"prompt": 1, "cached": 0.5, "completion": 2}})
GOOD = Used(prompt_tokens=10, completion_tokens=5)


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


class Desk:
    """A database with one key, `ana`, and a clock that stands still."""

    def __init__(self, where: str) -> None:
        self.clock = Clock()
        self.where = where
        self.database = Database(where)
        self.keys = Keys(self.database, clock=self.clock)
        self.books = Books(self.database, prices=PRICES, clock=self.clock)
        self.token = self.keys.create("ana", owner="Ana of Search")
        self.key = self.keys.get("ana").id

    def limit(self, **limits: object) -> None:
        self.keys.limit("ana", **limits)

    def ask(self, prompt: int = 10, completion: int = 0, **own: str) -> Grant | Refusal:
        return self.books.reserve(self.key, "small", prompt_tokens=prompt, max_tokens=completion, **own)

    def granted(self, prompt: int = 10, completion: int = 0, **own: str) -> Grant:
        result = self.ask(prompt, completion, **own)
        assert isinstance(result, Grant), result
        return result

    def refused(self, prompt: int = 10, completion: int = 0, **own: str) -> Refusal:
        result = self.ask(prompt, completion, **own)
        assert isinstance(result, Refusal), result
        return result

    def count(self, table: sa.Table) -> int:
        with self.database.reading() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where a new, empty database may be made."""
    return str(tmp_path / "llm.db")


@pytest.fixture
def desk(place: str) -> Iterator[Desk]:
    desk = Desk(place)
    yield desk
    desk.database.close()


# --- keys


def test_a_key_opens_until_it_is_revoked(desk: Desk) -> None:
    found = desk.keys.find(desk.token)
    assert found is not None and (found.name, found.owner, found.limits, found.revoked) == ("ana", "Ana of Search", Limits(), None)
    assert desk.token.startswith("hr_") and len(desk.token) == 46
    for presented in ("", "hr_", "ana", desk.token[:-1], "\ud800", b"\xff", "x" * 10_000):
        assert desk.keys.find(presented) is None
    desk.keys.revoke("ana")
    assert desk.keys.find(desk.token) is None and desk.keys.list() == ()
    assert desk.keys.list(revoked=True)[0].revoked == START
    assert desk.refused().reason == "revoked" and desk.refused().retry_after_s is None


def test_the_text_of_a_key_is_kept_nowhere(desk: Desk) -> None:
    with desk.database.reading() as connection:
        row = connection.execute(sa.select(tables.keys)).one()
    assert not [value for value in row if isinstance(value, str) and (desk.token in value or desk.token[3:] in value)]
    assert desk.token not in repr(desk.keys.list()) and row.sha256 not in repr(desk.keys.list())


def test_a_name_is_taken_for_ever(desk: Desk) -> None:
    with pytest.raises(AccountsError, match="a key named 'ana' already; choose another"):
        desk.keys.create("ana")
    desk.keys.revoke("ana")
    with pytest.raises(AccountsError, match="already, revoked on 2026-01-31, whose usage bears the name"):
        desk.keys.create("ana")
    with pytest.raises(AccountsError, match="was revoked on 2026-01-31; create another"):
        desk.keys.revoke("ana")
    assert desk.keys.get("ana", revoked=True).revoked == START
    with pytest.raises(AccountsError, match="no key named 'anna'.*but nothing$"):
        desk.keys.get("anna")
    with pytest.raises(AccountsError, match="no key named 'anna'.*did you mean 'ana'"):
        desk.keys.get("anna", revoked=True)


def test_limits_are_changed_one_by_one(desk: Desk) -> None:
    desk.limit(models=["small", "large"], requests_per_minute=5, budget_usd=12.5, priority="batch", log_prompts=True)
    changed = desk.keys.limit("ana", requests_per_minute=None, tokens_per_minute=100)
    assert changed.limits == Limits(models=("small", "large"), tokens_per_minute=100, budget_usd=12.5, priority="batch", log_prompts=True)
    assert desk.keys.get("ana") == changed
    with pytest.raises(AccountsError, match="no limit 'token_per_minute'.*did you mean 'tokens_per_minute'"):
        desk.keys.limit("ana", token_per_minute=1)
    with pytest.raises(AccountsError, match="no key named 'anna'.*but 'ana'; did you mean 'ana'"):
        desk.keys.limit("anna", tokens_per_minute=1)


def test_a_name_is_bounded(desk: Desk) -> None:
    for name in ("", ".ana", "a b", "a" * 65, "ä", "ana\n", None):
        with pytest.raises(AccountsError, match="cannot be named"):
            desk.keys.create(name)  # type: ignore[arg-type]
    with pytest.raises(AccountsError, match="an owner must be a line"):
        desk.keys.create("bob", owner="Bob\nof Search")


# --- rates


def test_requests_of_a_minute(desk: Desk) -> None:
    desk.limit(requests_per_minute=2)
    first = desk.granted()
    assert first.rates.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m1s",
    }
    desk.clock.now += 10.5
    desk.granted()
    refused = desk.refused()
    assert (refused.reason, refused.retry_after_s, refused.rates.remaining_requests) == ("requests", 50.5, 0)
    desk.clock.now += 50.49
    assert desk.refused().reason == "requests"
    desk.clock.now += 0.01
    desk.granted()


def test_tokens_of_a_minute_are_corrected_to_what_was_used(desk: Desk) -> None:
    desk.limit(tokens_per_minute=100)
    grant = desk.granted(40, 60)
    refused = desk.refused(1)
    assert (refused.reason, refused.retry_after_s) == ("tokens", 61.0) and "0 are left" in refused.message
    assert desk.books.settle(grant, Used(prompt_tokens=40, completion_tokens=5))
    assert desk.granted(55).rates.remaining_tokens == 0
    assert desk.refused(1).reason == "tokens"


def test_what_can_never_pass_is_told_so(desk: Desk) -> None:
    desk.limit(tokens_per_minute=100, budget_usd=0.000_05)
    tokens, money = desk.refused(101), desk.refused(51)
    assert tokens.reason == "tokens" and "101 tokens, more than this key's whole limit of 100 a minute: it can never pass" in tokens.message
    assert money.reason == "budget" and "whole budget" in money.message and "it can never pass" in money.message
    assert tokens.retry_after_s is None and money.retry_after_s is None


def test_a_wait_is_as_long_as_the_slowest_limit_asks(desk: Desk) -> None:
    desk.limit(requests_per_minute=1, tokens_per_minute=100)
    desk.granted(100)
    desk.clock.now += 1
    assert desk.refused(1).retry_after_s == 60.0


def test_models(desk: Desk) -> None:
    desk.limit(models=["large", "larger"])
    refused = desk.refused()
    assert refused.reason == "model" and "may not ask the model 'small'; ask one of 'large', 'larger'" in refused.message
    for at in range(3):
        assert isinstance(desk.books.reserve(desk.key, f"made-up-{at}", prompt_tokens=1, max_tokens=1), Refusal)
    assert [(row.model, row.refused) for row in usage.sums(desk.database)] == [("(not allowed)", 4)]


def test_a_release_gives_everything_back(desk: Desk) -> None:
    desk.limit(requests_per_minute=1, tokens_per_minute=10, budget_usd=0.000_01)
    grant = desk.granted()
    assert desk.refused().reason == "requests"
    assert desk.books.release(grant) and not desk.books.release(grant) and not desk.books.settle(grant, GOOD)
    desk.granted()
    assert not [row for row in usage.sums(desk.database) if row.requests]


# --- money


def test_a_budget_is_never_passed(desk: Desk) -> None:
    desk.limit(budget_usd=0.000_1)  # a hundred prompt tokens
    held = desk.granted(20, 35)
    soon = desk.refused(11)
    assert (soon.reason, soon.retry_after_s) == ("budget", 1.0)  # what is held may come back at any moment
    desk.books.settle(held, Used(prompt_tokens=20, completion_tokens=35))
    spent = desk.refused(11)
    assert (spent.reason, spent.retry_after_s) == ("budget", 3600.0)  # when the month is over
    desk.granted(10)
    assert desk.keys.get("ana").spent_usd == 0.000_09
    desk.clock.now += 3600
    assert desk.keys.get("ana").spent_usd == 0
    desk.granted(100)


def test_a_request_counts_in_the_month_in_which_it_was_admitted(desk: Desk) -> None:
    desk.limit(budget_usd=0.000_1)
    grant = desk.granted(100)
    desk.clock.now += 3600
    desk.granted(90)
    desk.books.settle(grant, Used(prompt_tokens=50))
    assert desk.refused(11).reason == "budget"
    desk.granted(10)
    assert [(row.day, row.usd) for row in usage.sums(desk.database, by=["day"])] == [("2026-01-31", 0.000_05), ("2026-02-01", 0.0)]


def test_a_clock_that_is_behind_does_not_bring_back_a_month(desk: Desk) -> None:
    desk.limit(budget_usd=0.000_1)
    desk.clock.now += 3600
    desk.granted(60)
    desk.clock.now -= 10
    assert desk.refused(41).reason == "budget"
    desk.books.settle(desk.granted(40), Used(prompt_tokens=40))  # in the month that has begun
    assert desk.refused(1).reason == "budget"
    assert [row.day for row in usage.sums(desk.database, by=["day"])] == ["2026-02-01"]


def test_cached_tokens_cost_less_and_a_model_without_a_price_nothing(desk: Desk) -> None:
    desk.books.settle(desk.granted(10, 5), Used(prompt_tokens=10, completion_tokens=5, cached_tokens=4))
    unknown = desk.books.reserve(desk.key, "unknown", prompt_tokens=1, max_tokens=1)
    assert isinstance(unknown, Grant) and unknown.ask.nusd == 0
    desk.books.settle(unknown, Used(prompt_tokens=1))
    rows = usage.sums(desk.database, by=["model"])
    assert [(row.model, row.usd, row.priced) for row in rows] == [("small", 0.000_018, True), ("unknown", 0.0, False)]
    assert [(row.requests, row.priced) for row in usage.sums(desk.database, by=["owner"])] == [(2, False)]


# --- once


def test_a_grant_is_settled_once(desk: Desk) -> None:
    grant = desk.granted(10, 5)
    assert [desk.books.settle(grant, GOOD), desk.books.settle(grant, GOOD), desk.books.release(grant)] == [True, False, False]
    assert desk.books.post([Settle(grant, GOOD), Release(grant)]) == [False, False]
    assert [row.requests for row in usage.sums(desk.database)] == [1]


def test_within_one_transaction_too(desk: Desk) -> None:
    desk.limit(requests_per_minute=2)
    asked = desk.books.post([Reserve(desk.key, "small", 1, 1) for _ in range(3)])
    assert [type(result) for result in asked] == [Grant, Grant, Refusal]
    grant = asked[0]
    assert isinstance(grant, Grant)
    assert desk.books.post([Settle(grant, GOOD), Settle(grant, GOOD), Release(grant)]) == [True, False, False]


def test_a_grant_that_nobody_settles_is_billed_as_reserved(desk: Desk) -> None:
    dead, alive = desk.granted(10, 5), desk.granted(7)
    desk.clock.now += GRANT_S - 1
    assert desk.books.sweep() == 0 and desk.books.settle(alive, Used(prompt_tokens=7))
    desk.clock.now += 1
    assert [desk.books.sweep(), desk.books.sweep()] == [1, 0]
    assert not desk.books.settle(dead, Used(prompt_tokens=1))
    assert [(row.requests, row.prompt_tokens, row.completion_tokens, row.usd) for row in usage.sums(desk.database)] == [(2, 17, 5, 0.000_027)]
    assert [(row.id, row.status) for row in usage.log(desk.database)] == [(dead.id, 0), (alive.id, 200)]
    assert desk.count(tables.grants) == 0


def test_an_id_of_ones_own_is_booked_once(desk: Desk) -> None:
    name = "batch:b1:7"
    assert [desk.books.book(name, key=desk.key, model="small", used=GOOD) for _ in range(2)] == [True, False]
    assert desk.refused(id=name).reason == "booked"
    bob = desk.keys.create("bob") and desk.keys.get("bob").id
    desk.granted(id="batch:b1:8")
    for one in (name, "batch:b1:8"):  # keys do not share ids
        assert desk.books.book(one, key=bob, model="small", used=GOOD)
    assert desk.count(tables.grants) == 1
    assert [(row.key, row.requests) for row in usage.sums(desk.database, by=["key"])] == [("ana", 1), ("bob", 2)]


def test_a_grant_with_an_id_of_ones_own_is_replaced_by_the_next_attempt(desk: Desk) -> None:
    desk.limit(requests_per_minute=1, tokens_per_minute=10)
    first = desk.granted(10, id="batch:b1:7")
    second = desk.granted(10, id="batch:b1:7")  # the process that held the first is dead
    assert desk.refused(1).reason == "requests" and desk.count(tables.grants) == 1
    assert desk.books.book("batch:b1:7", key=desk.key, model="small", used=GOOD)
    assert not desk.books.settle(first, GOOD) and not desk.books.settle(second, GOOD)
    desk.clock.now += GRANT_S
    assert desk.books.sweep() == 0 and [row.requests for row in usage.sums(desk.database)] == [1]


def test_a_grant_that_was_renewed_does_not_expire_with_the_old_one(desk: Desk) -> None:
    desk.granted(id="batch:b1:7")
    desk.clock.now += GRANT_S / 2
    desk.granted(id="batch:b1:7")
    desk.clock.now += GRANT_S / 2
    assert desk.books.sweep() == 0 and desk.count(tables.grants) == 1
    assert desk.books.post([Expire("batch:b1:7", desk.key)]) == [False]  # found when it was the old one, and posted when it is the new
    assert desk.count(tables.grants) == 1


def test_a_grant_with_an_id_of_ones_own_is_given_back_when_its_time_is_over_and_can_still_be_booked(desk: Desk) -> None:
    desk.limit(budget_usd=0.000_02)
    desk.granted(10, id="batch:b1:7")
    assert desk.refused(20).reason == "budget"
    desk.clock.now += GRANT_S
    assert desk.books.sweep() == 1 and desk.count(tables.grants) == 0 and not usage.sums(desk.database)[0].requests
    desk.granted(20)
    assert [desk.books.book("batch:b1:7", key=desk.key, model="small", used=GOOD) for _ in range(2)] == [True, False]


def test_limits_per_minute_do_not_count_for_what_is_not_paced(desk: Desk) -> None:
    desk.limit(requests_per_minute=1, tokens_per_minute=10, budget_usd=0.000_1)
    many = [desk.books.reserve(desk.key, "small", prompt_tokens=40, max_tokens=0, id=f"batch:b1:{at}", paced=False) for at in range(3)]
    assert [isinstance(one, Grant) for one in many] == [True, True, False]
    assert isinstance(many[2], Refusal) and many[2].reason == "budget"
    assert desk.books.book("batch:b1:0", key=desk.key, model="small", used=GOOD) and desk.books.release(many[1])  # type: ignore[arg-type]
    grant = desk.granted(10)
    assert grant.rates.remaining_requests == 0 and grant.rates.remaining_tokens == 0


def test_an_entry_of_another_database_spoils_no_other(desk: Desk) -> None:
    strange, fine = desk.books.post([Reserve(desk.key + 99, "small", 1, 1), Reserve(desk.key, "small", 1, 1)])
    assert isinstance(strange, AccountsError) and "of another database" in str(strange) and isinstance(fine, Grant)
    with pytest.raises(AccountsError, match="no key with the number"):
        desk.books.reserve(desk.key + 99, "small", prompt_tokens=1, max_tokens=1)


def test_what_is_wrong_is_told_before_it_is_entered(desk: Desk) -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: desk.ask(-1), "prompt_tokens must be a whole number from 0 to 100,000,000, got -1"),
        (lambda: desk.ask(1, True), "max_tokens must be a whole number"),
        (lambda: desk.ask(id="b1"), "'b1' cannot be the id of a request: .* with a ':'"),
        (lambda: desk.books.reserve("ana", "small", prompt_tokens=1, max_tokens=1), "number of a key must be .* it is the id of a Key"),  # type: ignore[arg-type]
        (lambda: desk.books.reserve(desk.key, "a\0b", prompt_tokens=1, max_tokens=1), "cannot be a model's name"),
        (lambda: desk.books.book("a:\udc80", key=desk.key, model="small", used=GOOD), "cannot be the id"),
        (lambda: Used(prompt_tokens=1, cached_tokens=2), "cached_tokens, which are among prompt_tokens, must be .* from 0 to 1, got 2"),
        (lambda: Used(ttft_s=float("nan")), "ttft_s must be seconds"),
        (lambda: Books(desk.database, grant_s=0), "grant_s must be above 0"),
    ]
    for act, why in wrong:
        with pytest.raises(AccountsError, match=why):
            act()


# --- usage


def test_usage_is_summed_and_exported(desk: Desk) -> None:
    desk.books.settle(desk.granted(10, 5), GOOD)
    desk.clock.now += 3600
    desk.books.settle(desk.granted(10, 5), GOOD)
    desk.limit(models=["large"])
    desk.refused()
    rows = usage.sums(desk.database, by=["day", "key", "model"])
    assert [(row.day, row.model, row.requests, row.refused) for row in rows] == [
        ("2026-01-31", "small", 1, 0),
        ("2026-02-01", "(not allowed)", 0, 1),
        ("2026-02-01", "small", 1, 0),
    ]
    february = usage.sums(desk.database, dt.date(2026, 2, 1), by=["key"])
    assert [(row.key, row.day, row.requests, row.usd) for row in february] == [("ana", None, 1, 0.000_02)]
    assert usage.sums(desk.database, by=["model"], key="bob") == [] and len(usage.sums(desk.database, by=["model"], key="ana")) == 2
    assert usage.sums(desk.database, until=dt.date(2026, 1, 31)) == [] == usage.sums(desk.database, until=dt.date(2026, 1, 31), by=[])
    assert json.loads(usage.as_json(february))[0].keys() == {
        "key",
        "requests",
        "refused",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "usd",
        "priced",
    }
    (line,) = csv.DictReader(io.StringIO(usage.as_csv(february)))
    assert (line["key"], line["usd"], line["priced"]) == ("ana", "2e-05", "true") and usage.as_csv([]) == ""
    with pytest.raises(AccountsError, match="cannot be grouped by 'modell'.*did you mean 'model'"):
        usage.sums(desk.database, by=["modell"])  # type: ignore[list-item]


def test_a_spreadsheet_takes_no_name_for_a_formula(desk: Desk) -> None:
    desk.books.book("a:1", key=desk.key, model="=1+1", used=GOOD)
    assert ",'=1+1,1," in usage.as_csv(usage.sums(desk.database))


def test_the_log_of_requests(desk: Desk) -> None:
    grant = desk.granted(10, 5)
    desk.books.settle(grant, Used(prompt_tokens=10, completion_tokens=2, status=503, queue_s=0.5, ttft_s=1.5, took_s=2.0))
    (row,) = usage.log(desk.database, key="ana")
    assert (row.id, row.at, row.key, row.model, row.status) == (grant.id, "2026-01-31T23:00:00.000Z", "ana", "small", 503)
    assert (row.prompt_tokens, row.completion_tokens, row.usd, row.queue_s, row.ttft_s, row.took_s) == (10, 2, 0.000_014, 0.5, 1.5, 2.0)
    assert usage.log(desk.database, key="bob") == [] and json.loads(usage.as_json([row]))[0]["queue_s"] == 0.5
    assert usage.as_csv([row]).startswith("id,at,key,model,status,")


def test_the_log_is_bounded_in_time_and_in_rows(desk: Desk) -> None:
    for at in range(6):
        desk.books.book(f"a:{at}", key=desk.key, model="small", used=GOOD)
    Books(desk.database, log_rows=4, clock=desk.clock).prune()
    assert [row.id for row in usage.log(desk.database)] == ["a:5", "a:4", "a:3", "a:2"]
    desk.clock.now += 10 * 86_400
    desk.books.book("a:6", key=desk.key, model="small", used=GOOD)
    assert not Books(desk.database, log_days=5, clock=desk.clock).prune()
    assert [row.id for row in usage.log(desk.database)] == ["a:6"]
    assert not desk.books.book("a:0", key=desk.key, model="small", used=GOOD)  # what is booked is remembered for longer
    desk.clock.now += (BOOKED_DAYS - 5) * 86_400
    desk.books.prune()
    assert desk.count(tables.booked) == 1 and [row.requests for row in usage.sums(desk.database)] == [7]


# --- the database


def test_the_accounts_outlive_their_database_object(desk: Desk) -> None:
    desk.limit(requests_per_minute=1)
    desk.granted()
    again = Database(desk.where)
    found = Keys(again).find(desk.token)
    assert found is not None and found.id == desk.key
    assert isinstance(Books(again, clock=desk.clock).reserve(found.id, "small", prompt_tokens=1, max_tokens=1), Refusal)
    again.close()


def test_a_newer_database_is_refused(desk: Desk) -> None:
    with desk.database.writing() as connection:
        connection.execute(tables.about.update().values(format=2))
    with pytest.raises(AccountsError, match="a newer headrace .format 2; this release knows 1."):
        Database(desk.where)
    with desk.database.writing() as connection:
        connection.execute(tables.about.update().values(format=1))
        connection.execute(sa.text("ALTER TABLE headrace_keys DROP COLUMN owner"))
    with pytest.raises(AccountsError, match="damaged .headrace_keys.owner is missing."):
        Database(desk.where)
    with desk.database.writing() as connection:
        connection.execute(sa.text("DROP TABLE headrace_about"))
    with pytest.raises(AccountsError, match="damaged .headrace_about is missing."):
        Database(desk.where)


def test_a_damaged_minute_is_told(desk: Desk) -> None:
    with desk.database.writing() as connection:
        connection.execute(tables.keys.update().values(minute="[[1"))
    with pytest.raises(AccountsError, match="damaged: the last minute of key 1"):
        desk.granted()


def test_a_failed_transaction_leaves_nothing(desk: Desk) -> None:
    grant = desk.granted(10, 5)
    with desk.database.writing() as connection:
        connection.execute(sa.text("DROP TABLE headrace_requests"))
    with pytest.raises(AccountsError, match="cannot be used: .*headrace_requests"):
        desk.books.settle(grant, GOOD)
    assert desk.count(tables.grants) == 1 and desk.count(tables.usage) == 0
