"""Who may use a gateway, how much, and what it cost: keys, quotas, prices and usage in one SQL database."""

from __future__ import annotations

from importlib.util import find_spec

from headrace.errors import AccountsError

if find_spec("sqlalchemy") is None:
    raise AccountsError("accounts of a gateway need SQLAlchemy: pip install 'headrace[gateway]'")
