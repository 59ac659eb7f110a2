"""Reservations and bills, entered in transactions: what processes that share a database decide, they decide one after the other.

A grant that is neither settled nor released within `grant_s` is settled as if all of its reservation had been used: a process that dies
never makes a request free, and may make it dearer than it was. What it holds of a budget is bounded by the same time. A grant under an id of the
caller's own is given back then: whoever names requests keeps what they came to, and books it under that name however often processes die.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import cast

import sqlalchemy as sa

from headrace.errors import AccountsError
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.entries import Book, Entry, Expire, Release, Reserve, Settle, Used, check_id
from headrace.gateway.accounts.page import Page, Result
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Grant, Refusal
from headrace.gateway.accounts.tables import booked, grants, requests

GRANT_S = 3600.0
"""How long a grant is waited for: longer than any request takes."""

BOOKED_DAYS = 90
"""How long an id of a caller's own is remembered, and so kept from being billed twice."""

LOG_DAYS = 30
LOG_ROWS = 1_000_000

_DAY_S = 86_400.0
_AT_ONCE = 500  # rows that one transaction of upkeep touches, so that requests do not wait for it


class Books:
    """The books of a database. Every method is one transaction; `post` enters many things in one.

    Args:
        database: where they are kept.
        prices: what tokens cost; nothing by default.
        grant_s: seconds after which a grant that nobody has settled ends.
        log_days: how long requests stay in the log.
        log_rows: how many of them do at most.
        clock: Unix time.

    Raises:
        AccountsError: a number that is not above 0.
    """

    def __init__(
        self,
        database: Database,
        *,
        prices: Prices | None = None,
        grant_s: float = GRANT_S,
        log_days: float = LOG_DAYS,
        log_rows: int = LOG_ROWS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for what, value in (("grant_s", grant_s), ("log_days", log_days), ("log_rows", log_rows)):
            if not value > 0:
                raise AccountsError(f"{what} must be above 0, got {value!r}")
        self.database = database
        self.prices = prices or Prices()
        self.grant_s = grant_s
        self._log_days = log_days
        self._log_rows = log_rows
        self.clock = clock

    def post(self, entries: Sequence[Entry]) -> list[Result | AccountsError]:
        """Enter all of them in one transaction, in order; an entry that is of another database gets its error as its result.

        Raises:
            AccountsError: the database refuses or cannot be reached; nothing was entered.
        """
        with self.database.writing() as connection:
            page = Page(connection, entries, prices=self.prices, grant_s=self.grant_s, clock=self.clock)
            results = [_entered(page, entry) for entry in entries]
            page.write()
        return results

    def reserve(self, key: int, model: str, *, prompt_tokens: int, max_tokens: int, id: str | None = None, paced: bool = True) -> Grant | Refusal:
        """Ask whether a request may run, and set aside what it may use at most.

        Args:
            key: the number of the key that asks.
            model: whose name has been found to be one that is served.
            prompt_tokens: of the prompt, or a number that they cannot exceed.
            max_tokens: that the answer may have.
            id: an id of the caller's own, with a ':' in it. A grant that it has already is replaced.
            paced: whether the limits per minute count.

        Raises:
            AccountsError: a value that is not allowed, or the database refuses.
        """
        return cast("Grant | Refusal", self._one(reservation(key, model, prompt_tokens, max_tokens, id, paced=paced)))

    def settle(self, grant: Grant, used: Used) -> bool:
        """Replace a reservation by what was used, and book it. False if it was settled, released or expired before.

        What is above the reservation is booked as well, and may pass the budget: whoever reserves says what is used at most.

        Raises:
            AccountsError: the database refuses. It does no harm to try again.
        """
        return cast("bool", self._one(Settle(grant, used)))

    def release(self, grant: Grant) -> bool:
        """Give a reservation back: the request never ran. False if it was settled, released or expired before.

        Raises:
            AccountsError: the database refuses.
        """
        return cast("bool", self._one(Release(grant)))

    def book(self, id: str, *, key: int, model: str, used: Used) -> bool:
        """Book a request under an id of the caller's own, such as `batch:b1:7`, once. False if it was booked before.

        A grant with this id is settled by it. Without one the budget is charged, but has not been asked.

        Raises:
            AccountsError: a value that is not allowed, or the database refuses.
        """
        return cast("bool", self._one(Book(id, key, model, used)))

    def sweep(self) -> int:
        """End grants whose time is over, some hundreds at once; returns how many. There may be more unless it is 0.

        Raises:
            AccountsError: the database refuses.
        """
        with self.database.reading() as connection:
            over = sa.select(grants.c.id, grants.c.key).where(grants.c.expires <= self.clock()).order_by(grants.c.expires).limit(_AT_ONCE)
            found = [Expire(row.id, row.key) for row in connection.execute(over)]
        return sum(result is True for result in self.post(found)) if found else 0

    def prune(self) -> bool:
        """Let go of some of what is older than it is kept: requests in the log, and ids that were booked. True if there may be more.

        Raises:
            AccountsError: the database refuses.
        """
        now = self.clock()
        with self.database.writing() as connection:
            newest = connection.scalar(sa.select(sa.func.max(requests.c.number))) or 0
            oldest = connection.execute(sa.select(requests.c.number, requests.c.at).order_by(requests.c.number).limit(_AT_ONCE)).all()
            gone = [row.number for row in oldest if row.at < now - self._log_days * _DAY_S or row.number <= newest - self._log_rows]
            if gone:
                connection.execute(requests.delete().where(requests.c.number <= gone[-1]))
            stale = sa.select(booked.c.id).where(booked.c.at < now - BOOKED_DAYS * _DAY_S).limit(_AT_ONCE)
            forgotten = connection.execute(booked.delete().where(booked.c.id.in_(stale))).rowcount
        return len(gone) == _AT_ONCE or forgotten == _AT_ONCE

    def _one(self, entry: Entry) -> Result:
        result = self.post([entry])[0]
        if isinstance(result, AccountsError):
            raise result
        return result


def _entered(page: Page, entry: Entry) -> Result | AccountsError:
    try:
        return page.enter(entry)
    except AccountsError as error:
        return error


def reservation(key: int, model: str, prompt_tokens: int, max_tokens: int, own: str | None, *, paced: bool) -> Reserve:
    """The entry that asks for a grant, under an id of the caller's own if there is one.

    Raises:
        AccountsError: a value that is not allowed.
    """
    if own is None:
        return Reserve(key, model, prompt_tokens, max_tokens, paced=paced)
    check_id(own)
    return Reserve(key, model, prompt_tokens, max_tokens, own, paced)
