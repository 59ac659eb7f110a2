"""The accounts of a gateway on a real PostgreSQL: every test that they have to pass on SQLite."""

from __future__ import annotations

import itertools

import pytest
import sqlalchemy as sa
from postgres import create, postgresql  # noqa: F401 - a fixture
from unit.test_gateway_accounts import *  # noqa: F403 - the tests, and what they need

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
