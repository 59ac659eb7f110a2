"""`headrace train`: the command killed, stopped and given again; what it says of mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SOURCE

FILE = """
import dataclasses, time
import numpy as np
import headrace as hr

@hr.stage(out={"x": hr.Vector(2, "float64")})
def pair(a: hr.Column[float], b: hr.Column[float]):
    return {"x": np.stack([a, b], axis=1)}

@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.05
    nap_s: float = 0.0

def descend(shard, settings, run):
    weights = np.zeros(2)
    if folder := run.resume():
        weights = np.load(folder / "weights.npy")
    def save(folder):
        np.save(folder / "weights.npy", weights)
    for batch in shard.batches(50):
        error = batch["x"] @ weights - batch["y"]
        weights -= settings.lr * batch["x"].T @ error / len(error)
        run.report(loss=(error**2).mean())
        time.sleep(settings.nap_s)
        run.checkpoint(save)

line = hr.Training("line", descend, data=hr.Pipeline("prepare", pair), keep=["y"], settings=Settings(), epochs=4, checkpoint_every=10)
"""


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 2_000))
    pq.write_table(pa.table({"a": a, "b": b, "y": 2 * a - 3 * b}), tmp_path / "in.parquet", row_group_size=500)
    (tmp_path / "line.py").write_text(FILE)
    return tmp_path


def checkpoints(folder):
    home = folder / "out/_headrace"
    return (home / "checkpoint.json").read_text() if (home / "checkpoint.json").exists() else None


def test_killed_and_given_again_it_goes_on_from_its_checkpoint(command, folder):
    """By SIGKILL, which leaves no time for anything: the second command has only the rows that the first had not been given when it was saved."""
    arguments = [sys.executable, "-m", "headrace", "train", "line.py", "--input", "in.parquet", "--output", "out", "--set", "nap_s=0.05"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(SOURCE)}
    first = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    look = threading.Event()
    try:
        seen = None
        while first.poll() is None and not (seen and checkpoints(folder) != seen):  # until there are two checkpoints
            seen = seen or checkpoints(folder)
            look.wait(0.1)
        assert first.returncode is None, "it ended"
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    done = command("train", "line.py", "--input", "in.parquet", "--output", "out", "--set", "nap_s=0.05", "--json", "--price", "cpu=0.04", timeout_s=420)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["state"], said["step"]) == ("succeeded", 160) and said["rows_in"] % 500 == 0 and 0 < said["rows_in"] <= 8_000 - 20 * 50
    assert np.load(folder / "out/checkpoint/weights.npy") == pytest.approx([2, -3], abs=0.02)
    assert said["cost"]["usd"] > 0

    again = command("train", "line.py", "--input", "in.parquet", "--output", "out", "--set", "nap_s=0.05", "--register", "line")
    assert "nothing to do: the training ended before, at step 160" in again.stdout and "loss" in again.stdout
    assert "registered as models:/line/1, @candidate" in again.stdout, again.stderr
    shown = command("models", "show", "line")
    assert re.search(r"metric +loss ", shown.stdout) and re.search(r"setting +lr 0\.05", shown.stdout), shown
    assert sorted(path.name for path in folder.glob("mlruns/*/*/artifacts/models/*/*")) == ["headrace.json", "weights.npy"]
    listed = command("runs", "out")
    assert "line" in listed.stdout and "succeeded" in listed.stdout


def test_mistakes_are_told_in_words(command, folder):
    for arguments, code, message in [
        (["--set", "lrr=1"], 2, "training 'line' has no setting 'lrr'; it has 'lr', 'nap_s'; did you mean 'lr'?"),
        (["--workers", "none"], 2, "--workers must be a number of at least 1, or LEAST:MOST such as 2:8, got 'none'"),
        (["--restart", "--accept-change"], 2, "give one of them"),
    ]:
        done = command("train", "line.py", "--input", "in.parquet", "--output", "out", *arguments)
        assert done.returncode == code and message in done.stderr, done.stderr
    done = command("train", "in.py", "--input", "in.parquet", "--output", "out")
    assert done.returncode == 2 and "no file 'in.py'; did you mean 'line.py'?" in done.stderr
    (folder / "empty.py").write_text("")
    done = command("train", "empty.py", "--input", "in.parquet", "--output", "out")
    assert done.returncode == 2 and "empty.py has no trainings; define one, such as prices = hr.Training('prices', fit)" in done.stderr


def test_a_sweep_prints_its_trials_and_each_is_a_training(command, folder):
    """The best first; and what is no setting is told before anything runs."""
    done = command("train", "line.py", "--input", "in.parquet", "--output", "sweep", "--sweep", "lr=5", "--trials", "2")
    assert done.returncode == 2 and "names one value; a sweep needs several" in done.stderr
    options = ["--sweep", "lr=0.002|0.1", "--trials", "2", "--epochs", "1"]
    done = command("train", "line.py", "--input", "in.parquet", "--output", "sweep", *options, timeout_s=420)
    assert done.returncode == 0, done.stderr
    assert "(2 of 2)" in done.stderr  # the worse one may be stopped early
    assert done.stdout.index("lr=0.1") < done.stdout.index("lr=0.002") < done.stdout.index("the best is saved in sweep/trials/000")
    listed = command("runs", "sweep").stdout
    assert "sweep/trials/0000" in listed and "sweep/trials/0001" in listed and "succeeded" in listed
