"""Trainings with libraries that take their rows as a whole, or bit by bit: LightGBM, XGBoost and scikit-learn."""

import dataclasses
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 20
    break_at: int = 0


class BrokenError(Exception):
    pass


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 2_000))
    return pa.table({"a": a, "b": b, "y": np.sign(a) + 0.5 * b})


def boost(shard, settings, run):
    """Trees that go on from those that were saved. On several workers, each has its part of the rows, and all the same trees."""
    import lightgbm

    data = shard.table()
    options = {"objective": "regression", "verbosity": -1, "num_threads": 1, "seed": 0, "min_data_in_bin": 1}
    if run.workers > 1:
        from ray.train.lightgbm import get_network_params

        options |= get_network_params() | {"tree_learner": "data", "pre_partition": True}
    before = lightgbm.Booster(model_file=str(run.resume() / "trees.txt")) if run.resume() else None
    done = before.num_trees() if before else 0
    rows = lightgbm.Dataset(np.stack([data["a"], data["b"]], axis=1), data["y"].to_numpy())

    def after(env):
        run.report(l2=env.evaluation_result_list[0][2])
        run.checkpoint(lambda folder: env.model.save_model(folder / "trees.txt"))
        if settings.break_at and env.iteration + 1 == settings.break_at and not done:
            raise BrokenError

    lightgbm.train(options, rows, settings.rounds - done, init_model=before, valid_sets=[rows], callbacks=[after])


def grow(shard, settings, run):
    """The same with XGBoost, whose workers find each other by themselves."""
    import xgboost

    data = shard.table()
    rows = xgboost.DMatrix(np.stack([data["a"], data["b"]], axis=1), data["y"].to_numpy())

    class After(xgboost.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            run.report(rmse=evals_log["rows"]["rmse"][-1])
            run.checkpoint(lambda folder: model.save_model(folder / "trees.json"))
            return False

    before = run.resume() / "trees.json" if run.resume() else None
    done = xgboost.Booster(model_file=before).num_boosted_rounds() if before else 0
    options = {"objective": "reg:squarederror", "nthread": 1, "seed": 0}
    xgboost.train(options, rows, settings.rounds - done, evals=[(rows, "rows")], verbose_eval=False, xgb_model=before, callbacks=[After()])


def learn(shard, settings, run):
    from sklearn.linear_model import SGDRegressor

    model = SGDRegressor(random_state=0)
    for batch in shard.batches(100):
        x = np.stack([batch["a"], batch["b"]], axis=1)
        model.partial_fit(x, batch["y"])
        run.report(r2=model.score(x, batch["y"]))
        run.checkpoint(partial(save, model))


def save(model, folder):
    np.savez(folder / "line.npz", coefficients=model.coef_, intercept=model.intercept_)


def predict(checkpoint, table):
    import lightgbm

    return lightgbm.Booster(model_file=f"{checkpoint}/trees.txt").predict(np.stack([table["a"], table["b"]], axis=1))


TREES = hr.Training("trees", boost, settings=Settings(), framework="lightgbm", checkpoint_every=5, shuffle=False)


def test_boosted_trees_go_on_from_those_that_were_saved(table, tmp_path):
    pytest.importorskip("lightgbm")
    undisturbed = TREES.local(table)
    with pytest.raises(BrokenError):
        TREES.local(table, settings={"break_at": 12}, folder=tmp_path)
    resumed = TREES.local(table, settings={"break_at": 12}, folder=tmp_path)
    assert undisturbed.metrics["l2"] < 0.05 and resumed.record.step == 20
    np.testing.assert_allclose(predict(resumed.checkpoint, table), predict(undisturbed.checkpoint, table), atol=1e-6)


def test_boosted_trees_on_two_workers_are_those_of_one(shared_ray, table, tmp_path):
    """As far as their histograms, which two workers make of two halves, are the same."""
    pytest.importorskip("lightgbm")
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=500)
    result = hr.train(TREES, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), workers=2)
    alone = TREES.local(table)
    assert result.record.workers == 2 and result.record.step == 20
    found = predict(result.checkpoint, table)
    assert np.mean((found - table["y"].to_numpy()) ** 2) < 2 * alone.metrics["l2"]


def test_xgboost_on_two_workers_is_that_of_one(shared_ray, table, tmp_path):
    """As far as their histograms, which two workers make of two halves, are the same."""
    xgboost = pytest.importorskip("xgboost")
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=500)
    training = dataclasses.replace(TREES, name="grown", loop=grow, framework="xgboost")
    result = hr.train(training, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), workers=2)
    alone = training.local(table)
    assert result.record.workers == 2 and result.record.step == 20
    trees = xgboost.Booster(model_file=f"{result.checkpoint}/trees.json")
    found = trees.predict(xgboost.DMatrix(np.stack([table["a"], table["b"]], axis=1)))
    assert np.mean((found - table["y"].to_numpy()) ** 2) < 2 * alone.metrics["rmse"] ** 2


def test_scikit_learn_learns_batch_by_batch(table):
    pytest.importorskip("sklearn")
    result = hr.Training("line", learn, epochs=5).local(table)
    assert result.metrics["r2"] > 0.6
    assert np.load(f"{result.checkpoint}/line.npz")["coefficients"] == pytest.approx([0.8, 0.5], abs=0.1)
