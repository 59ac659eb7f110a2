"""check(): a contract test must catch the stages that break the contract, and pass those that keep it."""

import itertools

import numpy as np
import pytest

import headrace as hr
from headrace.errors import ContractError, StageError, WiringError
from headrace.testing import check, same

CALLS = itertools.count()
ROWS = [{"text": "a"}, {"text": "bbb"}, {"text": "cc"}]


def stage_of(function, out):
    def call(text: hr.Column[str]):
        return {"y": function(text)}

    return hr.stage(out={"y": out}, name="probe")(call)


@pytest.mark.parametrize(
    ("function", "out"),
    [
        (lambda text: [t.upper() for t in text], str),
        (lambda text: [len(t) for t in text], int),
        (lambda text: np.array([[len(t), 1.0] for t in text]), hr.Vector(2)),
        (lambda text: [np.arange(len(t), dtype="f4") for t in text], hr.Vector()),
        (lambda text: [None if t == "a" else [1.0, 2.0] for t in text], hr.Vector() | None),
        (lambda text: [float("nan") for _ in text], float),
        (lambda text: [[t, None] for t in text], list[str | None]),
    ],
)
def test_an_honest_stage_passes(function, out):
    """A stage whose result depends on its row alone passes, and its outputs are returned."""
    assert len(check(stage_of(function, out), ROWS)) == len(ROWS)


@pytest.mark.parametrize(
    ("function", "out", "change"),
    [
        (lambda text: [next(CALLS) for _ in text], int, "run a second time"),
        (lambda text: list(range(len(text))), int, "run in reverse order"),
        (lambda text: [len(text)] * len(text), int, "each row is run alone"),
        (lambda text: [None if len(text) == 1 else [1.0, 2.0] for _ in text], hr.Vector() | None, "each row is run alone"),
        (lambda text: np.full((len(text), 2), float(len(text))), hr.Vector(2), "each row is run alone"),
        (lambda text: [[t] * len(text) for t in text], list[str], "each row is run alone"),
    ],
)
def test_a_stage_whose_rows_influence_each_other_is_caught(function, out, change):
    """The error names stage, column, row, the change that shows it, both values, and what to do."""
    with pytest.raises(ContractError) as caught:
        check(stage_of(function, out), ROWS)
    parts = ["'probe'", "'y'", "row 0", change, "became", "that row alone", "tolerance"]
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.stage == "probe"


@pytest.mark.parametrize(
    ("rows", "error", "parts"),
    [
        (ROWS[:1], ContractError, ["at least two rows", "got 1"]),
        ([{"txt": "a"}, {"txt": "b"}], WiringError, ["'text'", "did you mean 'txt'"]),
        ([{"text": "a"}, {"text": "boom"}], StageError, ["'fails'", "ValueError", "boom"]),
    ],
)
def test_mistakes_are_named(rows, error, parts):
    """Too few rows, wrong rows and a stage that raises are told apart."""

    @hr.stage(out={"y": int})
    def fails(text: hr.Column[str]):
        if "boom" in text:
            raise ValueError("boom")
        return {"y": [1] * len(text)}

    with pytest.raises(error) as caught:
        check(fails, rows)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_pipeline_can_be_checked():
    """A whole pipeline is held to the same contract, under its own name."""
    pipeline = hr.Pipeline("shouting", stage_of(lambda text: [t.upper() for t in text], str))
    assert check(pipeline, ROWS)[1] == {"y": "BBB"}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1.0, 1.0 + 1e-6, True),
        (1.0, 1.1, False),
        (float("nan"), float("nan"), True),
        (None, None, True),
        (None, np.ones(2), False),
        (1.0, None, False),
        (np.ones(2), np.ones(3), False),
        (np.ones(2), np.ones(2) + 1e-6, True),
        ([1.0, [2.0]], [1.0, [2.0 + 1e-6]], True),
        ([1.0], [1.0, 2.0], False),
        ("a", "a", True),
        (1, 2, False),
    ],
)
def test_same(one, other, equal):
    """Numbers are compared within the tolerance, everything else exactly, and a null equals only a null."""
    assert same(one, other, tolerance=1e-4) is equal
