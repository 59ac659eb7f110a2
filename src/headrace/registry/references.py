"""What a run is made from, and what it makes, by names that mean the same wherever they are written: files, views, models."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace import filesystems
from headrace.errors import RegistryError
from headrace.registry.address import is_address
from headrace.registry.versions import locate

VIEW = "view:"
RUN = "run:"
_LONGEST = 500  # characters of a name, as mlflow has it for datasets


@dataclass(frozen=True, slots=True)
class Reference:
    """A thing by its name: `models:/name/3`, `view:name`, `run:id`, or an absolute path or URI. `version` tells its content apart, where that is known."""

    name: str
    version: str = ""

    @property
    def kind(self) -> str:
        """`model`, `view`, `run` or `file`."""
        return next((kind for kind, start in (("model", "models:/"), ("view", VIEW), ("run", RUN)) if self.name.startswith(start)), "file")

    @staticmethod
    def of(given: Any) -> Reference:
        """The reference that a text or path means now: of a model's alias the version, of files how large they are and since when.

        Raises:
            RegistryError: it is no name, or no such files are there.
            SettingError: there is no such model.
        """
        text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else given
        if not isinstance(text, str) or not text.strip():
            raise RegistryError(f"inputs are paths, URIs, models:/name@alias, or view:name, got {given!r}")
        if is_address(text):
            located = locate(text, "input")
            return Reference(str(located), located.digest)
        if text.startswith((VIEW, RUN)):
            name, _, version = text.partition("#")
            return Reference(name, version)
        name = named(text)
        if len(name) > _LONGEST:
            raise RegistryError(f"input {name[:60] + '...'!r} has a name of {len(name)} characters, and {_LONGEST} are the most; name the folder")
        return Reference(name, _state(text))


def named(path: str) -> str:
    """The name of a path or URI: of one on this machine the absolute path."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _state(path: str) -> str:
    """A digest of the names, sizes and times of change of files, as a batch job knows its input by."""
    try:
        files = filesystems.find(filesystems.locate(path, error=RegistryError))
    except (OSError, pa.ArrowException) as error:
        raise RegistryError(f"input {path!r} cannot be read: {error}") from error
    if not files:
        raise RegistryError(f"input {path!r} holds no files; correct the path")
    states = [(info.path, info.size, info.mtime_ns) for info in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]
