"""The ledger on a disk, one thing at a time. That it holds in any order of steps is shown in `tests/properties/test_protocol.py`."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace import ledger
from headrace.errors import LedgerError, OutputError, StorageError, TakenOverError
from headrace.filesystems import locate
from headrace.intervals import Intervals
from headrace.ledger import LETTERS, SUCCESS, Ledger, begun, complete, load, staged
from headrace.state import Change, DataFile, State
from headrace.store import Folder

RUNS, CLAIMS, STAGING = "_headrace/ledger", "_headrace/ledger/claims", "_headrace/staging"


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return Folder(locate(str(tmp_path / "out"), error=OutputError))


def fresh() -> State:
    return State(request={"limit": None}, facts={}, units="units-1")


def hold(store: Folder, token: str = "a") -> Ledger:
    """An output taken over, and begun from what is known of it."""
    held, state = Ledger.claim(store, token=token)
    held.begin(state or fresh())
    return held


def written(held: Ledger, rows: int = 10, kind: str = "part") -> DataFile:
    """A staged file."""
    name = held.new_name(kind, ".parquet")
    held.store.put(staged(name), b"x" * rows)
    return DataFile(name, rows, rows)


def commit(held: Ledger, unit: int = 0) -> DataFile:
    """Ten rows of a unit, committed and not published."""
    file = written(held)
    held.commit(Change(files=[file], done={unit: [(0, 10)]}))
    return file


def refuse(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[str], bool], times: int = 1 << 30) -> None:
    """Puts of some names fail, so many times."""
    left, put = [times], Folder.put

    def failing(store: Folder, name: str, content: bytes) -> None:
        if wrong(name) and left[0]:
            left[0] -= 1
            raise StorageError(f"cannot write {name}: No space left on device")
        put(store, name, content)

    monkeypatch.setattr(Folder, "put", failing)


def test_a_folder_without_a_ledger_has_no_state(store: Folder) -> None:
    assert load(store) is None and not begun(store)
    store.put(f"{CLAIMS}/000001-a", b"")
    assert load(store) is None and begun(store), "it died before its base"


def test_a_run_goes_through(store: Folder) -> None:
    """Files lie in staging until they are published; at the end nothing but what counts is there."""
    held = hold(store)
    first, second, letters = commit(held), commit(held, unit=1), written(held, 2, "letters")
    held.commit(Change(letters=[letters], dead={2: [(0, 2)]}))
    assert held.unpublished() == [first, second]
    held.publish(first.name)
    held.publish(first.name)
    assert held.unpublished() == [second] and store.names("") == ["_headrace", first.name]
    written(held)  # of a task that was given up
    order: list[list[str]] = []
    held.finish(lambda: order.append(store.names("")))
    assert order == [sorted(["_headrace", first.name, second.name])], "called when all is there but _SUCCESS"
    assert store.names("") == sorted([SUCCESS, "_headrace", first.name, second.name]) and store.names(LETTERS) == [letters.name]
    assert store.names(STAGING) == []
    state = load(store)
    assert state == held.state and complete(store, state)
    assert (state.rows_done, state.rows_dead, state.finished) == (20, 2, True)


def test_a_run_goes_on_where_another_stopped(store: Folder) -> None:
    """What was committed and not published is taken over; what was only staged goes."""
    first = hold(store)
    file = commit(first)
    orphan = written(first)
    second = hold(store, "b")
    assert second.run == "000002-b" and second.unpublished() == [file]
    assert store.names(f"{STAGING}/000001-a") == [file.name] and orphan.name not in store.names("")
    assert store.names(RUNS) == ["000002-b", "claims"] and store.names(CLAIMS) == ["000002-b"]
    commit(second, unit=1)
    second.finish()
    assert len(store.names("")) == 4 and second.state.done == {0: Intervals([(0, 10)]), 1: Intervals([(0, 10)])}


def test_who_has_lost_the_output_stops(store: Folder) -> None:
    """At its next commit, at a compaction, before it begins, and at the end; what it still wrote is in no view."""
    first = hold(store)
    file = commit(first)
    second, before = Ledger.claim(store, token="b")
    assert before is not None
    second.begin(before)
    for step in (lambda: commit(first, unit=1), first.check, first.compact, first.finish):
        with pytest.raises(TakenOverError, match=r"another run \(number 2\) has taken over"):
            step()
    assert load(store) == second.state and list(second.state.files) == [file.name]
    Ledger.claim(store, token="c")
    with pytest.raises(TakenOverError):
        second.begin(second.state)
    assert SUCCESS not in store.names("")


def test_a_claim_beside_a_greater_one_is_given_up(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that claim in the same moment: the greater name has it."""
    put = Folder.put

    def both(store: Folder, name: str, content: bytes) -> None:
        put(store, name, content)
        if name.endswith("-a"):
            put(store, f"{CLAIMS}/000001-b", b"")

    monkeypatch.setattr(Folder, "put", both)
    with pytest.raises(TakenOverError):
        Ledger.claim(store, token="a")


def test_a_restart_forgets(store: Folder) -> None:
    """Files of earlier runs go with what was known; others in the folder stay."""
    first = hold(store)
    file = commit(first)
    first.finish()
    store.put("notes.txt", b"mine")
    second, before = Ledger.claim(store, restart=True)
    assert before is None
    second.begin(fresh())
    assert store.names("") == ["_headrace", "notes.txt"] and file.name not in store.names("")
    state = load(store)
    assert state is not None and not state.files


def test_compaction_changes_nothing_that_is_known(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_AFTER", 3)
    held = hold(store)
    for unit in range(7):
        commit(held, unit)
        assert load(store) == held.state
    assert store.names(f"{RUNS}/{held.run}") == ["base-000006", "record-000006"]


def test_a_compaction_that_was_cut_off_is_none(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greatest base counts, with the records from its own number on."""
    held = hold(store)
    for unit in range(3):
        commit(held, unit)
    monkeypatch.setattr(Folder, "delete", lambda store, name: None)
    held.compact()
    commit(held, 3)
    assert store.names(f"{RUNS}/{held.run}") == ["base-000000", "base-000003", *(f"record-00000{number}" for number in range(4))]
    assert load(store) == held.state


def test_merged_files_are_gone(store: Folder) -> None:
    held = hold(store)
    small = [commit(held, unit) for unit in range(2)]
    held.publish(small[0].name)
    merged = written(held, 20)
    held.settle(Change(files=[merged], dropped=[file.name for file in small]))
    held.publish(merged.name)
    assert store.names("") == ["_headrace", merged.name] and store.names(f"{STAGING}/{held.run}") == []


def test_new_letters_come_before_old_ones_go(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead row is among the letters at any moment, also when the run dies in between."""
    held = hold(store)
    old, new = written(held, 1, "letters"), written(held, 1, "letters")
    held.commit(Change(letters=[old], dead={0: [(0, 1)]}))
    held.publish(old.name)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "move", lambda *names: pytest.fail("died"))
        with pytest.raises(pytest.fail.Exception):
            held.settle(Change(letters=[new], dropped=[old.name]))
    assert store.names(LETTERS) == [old.name]
    hold(store, "b")
    assert store.names(LETTERS) == [new.name]


@pytest.mark.parametrize("gone", [SUCCESS, "part", "letters"])
def test_an_output_that_lacks_something_is_not_complete(store: Folder, gone: str) -> None:
    """A run that is given it puts it right, or says what is missing."""
    held = hold(store)
    file, letters = commit(held), written(held, 1, "letters")
    held.commit(Change(letters=[letters], dead={1: [(0, 1)]}))
    held.finish()
    assert complete(store, held.state)
    store.delete({SUCCESS: SUCCESS, "part": file.name, "letters": f"{LETTERS}/{letters.name}"}[gone])
    assert not complete(store, held.state)
    if gone == SUCCESS:
        hold(store, "b").finish()
        assert complete(store, held.state)
    else:
        with pytest.raises(LedgerError, match=f"the committed file {gone}-.* is neither staged nor in the output; was it deleted"):
            hold(store, "b").finish()


def test_what_does_not_count_makes_an_output_incomplete(store: Folder) -> None:
    """A letter of a row that is done by now, or a file that nobody knows, is left by a retry that died."""
    held = hold(store)
    letters = written(held, 1, "letters")
    held.commit(Change(letters=[letters], dead={0: [(0, 1)]}))
    held.finish()
    file = written(held, 1)
    store.move(staged(file.name), file.name)
    assert not complete(store, held.state), "not committed"
    held.commit(Change(files=[file], done={0: [(0, 1)]}))
    assert not complete(store, held.state), "done, and still among the letters"
    held.settle(Change(dropped=[letters.name]))
    assert complete(store, held.state)


@pytest.mark.parametrize("name", ["base-000000", "record-000001"])
@pytest.mark.parametrize("damage", [lambda content: content[:-12], lambda content: b"", lambda content: content.replace(b"0", b"1", 1)])
def test_a_damaged_record_is_told(store: Folder, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Cut short, empty, or with one digit changed: no number in it is believed."""
    held = hold(store)
    commit(held)
    commit(held, unit=1)
    path = f"{RUNS}/{held.run}/{name}"
    store.put(path, damage(store.read(path)))
    for step in (lambda: load(store), lambda: Ledger.claim(store)):
        with pytest.raises(LedgerError, match=f"the ledger's {name} is damaged: its checksum does not match"):
            step()


def test_a_missing_record_is_told(store: Folder) -> None:
    """Not if it was the last one: then it is as if it had never been written."""
    held = hold(store)
    for unit in range(3):
        commit(held, unit)
    store.delete(f"{RUNS}/{held.run}/record-000001")
    with pytest.raises(LedgerError, match=f"record 1 of run {held.run} is missing from the ledger, though later ones are there"):
        load(store)
    store.delete(f"{RUNS}/{held.run}/record-000002")
    state = load(store)
    assert state is not None and list(state.done) == [0]


def test_records_are_plain_json(store: Folder) -> None:
    """For whoever has to look into one; the last line is a checksum."""
    held = hold(store)
    commit(held)
    body, check, _ = store.read(f"{RUNS}/{held.run}/record-000000").split(b"\n")
    assert json.loads(body)["done"] == {"0": [[0, 10]]} and len(check) == 8


def test_nothing_to_commit_writes_nothing(store: Folder) -> None:
    held = hold(store)
    held.commit(Change())
    assert store.names(f"{RUNS}/{held.run}") == ["base-000000"]


def test_a_commit_that_does_not_add_up_writes_nothing(store: Folder) -> None:
    held = hold(store)
    with pytest.raises(LedgerError, match="settles 5 rows, but its files hold 0"):
        held.commit(Change(done={0: [(0, 5)]}))
    assert store.names(f"{RUNS}/{held.run}") == ["base-000000"]
    commit(held)
    assert load(store) == held.state


def test_a_put_is_tried_again(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold(store)
    refuse(monkeypatch, lambda name: "record-" in name, times=2)
    commit(held)
    assert load(store) == held.state


def test_a_put_that_was_given_up_ends_all_commits(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take effect yet: another record of that number would be lost then. The next run knows what was committed before."""
    held = hold(store)
    kept = commit(held)
    with monkeypatch.context() as patch:
        refuse(patch, lambda name: "record-" in name)
        with pytest.raises(StorageError, match="No space left on device"):
            commit(held, unit=1)
    for _ in range(2):
        with pytest.raises(StorageError, match="No space left on device"):
            commit(held, unit=2)
    assert list(hold(store, "b").state.files) == [kept.name]


def test_a_claim_that_was_cut_off_is_no_claim(store: Folder, tmp_path: Path) -> None:
    """Killed between writing and renaming: the partial file has a name of its own, and stands in nobody's way."""
    for folder in (CLAIMS, f"{RUNS}/000001-a"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    for name in (f"{CLAIMS}/.000001-a.0123abcd.tmp", f"{RUNS}/000001-a/.base-000000.0123abcd.tmp"):
        store.put(name, b"")
    assert load(store) is None
    held = hold(store, "b")
    commit(held)
    store.put(f"{RUNS}/{held.run}/.record-000001.0123abcd.tmp", b"")
    assert load(store) == held.state
    held.finish()


def test_a_reader_begins_again_when_a_run_takes_over(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it listed is swept away by then; what it returns is all that was committed."""
    commit(hold(store))
    names, once = Folder.names, iter([True])

    def meanwhile(folder: Folder, name: str) -> list[str]:
        found = names(folder, name)
        if name == RUNS and next(once, False):
            hold(store, "b")
        return found

    monkeypatch.setattr(Folder, "names", meanwhile)
    state = load(store)
    assert state is not None and state.rows_done == 10


def test_a_ledger_that_never_rests_is_told(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(store)

    def gone(store: Folder, name: str) -> bytes:
        raise FileNotFoundError(name)

    monkeypatch.setattr(Folder, "read", gone)
    with pytest.raises(LedgerError, match="the ledger changed 10 times while it was read"):
        load(store)


def test_only_files_of_a_run_can_be_staged() -> None:
    assert staged("part-000012-ab-0.parquet") == f"{STAGING}/000012-ab/part-000012-ab-0.parquet"
    for name in ("part-1.parquet", "notes.txt", "other-000012-ab-0.parquet"):
        with pytest.raises(LedgerError, match="is no file of a ledger"):
            staged(name)


def test_files_are_published_by_many_threads(store: Folder) -> None:
    held = hold(store)
    files = [commit(held, unit) for unit in range(40)]
    threads = [threading.Thread(target=lambda some: [held.publish(file.name) for file in some], args=(files[at::8],)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not held.unpublished() and len(os.listdir(store.place.path)) == 41
