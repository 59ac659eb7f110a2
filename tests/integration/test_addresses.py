"""Several services behind one address on a real Ray: each is updated and stopped by itself, while the others answer and whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_service import Served, until

from conftest import SOURCE, TESTS  # isort: skip

FILE = """
import headrace as hr
from addresses import Named

{name} = hr.Pipeline({name!r}, Named(model={model!r}, words={words}))
"""


ROWS = """
import headrace as hr


@hr.stage(out={"length": int})
def length(text: hr.Column[str]):
    return {"length": [len(each) for each in text]}


rows = hr.Pipeline("rows", length)
"""


class Several(Served):
    """A service `alpha`, and what is behind its doors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment["PYTHONPATH"] = f"{SOURCE}{os.pathsep}{TESTS}"

    def put(self, name: str, model: str, *, words: int = 3) -> str:
        """A file with a pipeline of one speaker."""
        (self.folder / f"{name}.py").write_text(FILE.format(name=name, model=model, words=words))
        return f"{name}.py"

    def say(self, model: str) -> tuple[int, int]:
        """The status of an answer, and its words; a lost connection is status 0."""
        body = {"model": model, "messages": [{"role": "user", "content": "one two"}]}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())["usage"]["completion_tokens"]
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, 0
        except (urllib.error.URLError, ConnectionError):
            return 0, 0

    @contextlib.contextmanager
    def talk(self, model: str) -> Iterator[Counter[tuple[int, int]]]:
        """Requests one after the other for the length of the block, counted by status and words."""
        seen: Counter[tuple[int, int]] = Counter()
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                seen[self.say(model)] += 1
                time.sleep(0.01)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def models(self) -> set[str]:
        return {model["id"] for model in self.get("/v1/models")["data"]}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    several = Several(tmp_path_factory.mktemp("several"))
    several.put("alpha", "acme/alpha")
    (several.folder / "measure.py").symlink_to("alpha.py")  # what `start` serves
    try:
        several.start("--log", "json")
        done = several.run("serve", several.put("beta", "acme/beta"), "--behind", "alpha")
        assert done.returncode == 0, done.stderr
        assert f"beta speaks OpenAI's interface at {several.url}/v1, as the model acme/beta" in done.stderr
        yield several
    finally:
        several.end()


def test_both_answer_at_one_address(several: Several):
    until(lambda: several.models() == {"acme/alpha", "alpha", "acme/beta", "beta"})
    assert [several.say(model) for model in ("acme/alpha", "beta", "gamma")] == [(200, 3), (200, 3), (404, 0)]
    until(lambda: '"beta"' in "".join(line for line in several.logs if '"model":"beta"' in line).partition('"service":')[2][:8])
    told = several.run("top", "beta", "--once", "--json")
    assert json.loads(told.stdout)["service"] == "beta", told
    assert several.run("top", "--once").stdout.splitlines()[0].startswith("alpha")


def test_a_name_that_is_taken_is_refused(several: Several):
    done = several.run("serve", several.put("gamma", "acme/beta"), "--behind", "alpha")
    assert done.returncode == 2 and "'gamma' would answer as 'acme/beta' at an address where service 'beta' does already" in done.stderr, done.stderr
    done = several.run("top", "gamma", "--once")
    assert done.returncode == 2 and "no service 'gamma' is running here" in done.stderr
    done = several.run("serve", several.put("delta", "acme/delta"), "--behind", "beta")
    assert done.returncode == 2 and "it is behind 'alpha'; say --behind alpha" in done.stderr, done.stderr
    done = several.run("serve", "alpha.py", "--behind", "alpha")
    assert done.returncode == 2 and "service 'alpha' runs already, with doors of its own" in done.stderr, done.stderr


def test_rows_behind_the_same_address_pass_their_gate(several: Several):
    (several.folder / "rows.py").write_text(ROWS)
    pq.write_table(pa.table({"text": ["a", "bcd"], "length": [1, 3]}), several.folder / "golden.parquet")
    done = several.run("serve", "rows.py", "--behind", "alpha", "--gate", "golden.parquet")
    assert done.returncode == 0, done.stderr
    assert "version 1 gate passed" in done.stderr and f"rows answers at {several.url}/rows" in done.stderr, done.stderr
    assert several.get("/rows/schema")["pipeline"] == "rows"
    done = several.run("stop", "rows")
    assert done.returncode == 0, done.stderr
    with pytest.raises(urllib.error.HTTPError, match="404"):
        several.get("/rows/schema")


def test_one_is_updated_while_the_other_answers_and_a_door_dies(several: Several):
    several.put("beta", "acme/beta-2", words=5)
    with several.talk("alpha") as alpha, several.talk("beta") as beta:
        until(lambda: alpha[200, 3] > 10 and beta[200, 3] > 10)
        done = several.run("serve", "beta.py")
        assert done.returncode == 0, done.stderr
        until(lambda: beta[200, 5] > 10)
        doors = several.processes("ray::FrontDoor")
        os.kill(doors[0], signal.SIGKILL)
        until(lambda: len([pid for pid in several.processes("ray::FrontDoor") if pid != doors[0]]) == len(doors))
        count = beta[200, 5]
        until(lambda: beta[200, 5] > count + 50)
        done = several.run("rollback", "beta")
        assert done.returncode == 0, done.stderr
        count = beta[200, 3]
        until(lambda: beta[200, 3] > count + 10)
    assert set(alpha) <= {(200, 3), (0, 0)} and set(beta) <= {(200, 3), (200, 5), (0, 0)}, (alpha, beta)
    assert alpha[0, 0] + beta[0, 0] <= 8  # the connections that the door had


def test_guests_are_there_again_when_control_is(several: Several):
    (alpha, beta) = several.processes("ray::Control")
    with several.talk("alpha") as host, several.talk("beta") as guest:
        for victim in (alpha, beta):
            os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(several.processes("ray::Control")) - {alpha, beta}) == 2)
        count = guest[200, 3]
        until(lambda: guest[200, 3] > count + 20)
    assert {status for status, _ in host + guest} == {200}, (host, guest)


def test_one_is_stopped_and_the_other_goes_on(several: Several):
    with several.talk("alpha") as alpha:
        done = several.run("stop", "beta")
        assert done.returncode == 0 and "beta has ended" in done.stderr, done.stderr
        assert several.say("beta") == (404, 0)
        assert several.models() == {"acme/alpha", "alpha"}
        count = alpha[200, 3]
        until(lambda: alpha[200, 3] > count + 10)
        assert len(several.processes("ray::Control")) == 1
    assert set(alpha) == {(200, 3)}
    assert several.run("top", "beta", "--once").returncode == 2
    done = several.run("serve", several.put("gamma", "acme/beta"), "--behind", "alpha")  # the name is free again
    assert done.returncode == 0, done.stderr
    done = several.run("stop", "alpha")
    assert done.returncode == 0, done.stderr
    assert not list((several.folder / "headrace").glob("*.json"))
