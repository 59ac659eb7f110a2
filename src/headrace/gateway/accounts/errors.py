"""What goes wrong with accounts."""

from __future__ import annotations

from headrace.errors import HeadraceError


class AccountsError(HeadraceError):
    """A database of accounts is missing, damaged or out of reach, or cannot take what was asked of it."""
