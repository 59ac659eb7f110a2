"""One transaction of the books: load what its entries touch, decide them in memory one after the other, write what has changed.

Rows are locked in one order, keys by their number and then what belongs to them, so that transactions of several processes wait for each
other and never in a circle. A grant is taken by deleting its row: whoever gets the row back settles it, and nobody else can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from headrace.errors import AccountsError
from headrace.gateway.accounts.entries import Book, Entry, Expire, Release, Reserve, Settle, Used, is_own, key_of
from headrace.gateway.accounts.keys import limits_of
from headrace.gateway.accounts.prices import Prices
from headrace.gateway.accounts.quotas import Ask, Grant, Meter, Refusal, day_of, refusal
from headrace.gateway.accounts.tables import booked, grants, keys, requests, usage
from headrace.gateway.accounts.window import Window

Result = Grant | Refusal | bool

_UNPACED = -1  # the second in which a request is counted that no limit per minute counts

_Name = tuple[int, str]  # the number of a key, and an id: keys do not share ids

_COUNTS = ("requests", "refused", "unpriced", "prompt_tokens", "cached_tokens", "completion_tokens", "nusd")

_KEYS: sa.BindParameter[int] = sa.bindparam("keys", expanding=True)
_IDS: sa.BindParameter[str] = sa.bindparam("ids", expanding=True)
_LOAD = sa.select(keys).where(keys.c.id.in_(_KEYS)).order_by(keys.c.id).with_for_update()
_TAKE = grants.delete().where(grants.c.key.in_(_KEYS), grants.c.id.in_(_IDS)).returning(grants)
_BOOKED = sa.select(booked.c.key, booked.c.id).where(booked.c.key.in_(_KEYS), booked.c.id.in_(_IDS))
_METER = (
    keys.update().where(keys.c.id == sa.bindparam("at")).values({name: sa.bindparam(f"new_{name}") for name in ("minute", "month", "spent_nusd", "held_nusd")})
)
_GRANT, _LOG, _OWN = grants.insert(), requests.insert(), booked.insert()


def _adding(insert: Any) -> Any:
    return insert.on_conflict_do_update(index_elements=["day", "key", "model"], set_={name: usage.c[name] + insert.excluded[name] for name in _COUNTS})


_USAGE = {"sqlite": _adding(sqlite.insert(usage)), "postgresql": _adding(postgresql.insert(usage))}


class Page:
    """The entries of one transaction.

    Args:
        connection: a transaction that may write.
        entries: what is going to be entered; `enter` takes no others.
        prices: what tokens cost.
        grant_s: how long a grant is waited for.
        clock: Unix time. It is read when the rows are locked: time spent waiting for them does not count as the past.
    """

    def __init__(self, connection: sa.Connection, entries: Sequence[Entry], *, prices: Prices, grant_s: float, clock: Callable[[], float] = time.time) -> None:
        self._connection = connection
        self._prices = prices
        self._grant_s = grant_s
        numbers = sorted({key_of(entry) for entry in entries})
        rows = connection.execute(_LOAD, {"keys": numbers}).all()
        self._keys = {row.id: (limits_of(row), _meter(row)) for row in rows}
        self._revoked = {row.id for row in rows if row.revoked is not None}
        self.now = clock()
        self._times = {key: meter.window.advance(self.now) for key, (_, meter) in self._keys.items()}
        today = day_of(self.now)
        self._days = {key: meter.turn(today) for key, (_, meter) in self._keys.items()}
        # Grants and what was booked, by key and id. Those that no entry is about may be among the grants; they are put back.
        ids = [name for entry in entries if (name := _grant_of(entry)) is not None]
        own = [name for name in ids if is_own(name)]
        taken = connection.execute(_TAKE, {"keys": numbers, "ids": ids}) if ids else ()
        self._open = {(row.key, row.id): _grant(row) for row in taken}
        self._booked = {(row.key, row.id) for row in connection.execute(_BOOKED, {"keys": numbers, "ids": own})} if own else set()
        self._was_booked = frozenset(self._booked)
        self._usage: dict[tuple[str, int, str], dict[str, int]] = {}
        self._log: list[dict[str, Any]] = []

    def enter(self, entry: Entry) -> Result:
        """Decide one entry.

        Raises:
            AccountsError: there is no key with its number; nothing has changed.
        """
        if key_of(entry) not in self._keys:
            raise AccountsError(f"there is no key with the number {key_of(entry)}: it is of another database")
        match entry:
            case Reserve():
                return self._reserve(entry)
            case Settle(grant, used):
                return self._settle((grant.key, grant.id), used)
            case Release(grant):
                return self._give_back((grant.key, grant.id))
            case Book():
                return self._book(entry)
            case Expire(name, key):
                held = self._open.get((key, name))
                if held is None or held.expires > self.now:  # another process was first, or it was renewed
                    return False
                if is_own(name):  # its caller knows what it came to, and books that
                    return self._give_back((key, name))
                return self._settle((key, name), Used(prompt_tokens=held.ask.prompt_tokens, completion_tokens=held.ask.completion_tokens, status=0))

    def write(self) -> None:
        """Put down what has changed."""
        execute = self._connection.execute
        if self._keys:
            execute(_METER, [_columns(key, meter) for key, (_, meter) in self._keys.items()])
        for statement, rows in (
            (_GRANT, [_row(grant) for grant in self._open.values()]),
            (_OWN, [{"key": key, "id": name, "at": self.now} for key, name in self._booked - self._was_booked]),
            (_LOG, self._log),
            (_USAGE[self._connection.dialect.name], [{"day": day, "key": key, "model": model, **counts} for (day, key, model), counts in self._usage.items()]),
        ):
            if rows:
                execute(statement, rows)

    def _reserve(self, entry: Reserve) -> Grant | Refusal:
        limits, meter = self._keys[entry.key]
        now, day = self._times[entry.key], self._days[entry.key]
        nusd = self._prices.nusd(entry.model, entry.prompt_tokens, entry.completion_tokens)
        ask = Ask(entry.model, entry.prompt_tokens, entry.completion_tokens, nusd)
        if (entry.key, entry.id) in self._booked:
            return Refusal("booked", f"the request {entry.id!r} was booked already", rates=meter.rates(limits, now))
        self._give_back((entry.key, entry.id))  # of an attempt before this one
        if not entry.paced:
            limits = replace(limits, requests_per_minute=None, tokens_per_minute=None)
        against = Refusal("revoked", "this key was revoked") if entry.key in self._revoked else refusal(limits, meter, ask, now=now)
        if against is not None:
            self._count(day, entry.key, "" if against.reason == "model" else ask.model, refused=1)
            return replace(against, rates=meter.rates(limits, now))
        second = meter.window.admit(now, ask.tokens) if entry.paced else _UNPACED
        meter.pay(day, held_nusd=nusd)
        grant = Grant(entry.id, entry.key, ask, second, day, self.now + self._grant_s, meter.rates(limits, now))
        self._open[entry.key, entry.id] = grant
        return grant

    def _give_back(self, name: _Name) -> bool:
        """Take a grant and undo its reservation; False if it is not open any more."""
        grant = self._open.pop(name, None)
        if grant is None:
            return False
        _, meter = self._keys[grant.key]
        meter.window.correct(grant.second, requests=-1, tokens=-grant.ask.tokens)
        meter.pay(grant.day, held_nusd=-grant.ask.nusd)
        return True

    def _settle(self, name: _Name, used: Used) -> bool:
        grant = self._open.pop(name, None)
        if grant is None:
            return False
        _, meter = self._keys[grant.key]
        meter.window.correct(grant.second, tokens=used.prompt_tokens + used.completion_tokens - grant.ask.tokens)
        meter.pay(grant.day, held_nusd=-grant.ask.nusd)
        self._spend(name, grant.ask.model, used, day=grant.day)
        return True

    def _book(self, entry: Book) -> bool:
        name = (entry.key, entry.id)
        if name in self._booked:
            return False
        if not self._settle(name, entry.used):
            self._spend(name, entry.model, entry.used, day=self._days[entry.key])
        return True

    def _spend(self, name: _Name, model: str, used: Used, *, day: str) -> None:
        """Book usage and money on the day on which the request was admitted, which is in the month whose budget it was admitted for."""
        key, request = name
        nusd = self._prices.nusd(model, used.prompt_tokens, used.completion_tokens, used.cached_tokens)
        tokens = {"prompt_tokens": used.prompt_tokens, "cached_tokens": used.cached_tokens, "completion_tokens": used.completion_tokens, "nusd": nusd}
        self._keys[key][1].pay(day, spent_nusd=nusd)
        self._count(day, key, model, requests=1, unpriced=int(model not in self._prices), **tokens)
        times = {"queue_s": used.queue_s, "ttft_s": used.ttft_s, "took_s": used.took_s}
        self._log.append({"id": request, "at": self.now, "key": key, "model": model, "status": used.status, **tokens, **times})
        if is_own(request):
            self._booked.add(name)

    def _count(self, day: str, key: int, model: str, **counts: int) -> None:
        total = self._usage.setdefault((day, key, model), dict.fromkeys(_COUNTS, 0))
        for name, count in counts.items():
            total[name] += count


def _grant_of(entry: Entry) -> str | None:
    """The id of the grant that an entry may find; a reservation under an id made for it finds none."""
    if isinstance(entry, Settle | Release):
        return entry.grant.id
    return entry.id if not isinstance(entry, Reserve) or is_own(entry.id) else None


def _meter(row: sa.Row[Any]) -> Meter:
    try:
        return Meter(Window(row.minute), row.month, row.spent_nusd, row.held_nusd)
    except (ValueError, TypeError) as error:
        raise AccountsError(f"the accounts are damaged: the last minute of key {row.id} cannot be read ({error})") from error


def _columns(key: int, meter: Meter) -> dict[str, Any]:
    return {"at": key, "new_minute": str(meter.window), "new_month": meter.month, "new_spent_nusd": meter.spent_nusd, "new_held_nusd": meter.held_nusd}


def _grant(row: sa.Row[Any]) -> Grant:
    return Grant(row.id, row.key, Ask(row.model, row.prompt_tokens, row.completion_tokens, row.nusd), row.second, row.day, row.expires)


def _row(grant: Grant) -> dict[str, Any]:
    ask = grant.ask
    tokens = {"prompt_tokens": ask.prompt_tokens, "completion_tokens": ask.completion_tokens, "nusd": ask.nusd}
    return {"id": grant.id, "key": grant.key, "model": ask.model, **tokens, "second": grant.second, "day": grant.day, "expires": grant.expires}
