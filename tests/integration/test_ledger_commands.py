"""The ledger at the command line: exit codes, Ctrl-C, replay, two runs at once, and nothing that stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import SOURCE, Run  # isort: skip

PIPELINE = """
import os
import time

import headrace as hr


@hr.stage(out={"y": int}, batch=16)
def double(id: hr.Column[int], told: hr.Column[str]):
    while max(id) >= 560 and os.path.exists(told[0] + "/gate"):
        time.sleep(0.02)
    for row in id:
        if os.path.exists(f"{told[0]}/row-{row}"):
            raise LookupError(f"row {row} has no luck")
    return {"y": id * 2}


doubled = hr.Pipeline("doubled", double)
"""
JOB = ["run", "job.py", "-i", "in", "-o", "out", "--keep", "id"]


@pytest.fixture(scope="module")
def address(shared_ray: None) -> str:
    """The address of a Ray that several commands can join, so that each does not start its own."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pipeline, 600 rows, and a folder in which the stage is told what to do."""
    (tmp_path / "told").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "job.py").write_text(PIPELINE)
    for name, start in (("a", 0), ("b", 300)):
        pq.write_table(pa.table({"id": range(start, start + 300), "told": [str(tmp_path / "told")] * 300}), tmp_path / f"in/{name}.parquet")
    return tmp_path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """The headrace command, begun in the folder and not waited for."""
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200"}
        words = [sys.executable, "-m", "headrace", *arguments]
        begun.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def first_commit(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until the run has committed something."""
    end = time.monotonic() + 120
    while not list(folder.glob("out/_headrace/ledger/0*/record-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def whole(folder: Path, *, without: tuple[int, ...] = ()) -> None:
    """Hold the output to what it must be."""
    found = sorted(row["id"] for path in folder.glob("out/part-*") for row in pq.read_table(path).to_pylist())
    assert found == [n for n in range(600) if n not in without] and (folder / "out/_SUCCESS").exists()


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.faults), signal.SIGTERM], ids=lambda how: how.name)
def test_stopped_and_gone_on(folder: Path, start: Start, command: Run, address: str, how: signal.Signals) -> None:
    """Exit code 130, without a traceback, and what to do next; the same command goes on. While a run is alive a second one gets 5."""
    (folder / "told/gate").touch()
    running = start(*JOB, "--address", address)
    first_commit(running, folder)
    second = command(*JOB, "--address", address)
    assert second.returncode == 5 and f"error: output 'out' is being written by another run (process {running.pid} on " in second.stderr, second.stderr
    running.send_signal(how)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert "rows are committed in out" in stderr and "the same command goes on from there" in stderr.lower()
    assert "Traceback" not in stderr and stdout == "" and not (folder / "out/_SUCCESS").exists()
    (folder / "told/gate").unlink()
    done = command(*JOB, "--address", address)
    assert done.returncode == 0 and " rows were done before" in done.stdout, done.stderr
    whole(folder)


def test_exit_codes(folder: Path, command: Run, address: str) -> None:
    """0, nothing to do, 4, and 6: a script can tell what happened, and so can whoever reads the message."""
    on = ("--address", address)
    assert command(*JOB, *on).returncode == 0
    again = command(*JOB)
    assert again.returncode == 0 and again.stdout.startswith("nothing to do: all 600 rows were done before"), "without Ray"
    changed = command(*JOB, "--limit", "700")
    assert changed.returncode == 4 and "  --limit: was absent, is 700\nChoose: --accept-change goes on" in changed.stderr, changed.stderr
    changed = command(*JOB, "--where", "id > 3", "--accept-change")
    assert changed.returncode == 4 and "error: --where was None when the output was begun, and is 'id > 3' now" in changed.stderr, changed.stderr
    (folder / "job.py").write_text("# a comment\n" + PIPELINE)
    assert command(*JOB).returncode == 0, "a comment is no change"
    (folder / "job.py").write_text(PIPELINE.replace("id * 2", "id * 3"))
    changed = command(*JOB)
    assert changed.returncode == 4 and "  code of job.py: changed\n" in changed.stderr
    for record in folder.glob("out/_headrace/ledger/0*/*"):
        record.write_bytes(b"{}\n")
    damaged = command(*JOB)
    assert damaged.returncode == 6 and "is damaged: its checksum does not match" in damaged.stderr, damaged.stderr
    done = command(*JOB, *on, "--restart")
    assert done.returncode == 0 and done.stdout.startswith("600 rows in "), done.stderr
    whole(folder)


def test_dead_letters_and_replay(folder: Path, command: Run, address: str) -> None:
    """3 where too many fail, with the user's own frames. `replay` knows the job from the folder, and merges what goes well."""
    rows = (7, 8, 120)
    for row in rows:
        (folder / f"told/row-{row}").touch()
    failed = command(*JOB, "--address", address, "--max-dead-letters", "2")
    assert failed.returncode == 3 and "--max-dead-letters allows 2. double: LookupError: row " in failed.stderr, failed.stderr
    assert "in double\n" in failed.stderr and "Traceback" not in failed.stderr and "src/headrace" not in failed.stderr
    done = command(*JOB, "--address", address)
    assert done.returncode == 0 and "3 dead letters in out/_headrace/dead_letters" in done.stdout, done.stderr
    assert "when the cause is mended: headrace replay out" in done.stdout
    whole(folder, without=rows)

    (folder / "told/row-7").unlink()
    partly = command("replay", "out", "--address", address)
    assert partly.returncode == 0 and "2 dead letters in out/_headrace/dead_letters (now: 2 LookupError in double)" in partly.stdout, partly.stderr
    whole(folder, without=rows[1:])

    (folder / "mended.py").write_text(PIPELINE.replace("if os.path.exists", "if False and os.path.exists"))
    last = command("replay", "out", "--file", "mended.py", "--address", address)
    assert last.returncode == 0 and "dead letter" not in last.stdout and "598 rows were done before" in last.stdout, last.stderr
    whole(folder)


def test_a_replay_whose_file_is_not_here(folder: Path, command: Run, address: str) -> None:
    """The run was started from Python, or elsewhere: what to name is said."""
    import headrace as hr
    from headrace.cli.loading import load

    (folder / "job.py").rename(folder / "other.py")
    hr.run(load(str(folder / "other.py")), input=str(folder / "in"), output=str(folder / "out"), keep="id")
    told = command("replay", "out")
    assert told.returncode == 2 and "was started from Python: name the pipeline's file with --file" in told.stderr
    done = command(*[word.replace("job.py", "other.py") for word in JOB], "--address", address, "--accept-change", "--limit", "10")
    assert done.returncode == 0, done.stderr
    (folder / "other.py").rename(folder / "third.py")
    told = command("replay", "out")
    assert told.returncode == 2 and "other.py', which is not here: name the pipeline's file with --file" in told.stderr, told.stderr


FIVE_RUNS = """
import sys

import headrace as hr
from headrace.cli.loading import load

pipeline = load("job.py")
for number in range(5):
    report = hr.run(pipeline, input="in", output=f"out-{number}")
    assert report.rows_out == 600
print("done", flush=True)
sys.stdin.readline()
"""


def marked(mark: str) -> set[int]:
    """Processes that have a mark in their environment: it is handed down, whoever their parent is by now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HEADRACE_TEST_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.faults  # for the time it takes
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found by /proc")
def test_no_process_stays_behind(folder: Path) -> None:
    """Five runs in one process, each with a Ray of its own, leave that process alone in the end."""
    mark = f"{os.getpid()}-{time.time()}"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HEADRACE_TEST_MARK": mark}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", FIVE_RUNS], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n", process.communicate()
        end = time.monotonic() + 20
        while (left := marked(mark) - {process.pid}) and time.monotonic() < end:
            time.sleep(0.1)
        assert process.pid in marked(mark) and not left, [Path(f"/proc/{one}/cmdline").read_text() for one in left]
        process.communicate("\n")
