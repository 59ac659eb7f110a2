"""API keys of a gateway: made, listed, limited, revoked and found in the database.

The text of a key is that of `headrace.serving.keys`, and so is the way in which one is found: by the SHA-256 of what was presented.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from headrace.errors import AccountsError, listing, nearest
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.limits import NANO, Limits, Priority
from headrace.gateway.accounts.quotas import day_of
from headrace.gateway.accounts.tables import about, keys
from headrace.serving.keys import MOST_KEYS, NAME, check, new_token

_MOST_OWNER = 200


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the database has it; its text is nowhere.

    Attributes:
        id: its number, which grants and usage refer to.
        name: what it is called; no two keys ever have the same.
        owner: whom to ask about it; free text.
        created: Unix time.
        revoked: when it became invalid, or None.
        limits: what it may do.
        spent_usd: what it has spent in this calendar month of UTC, without what is reserved.
    """

    id: int
    name: str
    owner: str
    created: float
    revoked: float | None
    limits: Limits
    spent_usd: float


class Keys:
    """The keys in a database."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._clock = clock

    def create(self, name: str, *, owner: str = "", limits: Limits | None = None) -> str:
        """A new key. What is returned is the only copy of its text.

        Raises:
            AccountsError: the name is taken or no name, or the database is full or out of reach.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            allowed = "letters, digits, '.', '_' and '-', at most 64 of them, the first a letter or a digit"
            raise AccountsError(f"a key cannot be named {str(name)[:80]!r}: {allowed}")
        if not isinstance(owner, str) or len(owner) > _MOST_OWNER or not (owner.isprintable() or not owner):
            raise AccountsError(f"an owner must be a line of at most {_MOST_OWNER} characters, got {str(owner)[:80]!r}")
        (token, sha256), now = new_token(), self._clock()
        with self.database.writing() as connection:
            _change(connection)
            taken = connection.execute(sa.select(keys.c.revoked).where(keys.c.name == name)).one_or_none()
            if taken is not None:
                when = f", revoked on {day_of(taken.revoked)}, whose usage bears the name" if taken.revoked is not None else ""
                raise AccountsError(f"there is a key named {name!r} already{when}; choose another name")
            if (connection.scalar(sa.select(sa.func.count()).where(keys.c.revoked.is_(None))) or 0) >= MOST_KEYS:
                raise AccountsError(f"{self.database.name!r} holds {MOST_KEYS:,} valid keys, which is the most; revoke those that nobody uses")
            connection.execute(
                keys.insert().values(
                    name=name,
                    owner=owner,
                    sha256=sha256,
                    created=now,
                    minute="[]",
                    month=day_of(now)[:7],
                    spent_nusd=0,
                    held_nusd=0,
                    **_columns(limits or Limits()),
                )
            )
        return token

    def list(self, *, revoked: bool = False) -> tuple[Key, ...]:
        """All valid keys, the oldest first; with `revoked`, also those that are not valid any more.

        Raises:
            AccountsError: the database is out of reach.
        """
        wanted = sa.select(keys) if revoked else sa.select(keys).where(keys.c.revoked.is_(None))
        with self.database.reading() as connection:
            return tuple(self._key(row) for row in connection.execute(wanted.order_by(keys.c.id)))

    def get(self, name: str, *, revoked: bool = False) -> Key:
        """A valid key by its name; with `revoked`, also one that is not valid any more.

        Raises:
            AccountsError: there is none, or the database is out of reach.
        """
        with self.database.reading() as connection:
            return self._key(self._row(connection, name, revoked=revoked))

    def number(self, name: str) -> int | None:
        """The `id` of the key of that name, valid or not; None if there never was one.

        Raises:
            AccountsError: the database is out of reach.
        """
        with self.database.reading() as connection:
            return cast("int | None", connection.scalar(sa.select(keys.c.id).where(keys.c.name == name)))

    def revoke(self, name: str) -> None:
        """Make a key invalid. From now on nothing is reserved for it; what was granted may be settled.

        Raises:
            AccountsError: there is no such key, or the database is out of reach.
        """
        with self.database.writing() as connection:
            _change(connection)
            row = self._row(connection, name)
            connection.execute(keys.update().where(keys.c.id == row.id).values(revoked=self._clock()))

    def limit(self, name: str, **changes: Any) -> Key:
        """Change limits of a key, those named and no others: `limit("ana", tokens_per_minute=10_000, budget_usd=None)`.

        Raises:
            AccountsError: there is no such key or limit, the value is not allowed, or the database is out of reach.
        """
        with self.database.writing() as connection:
            _change(connection)
            row = self._row(connection, name)
            columns = _columns(limits_of(row).changed(**changes))
            return self._key(connection.execute(keys.update().where(keys.c.id == row.id).values(columns).returning(keys)).one())

    def find(self, presented: str | bytes) -> Key | None:
        """The valid key whose text was presented, or None. A gateway asks `Teller.find`, which keeps keys in memory.

        Raises:
            AccountsError: the database is out of reach.
        """
        return self.loaded()[1].find(presented)

    def changes(self) -> int:
        """A number that grows whenever a key is made, changed or revoked.

        Raises:
            AccountsError: the database is out of reach.
        """
        with self.database.reading() as connection:
            return cast("int", connection.scalar(sa.select(about.c.changes)))

    def loaded(self) -> tuple[int, Ring]:
        """All valid keys, and the number that `changes` gave when they were read.

        Raises:
            AccountsError: the database is out of reach.
        """
        with self.database.reading() as connection:
            changes = cast("int", connection.scalar(sa.select(about.c.changes)))
            return changes, Ring({row.sha256: self._key(row) for row in connection.execute(sa.select(keys).where(keys.c.revoked.is_(None)))})

    def _row(self, connection: sa.Connection, name: str, *, revoked: bool = False) -> sa.Row[Any]:
        row = connection.execute(sa.select(keys).where(keys.c.name == name)).one_or_none()
        if row is None:
            named = sa.select(keys.c.name) if revoked else sa.select(keys.c.name).where(keys.c.revoked.is_(None))
            names = connection.scalars(named.order_by(keys.c.id)).all()
            raise AccountsError(f"there is no key named {name!r} in {self.database.name!r}, but {listing(names)}{nearest(name, names)}")
        if row.revoked is not None and not revoked:
            raise AccountsError(f"the key {name!r} was revoked on {day_of(row.revoked)}; create another one")
        return row

    def _key(self, row: sa.Row[Any]) -> Key:
        spent_nusd = row.spent_nusd if row.month == day_of(self._clock())[:7] else 0
        return Key(row.id, row.name, row.owner, row.created, row.revoked, limits_of(row), spent_nusd / NANO)


class Ring:
    """Keys in memory, to be found by what was presented."""

    __slots__ = ("_keys", "_names")

    def __init__(self, hashes: dict[str, Key]) -> None:
        self._names = {sha256: key.name for sha256, key in hashes.items()}
        self._keys = {key.name: key for key in hashes.values()}

    def find(self, presented: str | bytes) -> Key | None:
        """The key whose text was presented, or None. Takes the same time whatever the keys look like."""
        name = check(self._names, presented)
        return None if name is None else self._keys[name]

    def named(self, name: str) -> Key | None:
        """The key of that name, or None."""
        return self._keys.get(name)


def limits_of(row: Any) -> Limits:
    """The limits in a row of the table of keys.

    Raises:
        AccountsError: they are none: somebody else has written there.
    """
    try:
        models = None if row.models is None else tuple(json.loads(row.models))
    except (ValueError, TypeError) as error:
        raise AccountsError(f"the accounts are damaged: the models of key {row.id} are no JSON array ({error})") from error
    return Limits(
        models=models,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        budget_usd=None if row.budget_nusd is None else row.budget_nusd / NANO,
        priority=cast("Priority", row.priority),
        log_prompts=row.log_prompts,
    )


def _columns(limits: Limits) -> dict[str, Any]:
    return {
        "models": None if limits.models is None else json.dumps(limits.models),
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "budget_nusd": limits.budget_nusd,
        "priority": limits.priority,
        "log_prompts": limits.log_prompts,
    }


def _change(connection: sa.Connection) -> None:
    """Say that keys are going to change. As all changes begin with it, they wait for each other here, and two cannot take one name."""
    connection.execute(about.update().values(changes=about.c.changes + 1))
