"""Heartbeat: a second run waits for nobody who is gone, and never takes over from one that is at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from headrace import heartbeat
from headrace.errors import StorageError, TakenOverError
from headrace.filesystems import Place
from headrace.heartbeat import Heartbeat, wait_until_free
from headrace.store import Folder

SIGN = "_headrace/alive.json"
BEAT_S = 0.01


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An output whose holder gives a sign a hundred times a second."""
    monkeypatch.setattr(heartbeat, "BEAT_S", BEAT_S)
    return Folder(Place(fs.LocalFileSystem(), str(tmp_path), str(tmp_path)))


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, two seconds at most."""
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def sign(store: Folder, **changed: Any) -> None:
    """Leave a sign of another run; of this process, unless said otherwise."""
    whole = {"run": "000001-x", "beat": 0, "host": heartbeat._host(), "process": heartbeat._process(os.getpid()), **changed}
    store.put(SIGN, json.dumps(whole).encode())


def took_s(store: Folder) -> float:
    """How long a newcomer waits."""
    started = time.monotonic()
    wait_until_free(store, uri="out", beat_s=BEAT_S)
    return time.monotonic() - started


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer that waits fails."""
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: pytest.fail("waited"))


@pytest.mark.usefixtures("no_waiting")
def test_nobody_was_ever_there(store: Folder) -> None:
    """No sign, or one that was cut off, is no reason to wait."""
    wait_until_free(store, uri="out")
    store.put(SIGN, b'{"run": "0000')
    wait_until_free(store, uri="out")


def test_a_sign_for_the_length_of_the_block(store: Folder) -> None:
    """It changes all the time, and is gone afterwards, whatever happened."""
    with pytest.raises(KeyError), Heartbeat(store, "000001-x"):
        wait_for(lambda: "alive.json" in store.names("_headrace"))
        first = json.loads(store.read(SIGN))
        wait_for(lambda: json.loads(store.read(SIGN)) != first)
        assert first["run"] == "000001-x"
        raise KeyError
    assert store.names("_headrace") == []
    assert not [one for one in threading.enumerate() if one.name == "headrace-heartbeat"]


def test_only_ones_own_sign_is_taken_away(store: Folder) -> None:
    """A run that has lost the output leaves the sign of its successor."""
    with Heartbeat(store, "000001-x") as beating:
        wait_for(lambda: "alive.json" in store.names("_headrace"))
        beating._stopped.set()
        beating._thread.join()
        sign(store, run="000002-y")
    assert json.loads(store.read(SIGN))["run"] == "000002-y"


def test_a_live_run_is_left_alone(store: Folder) -> None:
    """While it beats a newcomer is refused, and told who it is."""
    with Heartbeat(store, "000001-x"):
        wait_for(lambda: "alive.json" in store.names("_headrace"))
        with pytest.raises(TakenOverError, match=rf"output 'out' is being written by another run \(process {os.getpid()} on .*\); wait for it, or stop it"):
            wait_until_free(store, uri="out", beat_s=5 * BEAT_S)


def test_one_that_ends_meanwhile(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the sign is taken away, the output is free."""
    sign(store)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        store.delete(SIGN)

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    wait_until_free(store, uri="out")
    assert len(waits) == 1


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Another process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.stdin.close()  # type: ignore[union-attr]
    process.wait()


@pytest.mark.usefixtures("no_waiting")
def test_a_process_that_is_gone(store: Folder, child: subprocess.Popen[bytes]) -> None:
    """Dead, dead and not yet buried by its parent, or its number given to another process: nobody waits."""
    sign(store, process=heartbeat._process(child.pid))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    wait_until_free(store, uri="out")
    child.wait()
    wait_until_free(store, uri="out")
    sign(store, process=f"{os.getpid()}@1")
    wait_until_free(store, uri="out")


@pytest.mark.parametrize("host", ["elsewhere/boot/pid:[1]", None])
def test_one_that_has_stopped_beating(store: Folder, host: str | None) -> None:
    """On another machine, or frozen on this one: after four beats without a change it is taken for dead."""
    sign(store, **({"host": host, "process": "1@1"} if host else {}))
    assert 3.5 * BEAT_S < took_s(store) < 2


def test_one_that_beats_on_another_machine(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process number tells; only the sign does."""
    sign(store, host="elsewhere/boot/pid:[1]", process="17@1")
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: sign(store, host="elsewhere/boot/pid:[1]", process="17@1", beat=1))
    with pytest.raises(TakenOverError, match=r"process 17 on elsewhere\)"):
        wait_until_free(store, uri="out")


def test_a_store_that_refuses_ends_no_run(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign that cannot be written is a courtesy not done."""
    tries: list[str] = []

    def refuse(self: Folder, name: str, content: bytes) -> None:
        tries.append(name)
        raise StorageError("full")

    monkeypatch.setattr(Folder, "put", refuse)
    with Heartbeat(store, "000001-x"):
        wait_for(lambda: len(tries) > 2)


def test_without_proc(monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]) -> None:
    """Where there is no /proc, a process is known by its number alone."""
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert heartbeat._process(child.pid) == f"{child.pid}@"
    child.kill()
    child.wait()
    assert heartbeat._process(child.pid) == "gone"
