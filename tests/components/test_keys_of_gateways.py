"""`headrace keys` for the accounts of a gateway, in SQLite files: limits, lists, revocation, usage, and what is told of mistakes."""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace import cli
from headrace.errors import AccountsError, HeadraceError, KeyFileError, SettingError
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Used
from headrace.gateway.accounts.keys import Key, Keys
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.accounts.prices import Prices


@dataclass
class Said:
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [" ".join(line.split()) for line in self.out.splitlines()]


Call = Callable[..., Said]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls `headrace keys` with HEADRACE_ACCOUNTS set to `place`."""
    monkeypatch.setenv("HEADRACE_ACCOUNTS", str(place))

    def run(*words: str) -> Said:
        done = CliRunner().invoke(cli.app, ["keys", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return Said(done.stdout, done.stderr)

    return run


def kept(place: Path, name: str) -> Key:
    with contextlib.closing(Database(place, make=False)) as database:
        return Keys(database).get(name)


@pytest.fixture
def used(place: Path) -> Path:
    """Accounts in which ana used a priced and an unpriced model on two days, and bob, who is revoked now, the priced one."""

    class Clock:
        now = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC).timestamp()

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    with contextlib.closing(Database(place)) as database:
        keys = Keys(database, clock=clock)
        books = Books(database, prices=Prices.of({"small": {"prompt": 100, "completion": 200}}), clock=clock)
        for name, owner in (("ana", "Search"), ("bob", "Shop")):
            keys.create(name, owner=owner)
        ana, bob = keys.get("ana").id, keys.get("bob").id
        books.book("a:1", key=ana, model="small", used=Used(prompt_tokens=1000, completion_tokens=500, cached_tokens=400))
        books.book("a:2", key=bob, model="small", used=Used(prompt_tokens=10_000))
        clock.now += 86_400
        books.book("a:3", key=ana, model="small", used=Used(prompt_tokens=2000))
        books.book("a:4", key=ana, model="other", used=Used(prompt_tokens=5))
        keys.revoke("bob")
    return place


# --- keys and limits


def test_a_key_is_made_with_its_owner_and_limits(call: Call, place: Path) -> None:
    """The key alone is on standard output, once."""
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "10000", "--budget", "12.5", "--priority", "batch", "--log-prompts"]
    made = call("create", "shop", "--owner", "Ana of Search", "--model", "small", "--model", "large", *limits)
    token = made.out.strip()
    assert made.out == f"{token}\n" and token not in made.err and f"shown only now; its hash is in {place}" in made.err
    with contextlib.closing(Database(place)) as database:
        found = Keys(database).find(token)
    expected = Limits(models=("small", "large"), requests_per_minute=60, tokens_per_minute=10_000, budget_usd=12.5, priority="batch", log_prompts=True)
    assert found is not None and (found.name, found.owner, found.limits) == ("shop", "Ana of Search", expected)
    assert call("list").lines[1].endswith("batch small, large 60 10,000 12.50 USD 0.00 USD logged")
    call("create", "tests", "--budget", "none", "--model", "all")
    assert (kept(place, "tests").owner, kept(place, "tests").limits) == ("", Limits())


def test_limits_are_changed_and_cleared_one_by_one(call: Call, place: Path) -> None:
    call("create", "shop", "--model", "small", "--requests-per-minute", "60", "--tokens-per-minute", "10000", "--budget", "12.5", "--log-prompts")
    shown = call("limit", "shop", "--tokens-per-minute", "none", "--budget", "20", "--priority", "interactive", "--no-log-prompts")
    assert kept(place, "shop").limits == Limits(models=("small",), requests_per_minute=60, budget_usd=20.0, priority="interactive")
    assert shown.lines[1].endswith("interactive small 60 none 20.00 USD 0.00 USD")
    call("limit", "shop", "--model", "all", "--requests-per-minute", "none", "--budget", "none", "--priority", "normal")
    assert kept(place, "shop").limits == Limits()
    with contextlib.closing(Database(place)) as database:
        before = Keys(database).changes()
        assert call("limit", "shop").lines[1].endswith("normal all none none none 0.00 USD")
        assert Keys(database).changes() == before  # where no limit is named, it only shows them


def test_a_list(call: Call, used: Path) -> None:
    heads, *valid = call("list").lines
    assert heads == "name owner created priority models requests/min tokens/min budget spent prompts"
    assert valid == ["ana Search 2026-01-31 normal all none none none 0.00 USD"]
    heads, *rows = call("list", "--revoked").lines
    assert heads.endswith("prompts revoked") and rows == [*valid, "bob Shop 2026-01-31 normal all none none none 0.00 USD 2026-02-01"]
    ana, bob = json.loads(call("list", "--revoked", "--json").out)
    assert ana == {
        "name": "ana",
        "owner": "Search",
        "created": "2026-01-31T12:00:00Z",
        "revoked": None,
        "models": None,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "budget_usd": None,
        "priority": "normal",
        "log_prompts": False,
        "spent_usd": 0.0,
    }
    assert bob["revoked"] == "2026-02-01T12:00:00Z" and len(json.loads(call("list", "--json").out)) == 1


def test_what_was_spent_this_month_is_in_the_list(call: Call, place: Path) -> None:
    call("create", "ana", "--budget", "50")
    with contextlib.closing(Database(place)) as database:
        prices = Prices.of({"small": {"prompt": 100, "completion": 200}})
        Books(database, prices=prices).book("a:1", key=Keys(database).get("ana").id, model="small", used=Used(prompt_tokens=25_000))
    assert json.loads(call("list", "--json").out)[0]["spent_usd"] == 2.5
    assert call("list").lines[1].endswith("50.00 USD 2.50 USD")


def test_a_key_is_revoked(call: Call, place: Path) -> None:
    call("create", "ana")
    assert "no longer valid in" in call("revoke", "ana").err
    assert call("list", "--json").out == "[]\n" and "nobody is let in" in call("list").err
    with pytest.raises(AccountsError, match="was revoked on"):
        call("limit", "ana", "--budget", "1")
    with pytest.raises(AccountsError, match="already, revoked on .*, whose usage bears the name"):
        call("create", "ana")


# --- usage


def test_usage_as_a_table(call: Call, used: Path) -> None:
    assert call("usage").lines == [
        "key day requests refused prompt tokens cached answer tokens cost",
        "ana 2026-01-31 1 0 1,000 400 500 0.20 USD",
        "ana 2026-02-01 2 0 2,005 0 0 at least 0.20 USD",
        "bob 2026-01-31 1 0 10,000 0 0 1.00 USD",
    ]
    models = call("usage", "--by", "model", "--key", "ana").lines
    assert models[1:] == ["other 1 0 5 0 0 no price", "small 2 0 3,000 400 500 0.40 USD"]


def test_usage_of_some(call: Call, used: Path) -> None:
    def keys_and_days(*words: str) -> list[tuple[str, str]]:
        return [(row["key"], row["day"]) for row in json.loads(call("usage", "--json", *words).out)]

    assert keys_and_days("--key", "bob") == [("bob", "2026-01-31")]  # although it is revoked
    assert keys_and_days("--since", "2026-02-01") == [("ana", "2026-02-01")]
    assert keys_and_days("--until", "2026-02-01") == [("ana", "2026-01-31"), ("bob", "2026-01-31")]
    assert keys_and_days("--since", "2026-02-02") == [] and "no usage" in call("usage", "--since", "2026-02-02").err


def test_usage_as_csv_and_json(call: Call, used: Path) -> None:
    as_csv = list(csv.DictReader(io.StringIO(call("usage", "--csv").out)))
    as_json = json.loads(call("usage", "--json").out)
    assert [list(row) for row in as_csv] == [list(row) for row in as_json]
    assert [(row["key"], row["day"], float(row["usd"]), row["priced"]) for row in as_csv] == [
        ("ana", "2026-01-31", 0.2, "true"),
        ("ana", "2026-02-01", 0.2, "false"),
        ("bob", "2026-01-31", 1.0, "true"),
    ]
    assert [row["owner"] for row in json.loads(call("usage", "--by", "owner", "--json").out)] == ["Search", "Shop"]


# --- mistakes


@pytest.mark.parametrize(
    ("words", "kind", "why"),
    [
        ("create ana --tokens-per-minute 10k", SettingError, "--tokens-per-minute '10k' must be a whole number, or none"),
        ("create ana --requests-per-minute 1.5", SettingError, "--requests-per-minute '1.5' must be a whole number, or none"),
        ("create ana --requests-per-minute 0", AccountsError, "requests_per_minute must be a whole number from 1"),
        ("create ana --budget much", SettingError, "--budget 'much' must be a number, or none"),
        ("create ana --budget nan", AccountsError, "budget_usd must be a number of USD from 0"),
        ("create ana --budget=-1", AccountsError, "budget_usd must be a number of USD from 0"),
        ("create ana --priority batches", AccountsError, "priority must be one of .*did you mean 'batch'"),
        ("create ana --model all --model small", SettingError, "--model all allows every model: give it alone"),
        ("list", AccountsError, "there are no accounts in .*`headrace keys create` makes them"),
        ("revoke ana", AccountsError, "there are no accounts in"),
        ("limit ana --budget 1", AccountsError, "there are no accounts in"),
        ("usage", AccountsError, "there are no accounts in"),
        ("usage --csv --json", SettingError, "give one of them"),
        ("usage --since yesterday", SettingError, "--since 'yesterday' must be a day, such as 2026-01-31"),
        ("usage --since 2026-02-01 --until 2026-02-01", SettingError, "have no day between them: --until is the day after the last"),
    ],
)
def test_mistakes_are_told_and_nothing_is_made(call: Call, place: Path, words: str, kind: type[HeadraceError], why: str) -> None:
    with pytest.raises(kind, match=why):
        call(*words.split())
    assert not place.exists()


def test_names_that_are_not_there(call: Call, used: Path) -> None:
    for words in ("limit anna --budget 1", "revoke anna", "usage --key anna"):
        with pytest.raises(AccountsError, match="no key named 'anna'.*did you mean 'ana'"):
            call(*words.split())
    with pytest.raises(AccountsError, match="cannot be grouped by 'modell'.*did you mean 'model'"):
        call("usage", "--by", "modell")


def test_whose_keys(call: Call, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said counts before the environment, and one place only may be said."""
    file, other = tmp_path / "keys.json", tmp_path / "other.db"
    call("create", "ana", "--file", str(file))
    call("create", "bob", "--accounts", str(other))
    assert not place.exists()
    assert [row["name"] for row in json.loads(call("list", "--json", "--file", str(file)).out)] == ["ana"]
    call("revoke", "bob", "--accounts", str(other))
    with pytest.raises(KeyFileError, match="only one of them"):
        call("create", "ana", "--file", str(file), "--accounts", str(other))
    with pytest.raises(KeyFileError, match="for --owner, --model, --budget give --accounts"):
        call("create", "cyd", "--file", str(file), "--owner", "Cyd", "--budget", "1", "--model", "small")
    with pytest.raises(KeyFileError, match="for --revoked give --accounts"):
        call("list", "--revoked", "--file", str(file))
    monkeypatch.setenv("HEADRACE_ACCOUNTS", "")
    with pytest.raises(KeyFileError, match=r"--accounts \(or HEADRACE_ACCOUNTS\).* --service or --file"):
        call("list")
    with pytest.raises(AccountsError, match="--accounts, or HEADRACE_ACCOUNTS"):
        call("usage")


def test_the_command_line_loads_no_database() -> None:
    """`headrace --help` does not wait for SQLAlchemy, and works without it."""
    code = "import sys, headrace.cli; print([name for name in sys.modules if name.startswith(('sqlalchemy', 'headrace.gateway'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"
