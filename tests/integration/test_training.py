"""Trainings on Ray: the same as in one process, and the same whoever dies on the way."""

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.errors import ChangedError, HardwareError, OutputError, SourceError, StageError, StoppedError
from headrace.events import CheckpointSaved, StepsDone, WorkersStarted
from headrace.on_ray import trainers

pytestmark = [pytest.mark.usefixtures("shared_ray"), pytest.mark.faults]  # a training starts nine processes: these take minutes

ROWS = 2_000


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.05
    nap_s: float = 0.0
    marks: str = ""
    fail_at: int = 0


@hr.stage(out={"x": hr.Vector(2, "float64")})
def pair(a: hr.Column[float], b: hr.Column[float]):
    return {"x": np.stack([a, b], axis=1)}


@hr.stage(out={"x": hr.Vector(2, "float64")})
def choosy(a: hr.Column[float], b: hr.Column[float]):
    if (a > 3).any():
        raise ValueError("too large")
    return {"x": np.stack([a, b], axis=1)}


def descend(shard, settings, run):
    """Linear regression. Leaves its process's number where a test finds it."""
    if settings.marks:
        with open(f"{settings.marks}/{run.rank}", "w") as file:
            file.write(str(os.getpid()))
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
        if shard.step == settings.fail_at:
            raise ArithmeticError("it diverged")
        run.checkpoint(save)


def seen(shard, settings, run):
    """Writes down which rows it was given."""
    path = f"{settings.marks}/{run.rank}-{os.getpid()}-{shard.step}"
    given = []
    for batch in shard.batches(40):
        given += batch["id"].tolist()
        time.sleep(settings.nap_s)
        run.checkpoint(lambda folder: (folder / "nothing").touch())
        with open(f"{path}.part", "w") as file:
            json.dump(given, file)
        os.replace(f"{path}.part", path)  # it may be killed at any moment


def line(**options):
    return hr.Training("line", descend, **{"data": hr.Pipeline("prepare", pair), "keep": ["y"], "settings": Settings(), "checkpoint_every": 10} | options)


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, ROWS))
    return pa.table({"id": np.arange(ROWS), "a": a, "b": b, "y": 2 * a - 3 * b})


@pytest.fixture
def source(table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=500)
    return str(tmp_path / "in.parquet")


def weights(output):
    return np.load(f"{output}/checkpoint/weights.npy")


def test_one_worker_on_ray_is_the_loop_in_this_process(table, source, tmp_path):
    """The same losses to the last bit, and a finished one is left alone."""
    training = line(shuffle=False, epochs=2)
    result = hr.train(training, input=source, output=str(tmp_path / "out"))
    here = training.local(table)
    assert result.curve("loss") == here.curve("loss") and len(result.curve("loss")) == 80
    assert (weights(tmp_path / "out") == np.load(f"{here.checkpoint}/weights.npy")).all()
    assert (result.record.state, result.record.rows_in, result.record.step) == ("succeeded", 2 * ROWS, 80)
    assert (tmp_path / "out/_SUCCESS").exists() and (tmp_path / "out/_headrace/report.html").exists()
    report = json.loads((tmp_path / "out/_headrace/report.json").read_text())
    assert report["metrics"] == dict(result.metrics) and report["settings"]["lr"] == "0.05"

    again = hr.train(training, input=source, output=str(tmp_path / "out"))
    assert (again.metrics, again.record.rows_in) == (result.metrics, 0)
    with pytest.raises(ChangedError, match=r"setting lr: was 0.05, is 0.1(.|\n)*--accept-change goes on from the last checkpoint"):
        hr.train(training, input=source, output=str(tmp_path / "out"), settings={"lr": 0.1})


def test_with_more_epochs_it_goes_on_and_begun_again_it_is_as_it_was(source, tmp_path):
    training = line(shuffle=False)
    first = hr.train(training, input=source, output=str(tmp_path / "out"))
    more = hr.train(dataclasses.replace(training, epochs=2), input=source, output=str(tmp_path / "out"), mode="accept-change")
    assert (more.record.rows_in, more.record.step) == (ROWS, 80)
    anew = hr.train(training, input=source, output=str(tmp_path / "out"), mode="restart")
    assert anew.curve("loss") == first.curve("loss") and anew.record.rows_in == ROWS


def test_two_workers_are_given_every_row_once_in_every_epoch(source, tmp_path):
    """Also where one of them is killed on the way, twice, and begins again with the other from the last checkpoint."""
    marks = tmp_path / "marks"
    marks.mkdir()
    training = hr.Training("seen", seen, settings=Settings(marks=str(marks), nap_s=0.05), workers=2, epochs=2, checkpoint_every=5, retries=2)
    events, killed = [], []

    def kill(new):
        events.extend(new)
        starts = [event for event in events if isinstance(event, WorkersStarted)]
        saved = [event for event in events if isinstance(event, CheckpointSaved)]
        if len(starts) == len(killed) + 1 <= 2 and saved and saved[-1].step >= starts[-1].step + 15:
            killed.append(next(name for name in os.listdir(marks) if name.startswith("1-") and name.endswith(f"-{starts[-1].step}")))
            os.kill(int(killed[-1].split("-")[1]), signal.SIGKILL)

    result = hr.train(training, input=source, output=str(tmp_path / "out"), watch=kill)
    starts = [event.step for event in events if isinstance(event, WorkersStarted)]
    assert len(killed) == 2 and len(starts) == 3 and 0 < starts[1] < starts[2]
    assert result.record.restarts == 2 and result.record.step == 2 * ROWS // 2 // 40
    given = []
    for name in (name for name in os.listdir(marks) if not name.endswith(".part")):
        began = starts.index(int(name.split("-")[2]))
        # Of those that were killed, what was given after the checkpoint that the next ones began with does not count.
        steps = starts[began + 1] - starts[began] if began < 2 else None
        given += json.loads((marks / name).read_text())[: steps and steps * 40]
    assert sorted(given) == sorted(list(range(ROWS)) * 2)


def test_a_worker_that_is_killed_costs_nothing_but_time(table, source, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    training = line(epochs=3, settings=Settings(marks=str(marks), nap_s=0.02))
    killed = []

    def kill(events):
        if not killed and any(isinstance(event, CheckpointSaved) and event.step >= 30 for event in events):
            killed.append(int((marks / "0").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    result = hr.train(training, input=source, output=str(tmp_path / "out"), watch=kill)
    assert killed and result.record.restarts == 1 and result.record.step == 120
    undisturbed = line(epochs=3).local(table)
    assert weights(tmp_path / "out") == pytest.approx(np.load(f"{undisturbed.checkpoint}/weights.npy"), abs=0.02)


def test_what_the_loop_raises_is_told_at_once_and_the_rest_goes_on_later(source, tmp_path):
    """No retries: it would raise again. With the cause mended, it goes on from its checkpoint."""
    training = line(settings=Settings(fail_at=25), retries=5)
    events = []
    with pytest.raises(StageError, match="the loop of training 'line' raised: ArithmeticError: it diverged") as told:
        hr.train(training, input=source, output=str(tmp_path / "out"), watch=events.extend)
    assert 'raise ArithmeticError("it diverged")' in told.value.frames
    assert len([event for event in events if isinstance(event, WorkersStarted)]) == 1
    assert json.loads((tmp_path / "out/_headrace/report.json").read_text())["state"] == "failed"
    result = hr.train(training, input=source, output=str(tmp_path / "out"), settings={"fail_at": 0}, mode="accept-change")
    assert (result.record.rows_in, result.record.step) == (ROWS - 20 * 50, 40)


def test_told_to_stop_it_is_saved_and_goes_on(source, tmp_path):
    training = line(epochs=4, settings=Settings(nap_s=0.05), checkpoint_every="1h")
    asked = []

    def stop(events):
        if not asked and any(isinstance(event, StepsDone) for event in events):
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match=r"stopped at step \d+, which is saved in .*; the same command goes on from there") as told:
        hr.train(training, input=source, output=str(tmp_path / "out"), watch=stop)
    step = int(str(told.value).split("step ")[1].split(",")[0])
    result = hr.train(training, input=source, output=str(tmp_path / "out"))
    assert 0 < step < 160 and result.record.rows_in == 4 * ROWS - step * 50 and result.record.step == 160


def test_rows_on_which_a_stage_fails_are_left_out_and_counted(table, tmp_path):
    values = table["a"].to_numpy().copy()
    values[7] = 4.0
    pq.write_table(table.set_column(1, "a", pa.array(values)), tmp_path / "in.parquet")
    training = line(data=hr.Pipeline("prepare", choosy))
    result = hr.train(training, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"))
    large = int((values > 3).sum())
    assert result.record.failures == {"ValueError in choosy": large} and result.record.rows_in == ROWS - large


def test_mistakes_are_told_before_anything_runs(source, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(SourceError, match="pipeline 'line' reads column 'yy', which the input lacks"):
        hr.train(line(keep=["yy"]), input=source, output=out)
    with pytest.raises(HardwareError, match="training 'line' asks for 64 workers on cpu"):
        hr.train(line(), input=source, output=out, workers=64)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(OutputError, match="holds no training of headrace: it has 'notes.txt'"):
        hr.train(line(), input=source, output=str(tmp_path / "mine"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_ray_left_half_written_is_mended(source, tmp_path):
    """A crash while Ray Train writes its list of checkpoints: ours says which is the last that is complete."""
    training = line(settings=Settings(fail_at=25))
    out = tmp_path / "out"
    with pytest.raises(StageError):
        hr.train(training, input=source, output=str(out))
    listed = out / "_headrace" / trainers.EXPERIMENT / "checkpoint_manager_snapshot.json"
    listed.write_text(listed.read_text()[:40])
    result = hr.train(training, input=source, output=str(out), settings={"fail_at": 0}, mode="accept-change")
    assert (result.record.rows_in, result.record.step) == (ROWS - 20 * 50, 40)


def torch_loop(shard, settings, run):
    """The same regression by torch, its gradients averaged over the workers."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    both = DistributedDataParallel(model) if run.workers > 1 else model
    optimizer = torch.optim.SGD(both.parameters(), lr=settings.lr)
    for batch in shard.batches(50 // run.workers):
        loss = ((both(torch.from_numpy(batch["x"]))[:, 0] - torch.from_numpy(batch["y"])) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss.item())
        run.checkpoint(lambda folder: np.save(folder / "weights.npy", model.weight.detach().numpy()[0]))


def test_torch_on_two_workers_ends_where_one_does(table, source, tmp_path):
    pytest.importorskip("torch")
    training = hr.Training(
        "torch_line", torch_loop, data=hr.Pipeline("prepare", pair), keep=["y"], settings=Settings(lr=0.1), epochs=2, framework="torch", checkpoint_every=20
    )
    result = hr.train(training, input=source, output=str(tmp_path / "out"), workers=2)
    alone = training.local(table)
    assert result.record.step == alone.record.step == 80 and result.record.workers == 2
    assert weights(tmp_path / "out") == pytest.approx([2, -3], abs=1e-3)
    assert weights(tmp_path / "out") == pytest.approx(np.load(f"{alone.checkpoint}/weights.npy"), abs=1e-3)


def test_a_sweep_finds_the_best_settings_and_goes_on_where_it_was(source, tmp_path):
    """Trials side by side, each a training of its own; one whose loop raises costs no other."""
    training = line(settings=Settings(), epochs=1)
    out = str(tmp_path / "out")
    space = ["lr=0.001|0.2|1e9"]  # too slow, right, and far off: its numbers overflow
    first = hr.sweep(training, input=source, output=out, space=space, trials=2)
    second = hr.sweep(training, input=source, output=out, space=space, trials=3)
    assert [trial.settings for trial in second.trials][:2] == [trial.settings for trial in first.trials]
    assert {trial.settings["lr"] for trial in second.trials} == {0.001, 0.2, 1e9}
    assert second.best is not None and second.best.settings == {"lr": 0.2} and second.best.metrics["loss"] < 0.01
    assert np.load(f"{second.best.output}/checkpoint/weights.npy") == pytest.approx([2, -3], abs=0.1)
    kept = json.loads((tmp_path / "out/_sweep/trials.json").read_text())
    assert [trial["state"] for trial in kept] == [trial.state for trial in second.trials]
    with pytest.raises(OutputError, match="holds a sweep over other settings; give the same --sweep, or choose an empty folder"):
        hr.sweep(training, input=source, output=out, space=["lr=0.001|0.3"], trials=2)


def test_rows_that_only_reading_tells_are_counted_first(table, tmp_path):
    """Of text files, and behind a filter: how many there are decides how far an epoch goes."""
    from pyarrow import csv

    from headrace.on_ray.train import Fit

    csv.write_csv(table, tmp_path / "in.csv")
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=500)
    positive = int((table["a"].to_numpy() > 0).sum())
    for name in ("in.csv", "in.parquet"):
        for options, rows in [({}, ROWS), ({"where": "a > 0"}, positive), ({"limit": 700}, 700), ({"where": "a > 0", "limit": 700}, 700)]:
            fit = Fit.of(line(), input=hr.Input(str(tmp_path / name), **options), output=str(tmp_path / "out"))
            assert fit.source.rows == rows, (name, options)


def test_epochs_of_one_row_group_are_read_one_after_the_other():
    """Units of a row group are read in one scan, but the same unit again is another scan."""
    import pickle

    from headrace.loops.position import left
    from headrace.on_ray.operators import pack
    from headrace.units import Unit

    units = [Unit(0, ("a.parquet",), 0, 0, 10, 1, 1), Unit(1, ("a.parquet",), 0, 10, 10, 1, 1)]
    tasks = pack(left(units, epochs=3, shuffle=False, seed=0, taken={}), 1000)
    scans = [scan for task in tasks for packed in task["scans"].to_pylist() for scan in pickle.loads(packed)]
    assert [[unit.id for unit, _ in scan] for scan in scans] == [[0, 1], [2, 3], [4, 5]]
