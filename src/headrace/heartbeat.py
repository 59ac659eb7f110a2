"""A sign of life beside the output, so that a second run does not take an output over from one that is still at work.

A courtesy only: what keeps two runs from both counting is the ledger. So no clocks are compared: a newcomer watches whether the
sign changes. On one machine a process that is gone is seen at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace.errors import StorageError, TakenOverError
from headrace.ledger import HOME
from headrace.store import Store

BEAT_S = 2.0
_MISSED = 4  # beats without a change, until the holder is taken for dead
_LONG_S = 3600.0  # since the last beat: longer than clocks of machines differ
_NAME = f"{HOME}/alive.json"


class Heartbeat:
    """Renews the sign in a thread for the length of the block, and takes it away at the end."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="headrace-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        try:
            if json.loads(self.store.read(_NAME))["run"] == self.run:
                self.store.delete(_NAME)
        except (FileNotFoundError, StorageError, ValueError):
            return  # whoever comes next waits a few seconds longer

    def _beat(self) -> None:
        count, began_s = 0, time.time()
        while True:
            sign = {"run": self.run, "beat": count, "host": _host(), "process": _process(os.getpid()), "began_s": began_s, "at_s": time.time()}
            with contextlib.suppress(StorageError):  # the run itself will tell, at its next commit
                self.store.put(_NAME, json.dumps(sign).encode())
            count += 1
            if self._stopped.wait(BEAT_S):
                return


def wait_until_free(store: Store, *, uri: str, beat_s: float = BEAT_S) -> None:
    """Return when nobody is at work on an output: at once where that is certain, else after a few beats without a sign.

    Raises:
        TakenOverError: another run is at work on it.
    """
    first = read(store)
    if first is None or _is_there(first) is False:
        return
    for _ in range(2 * _MISSED):
        time.sleep(beat_s / 2)
        now = read(store)
        if now is None:
            return
        if now != first:
            raise TakenOverError(
                f"output {uri!r} is being written by another run (process {first['process'].partition('@')[0]} on {first['host'].partition('/')[0]}); "
                "wait for it, or stop it: then the same command goes on where it was"
            )


def read(store: Store) -> dict[str, Any] | None:
    """The sign beside an output: the `run` that gave it, when that began and when this was given (`began_s`, `at_s`); None where there is none."""
    try:
        values = json.loads(store.read(_NAME))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) and {"run", "host", "process"} <= values.keys() else None


def at_work(signs: Sequence[tuple[Store, dict[str, Any]]], *, beat_s: float = BEAT_S) -> list[bool]:
    """Whether those who gave these signs are still there.

    Of a process on this machine that is known at once, and of one that gave its last sign an hour ago or more. The signs of other
    machines are watched, all together, for a few beats.
    """
    there = [False if time.time() - sign.get("at_s", math.inf) > _LONG_S else _is_there(sign) for _, sign in signs]
    for _ in range(2 * _MISSED):
        if None not in there:
            break
        time.sleep(beat_s / 2)
        for at, (store, sign) in enumerate(signs):
            if there[at] is None and (now := read(store)) != sign:
                there[at] = now is not None and now["run"] == sign["run"]
    return [bool(one) for one in there]


def _is_there(sign: dict[str, Any]) -> bool | None:
    """Whether the process is there that gave a sign; None where it is not on this machine, and may be."""
    if sign["host"] == _host():
        return bool(sign["process"] == _process(int(sign["process"].partition("@")[0])))
    return None


def _host() -> str:
    """This machine, its boot and its process namespace: process numbers mean something only within."""
    boot, names = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}/{os.readlink(names) if names.exists() else ''}"


def _process(number: int) -> str:
    """A process by its number and when it started, since numbers are used again; `gone` when there is none."""
    try:
        status = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        started = "gone" if status[0] == "Z" else status[19]
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends while it is looked at
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return "gone"
        started = ""  # no /proc here, as on macOS
    return f"{number}@{started}"
