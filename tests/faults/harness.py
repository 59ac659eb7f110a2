"""What the fault tests are played with: a job as a process tree, moments to strike at, and a count that trusts nobody."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

import headrace
from headrace import ledger
from headrace.errors import OutputError
from headrace.filesystems import locate
from headrace.store import Folder

SOURCE = Path(headrace.__file__).parent.parent
INJECT = Path(__file__).parent / "inject"
KILLS = int(os.environ.get("HEADRACE_FAULT_KILLS", "200"))
SEED = int(os.environ.get("HEADRACE_FAULT_SEED", "0"))
ROWS = 4000
TIMEOUT_S = 240  # of a run; a run of this job takes ten seconds on an idle machine, and a hang is to be told from a busy one
GONE_S = 60  # within which what a dead run has left behind must have ended by itself
AGENTS = "ray::DashboardAgent", "ray::RuntimeEnvAgent"  # Ray's own; they wait a minute for an answer of the dead, and end then

TIGHT = {
    "headrace.on_ray.commits": {"_OLDEST_S": [0.3, 60.0], "_SMALL_BYTES": 12_000, "_MERGED_BYTES": 12_000},
    "headrace.ledger": {"_COMPACT_AFTER": 4},
}
"""Limits under which a small job commits, merges, compacts and publishes as often as one of a day does."""

SLOW = "--set", "model.pause_s=0.01"  # twenty seconds of the job, so that a second run has the time to start beside it

PIPELINE = """
import time

import headrace as hr


@hr.stage(out={"half": int})
def halve(id: hr.Column[int]):
    time.sleep(0.0005 * len(id))
    return {"half": id // 2}


@hr.stage(out={"y": float}, replicas=2, batch=16)
class Model:
    pause_s: float = 0.002

    def __call__(self, id: hr.Column[int], half: hr.Column[int]):
        time.sleep(self.pause_s * len(id))
        return {"y": id * 3.0 + half}


job = hr.Pipeline("job", halve, Model())
"""


PERCENT = {
    "task workers": (13, 8),
    "actors": (10, 6),
    "event log": (3, 2),
    "driver": (20, 10),
    "everything": (12, 6),
    "node": (10, 0),
}
"""Of all kills, over a local output and over one on S3."""


def share(kind: str, where: str = "local") -> int:
    """How many kills are of one kind."""
    return max(1, round(PERCENT[kind][where == "s3"] / 100 * KILLS))


def write_input(folder: Path, rows: int = ROWS) -> None:
    """Rows in eight files of five row groups each."""
    folder.mkdir(parents=True)
    count = rows // 8
    for file in range(8):
        ids = range(file * count, (file + 1) * count)
        pq.write_table(pa.table({"id": ids, "text": [f"row {row}" for row in ids]}), folder / f"{file}.parquet", row_group_size=max(1, count // 5))


def expected(rows: int = ROWS) -> pa.Table:
    """What the job makes of its input, told without running it."""
    ids = list(range(rows))
    return pa.table({"id": ids, "text": [f"row {row}" for row in ids], "half": [row // 2 for row in ids], "y": [row * 3.0 + row // 2 for row in ids]})


@dataclass(frozen=True, slots=True)
class Count:
    """What an output holds, held against what it should. `wrong` counts rows with another value."""

    rows: int
    lost: int
    doubled: int
    wrong: int


class Output:
    """An output folder or URI, looked at from outside: through listings and Parquet files only."""

    def __init__(self, uri: str, keys: Callable[[], set[str]] | None = None) -> None:
        self.uri = uri
        self.place = locate(uri, error=OutputError)
        self._keys = keys

    def paths(self) -> set[str]:
        """All files, relative to the output."""
        if self._keys is not None:
            prefix = self.place.path.partition("/")[2] + "/"
            return {key.removeprefix(prefix) for key in self._keys() if key.startswith(prefix) and not key.endswith("/")}
        found = set()
        for folder, _, names in os.walk(self.place.path):
            found |= {os.path.relpath(os.path.join(folder, name), self.place.path) for name in names}
        return found

    def table(self) -> pa.Table:
        """All rows, by id."""
        infos = self.place.filesystem.get_file_info(fs.FileSelector(self.place.path, allow_not_found=True))
        parts = [info.path for info in infos if info.base_name.startswith("part-")]
        tables = [pq.read_table(path, filesystem=self.place.filesystem) for path in sorted(parts)]
        return pa.concat_tables(tables).sort_by("id") if tables else expected(0)

    def letters(self) -> list[dict[str, Any]]:
        """All dead letters."""
        selector = fs.FileSelector(f"{self.place.path}/{ledger.LETTERS}", allow_not_found=True)
        found = []
        for info in self.place.filesystem.get_file_info(selector):
            if info.type == fs.FileType.File:
                found += pq.read_table(info.path, filesystem=self.place.filesystem).to_pylist()
        return found

    def count(self, wanted: pa.Table) -> Count:
        """The rows, held against those wanted."""
        data = self.table()
        held = set(data["id"].to_pylist())
        first = data.filter(pa.array([at == 0 or data["id"][at] != data["id"][at - 1] for at in range(data.num_rows)], pa.bool_()))
        known = wanted.filter(pc.is_in(wanted["id"], pa.array(sorted(held), pa.int64()))).select(data.schema.names)
        wrong = sum(one != other for one, other in zip(first.to_pylist(), known.to_pylist(), strict=False))
        return Count(data.num_rows, wanted.num_rows - known.num_rows, data.num_rows - len(held), wrong + first.num_rows - known.num_rows)

    def check(self, wanted: pa.Table, *, litter: bool = False) -> Count:
        """Hold that the output is complete and exact, marked as such, and that nothing lies there which does not belong there.

        With `litter`, a run that has lost the output may have left files in its staging folder, after the other one finished.
        """
        found = self.count(wanted)
        assert (found.lost, found.doubled, found.wrong) == (0, 0, 0), f"{found} in {self.uri}"
        assert found.rows == wanted.num_rows
        paths = self.paths()
        root = {path for path in paths if "/" not in path}
        state = ledger.load(Folder(self.place))
        assert state is not None and state.finished
        assert "_SUCCESS" in root, f"{self.uri} is not marked as a success"
        partial = {path for path in root if path.endswith(".tmp")}  # of a put that was cut off; its name starts with a dot
        assert root - partial == {"_SUCCESS", *state.files}, f"{sorted(root)} where the ledger knows {sorted(state.files)}"
        staged = [path for path in paths if path.startswith("_headrace/staging/")]
        assert litter or not staged, f"staged files are left: {staged}"
        return found


def session(leader: int) -> list[psutil.Process]:
    """The processes of the session that a process leads or led, whoever their parent is by now; without zombies."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(psutil.Process(pid))
    return found


def title(process: psutil.Process) -> str:
    """The command line, which Ray sets to what a worker is doing."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


class Running:
    """A command as a session of its own, so that all its processes can be told and ended, whatever becomes of it."""

    def __init__(self, arguments: list[str], *, folder: Path, plan: Mapping[str, Any] | None = None, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{time.time_ns()}.txt"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(INJECT), str(SOURCE)]),
            "HEADRACE_FAULT_PLAN": json.dumps(plan or {}),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        self.started_s = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=folder, env=environment | variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether the driver is there, frozen or not."""
        return self.process.poll() is None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code. A run that does not end is told with the stacks of its driver."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            stacks = subprocess.run(["py-spy", "dump", "--pid", str(self.process.pid)], capture_output=True, text=True, timeout=60, env=_with_tools()).stdout
            tree = "\n".join(title(process)[:150] for process in session(self.process.pid))
            raise AssertionError(f"it has not ended after {timeout_s} s:\n{self.said[-2000:]}\n{stacks}\n{tree}") from None

    def members(self, *prefixes: str) -> list[psutil.Process]:
        """Its processes whose title starts with one of `prefixes`."""
        return [process for process in session(self.process.pid) if title(process).startswith(prefixes)]

    def kill(self) -> None:
        """SIGKILL to the driver."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """SIGKILL to everything: driver, gcs, raylet, agents and workers."""
        found = session(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def left(self, timeout_s: float = GONE_S, but: tuple[str, ...] = AGENTS) -> list[str]:
        """What is still there of its processes, except `but`, when they have had the time to end by themselves."""
        until = time.monotonic() + timeout_s
        while True:
            found = [process for process in session(self.process.pid) if title(process) and not title(process).startswith(but)]
            if not found or time.monotonic() > until:
                return [title(process)[:150] for process in found]
            psutil.wait_procs(found, timeout=0.5)

    def end(self) -> None:
        """End whatever is left of it."""
        for _ in range(3):
            self.kill_all()
            if not psutil.wait_procs(session(self.process.pid), timeout=5)[1]:
                return


def _with_tools() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@dataclass(frozen=True, slots=True)
class Moment:
    """When to strike: `delay_s` after the `nth` new file that matches `sign` has appeared, or, without a sign, after the start."""

    sign: str = ""
    nth: int = 1
    delay_s: float = 0.0

    @staticmethod
    def random(chance: random.Random) -> Moment:
        """Any moment in the life of a run: setting out, claiming, writing, committing, compacting, merging, publishing, finishing."""
        sign, most = chance.choice(
            [
                ("", 1),
                (r"ledger/claims/\d", 1),
                (r"ledger/\d+-\w+/base-", 3),
                (r"ledger/\d+-\w+/record-", 8),
                (r"ledger/\d+-\w+/record-", 8),
                (r"staging/.*\d\.tmp|staging/.*parquet$", 10),
                (r"staging/.*parquet$", 10),
                (r"^part-", 3),
                (r"^part-", 3),
                (r"^_SUCCESS$", 1),
            ]
        )
        delay_s = chance.uniform(0, 12) if not sign else chance.choice([0.0, 0.0, chance.uniform(0, 0.02), chance.uniform(0, 0.3)])
        return Moment(sign, chance.randint(1, most), delay_s)

    @staticmethod
    def soon(chance: random.Random) -> Moment:
        """A moment in the middle of a run."""
        sign = chance.choice(["", "", r"ledger/\d+-\w+/record-", r"staging/.*\d\.tmp|staging/.*parquet$", r"^part-"])
        return Moment(sign, 1, chance.uniform(0, 0.02 if sign else 1.0))

    def wait(self, run: Running, output: Output) -> bool:
        """Wait for it; False when the run ended before."""
        before, found = output.paths(), set[str]()
        while self.sign and len(found) < self.nth:
            if not run.alive:
                return False
            found |= {path for path in output.paths() - before if re.search(self.sign, path)}
            time.sleep(0.001)  # as fine as a poll can be: what it waits for are files of another process
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(self.delay_s)
        return run.alive


@dataclass(slots=True)
class Figures:
    """What the suite has found, by kind of fault."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, kind: str, *, faults: int, runs: int, seconds: float, count: Count | None = None, left: int = 0) -> None:
        """Add to a kind's sums."""
        row = self.rows.setdefault(kind, dict.fromkeys(("faults", "runs", "lost", "doubled", "wrong", "processes left", "seconds"), 0))
        new = {"faults": faults, "runs": runs, "seconds": seconds, "processes left": left}
        if count is not None:
            new |= {"lost": count.lost, "doubled": count.doubled, "wrong": count.wrong}
        for name, value in new.items():
            row[name] = round(row[name] + value, 1)

    def lines(self) -> Iterator[str]:
        """As a table."""
        if self.rows:
            names = list(next(iter(self.rows.values())))
            yield f"{'kind':44}" + "".join(f"{name:>16}" for name in names)
            for kind, row in self.rows.items():
                yield f"{kind:44}" + "".join(f"{row[name]:>16,.0f}" for name in names)
