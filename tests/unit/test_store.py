"""Files of a folder: whole or not at all, and errors that say what could not be done."""

from __future__ import annotations

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(store: Folder, tmp_path: Path) -> None:
    store.put("x", b"old")
    os.chmod(tmp_path / "out", 0o500)
    for step in (lambda: store.put("x", b"new"), lambda: store.move("x", "y"), lambda: store.delete("x")):
        with pytest.raises(StorageError, match="Permission denied"):
            step()
    assert store.read("x") == b"old"


def test_a_file_in_the_way_is_told(store: Folder) -> None:
    """What a folder cannot be made for names what was to be written, and where."""
    store.put("x", b"old")
    with pytest.raises(StorageError, match="cannot write 'x/y' in "):
        store.put("x/y", b"new")


def test_a_power_cut_loses_nothing_that_was_put(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is flushed before it has its name, and the folder with the name after that."""
    steps: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"), flush(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("name"), rename(*names)))
    store.put("x", b"1")
    assert steps == ["file", "name", "folder"]


def test_two_may_delete_a_folder_and_a_third_write_into_it(store: Folder, tmp_path: Path) -> None:
    """Whoever returns has seen the folder empty of all that was there, and nobody fails."""

    def delete() -> list[str]:
        store.delete("a")
        return [name for name in store.names("a") if name.startswith("old")]

    def write() -> None:
        for number in range(5):
            with contextlib.suppress(FileNotFoundError):  # the folder went before the file was in it
                store.put(f"a/new-{number}", b"")

    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            (tmp_path / "out/a").mkdir(parents=True, exist_ok=True)
            for number in range(40):
                (tmp_path / f"out/a/old-{number}").touch()
            doing = [pool.submit(step) for step in (delete, delete, write)]
            assert not any(one.result() for one in doing)
