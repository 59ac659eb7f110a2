"""The bytes of files, by their ids, in one folder of a local disk."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import BinaryIO

from headrace.errors import StorageError
from headrace.gateway.batches.refusal import DiskFullError

_NAME = re.compile(r"file-[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Sheet:
    """A file that is being written."""

    def __init__(self, shelf: Shelf, descriptor: int) -> None:
        self._shelf, self._descriptor = shelf, descriptor
        self._lock = threading.RLock()  # a number that was closed may be another file's at once

    def end_with(self, at: int, data: bytes) -> None:
        """Make the file end with `data`, from the byte `at` on, and flush that.

        What was there behind `at` is gone, so that a write can be done again whatever became of it. After a failed flush it has to be:
        the system may take pages for written that are not.
        """
        with self._lock, told("write"):
            self._shelf.check_room(self._descriptor)
            os.ftruncate(self._descriptor, at)
            self.write(at, data)
            os.fsync(self._descriptor)

    def write(self, at: int, data: bytes | bytearray) -> None:
        """Write at this place, without flushing."""
        rest = memoryview(data)
        with self._lock, told("write"):
            while rest:
                count = os.pwrite(self._descriptor, rest, at)
                at, rest = at + count, rest[count:]

    def cut(self, size: int) -> None:
        """Cut it to this size, at which it was flushed before, and flush that: else a tail might come back after the last write.

        Raises:
            StorageError: it is shorter: the disk has lost what it had said it holds.
        """
        with self._lock, told("cut"):
            found = os.fstat(self._descriptor).st_size
            if found < size:
                raise StorageError(f"a file of results has {found} bytes, but {size} were written")
            if found > size:
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)

    def flush(self) -> None:
        """Have the device hold it, its name included."""
        with self._lock, told("write"):
            os.fsync(self._descriptor)
            self._shelf.flush()

    def lock(self) -> bool:
        """Claim it; False where somebody else has."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go of it, and of the claim to it."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> Sheet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Shelf:
    """A folder of files."""

    def __init__(self, folder: str, *, floor_bytes: int = 0) -> None:
        self._folder, self._floor_bytes = folder, floor_bytes
        with told("make"):
            os.makedirs(folder, exist_ok=True)

    def begin(self, name: str) -> Sheet:
        """A new file; it is there for good once it is flushed."""
        with told("write"):
            return Sheet(self, os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def claim(self, name: str) -> Sheet | None:
        """A file, made if need be, that no other process writes as long as this one does; None where another has it.

        The system takes the claim back when the process ends, however it ends. No clock is asked, and nobody is declared dead who is not.
        """
        with told("write"):
            sheet = Sheet(self, os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            claimed = False
            try:
                claimed = sheet.lock()
                if claimed:
                    self.flush()
            finally:
                if not claimed:
                    sheet.close()
            return sheet if claimed else None

    def open(self, name: str) -> BinaryIO:
        """A file to read; FileNotFoundError when it is not there."""
        with told("read"):
            return open(self._path(name), "rb", buffering=1 << 20)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens when it is not there. Who reads it can go on."""
        with told("delete"), suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def old(self, age_s: float) -> list[str]:
        """The files that were not written for so long."""
        names: list[str] = []
        with told("list"), os.scandir(self._folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):  # it went while it was listed
                    if _NAME.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - age_s:
                        names.append(entry.name)
        return names

    def free_bytes(self) -> int:
        """The room on the disk."""
        with told("measure"):
            return shutil.disk_usage(self._folder).free

    def check_room(self, descriptor: int) -> None:
        """Raise DiskFullError where no more than the last reserve is left: whoever deletes something needs a little room as well."""
        found = os.fstatvfs(descriptor)
        if found.f_bavail * found.f_frsize < self._floor_bytes:
            raise DiskFullError("the disk is full")

    def flush(self) -> None:
        """Have the device hold the names of what was made."""
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):  # ids are made here; one that comes from outside must not lead out of the folder
            raise FileNotFoundError(name)
        return os.path.join(self._folder, name)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raise trouble with the disk as StorageError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = DiskFullError if error.errno in _FULL else StorageError
        raise kind(f"cannot {what} a file of batches: {error}") from error
