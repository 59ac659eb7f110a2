"""Trainings: what is written wrongly is told where it is written, and `local` says what a loop means."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.errors import DefinitionError, OutputError, SettingError, WiringError
from headrace.settings import override_training


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    stop_at: int = 0
    layers: list[int] = dataclasses.field(default_factory=lambda: [4, 2])


@hr.stage(out={"x": hr.Vector(2, "float64")})
def pair(a: hr.Column[float], b: hr.Column[float]):
    return {"x": np.stack([a, b], axis=1)}


@hr.stage(out={"x": hr.Vector(2, "float64")})
class Scaled:
    by: float = 1.0

    def __call__(self, a: hr.Column[float], b: hr.Column[float]):
        return {"x": np.stack([a, b], axis=1) * self.by}


class BrokenError(Exception):
    pass


def fit(shard, settings, run):
    """Linear regression by gradient descent."""
    weights = np.zeros(2)
    if folder := run.resume():
        weights = np.load(folder / "weights.npy")

    def save(folder):
        np.save(folder / "weights.npy", weights)

    for batch in shard.batches(16):
        error = batch["x"] @ weights - batch["y"]
        weights -= settings.lr * batch["x"].T @ error / len(error)
        run.report(loss=(error**2).mean())
        run.checkpoint(save)
        if shard.step == settings.stop_at and not folder:
            raise BrokenError


PREPARE = hr.Pipeline("prepare", pair)


def training(**options):
    return hr.Training(
        "line", options.pop("loop", fit), **{"data": PREPARE, "keep": ["y"], "settings": Settings(), "epochs": 2, "checkpoint_every": 4} | options
    )


def rows(count=200):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, count))
    return pa.table({"a": a, "b": b, "y": 2 * a - 3 * b, "name": [f"row {at}" for at in range(count)]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "my training"}, "an identifier such as 'prices', got 'my training'"),
        ({"loop": "fit"}, r"loop must be a function, def fit\(shard, settings, run\), got 'fit'"),
        ({"loop": lambda shard, run: None}, r"loop must take \(shard, settings, run\), got <lambda>\(shard, run\)"),
        ({"data": "in.parquet"}, "data must be an hr.Pipeline, got 'in.parquet'; what is read is said by input="),
        ({"settings": Settings}, "settings must be an instance of a dataclass"),
        ({"settings": {"lr": 1}}, "settings must be an instance of a dataclass"),
        ({"keep": "y"}, r"keep is a list of columns, such as keep=\['y'\], or 'all'"),
        ({"workers": 0}, r"workers must be a number of at least 1, or \(least, most\)"),
        ({"workers": (3, 2)}, r"with 1 <= least <= most, got \(3, 2\)"),
        ({"workers": True}, "workers must be"),
        ({"on": ["gpu"]}, r"on must list hr.gpu\(...\) and hr.cpu\(...\), got 'gpu'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"framework": "pytorch"}, "framework must be one of 'torch', 'lightgbm', 'xgboost', got 'pytorch'; did you mean 'torch'?"),
        ({"checkpoint_every": "often"}, "a number of steps of at least 1, or a time such as '60s', '5min' or '1h', got 'often'"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"checkpoint_every": "0s"}, "checkpoint_every must be"),
    ],
)
def test_a_mistake_is_told_where_the_training_is_written(options, message):
    with pytest.raises(DefinitionError, match=message):
        hr.Training(options.pop("name", "line"), options.pop("loop", fit), **options)


def test_workers_and_cadence_are_kept_in_normal_form():
    one = training(workers=(2, 2), on=hr.gpu(1), checkpoint_every="5min")
    assert (one.workers, one.least_workers, one.most_workers, one.on, one.every) == (2, 2, 2, (hr.gpu(1),), (None, 300.0))
    assert (training(workers=(1, 3)).least_workers, training(workers=(1, 3)).most_workers, training().every) == (1, 3, (4, None))


def test_settings_are_overridden_and_checked():
    changed = override_training(training(data=hr.Pipeline("p", Scaled())), ["lr=3e-4", "layers=[8]", "scaled.by=2"])
    assert (changed.settings, changed.data.stage("scaled").settings) == (Settings(lr=3e-4, layers=[8]), {"by": 2.0})
    for assignment, message in [
        ("lr=fast", "--set lr='fast': Input should be a valid number.*declared as float"),
        ("lrr=1", "training 'line' has no setting 'lrr'; it has 'lr', 'stop_at', 'layers'; did you mean 'lr'?"),
        ("lr", "must have the form setting=value, such as lr=3e-4"),
        ("pairs.by=1", "pipeline 'prepare' has no stage 'pairs'; it has 'pair'"),
    ]:
        with pytest.raises(SettingError, match=message):
            override_training(training(), [assignment])
    with pytest.raises(SettingError, match="training 'line' has no pipeline; of its own it has 'lr'"):
        override_training(training(data=None), ["pair.by=1"])
    with pytest.raises(SettingError, match="has no setting 'lr'; it has none"):
        training(settings=None).with_settings(lr=1)


def test_a_loop_runs_here_and_learns():
    result = training(epochs=8).local(rows())
    assert result.metrics["loss"] < 1e-3
    assert np.load(f"{result.checkpoint}/weights.npy") == pytest.approx([2, -3], abs=0.05)
    assert (result.record.state, result.record.rows_in, result.record.step) == ("succeeded", 1600, 100)
    assert [step for step, _ in result.curve("loss")] == list(range(1, 101))
    assert result.curve("loss")[-1][1] == result.metrics["loss"]


def test_lists_of_rows_do_as_well_as_tables():
    table = rows(40)
    one, other = training().local(table), training().local(table.to_pylist())
    assert one.curve("loss") == other.curve("loss")


def test_the_same_seed_gives_the_same_order_and_another_another():
    table = rows()
    curves = [training(**options).local(table).curve("loss") for options in ({}, {}, {"seed": 1}, {"shuffle": False})]
    assert curves[0] == curves[1]
    assert curves[1] != curves[2] != curves[3] != curves[1]


def test_a_loop_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path):
    """At step 10 it fails, after it was saved at step 8: steps 9 and 10 are made again, on the same rows."""
    undisturbed = training().local(rows())
    with pytest.raises(BrokenError):
        training(settings=Settings(stop_at=10)).local(rows(), folder=tmp_path)
    resumed = training(settings=Settings(stop_at=10)).local(rows(), folder=tmp_path)
    assert resumed.record.rows_in == 400 - 8 * 16
    assert resumed.curve("loss") == undisturbed.curve("loss")[8:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_cut_off_twice_it_still_ends_as_if_it_had_not_been(tmp_path):
    """What was given before the first time is not given again after the second."""
    ends = iter([8, 20, 0])

    def broken(shard, settings, run):
        fit(shard, dataclasses.replace(settings, stop_at=0), Breaking(run, shard, next(ends)))

    class Breaking:
        """A run that breaks at a step."""

        def __init__(self, run, shard, end):
            self.run, self.shard, self.end = run, shard, end
            self.report, self.resume = run.report, run.resume

        def checkpoint(self, save):
            self.run.checkpoint(save)
            if self.shard.step == self.end:
                raise BrokenError

    undisturbed = training().local(rows())
    for _ in range(2):
        with pytest.raises(BrokenError):
            training(loop=broken).local(rows(), folder=tmp_path)
    resumed = training(loop=broken).local(rows(), folder=tmp_path)
    assert resumed.record.rows_in == 400 - 20 * 16 and resumed.curve("loss") == undisturbed.curve("loss")[20:]


def test_a_loop_that_had_ended_is_left_alone(tmp_path):
    first = training().local(rows(), folder=tmp_path)
    again = training().local(rows(), folder=tmp_path)
    assert (again.metrics, again.record.rows_in, again.record.state) == (first.metrics, 0, "succeeded")


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path):
    training().local(rows(), folder=tmp_path)
    (tmp_path / "checkpoint/_position-00000.json").write_text("{}}")
    with pytest.raises(OutputError, match="is damaged: .*begin again in an empty folder, or with --restart"):
        training().local(rows(), folder=tmp_path)
    (tmp_path / "checkpoint/_position-00000.json").unlink()
    with pytest.raises(OutputError, match="made by 1 workers, and has the positions of 0"):
        training().local(rows(), folder=tmp_path)


def test_a_column_that_is_missing_or_does_not_fit_is_told():
    with pytest.raises(WiringError, match="training 'line' reads column 'y', which the rows lack; they have 'a', 'b'"):
        training().local(rows().select(["a", "b"]))
    with pytest.raises(WiringError, match=r"training 'line': column 'a' \(float\): 1 nulls"):
        training().local([{"a": None, "b": 1.0, "y": 1.0}, {"a": 1.0, "b": 1.0, "y": 1.0}])
    with pytest.raises(WiringError, match="there are no rows"):
        training().local([])


def test_without_a_pipeline_the_loop_gets_every_column_or_those_that_are_kept():
    seen = []

    def look(shard, settings, run):
        seen.append(next(shard.batches(2)))

    for options in ({}, {"keep": ["y"]}, {"keep": "all"}):
        hr.Training("look", look, **options).local([{"y": 1, "text": "a"}, {"y": 2, "text": "b"}])
    assert [set(batch) for batch in seen] == [{"y", "text"}, {"y"}, {"y", "text"}]


def test_what_takes_its_rows_as_a_table_is_saved_at_its_end_and_gets_all_rows_again(tmp_path):
    """As boosted trees and scikit-learn do: the calls of `checkpoint` are its steps."""
    sizes = []

    def boost(shard, settings, run):
        data = shard.table()
        sizes.append((data.num_rows, data.column_names))
        for turn in range(5):
            run.report(loss=1 / (turn + 1))
            run.checkpoint(lambda folder, turn=turn: (folder / "turn").write_text(str(turn)))
            if turn == 3 and not run.resume():
                raise BrokenError

    trees = hr.Training("trees", boost, checkpoint_every=2, shuffle=False)
    with pytest.raises(BrokenError):
        trees.local(rows(30), folder=tmp_path)
    assert (tmp_path / "checkpoint/turn").read_text() == "3"
    result = trees.local(rows(30), folder=tmp_path)
    assert sizes == [(30, ["a", "b", "y", "name"])] * 2
    assert (tmp_path / "checkpoint/turn").read_text() == "4" and result.metrics == {"loss": 0.2}
    with pytest.raises(SettingError, match=r"gives the rows of one epoch, and the training has epochs=2"):
        dataclasses.replace(trees, epochs=2).local(rows(30))


def test_a_shard_is_read_once():
    def twice(shard, settings, run):
        for _ in range(2):
            for _ in shard.batches(10):
                pass

    with pytest.raises(SettingError, match=r"shard.batches\(\) was called a second time; the rows of all 1 epochs come from one call"):
        hr.Training("twice", twice).local(rows(20))
