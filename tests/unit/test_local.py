"""local: what a pipeline means, in this process."""

import datetime as dt

import numpy as np
import pytest

import headrace as hr
from headrace.errors import StageError, WiringError
from headrace.local import local


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    return {"text": [" ".join(t.split()) for t in text]}


@hr.stage(out={"vector": hr.Vector(2)}, batch=hr.tokens(4, of="text", bytes_per_token=1))
class Embed:
    scale: float = 1.0

    def setup(self, device):
        self.device = device

    def __call__(self, text: hr.Column[str]):
        return {"vector": np.array([[self.scale * len(t), len(self.device)] for t in text])}


REVIEWS = hr.Pipeline("reviews", clean, Embed())
ROWS = [{"id": 1, "text": " a  b"}, {"id": 2, "text": ""}, {"id": 3, "text": "a long one"}]


def plain(rows):
    """Rows with vectors as lists, to compare with."""
    return [{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("rows", "keep", "expected"),
    [
        ([], [], []),
        (ROWS[:1], [], [{"text": "a b", "vector": [3.0, 3.0]}]),
        (ROWS[:1], ["id"], [{"id": 1, "text": "a b", "vector": [3.0, 3.0]}]),
        (ROWS[:1], ["text"], [{"text": "a b", "vector": [3.0, 3.0]}]),
        (ROWS[:0:-1], ["id"], [{"id": 3, "text": "a long one", "vector": [10.0, 3.0]}, {"id": 2, "text": "", "vector": [0.0, 3.0]}]),
    ],
)
def test_outputs_for_each_row_in_order(rows, keep, expected):
    """One result per row, in order, kept columns first, whatever else the rows hold."""
    found = plain(REVIEWS.local(rows, keep=keep))
    assert found == expected
    assert [list(row) for row in found] == [list(row) for row in expected]


def test_the_device_is_passed_on():
    """Set-up is called with the device asked for."""
    assert local(REVIEWS, ROWS[:1], device="cuda")[0]["vector"].tolist() == [3.0, 4.0]


def test_running_twice_sets_up_twice():
    """A pipeline object holds no state between runs."""
    assert plain(REVIEWS.local(ROWS)) == plain(REVIEWS.local(ROWS))
    assert not hasattr(REVIEWS.stage("embed").call, "device")


@pytest.mark.parametrize(
    ("rows", "keep", "error", "parts"),
    [
        ([{"txt": "a"}], [], WiringError, ["'reviews'", "row 0 has no column 'text'", "it has 'txt'", "did you mean 'txt'?"]),
        ([{"text": 3}], [], WiringError, ["'reviews'", "column 'text' (str)", "int", "expected str"]),
        ([{"text": None}], [], WiringError, ["'reviews'", "column 'text' (str)", "str | None"]),
        (["text"], [], WiringError, ["'reviews'", "a row must map column names", "got 'text'"]),
        ({"text": "a"}, [], WiringError, ["'reviews'", "a row must map column names", "got 'text'"]),
        (ROWS, ["idd"], WiringError, ["no column 'idd'", "did you mean 'id'?"]),
        (ROWS, "id", WiringError, ["keep is a list", "keep=['id']"]),
    ],
)
def test_wrong_rows_are_refused(rows, keep, error, parts):
    """Rows that the pipeline cannot read are refused by pipeline, row and column."""
    with pytest.raises(error) as caught:
        REVIEWS.local(rows, keep=keep)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_kept_column_that_a_stage_overwrites_is_refused():
    """What every target refuses is refused here too."""
    with pytest.raises(WiringError, match="cannot keep 'text' as it was: stage 'clean' writes"):
        hr.Pipeline("vectors", clean, Embed(), outputs=["vector"]).local(ROWS, keep=["text"])


def test_a_stage_that_raises_is_named():
    """The stage's own error comes with its name."""

    @hr.stage(out={"n": int})
    def parse(text: hr.Column[str]):
        return {"n": [int(t) for t in text]}

    with pytest.raises(StageError, match=r"stage 'parse' raised: ValueError: invalid literal"):
        hr.Pipeline("numbers", parse).local(ROWS)


def test_every_column_type_reaches_a_stage_and_comes_back():
    """Values of all types pass through a pipeline unchanged, with instants in UTC."""
    types = {"a": str, "b": bool, "c": int, "d": float, "e": bytes, "f": dt.datetime, "g": dt.date, "h": hr.Vector(), "i": list[str | None], "j": int | None}

    def copy(a, b, c, d, e, f, g, h, i, j):
        return dict(zip("abcdefghij", (a, b, c, d, e, f, g, h, i, j), strict=True))

    copy.__annotations__ = {name: hr.Column[annotation] for name, annotation in types.items()}
    noon = dt.datetime(2024, 5, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=9)))
    row = {"a": "é", "b": True, "c": 2**60, "d": 0.5, "e": b"\0", "f": noon, "g": noon.date(), "h": [1.0, 2.0], "i": ["x", None], "j": None}
    assert plain(hr.Pipeline("copies", hr.stage(out=types)(copy)).local([row])) == [row]
