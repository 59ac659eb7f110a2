"""Files of one folder as a ledger needs them: put whole or not at all, listed and read as soon as they are there.

What the protocol in `headrace.ledger` asks of a store, and no more: `put` is atomic and replaces, `names` and `read` see every
`put` that has returned, and `move` leaves the file under its old name, its new name, or both. Local disks, S3, Google Cloud
Storage, Azure and HDFS keep that. No conditional put, no lock and no clock is needed.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
from pyarrow import fs

from headrace.errors import StorageError
from headrace.filesystems import Place

_ATTEMPTS = 10  # to make or delete a folder that others delete or write into
_PAUSE_S = 0.001  # before the second of them, and as much more before each after that

_WHOLE = ("s3", "gcs", "abfs", "py::fsspec+('s3', 's3a')", "py::fsspec+memory")
"""File systems on which a file appears when it is complete: there is nothing to rename, and renaming would be a copy."""


class Store(Protocol):
    """What a ledger reads and writes; names are relative to its folder, with slashes."""

    def names(self, folder: str) -> list[str]:
        """The names of what lies directly in a folder, sorted; empty when there is no such folder."""

    def read(self, name: str) -> bytes:
        """A file's content; FileNotFoundError when it is not there."""

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file whole, or fail and leave what was there."""

    def move(self, name: str, to: str) -> None:
        """Give a file another name; FileNotFoundError when it is not there."""

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens when it is not there."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A `Store` on any file system that `headrace.filesystems` knows."""

    place: Place

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        with self._named("list", folder):
            selector = fs.FileSelector(self._path(folder), allow_not_found=True)
            try:
                return sorted(info.base_name for info in self.place.filesystem.get_file_info(selector))
            except FileNotFoundError:
                return []  # it went while it was listed

    def read(self, name: str) -> bytes:
        """See `Store`."""
        with self._named("read", name), self.place.filesystem.open_input_stream(self._path(name), compression=None) as stream:
            return bytes(stream.read())

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """See `Store`. On disks that a machine owns it is flushed to the device as well, so that a power cut loses nothing."""
        path = self._path(name)
        with self._named("write", name):
            if self.place.is_local:
                _put_local(path, content)
                return
            whole = self.place.filesystem.type_name in _WHOLE
            folder, base = os.path.split(path)
            target = path if whole else f"{folder}/.{base}.{uuid.uuid4().hex[:8]}.tmp"
            if not whole:
                self.place.filesystem.create_dir(folder, recursive=True)
            with self.place.filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(content)
            if not whole:
                self.place.filesystem.move(target, path)

    def move(self, name: str, to: str) -> None:
        """See `Store`."""
        with self._named("move", name):
            if self.place.is_local:
                _make(os.path.dirname(self._path(to)))
                os.replace(self._path(name), self._path(to))
            else:
                self.place.filesystem.move(self._path(name), self._path(to))

    def delete(self, name: str) -> None:
        """See `Store`."""
        with self._named("delete", name):
            if self.place.is_local:
                _delete_local(self._path(name))
                return
            for left in reversed(range(_ATTEMPTS)):
                info = self.place.filesystem.get_file_info(self._path(name))
                try:
                    if info.type == fs.FileType.Directory:
                        self.place.filesystem.delete_dir(info.path)
                    elif info.type != fs.FileType.NotFound:
                        self.place.filesystem.delete_file(info.path)
                    return
                except OSError:  # somebody else deletes it as well, and may be half-way, or writes into it
                    if not left:
                        raise
                    time.sleep(_PAUSE_S * (_ATTEMPTS - left))

    def _path(self, name: str) -> str:
        return self.place.child(name).path if name else self.place.path

    @contextmanager
    def _named(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and ("NoSuchKey" in str(error) or "NO_SUCH_KEY" in str(error)):  # fsspec's word, and Arrow's
                raise FileNotFoundError(name) from error
            raise StorageError(f"cannot {what} {name or 'the folder'!r} in {self.place.uri!r}: {error}") from error


def _make(folder: str) -> None:
    """The folder, if it is not there. Python finds it in the way, and then finds it gone, when somebody deletes it at that moment."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            os.makedirs(folder, exist_ok=True)
            return
        except FileExistsError:
            if not left or (os.path.lexists(folder) and not os.path.isdir(folder)):
                raise


def _delete_local(path: str) -> None:
    """A file or a folder with all that is in it. Others may delete it at the same time, or write into it: then once more."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, onerror=_unless_gone)
            else:
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError:  # a worker that does not know yet that its run is over may write into it
            if not left:
                raise
            time.sleep(_PAUSE_S * (_ATTEMPTS - left))


def _unless_gone(_function: object, _path: str, error: tuple[object, BaseException, object]) -> None:
    """Go on where somebody else was faster."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _put_local(path: str, content: bytes | pa.Buffer) -> None:
    """Write beside the target, flush, and rename: other processes see the old file or the new one, whole."""
    folder, name = os.path.split(path)
    _make(folder)
    partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
