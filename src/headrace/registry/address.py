"""What `models:/...` names. Pure: no registry is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from headrace.errors import SettingError

_SCHEME = "models:/"


@dataclass(frozen=True, slots=True)
class Address:
    """A registered model, by an alias or by a version: one of the two is given."""

    name: str
    alias: str = ""
    version: str = ""

    @staticmethod
    def of(uri: str, what: str) -> Address:
        """The address that a URI is; `what` opens the message.

        Raises:
            SettingError: it names neither an alias nor a version.
        """
        rest = uri.removeprefix(_SCHEME)
        if found := re.fullmatch(r"([^/:]+)/0*([1-9][0-9]*)", rest):
            return Address(found[1], version=found[2])
        if found := re.fullmatch(r"([^/:]+)@([^/:@]+)", rest):
            return Address(found[1], alias=found[2])
        name = re.split("[/@:]", rest)[0] or "name"
        raise SettingError(f"{what}={uri!r} names no version; name an alias, models:/{name}@champion, or a version's number, models:/{name}/3")

    def __str__(self) -> str:
        return f"{_SCHEME}{self.name}@{self.alias}" if self.alias else f"{_SCHEME}{self.name}/{self.version}"


def is_address(name: Any) -> bool:
    """Whether a model's name is meant for a registry."""
    return isinstance(name, str) and name.startswith(_SCHEME)
