"""The online store in a file: what it is opened from, and what it says when the file or the disk will not do."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest
from components.test_online_store import opened, place, store, table, values, write  # noqa: F401 - fixtures

from headrace.errors import OnlineStoreError
from headrace.online_store import OnlineStore, open_store


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_path_or_a_url_means_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "made" / "features.db"
    with open_store(form.format(path)) as store:  # noqa: F811
        write(store, ("a", 0, 1))
        assert store.name == str(path)
    with open_store(path, make=False) as store:
        assert values(store, "a") == [1]


def test_relative_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("sqlite:///features.db").close()
    assert (tmp_path / "features.db").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "'' is no place for an online store: give the path of an SQLite file"),
        (":memory:", "':memory:' is no place"),
        (None, "None is no place"),
        ("postgresql://user:secret@host/db", "no online store is known as postgresql://: give the path"),
        ("reddis://user:secret@host", "did you mean 'redis'?"),
        ("sqlite://features.db", "names no file: write sqlite:///features.db"),
    ],
)
def test_other_places_are_refused(url: str, said: str) -> None:
    with pytest.raises(OnlineStoreError) as raised:
        open_store(url)
    assert said in str(raised.value) and "secret" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(OnlineStoreError, match=r"needs redis: pip install 'headrace\[redis\]'"):
        open_store("redis://localhost")


def test_a_reader_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(OnlineStoreError, match="there is no online store in .*features.db'; `headrace features FILE --publish STORE` makes it"):
        open_store(tmp_path / "features.db", make=False)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "features.db", tmp_path):
        with pytest.raises(OnlineStoreError, match="cannot be"):
            open_store(wrong)


def test_files_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("no database at all, but some text of more than a hundred bytes, so that it cannot be taken for a file that is new. " * 2)
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = text.read_bytes(), other.read_bytes()
    with pytest.raises(OnlineStoreError, match="is damaged .*; move the file away, and publish again"):
        open_store(text)
    with pytest.raises(OnlineStoreError, match="is a database of something else, and no online store"):
        open_store(other)
    assert (text.read_bytes(), other.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db", "text.db"]


def test_a_newer_format_is_refused(store: OnlineStore, place: str) -> None:  # noqa: F811
    store.close()
    connection = sqlite3.connect(place)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(OnlineStoreError, match=r"made by a newer headrace \(format 2; this release knows 1\)"):
        open_store(place)


def test_a_damaged_file_is_told(place: str) -> None:  # noqa: F811
    with open_store(place) as store:  # noqa: F811
        write(store, *((f"k{number}", 0, number) for number in range(2000)))
    content = bytearray(Path(place).read_bytes())
    content[32768:] = bytes(len(content) - 32768)
    Path(place).write_bytes(content)
    with pytest.raises(OnlineStoreError, match="is damaged"), open_store(place) as store:
        values(store, "k1")


def test_a_damaged_value_is_told(store: OnlineStore) -> None:  # noqa: F811
    write(store, ("a", 0, 1), ("b", 0, 2))
    with store.engine._changing() as connection:
        connection.execute("UPDATE feature_values SET value = x'00' WHERE key = ?", (b"a",))
    with pytest.raises(OnlineStoreError, match="view 'stats' in .* is damaged: a value has another length than its view's schema says; publish it again"):
        values(store, "a", "b")
    assert values(store, "b") == [2]


def test_a_full_disk_keeps_nothing_of_a_batch(store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    write(store, ("k0", 0, 0))
    connect = store.engine._connect

    def small() -> sqlite3.Connection:
        connection = connect()
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    store.close()
    monkeypatch.setattr(store.engine, "_connect", small)
    done = 1
    with pytest.raises(OnlineStoreError, match="the disk of the online store in .* is full; nothing of the batch was kept"):
        while True:
            write(store, *((f"k{number}", 0, number) for number in range(done, done + 500)))
            done += 500
    assert done > 1 and values(store, "k0", f"k{done - 1}", f"k{done}") == [0, done - 1, None]
    assert store.freshness("stats").keys == done
    monkeypatch.undo()
    store.close()
    write(store, (f"k{done}", 0, 7))
    assert values(store, f"k{done}") == [7]


def test_another_who_writes_is_waited_for_and_does_not_stop_readers(store: OnlineStore, place: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("headrace.online_store.sqlite._BUSY_S", 0.05)
    write(store, ("a", 0, 1))
    store.close()
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OnlineStoreError, match="is busy: another program has been writing"):
        write(store, ("a", 1, 2))
    assert values(store, "a") == [1]
    other.close()
    write(store, ("a", 1, 2))
    assert values(store, "a") == [2]


def test_what_a_killed_replacement_left_is_removed_by_the_next(store: OnlineStore) -> None:  # noqa: F811
    write(store, ("a", 0, 1))
    store.engine.begin("stats", store.schema("stats").to_bytes())
    abandoned = store.engine.begin("stats", store.schema("stats").to_bytes())
    store.engine.put(abandoned, [b"a"], [bytes(30)], 0)
    assert store.engine.put(store.engine.begin("stats", b""), [b"a"], [bytes(30)], 0) == 1
    assert store.engine.put(abandoned, [b"a"], [bytes(30)], 0) is None and not store.engine.swap(abandoned)
    assert values(store, "a") == [1]
    store.replace("stats", [table(("b", 0, 2))], key="key", time="time")
    with store.engine._connection() as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT generation) FROM feature_values").fetchone() == (2, 1)
        assert connection.execute("SELECT count(*) FROM generations").fetchone() == (1,)
