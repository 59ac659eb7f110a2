"""The accounts of a gateway on a real PostgreSQL: every test that they have to pass on SQLite."""

from __future__ import annotations

import itertools

import pytest
from postgres import create, postgresql  # noqa: F401 - a fixture
from unit.test_gateway_accounts import *  # noqa: F403 - the tests, and what they need

NUMBERS = itertools.count(1)


@pytest.fixture
def place(postgresql: str) -> str:  # noqa: F811
    return create(postgresql, f"accounts_{next(NUMBERS)}")


def test_this_is_a_postgresql(desk) -> None:
    assert desk.database.engine.dialect.name == "postgresql"
