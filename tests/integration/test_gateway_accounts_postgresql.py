"""The accounts of a gateway on a real PostgreSQL: every test that they have to pass on SQLite."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import sqlalchemy as sa
from components.test_gateway_accounts import *  # noqa: F403 - the tests, and what they need
from postgres import create, postgresql  # noqa: F401 - a fixture
from typer.testing import CliRunner

from headrace import cli

NUMBERS = itertools.count(1)


@pytest.fixture
def place(postgresql: str) -> str:  # noqa: F811
    return create(postgresql, f"accounts_{next(NUMBERS)}")


def test_this_is_a_postgresql(desk) -> None:
    assert desk.database.engine.dialect.name == "postgresql"


def test_a_lost_connection_is_made_again(desk) -> None:
    """Whoever restarts the server costs at most what was under way."""
    others = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    other = Database(desk.where)  # noqa: F405
    with other.writing() as connection:
        connection.execute(others)
    other.close()
    desk.granted()


def test_a_connection_that_is_lost_on_the_way_is_told(desk) -> None:
    with pytest.raises(AccountsError, match="cannot be used"), desk.database.writing() as connection:  # noqa: F405
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        with desk.database.writing() as other:
            other.execute(sa.text(f"SELECT pg_terminate_backend({pid})"))
        connection.execute(sa.text("SELECT 1"))
    desk.granted()


def test_the_command_takes_a_url_and_shows_no_password(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_ACCOUNTS", place.replace("headrace@", "headrace:secret@"))

    def call(*words: str) -> str:
        done = CliRunner().invoke(cli.app, ["keys", *words], catch_exceptions=False)
        assert done.exit_code == 0 and "secret" not in done.output, done.output
        return done.output

    with pytest.raises(AccountsError, match="there are no accounts in 'postgresql"):  # noqa: F405
        call("list")
    assert "headrace:***@" in call("create", "ana", "--owner", "Search", "--budget", "50")
    assert "10,000" in call("limit", "ana", "--tokens-per-minute", "10000")
    with contextlib.closing(Database(place)) as database:  # noqa: F405
        Books(database, prices=PRICES).book("a:1", key=Keys(database).get("ana").id, model="small", used=GOOD)  # noqa: F405
    assert "0.00002 USD" in call("usage", "--key", "ana", "--by", "model")
    call("revoke", "ana")
    assert "Search" in call("list", "--revoked") and "nobody is let in" in call("list")
