"""API keys of a service: made, listed and revoked in a file that knows only their hashes.

A key is `hr_` and 256 random bits. Its SHA-256 is all that is kept: slow hashes with salts protect passwords, which can be guessed; nobody
guesses 256 bits, so a fast hash gives nothing away and costs a request less than a microsecond.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.errors import KeyFileError, listing, nearest

PREFIX = "hr_"
MOST_KEYS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_SERVICE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_LONGEST = 256  # characters of a key that is looked at; ours have 46
_FORMAT = 1
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the file has it: its name, the SHA-256 of its text in hex, and when it was made, in UTC (RFC 3339)."""

    name: str
    sha256: str
    created: str


def new_token() -> tuple[str, str]:
    """The text of a new key, and its SHA-256 in hex."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, hashlib.sha256(token.encode()).hexdigest()


def check(hashes: Mapping[str, str], presented: str | bytes) -> str | None:
    """The name of the key that was presented; None for one that is not valid.

    The hash is looked up, not compared with each in turn. That takes the same time whatever a known key looks like: what a look-up's time
    could tell is where the SHA-256 of a guess comes to lie, which says nothing about the text of a key that hashes elsewhere.
    """
    text = presented.encode("utf-8", "replace") if isinstance(presented, str) else presented
    return hashes.get(hashlib.sha256(text).hexdigest()) if len(text) <= _LONGEST else None


def default_path(service: str) -> Path:
    """Where the keys of a service are kept unless told otherwise: `$XDG_CONFIG_HOME/headrace/keys/<service>.json`, by default below `~/.config`.

    Raises:
        KeyFileError: this is no name of a service.
    """
    if not _SERVICE.fullmatch(service):
        raise KeyFileError(f"{service!r} is no name of a service: letters, digits, '.', '_' and '-', at most 100 of them")
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".config") / "headrace" / "keys" / f"{service}.json"


class KeyFile:
    """The file with a service's keys. Every change replaces it whole, so that a reader sees the old keys or the new ones.

    A file that is missing or damaged is an error to whoever wants the hashes, never a service without keys; one without a key
    in it lets nobody in.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._seen: tuple[int, ...] | None = None

    def create(self, name: str) -> str:
        """A new key. What is returned is the only copy of its text.

        Raises:
            KeyFileError: the name is taken or no name, or the file is damaged, full or out of reach.
        """
        if not NAME.fullmatch(name):
            raise KeyFileError(f"a key cannot be named {name[:80]!r}: letters, digits, '.', '_' and '-', at most 64 of them, the first a letter or a digit")
        token, sha256 = new_token()
        with self._locked():
            keys = self._read() if self.path.exists() else ()
            if any(key.name == name for key in keys):
                raise KeyFileError(f"there is a key named {name!r} in {str(self.path)!r} already; revoke it first, or choose another name")
            if len(keys) >= MOST_KEYS:
                raise KeyFileError(f"{str(self.path)!r} holds {MOST_KEYS:,} keys, which is the most")
            created = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._write([*keys, Key(name, sha256, created)])
        return token

    def revoke(self, name: str) -> None:
        """Make a key invalid; services that use the file notice within seconds.

        Raises:
            KeyFileError: there is no such key, or the file is missing, damaged or out of reach.
        """
        with self._locked():
            keys = self._read()
            left = tuple(key for key in keys if key.name != name)
            if len(left) == len(keys):
                names = [key.name for key in keys]
                raise KeyFileError(f"there is no key named {name!r} in {str(self.path)!r}, but {listing(names)}{nearest(name, names)}")
            self._write(left)

    def list(self) -> tuple[Key, ...]:
        """All keys, the oldest first.

        Raises:
            KeyFileError: the file is missing, damaged or out of reach.
        """
        return self._read()

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every valid key in hex, and the key's name.

        Raises:
            KeyFileError: the file is missing, damaged or out of reach. A service that has keys already goes on with them.
        """
        return {key.sha256: key.name for key in self._read()}

    def changed(self) -> bool:
        """Whether the file is another than at the last reading; a missing one counts as changed. Costs one look at the folder."""
        try:
            return self._seen is None or _signature(os.stat(self.path)) != self._seen
        except OSError:
            return True

    def _read(self) -> tuple[Key, ...]:
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                content = file.read()
        except FileNotFoundError:
            raise KeyFileError(f"there is no file of keys at {str(self.path)!r}; `headrace keys create` makes it") from None
        except OSError as error:
            raise KeyFileError(f"the keys in {str(self.path)!r} cannot be read: {error.strerror or error}") from error
        self._seen = _signature(status)
        if status.st_mode & _OTHERS_WRITE:
            raise KeyFileError(f"others than its owner may write {str(self.path)!r}, and so add keys of their own; `chmod 600` it")
        try:
            return _parsed(content)
        except ValueError as error:
            raise KeyFileError(f"the file of keys {str(self.path)!r} is damaged: {error}; restore it, or delete it and create new keys") from error

    def _write(self, keys: Iterable[Key]) -> None:
        target = Path(os.path.realpath(self.path))  # where the path is a link, the link stays
        content = json.dumps({"format": _FORMAT, "keys": [asdict(key) for key in keys]}, indent=1) + "\n"
        partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(handle, "wb") as file:
                    file.write(content.encode())
                    file.flush()
                    os.fsync(handle)
                os.replace(partial, target)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # the new name, too, outlives a loss of power
            finally:
                os.close(folder)
        except OSError as error:
            raise KeyFileError(f"the keys in {str(self.path)!r} cannot be written: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """While this holds, no other process changes the file."""
        target = Path(os.path.realpath(self.path))
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise KeyFileError(f"the keys in {str(self.path)!r} cannot be changed: {error.strerror or error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _parsed(content: bytes) -> tuple[Key, ...]:
    """The keys that a file holds; ValueError says what is wrong with it."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(values, dict) or values.keys() != {"format", "keys"} or not isinstance(values["keys"], list):
        raise ValueError("it is not an object of 'format' and a list of 'keys'")
    if values["format"] != _FORMAT:
        raise ValueError(f"its format is {values['format']!r}, and this release reads {_FORMAT}")
    keys = tuple(_key(at, value) for at, value in enumerate(values["keys"]))
    for what, each in (("name", [key.name for key in keys]), ("hash", [key.sha256 for key in keys])):
        if len(set(each)) < len(each):
            raise ValueError(f"two of its keys have the same {what}")
    return keys


def _key(at: int, value: Any) -> Key:
    fields = {"name": NAME, "sha256": _SHA256, "created": _CREATED}
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise ValueError(f"key {at} is not an object of 'name', 'sha256' and 'created'")
    for field, pattern in fields.items():
        if not isinstance(value[field], str) or not pattern.fullmatch(value[field]):
            raise ValueError(f"the {field} of key {at} is no such thing")
    return Key(**value)
