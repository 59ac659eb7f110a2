"""Sweeps: what --sweep says, the trials that are drawn, and which is the best."""

import dataclasses
from typing import Literal

import numpy as np
import pytest

import headrace as hr
from headrace.errors import SettingError
from headrace.loops.space import Choice, Range, Trial, best, draw, parse_space


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    layers: int = 2
    kind: Literal["mean", "max"] = "mean"
    deep: bool = False
    name: str = ""


TRAINING = hr.Training("line", lambda shard, settings, run: None, settings=Settings())


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("lr=1e-4..1e-2:log", Range(1e-4, 1e-2, log=True)),
        ("lr=0.1..0.5", Range(0.1, 0.5)),
        ("lr=-1..1", Range(-1.0, 1.0)),
        ("layers=1..8", Range(1, 8, whole=True)),
        ("layers=1..64:log", Range(1, 64, log=True, whole=True)),
        ("kind=mean|max", Choice(("mean", "max"))),
        ("deep=true|false", Choice((True, False))),
        ("lr=0.1|0.2|0.3", Choice((0.1, 0.2, 0.3))),
    ],
)
def test_a_range_or_a_choice_is_held_to_the_annotation(text, domain):
    assert parse_space(TRAINING, [text]) == {text.partition("=")[0]: domain}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "must have a form such as lr=1e-4..1e-2:log"),
        ("layer=1..2", "training 'line' has no setting 'layer'; it has 'lr', .*; did you mean 'layers'?"),
        ("lr=0.1", "names one value; a sweep needs several"),
        ("lr=a..b", "Input should be a valid number"),
        ("lr=2..1", "a range goes from the smaller number to the larger"),
        ("lr=0..1:log", "with :log both are above 0"),
        ("layers=1.5..2", "Input should be a valid integer"),
        ("kind=mean|min", "Input should be 'mean' or 'max'"),
        ("name=a..b", "a range is of numbers, and the setting takes others; name them: name=a|b"),
    ],
)
def test_a_mistake_is_told(text, message):
    with pytest.raises(SettingError, match=message):
        parse_space(TRAINING, [text])


def test_the_same_seed_draws_the_same_trials_within_their_bounds():
    space = parse_space(TRAINING, ["lr=1e-4..1e-2:log", "layers=1..4", "kind=mean|max"])
    one, same, other = draw(space, trials=200, seed=1), draw(space, trials=200, seed=1), draw(space, trials=200, seed=2)
    assert one == same != other and len(one) == 200
    assert draw(space, trials=5, seed=1) == one[:5]  # more trials go on where fewer stopped
    assert all(1e-4 <= trial["lr"] <= 1e-2 and trial["layers"] in (1, 2, 3, 4) for trial in one)
    assert {trial["kind"] for trial in one} == {"mean", "max"} and {trial["layers"] for trial in one} == {1, 2, 3, 4}
    assert np.median([trial["lr"] for trial in one]) == pytest.approx(1e-3, rel=0.5)


def test_a_small_space_is_tried_once():
    trials = draw(parse_space(TRAINING, ["kind=mean|max", "layers=1..2"]), trials=50, seed=0)
    assert len(trials) == 4


def test_the_best_is_a_finished_one_that_has_the_metric():
    trials = [
        Trial(0, {}, "stopped", {"loss": 0.0}),
        Trial(1, {}, "finished", {"loss": 0.5}),
        Trial(2, {}, "finished", {"loss": float("nan")}),
        Trial(3, {}, "finished", {"loss": 0.25}),
        Trial(4, {}, "finished", {"accuracy": 0.9}),
    ]
    assert best(trials, metric="loss", largest=False).number == 3
    assert best(trials, metric="loss", largest=True).number == 1
    assert best(trials, metric="other", largest=True) is None
