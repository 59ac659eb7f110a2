"""Windows, prices, limits and places of accounts: what needs no open database, or only a file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

import headrace
from headrace.errors import AccountsError, KeyFileError
from headrace.gateway.accounts.database import Database, default_path
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.accounts.prices import Price, Prices
from headrace.gateway.accounts.quotas import Rates
from headrace.gateway.accounts.window import Window

SOURCES = str(Path(headrace.__file__).parents[1])


def test_a_second_counts_until_its_last_moment_has_left() -> None:
    window = Window()
    window.admit(window.advance(100.999), 7)
    for now, left in ((160.998, 1), (160.999, 1), (160.9999, 1), (161.0, 0)):
        again = Window(str(window))
        again.advance(now)
        assert (again.requests, again.tokens) == (left, 7 * left)


def test_waits() -> None:
    window = Window()
    for now, tokens in ((10.0, 5), (10.5, 5), (20.0, 5)):
        window.admit(window.advance(now), tokens)
    assert [window.wait_s(20.0, requests=count) for count in (0, 1, 2, 3, 9)] == [0.0, 51.0, 51.0, 61.0, 61.0]
    assert [window.wait_s(20.0, tokens=count) for count in (1, 10, 11)] == [51.0, 51.0, 61.0]


def test_a_clock_that_is_behind_counts_at_the_time_of_the_other() -> None:
    window = Window()
    window.admit(window.advance(100.0), 1)
    assert window.advance(95.0) == 100.0
    assert window.admit(100.0, 1) == 100


def test_a_clock_that_was_far_ahead_does_not_block_for_as_long() -> None:
    window = Window()
    window.admit(window.advance(100_000.0), 7)
    assert window.advance(100.0) == 100.0 and (window.requests, window.tokens) == (1, 7)
    window.advance(161.0)
    assert window.requests == 0


def test_a_window_stays_small() -> None:
    window = Window()
    for at in range(10_000):
        window.admit(window.advance(at / 10), 1_000_000)
    assert len(str(window)) < 2_000


def test_corrections_come_too_late_once_the_second_has_left() -> None:
    window = Window()
    second = window.admit(window.advance(10.0), 5)
    window.correct(second, tokens=-2)
    assert window.tokens == 3
    window.correct(second, requests=-1, tokens=-3)
    assert str(window) == "[]"
    window.correct(second, tokens=9)
    assert window.tokens == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", "[[1]]", '[["a",1,1]]'])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        Window(text)


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0ms"), (0.0171, "18ms"), (0.9999, "1s"), (1.01, "2s"), (59.5, "1m0s"), (61.0, "1m1s"), (360.0, "6m0s")])
def test_durations_are_written_as_clients_know_them(seconds: float, text: str) -> None:
    assert Rates(5, None, 2, None, seconds).headers()["x-ratelimit-reset-requests"] == text


def test_what_has_no_limit_has_no_headers() -> None:
    assert Rates().headers() == {}
    assert set(Rates(limit_tokens=5, remaining_tokens=1).headers()) == {f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")}


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute must be a whole number from 1 to 1,000,000,000, got 0; None is no limit"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute must be a whole number"),
        ({"tokens_per_minute": True}, "tokens_per_minute must be a whole number"),
        ({"budget_usd": -1}, "budget_usd must be a number of USD from 0"),
        ({"budget_usd": float("nan")}, "budget_usd must be a number"),
        ({"budget_usd": "5"}, "budget_usd must be a number .* got '5'"),
        ({"priority": "interactiv"}, "must be one of 'interactive', 'normal', 'batch', got 'interactiv'; did you mean 'interactive'"),
        ({"log_prompts": 1}, "log_prompts must be True or False"),
        ({"models": "small"}, "must be a list of names, got the text 'small'; write"),
        ({"models": []}, "models must name 1 to 100 models, got 0; leave it out to allow all"),
        ({"models": ["a b"]}, "'a b' cannot be a model's name"),
        ({"models": [7]}, "'7' cannot be a model's name"),
    ],
)
def test_limits_are_checked(limits: dict[str, object], why: str) -> None:
    with pytest.raises(AccountsError, match=why):
        Limits(**limits)  # type: ignore[arg-type]


def test_prices_are_exact_and_rounded_up() -> None:
    price = Price(prompt=0.1, cached=0.01, completion=0.4)
    assert price.nusd(1_000_000, 0) == 100_000_000 and price.nusd(3, 3, 1) == 200 + 10 + 1200
    assert Price(prompt=Decimal("0.000001"), completion=0).nusd(1, 0) == 1  # a thousandth of a nano-USD is not nothing
    assert Price(prompt=1, completion=1).nusd(10, 0, 10) == 10_000  # by default cached tokens cost what others do


def test_prices_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('["Qwen/Qwen3-0.6B"]\nprompt = 0.10\ncached = 0.01\ncompletion = 0.40\n')
    prices = Prices.read(file)
    assert "Qwen/Qwen3-0.6B" in prices and prices.nusd("Qwen/Qwen3-0.6B", 10, 10) == 5_000
    assert "other" not in prices and prices.nusd("other", 10, 10) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "is no TOML"),
        ("small = 1", "'small' must be a table of prices, got 1"),
        ("[small]\nprompt = 1", "'small' lacks a price for 'completion' tokens"),
        ("[small]\npromt = 1\ncompletion = 1", "no price for 'promt', but may have 'prompt', 'cached', 'completion'; did you mean 'prompt'"),
        ("[small.v1]\nprompt = 1\ncompletion = 1", "no price for 'v1'.*has to be in quotes"),
        ("[small]\nprompt = -1\ncompletion = 1", "'small': the price of a million prompt tokens must be a number of USD from 0 to 10,000, got -1"),
        ("[small]\nprompt = 'one'\ncompletion = 1", "must be a number"),
        ("[small]\nprompt = 0.0000001\ncompletion = 1", "may have six decimals"),
        ("[small]\nprompt = 1\ncached = 2\ncompletion = 1", "cached tokens must not cost more than other prompt tokens .1., got 2"),
        ('["a b"]\nprompt = 1\ncompletion = 1', "'a b' cannot be a model's name"),
    ],
)
def test_wrong_prices_are_told(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(AccountsError, match=why):
        Prices.read(file)


def test_prices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(AccountsError, match="cannot be read"):
        Prices.read(tmp_path / "none.toml")


def test_only_the_owner_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway" / "llm.db"
    before = os.umask(0)
    try:
        database = Database(path)
    finally:
        os.umask(before)
    with database.writing():
        assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == dict.fromkeys(["llm.db", "llm.db-wal", "llm.db-shm"], 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    database.close()
    path.chmod(0o620)
    with pytest.raises(AccountsError, match="chmod 600"):
        Database(path)


def test_what_is_no_database_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "llm.db"
    path.write_bytes(b"no database at all, but long enough to be looked at " * 100)
    path.chmod(0o600)
    with pytest.raises(AccountsError, match=r"are damaged \(file is not a database\)"):
        Database(path)
    assert path.read_bytes().startswith(b"no database")


def test_a_database_of_something_else_is_left_alone_beside_ours(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "llm.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (id INTEGER)")
    connection.close()
    Database(path).close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM other").fetchone() == (0,)
    connection.close()


def test_none_is_made_unless_wanted(tmp_path: Path) -> None:
    for path in (tmp_path / "llm.db", tmp_path / "no" / "llm.db"):
        with pytest.raises(AccountsError, match="there are no accounts in .*; `headrace keys create` makes them"):
            Database(path, make=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty.db").touch(0o600)
    with pytest.raises(AccountsError, match="there are no accounts in"):
        Database(tmp_path / "empty.db", make=False)
    Database(tmp_path / "llm.db").close()
    Database(tmp_path / "llm.db", make=False).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AccountsError, match="cannot be opened: Not a directory|cannot be opened: File exists"):
        Database(tmp_path / "file" / "llm.db")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("", "no place for accounts: give the path"),
        (":memory:", "no place for accounts"),
        ("mysql://root:secret@db/x", r"'mysql://root:\*\*\*@db/x' is no place"),
        ("postgres://ana:secret@db/x", "write postgresql.psycopg:// in place of postgres://"),
        ("postgresql://ana:secret@db/x", "write postgresql.psycopg:// in place of postgresql://"),
        ("postgresql+psycopg://ana:secret@db", "no place for accounts"),
        ("postgresql+psycopg://ana:pass@secret@db/x", "must stand between user: and @host, with %40 for each '@'"),
        ("postgresql+psycopg://ana@db/x?password=secret", "must stand between user: and @host"),
        ("://", "no URL of accounts"),
    ],
)
def test_where_accounts_may_be(where: str, why: str) -> None:
    with pytest.raises(AccountsError, match=why) as raised:
        Database(where)
    assert "secret" not in str(raised.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(AccountsError, match="cannot be used: .*onnection") as raised:
        Database("postgresql+psycopg://ana:secret@127.0.0.1:1/x")
    assert "secret" not in str(raised.value)


def test_the_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_path("llm") == tmp_path / "headrace" / "gateway" / "llm.db"
    with pytest.raises(KeyFileError, match="no name of a service"):
        default_path("../llm")


@pytest.mark.parametrize(("missing", "where"), [("sqlalchemy", "x.db"), ("psycopg", "postgresql+psycopg://127.0.0.1:1/x")])
def test_a_missing_extra_is_told(missing: str, where: str) -> None:
    code = f"""
import importlib.util, sys
from importlib.abc import MetaPathFinder

class Gone(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Gone())
found = importlib.util.find_spec
sys.path.insert(0, {SOURCES!r})
importlib.util.find_spec = lambda name, package=None: None if name == {missing!r} else found(name, package)
from headrace.errors import HeadraceError
try:
    from headrace.gateway.accounts.database import Database
    Database({where!r})
except HeadraceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'headrace[gateway]'" in done.stdout, done.stderr
