"""Where a model lies: a folder, a name on the hub, or a URI or a name in a registry, from where it is fetched into the user's cache once."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from headrace import copies, registry
from headrace.errors import SettingError


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


def vector_size(name: str) -> int | None:
    """How many numbers the vectors of an embedding model have, by its `config.json`; None where that is not on this machine."""
    folder = find(name)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads(((folder or Path()) / "config.json").read_text(encoding="utf-8")) if folder else {}
        return int(config["hidden_size"])
    return None


def fetch(name: str, what: str) -> str:
    """The model in a form that the engine takes: a folder of this machine, or the hub's name as it is.

    Raises:
        SettingError: a folder or URI holds no model, or cannot be read; or a registry has no such model.
    """
    if registry.is_address(name):
        return str(registry.fetch(name, what))
    if "://" in name:
        return str(copies.fetch(name, what, shelf="llms"))
    if (folder := find(name)) is not None:
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SettingError(f"{what}={name!r} is no folder on this machine; correct the path")
    return name
