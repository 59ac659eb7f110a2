"""What was used: sums by key, owner, model and day, the log of requests, and both as CSV or JSON."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import sqlalchemy as sa

from headrace.errors import AccountsError, listing, nearest
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.limits import NANO, whole
from headrace.gateway.accounts.tables import keys, requests, usage

By = Literal["day", "key", "owner", "model"]
NOT_ALLOWED = "(not allowed)"
"""In place of the model: refusals of models that the key may not ask."""

_GROUPS = {"day": usage.c.day, "key": keys.c.name, "owner": keys.c.owner, "model": usage.c.model}
_SUMS = ("requests", "refused", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """What was used by one group; what it was not grouped by is None.

    `priced` is false if some of the requests were of models without a price: `usd` lacks what they cost.
    """

    day: str | None = None
    key: str | None = None
    owner: str | None = None
    model: str | None = None
    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    usd: float
    priced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request in the log. `at` is when it was settled, in UTC (RFC 3339); a status of 0 says that its process died, and that it was billed as reserved."""

    id: str
    at: str
    key: str
    model: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    usd: float
    queue_s: float | None
    ttft_s: float | None
    took_s: float | None


def sums(
    database: Database, since: dt.date | None = None, until: dt.date | None = None, *, by: Sequence[By] = ("key", "model"), key: str | None = None
) -> list[Sum]:
    """What was used on the days from `since` on and before `until`, of UTC, by all keys or the one that is named, in the order of what it is grouped by.

    Raises:
        AccountsError: it cannot be grouped so, or the database is out of reach.
    """
    for name in by:
        if name not in _GROUPS:
            raise AccountsError(f"usage cannot be grouped by {name!r}, only by {listing(_GROUPS)}{nearest(str(name), _GROUPS)}")
    groups = [_GROUPS[name].label(name) for name in dict.fromkeys(by)]
    columns = [sa.cast(sa.func.sum(usage.c[name]), sa.BigInteger).label(name) for name in (*_SUMS, "unpriced", "nusd")]
    query = sa.select(*groups, *columns).join_from(usage, keys, usage.c.key == keys.c.id).group_by(*groups).order_by(*groups)
    if since is not None:
        query = query.where(usage.c.day >= since.isoformat()[:10])
    if until is not None:
        query = query.where(usage.c.day < until.isoformat()[:10])
    if key is not None:
        query = query.where(keys.c.name == key)
    with database.reading() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings() if row["requests"] is not None]
    found = []
    for row in rows:
        usd, priced = row.pop("nusd") / NANO, not row.pop("unpriced")
        if row.get("model") == "":
            row["model"] = NOT_ALLOWED
        found.append(Sum(**row, usd=usd, priced=priced))
    return found


def log(database: Database, *, key: str | None = None, most: int = 100) -> list[Request]:
    """The newest requests in the log, the newest first; of one key, if it is named.

    Raises:
        AccountsError: the number is out of bounds, or the database is out of reach.
    """
    whole(most, "most", least=1, most=1_000_000)
    query = sa.select(requests, keys.c.name).join_from(requests, keys, requests.c.key == keys.c.id).order_by(requests.c.number.desc()).limit(most)
    if key is not None:
        query = query.where(keys.c.name == key)
    names = [field.name for field in fields(Request) if field.name not in ("at", "key", "usd")]
    with database.reading() as connection:
        return [
            Request(**{name: row[name] for name in names}, at=_when(row["at"]), key=row["name"], usd=row["nusd"] / NANO)
            for row in connection.execute(query).mappings()
        ]


def as_json(rows: Iterable[Sum | Request]) -> str:
    """Rows as a JSON array; a sum has no fields that it was not grouped by."""
    return json.dumps([_record(row) for row in rows], indent=1) + "\n"


def as_csv(rows: Iterable[Sum | Request]) -> str:
    """Rows as CSV with a header; empty if there are none."""
    text = io.StringIO()
    for at, row in enumerate(rows):
        record = {name: _cell(value) for name, value in _record(row).items()}
        writer = csv.DictWriter(text, record, lineterminator="\n")
        if at == 0:
            writer.writeheader()
        writer.writerow(record)
    return text.getvalue()


def _record(row: Sum | Request) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if not isinstance(row, Sum) or value is not None}


def _cell(value: Any) -> Any:
    """Spreadsheets take a text that begins with one of these for a formula, and whoever names a model or an owner would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
