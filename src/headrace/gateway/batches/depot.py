"""What all parts of the batch service share."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from types import TracebackType

from headrace.gateway.batches.catalog import Catalog
from headrace.gateway.batches.limits import Limits
from headrace.gateway.batches.shelf import Shelf, told


class Depot:
    """A folder of files and batches, their bounds, and the clock. Any number of processes of one machine may open it.

    The bytes of a file are written first, and its line in the catalog after that: what the catalog names is there, whole. Bytes that
    it does not name belong to an upload that is under way, or that died; `sweep` tells them apart by their age.

    Attributes:
        catalog: which files and batches there are.
        shelf: the bytes of the files.
        limits: the bounds.
        clock: seconds since 1970.
    """

    def __init__(self, folder: str, *, limits: Limits | None = None, clock: Callable[[], float] = time.time) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self.shelf = Shelf(os.path.join(folder, "contents"), floor_bytes=self.limits.floor_bytes)
        with told("open"):
            lock = os.open(os.path.join(folder, "opening"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite cannot be asked by two at once to begin a database
            self.catalog = Catalog(os.path.join(folder, "catalog.sqlite"))
        finally:
            os.close(lock)

    def close(self) -> None:
        """Close the catalog."""
        self.catalog.close()

    def remove(self, name: str) -> None:
        """Remove a file. A batch that reads it goes on."""
        if self.catalog.remove_file(name):
            self.shelf.delete(name)

    def release(self, name: str) -> None:
        """Remove the bytes of a file, if nothing needs them any more."""
        if not self.catalog.needs(name):
            self.shelf.delete(name)

    def sweep(self, *, orphan_s: float = 86_400) -> None:
        """Remove the files that have expired, and bytes that nobody named for so long; no upload stays without a write for a day."""
        for name in self.catalog.expired_files(self.clock()):
            self.remove(name)
        for name in self.shelf.old(orphan_s):
            self.release(name)

    def __enter__(self) -> Depot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
