"""The tables of accounts, as SQLAlchemy describes them: the same in SQLite and PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

FORMAT = 1
"""Of the tables below. A release reads its own format and refuses a newer one."""

tables = sa.MetaData()

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite numbers rows by itself only where the type is its own

about = sa.Table(
    "headrace_about",
    tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # there is one row, 1
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("changes", sa.BigInteger, nullable=False),  # of keys: whoever has them in memory sees by it that they are stale
)

keys = sa.Table(
    "headrace_keys",
    tables,
    sa.Column("id", _NUMBER, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("created", sa.Double, nullable=False),  # all times are seconds of Unix time
    sa.Column("revoked", sa.Double),
    sa.Column("models", sa.Text),  # a JSON array; NULL allows all
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("budget_nusd", sa.BigInteger),  # all money is nano-USD
    sa.Column("priority", sa.String(16), nullable=False),
    sa.Column("log_prompts", sa.Boolean, nullable=False),
    # The meter. It is part of the key's row, so that one lock covers limits and use.
    sa.Column("minute", sa.Text, nullable=False),
    sa.Column("month", sa.String(7), nullable=False),
    sa.Column("spent_nusd", sa.BigInteger, nullable=False),
    sa.Column("held_nusd", sa.BigInteger, nullable=False),
)

grants = sa.Table(  # what is reserved and not settled
    "headrace_grants",
    tables,
    sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("nusd", sa.BigInteger, nullable=False),
    sa.Column("second", sa.BigInteger, nullable=False),
    sa.Column("day", sa.String(10), nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),
)

booked = sa.Table(  # ids that callers gave, so that each is billed once
    "headrace_booked",
    tables,
    sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("at", sa.Double, nullable=False, index=True),
)

usage = sa.Table(
    "headrace_usage",
    tables,
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("model", sa.String(200), primary_key=True),  # '' for refused models, so that whoever makes up names fills no table
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("refused", sa.BigInteger, nullable=False),
    sa.Column("unpriced", sa.BigInteger, nullable=False),  # of the requests, those whose model had no price
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("nusd", sa.BigInteger, nullable=False),
)

requests = sa.Table(
    "headrace_requests",
    tables,
    sa.Column("number", _NUMBER, primary_key=True),
    sa.Column("id", sa.String(200), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("key", sa.BigInteger, nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("nusd", sa.BigInteger, nullable=False),
    sa.Column("queue_s", sa.Double),
    sa.Column("ttft_s", sa.Double),
    sa.Column("took_s", sa.Double),
)
