"""What was found out once, kept on disk: a folder per key under the user's cache directory, complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_INDEX = "entry.json"
_WAIT_S = 300.0  # for another process that is finding out the same; then it is found out here as well
_ABANDONED_S = 3600.0  # after which what a killed process left half-made is thrown away


def place() -> Path:
    """The folder that keeps the entries: `$XDG_CACHE_HOME/headrace/models`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / "models"


def key(facts: Mapping[str, Any]) -> str:
    """A name for what is found out under these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def get(shelf: Path, name: str) -> tuple[Any, Path] | None:
    """The content of an entry and its folder; None when there is none. One that is damaged is removed."""
    folder = shelf / name
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        content, files = index["content"], index["files"]
        whole = index["digest"] == _digest_of(content, files) and all(_digest(folder / file) == digest for file, digest in files.items())
    except FileNotFoundError:
        whole = not folder.exists()
        content = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        drop(shelf, name)
        return None
    return None if content is None else (content, folder)


def drop(shelf: Path, name: str) -> None:
    """Remove an entry, whole: it is moved away first, since another process may be looking at it."""
    with contextlib.suppress(OSError):
        away = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=shelf))
        with contextlib.suppress(OSError):
            os.replace(shelf / name, away / "entry")
        shutil.rmtree(away, ignore_errors=True)


def put(shelf: Path, name: str, content: Any, made: Path) -> Path | None:
    """Keep `content` with the files of the folder `made`, which is moved; the entry's folder, or None if it cannot be kept.

    If another process was first, its entry stays.
    """
    files = {path.name: _digest(path) for path in sorted(made.iterdir())}
    index = {"content": content, "files": files, "digest": _digest_of(content, files)}
    try:
        (made / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        os.rename(made, shelf / name)  # onto a folder with files in it this fails: an entry is never replaced
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        return shelf / name if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and (shelf / name / _INDEX).is_file() else None
    return shelf / name


@contextlib.contextmanager
def desk(shelf: Path, name: str) -> Iterator[Path]:
    """An empty folder to make an entry in, beside the shelf if it can be written to, removed at the end unless it was put there."""
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        _tidy(shelf)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=shelf))
    except OSError:  # read-only, full, or no home at all: go on without keeping anything
        folder = Path(tempfile.mkdtemp(prefix="headrace-models-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def alone(shelf: Path, name: str, *, wait_s: float = _WAIT_S) -> Iterator[bool]:
    """Hold the lock of an entry, so that replicas which start together find out once; False where it could not be had.

    The lock only saves work: an entry is safe without it, since it appears complete. It ends with the process that holds it.
    """
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        file = os.open(shelf / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield False
        return
    try:
        yield _locked(file, time.monotonic() + wait_s)
    finally:
        os.close(file)


def _locked(file: int, until_s: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return False
        else:
            return True


def _tidy(shelf: Path) -> None:
    for left in shelf.glob(".*"):
        with contextlib.suppress(OSError):  # another process may tidy, too
            if left.is_dir() and time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Any, files: Any) -> str:
    return hashlib.sha256(json.dumps([content, files], sort_keys=True).encode()).hexdigest()
