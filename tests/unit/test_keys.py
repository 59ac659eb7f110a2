"""API keys: made once, kept as hashes, replaced whole, and never mistaken for 'no keys needed'."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace import cli
from headrace.errors import KeyFileError
from headrace.serving.keys import KeyFile, check, default_path

GOOD = {"name": "ana", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys" / "reviews.json")


def test_a_key_opens_until_it_is_revoked(keys: KeyFile) -> None:
    ana, bob = keys.create("ana"), keys.create("bob")
    hashes = keys.hashes()
    assert re.fullmatch(r"hr_[A-Za-z0-9_-]{43}", ana) and ana != bob
    assert [check(hashes, ana), check(hashes, bob.encode())] == ["ana", "bob"]
    keys.revoke("ana")
    assert [check(keys.hashes(), ana), check(keys.hashes(), bob)] == [None, "bob"]
    keys.revoke("bob")
    assert keys.hashes() == {} and check({}, bob) is None  # a file without keys lets nobody in


@pytest.mark.parametrize("presented", ["", "hr_", "ana", "hr_" + "A" * 43, "\ud800", "é", b"\xff" * 8, "x" * 100_000])
def test_what_is_no_key(keys: KeyFile, presented: str | bytes) -> None:
    keys.create("ana")
    assert check(keys.hashes(), presented) is None
    assert check({hashlib.sha256(b"x" * 100_000).hexdigest(): "long"}, presented) is None


def test_the_hash_is_no_key(keys: KeyFile) -> None:
    keys.create("ana")
    assert check(keys.hashes(), next(iter(keys.hashes()))) is None


def test_only_the_hash_is_kept_and_only_the_owner_reads_it(keys: KeyFile) -> None:
    token = keys.create("ana")
    text = keys.path.read_text()
    assert token not in text and token.removeprefix("hr_") not in text and hashlib.sha256(token.encode()).hexdigest() in text
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.path.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in keys.path.parent.iterdir()) == [".reviews.json.lock", "reviews.json"]  # no partial file is left


def test_a_change_is_noticed(keys: KeyFile) -> None:
    assert keys.changed()
    keys.create("ana")
    reader = KeyFile(keys.path)
    assert reader.changed()
    reader.hashes()
    assert not reader.changed()
    keys.create("bob")
    assert reader.changed()
    assert set(reader.hashes().values()) == {"ana", "bob"} and not reader.changed()
    keys.path.unlink()
    assert reader.changed()


@pytest.mark.parametrize("name", ["", ".ana", "-ana", "a b", "ana\n", "a" * 65, "ä", "../ana", 'a"b'])
def test_a_name_is_bounded(keys: KeyFile, name: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be named"):
        keys.create(name)


def test_a_name_is_taken_once(keys: KeyFile) -> None:
    keys.create("ana")
    with pytest.raises(KeyFileError, match="a key named 'ana'"):
        keys.create("ana")
    with pytest.raises(KeyFileError, match="no key named 'anna'.*but 'ana'; did you mean 'ana'"):
        keys.revoke("anna")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b'{"format": 1, "keys": [', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"null", "not an object"),
        (b"{}", "not an object"),
        (b'{"format": 1, "keys": null}', "not an object"),
        (b'{"format": 2, "keys": []}', "format is 2"),
        (json.dumps({"format": 1, "keys": [{"name": "ana"}]}).encode(), "key 0"),
        (json.dumps({"format": 1, "keys": [GOOD | {"sha256": "0" * 63}]}).encode(), "the sha256 of key 0"),
        (json.dumps({"format": 1, "keys": [GOOD | {"name": None}]}).encode(), "the name of key 0"),
        (json.dumps({"format": 1, "keys": [GOOD, GOOD | {"sha256": "1" * 64}]}).encode(), "the same name"),
        (json.dumps({"format": 1, "keys": [GOOD, GOOD | {"name": "bob"}]}).encode(), "the same hash"),
    ],
)
def test_damage_is_told_and_nothing_is_written_over_it(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    for act in (KeyFile(path).hashes, KeyFile(path).list, lambda: KeyFile(path).create("bob"), lambda: KeyFile(path).revoke("ana")):
        with pytest.raises(KeyFileError, match=f"is damaged: .*{why}"):
            act()
    assert path.read_bytes() == content


def test_a_missing_file_is_no_service_without_keys(keys: KeyFile) -> None:
    for act in (keys.hashes, keys.list, lambda: keys.revoke("ana")):
        with pytest.raises(KeyFileError, match="no file of keys"):
            act()


def test_a_file_that_others_may_write_is_refused(keys: KeyFile) -> None:
    keys.create("ana")
    keys.path.chmod(0o620)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.hashes()
    keys.path.chmod(0o444)
    assert set(keys.hashes().values()) == {"ana"}


def test_a_file_that_cannot_be_written_stays_as_it_is(keys: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create("ana")
    before = keys.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        keys.create("bob")
    assert keys.path.read_bytes() == before
    assert sorted(path.name for path in keys.path.parent.iterdir()) == [".reviews.json.lock", "reviews.json"]


def test_a_link_stays_a_link(keys: KeyFile, tmp_path: Path) -> None:
    keys.create("ana")
    link = tmp_path / "link.json"
    link.symlink_to(keys.path)
    KeyFile(link).create("bob")
    assert link.is_symlink() and set(keys.hashes().values()) == {"ana", "bob"}


def test_two_at_once_lose_no_key(keys: KeyFile) -> None:
    threads = [threading.Thread(target=KeyFile(keys.path).create, args=(f"key{at}",)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.list()} == {f"key{at}" for at in range(8)}


def test_where_keys_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_path("reviews") == tmp_path / "headrace" / "keys" / "reviews.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/ana")
    assert default_path("reviews") == Path("/home/ana/.config/headrace/keys/reviews.json")
    for name in ("", "..", "a/b", "a\0", ".hidden"):
        with pytest.raises(KeyFileError, match="no name of a service"):
            default_path(name)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key alone is on standard output, once; the list has names only."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HEADRACE_ACCOUNTS", raising=False)

    def call(*words: str) -> tuple[str, str]:
        done = CliRunner().invoke(cli.app, ["keys", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    token, said = call("create", "ana", "--service", "reviews")
    assert check(KeyFile(default_path("reviews")).hashes(), token.strip()) == "ana"
    assert "shown only now" in said and token.strip() not in said
    listed, _ = call("list", "--service", "reviews")
    assert listed.split()[:1] == ["name"] and "ana" in listed and token.strip() not in listed
    as_json, _ = call("list", "--file", str(default_path("reviews")), "--json")
    assert [sorted(one) for one in json.loads(as_json)] == [["created", "name"]]
    call("revoke", "ana", "--service", "reviews")
    assert KeyFile(default_path("reviews")).hashes() == {}
    for words in (["ana"], ["ana", "--service", "reviews", "--file", "x"]):
        with pytest.raises(KeyFileError, match="--service or --file"):
            call("create", *words)
