"""Services with a real engine, as `headrace serve` starts them, for tests that share them; and their processes, to strike at."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import headrace
from headrace.gateway.accounts.books import Books
from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.limits import Limits
from headrace.gateway.accounts.prices import Prices

SOURCE = Path(headrace.__file__).parent.parent
WORDS, LENGTH, PLACES = 16, 512, 32

ENGINE = {
    "max_model_len": LENGTH,
    "max_num_seqs": PLACES,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}
TALK = """
import headrace as hr

say = hr.LLM(
    out="said", model={model!r}, prompt="Say: {{text}}", on=hr.cpu(1), replicas=2, sampling=hr.Sampling(max_tokens={words}), engine={engine!r}, stall_s=20.0
)
talk = hr.Pipeline("talk", say)
"""
EMBED = """
import headrace as hr

vectors = hr.Pipeline("vectors", hr.LLM(model={model!r}, embed=True, on=hr.cpu(1), engine={engine!r}))
"""
PRICES = """
[tiny]
prompt = 1.0
cached = 0.5
completion = 10.0
"""


@dataclass
class Endpoint:
    """A running service. `accounts` are its books, if it keeps any, and `folder` is where it lives."""

    url: str
    pid: int
    folder: Path
    said: list[str]
    accounts: str | None = None

    @property
    def base(self) -> str:
        """What OpenAI's clients are given."""
        return f"{self.url}/v1"

    def key(self, name: str, **limits: Any) -> str:
        """A new key, once all doors have heard of it: they look once a second."""
        with self.database() as database:
            made = Keys(database).create(name, limits=Limits(**limits))
        time.sleep(1.5)
        return made

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """Its accounts."""
        assert self.accounts is not None
        database = Database(self.accounts)
        try:
            yield database
        finally:
            database.close()

    @contextlib.contextmanager
    def books(self) -> Iterator[Books]:
        """The same, with prices."""
        with self.database() as database:
            yield Books(database, prices=Prices.read(str(self.folder / "prices.toml")))

    def get(self, path: str, key: str | None = None) -> bytes:
        """A page."""
        request = urllib.request.Request(self.url + path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: bytes = answer.read()
            return found

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Its processes whose command lines have all of these in them."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE and all(title in " ".join(process.cmdline()) for title in titles):
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """The engines of its replicas."""
        return [one for one in self.processes("spawn_main") if "ray::ServeReplica" in " ".join(_parent(one).cmdline())]

    def replicas(self) -> list[psutil.Process]:
        """Its replicas, those that have an engine."""
        return [_parent(one) for one in self.engines()]

    def doors(self) -> list[psutil.Process]:
        """Its doors."""
        return self.processes("ray::FrontDoor")


def _parent(process: psutil.Process) -> psutil.Process:
    parent = process.parent()
    assert parent is not None
    return parent


def until(holds: Callable[[], Any], *, within_s: float, what: str = "it") -> None:
    """Wait for what another process is about to do."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, f"{what} never came true"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(folder: Path, source: str, *options: str, accounts: bool = False) -> Iterator[Endpoint]:
    """Serve a pipeline from a file in a folder."""
    (folder / "served.py").write_text(source)
    books = str(folder / "accounts.db") if accounts else None
    if books is not None:
        (folder / "prices.toml").write_text(PRICES)
        options = (*options, "--accounts", books, "--prices", "prices.toml")
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "XDG_RUNTIME_DIR": str(folder)}
    environment = {name: value for name, value in variables.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "headrace", "serve", "served.py", "--port", "0", *options]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"answers at (http://[^/\s]+)", line):
                    threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
                    yield Endpoint(found[1], process.pid, folder, said, books)
                    return
            raise AssertionError("".join(said))
        finally:
            process.terminate()
            process.wait(60)
