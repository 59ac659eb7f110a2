"""Files of a folder: whole or not at all, and errors that say what could not be done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from headrace.errors import OutputError, StorageError
from headrace.filesystems import locate
from headrace.store import Folder


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return Folder(locate(str(tmp_path / "out"), error=OutputError))


def test_files_are_put_read_listed_moved_and_deleted(store: Folder, tmp_path: Path) -> None:
    assert store.names("") == []
    store.put("a/b/x", b"1")
    store.put("a/b/x", b"2")
    store.put("a/y", b"3")
    assert (store.names("a"), store.names("a/b"), store.read("a/b/x")) == (["b", "y"], ["x"], b"2")
    store.move("a/b/x", "z")
    store.delete("a")
    store.delete("a")
    assert store.names("") == ["z"] and (tmp_path / "out/z").read_bytes() == b"2"


def test_what_is_not_there_is_told_apart(store: Folder) -> None:
    store.put("x", b"")
    for missing in (lambda: store.read("y"), lambda: store.move("y", "z")):
        with pytest.raises(FileNotFoundError):
            missing()


def test_a_full_disk_leaves_what_was_there(store: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot write 'x' in .*No space left on device"):
        store.put("x", b"new")
    assert store.read("x") == b"old" and sorted(os.listdir(tmp_path / "out")) == ["x"]


def test_other_file_systems_are_written_whole_too(tmp_path: Path) -> None:
    store = Folder(locate(f"local://{tmp_path}/far", error=OutputError))
    assert not store.place.is_local
    store.put("a/x", b"1")
    store.move("a/x", "y")
    assert (store.names(""), store.names("a"), store.read("y")) == (["a", "y"], [], b"1")
