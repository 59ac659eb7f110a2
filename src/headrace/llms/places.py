"""Where a model lies: a folder, a name on the hub, or a URI, from which it is fetched into the user's cache once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from headrace import filesystems
from headrace.errors import SettingError


def check(name: Any, what: str) -> None:
    """Raise SettingError if `name` cannot be that of a model; `what` opens the message."""
    if not isinstance(name, str) or not name.strip():
        raise SettingError(f"{what} must be a name on the hub, a folder or a URI, got {name!r}")
    if name.startswith("models:/"):
        raise SettingError(f"{what}={name!r} names an entry of a model registry, and headrace reads none yet; give the folder, the s3:// URI or the hub's name")


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
    """What clients call a model: its name on the hub, or the last part of its folder or URI."""
    if "://" not in name and not name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        return name
    last = Path(name.partition("://")[2] or name).expanduser().resolve().name
    return re.sub(r"[^\x21-\x7e]", "-", last)[:200] or "model"


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
        SettingError: a folder or URI holds no model, or cannot be read.
    """
    if "://" in name:
        return str(_fetched(name, what))
    if (folder := find(name)) is not None:
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SettingError(f"{what}={name!r} is no folder on this machine; correct the path")
    return name


def _fetched(uri: str, what: str) -> Path:
    """The folder in the cache that holds what is at the URI now."""
    try:
        place = filesystems.locate(uri, error=SettingError)
        files = filesystems.find(place)
    except (OSError, pa.ArrowException) as error:
        raise SettingError(f"{what}={uri!r} cannot be read: {error}") from error
    if not files:
        raise SettingError(f"{what}={uri!r} holds no files; correct the URI")
    state = [(info.path, info.size, info.mtime_ns) for info in files]  # a model that is replaced is another one
    shelf = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / "llms"
    kept = shelf / hashlib.sha256(repr((uri, state)).encode()).hexdigest()[:32]
    with _alone(kept):
        if not kept.is_dir():
            for left in shelf.glob(f".{kept.name}.*"):  # by a process that was killed: only one at a time works on it
                shutil.rmtree(left, ignore_errors=True)
            half = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=shelf))
            try:
                fs.copy_files(place.path, str(half), source_filesystem=place.filesystem, destination_filesystem=fs.LocalFileSystem())
            except (OSError, pa.ArrowException) as error:
                shutil.rmtree(half, ignore_errors=True)
                raise SettingError(f"{what}={uri!r} cannot be fetched: {error}") from error
            half.rename(kept)  # whole, or not there at all
    return kept


@contextlib.contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """One process of this machine at a time; the others find the model there. A lock ends with its process."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
