"""What lies elsewhere, as a folder in the user's cache: fetched once for all processes of a machine, and there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from headrace import filesystems
from headrace.errors import SettingError


def fetch(uri: str, what: str, *, shelf: str) -> Path:
    """The folder that holds the files that are at a URI now; `what` opens messages, and `shelf` is the part of the cache.

    Raises:
        SettingError: nothing is there, or it cannot be read.
    """
    try:
        files = filesystems.find(filesystems.locate(uri, error=SettingError))
    except (OSError, pa.ArrowException) as error:
        raise SettingError(f"{what}={uri!r} cannot be read: {error}") from error
    if not files:
        raise SettingError(f"{what}={uri!r} holds no files; correct the URI")
    state = [(info.path, info.size, info.mtime_ns) for info in files]  # what is replaced is something else
    return kept(shelf, (uri, state), lambda folder: copy(uri, what, folder))


def copy(uri: str, what: str, folder: Path) -> None:
    """Put the files that are at a path or URI into `folder`.

    Raises:
        SettingError: they cannot be read.
    """
    place = filesystems.locate(uri, error=SettingError)
    try:
        fs.copy_files(place.path, str(folder), source_filesystem=place.filesystem, destination_filesystem=fs.LocalFileSystem())
    except (OSError, pa.ArrowException) as error:
        raise SettingError(f"{what}={uri!r} cannot be fetched: {error}") from error


def kept(shelf: str, key: Any, fill: Callable[[Path], None]) -> Path:
    """The folder in `$XDG_CACHE_HOME/headrace/SHELF` of what `key` names by its repr; `fill` puts the files into a new one."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / shelf
    folder = place / hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    with _alone(folder):
        if not folder.is_dir():
            for left in place.glob(f".{folder.name}.*"):  # by a process that was killed: only one at a time works on it
                shutil.rmtree(left, ignore_errors=True)
            half = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place))
            try:
                fill(half)
                half.rename(folder)  # whole, or not there at all
            finally:
                shutil.rmtree(half, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; the others find the folder there. A lock ends with its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
