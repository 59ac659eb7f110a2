"""Where a model lies: a folder, a name on the hub, or a URI or a name in a registry, from where it is fetched into the user's cache once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from headrace import copies, registry
from headrace.errors import SettingError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_S = 10.0
_MOST_BYTES = 1 << 20


def check(name: Any, what: str) -> None:
    """Raise SettingError if `name` cannot be that of a model; `what` opens the message."""
    if not isinstance(name, str) or not name.strip():
        raise SettingError(f"{what} must be a name on the hub, a folder, a URI or models:/name@alias, got {name!r}")
    if registry.is_address(name):
        registry.Address.of(name, what)


def find(name: str) -> Path | None:
    """The folder of a model that is on this machine: one of that name, or the hub's in the user's cache. Asks nobody else."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    kept = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError):
        snapshot = kept / "snapshots" / (kept / "refs" / "main").read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    return None


def public_name(name: str) -> str:
    """What clients call a model: its name on the hub or in a registry, or the last part of its folder or URI."""
    if registry.is_address(name):
        return _printable(registry.Address.of(name, "model").name)
    if "://" not in name and not name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        return name
    last = Path(name.partition("://")[2] or name).expanduser().resolve().name
    return _printable(last)


def _printable(name: str) -> str:
    return re.sub(r"[^\x21-\x7e]", "-", name)[:200] or "model"


def vector_size(name: str, *, hub: bool = False) -> int | None:
    """How many numbers the vectors of an embedding model have, by its `config.json`; None where that is not on this machine, nor on the `hub`, if asked."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(_read(name, "config.json", hub=hub) or b"{}")["hidden_size"])
    return None


def embeds(name: str) -> bool:
    """Whether a model says that it turns text into vectors, as those of sentence-transformers do; asks the hub if it is not on this machine."""
    return _read(name, "modules.json", hub=True) is not None


def _read(name: str, file: str, *, hub: bool) -> bytes | None:
    """A small file of a model, if it has one."""
    if (folder := find(name)) is not None:
        with contextlib.suppress(OSError):
            return (folder / file).read_bytes()
    elif hub and _HUB_NAME.fullmatch(name) and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        token = os.environ.get("HF_TOKEN")
        url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/main/{file}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310 - of the user's own environment
        with contextlib.suppress(urllib.error.URLError, OSError, ValueError), urllib.request.urlopen(request, timeout=_HUB_S) as answer:  # noqa: S310
            found: bytes = answer.read(_MOST_BYTES)
            return found
    return None


def fetch(name: str, what: str, *, trust_pickles: bool = False) -> str:
    """The model in a form that the engine takes: a folder of this machine, or the hub's name as it is.

    Raises:
        SettingError: a folder or URI holds no model, or cannot be read; or a registry has no such model, or one with pickles that are not trusted.
    """
    if registry.is_address(name):
        return str(registry.fetch(name, what, trust_pickles=trust_pickles))
    if "://" in name:
        return str(copies.fetch(name, what, shelf="llms"))
    if (folder := find(name)) is not None:
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SettingError(f"{what}={name!r} is no folder on this machine; correct the path")
    return name
