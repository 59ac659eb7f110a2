"""The parity gate: what is equal passes, what differs is named, and an injected skew is caught every time."""

import datetime as dt
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conformance import CASES
from doors import service as door
from pretend import Pretend, refusal, serving
from skews import SKEWS, centred, prices

import headrace as hr
from headrace.columns import type_of
from headrace.errors import DefinitionError, ParityError, SettingError, SourceError, StageError
from headrace.formats import Input
from headrace.local import prepare
from headrace.parity import Difference, Golden, Tolerance, compare, distance, gate, golden, over_http

NOON = dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)


@hr.stage(out={"size": int, "share": float})
def sizes(text: hr.Column[str]):
    return {"size": [len(t) for t in text], "share": [t.count("a") / max(1, len(t)) for t in text]}


SIZES = hr.Pipeline("sizes", sizes)
ROWS = [{"text": text} for text in ("a", "banana", "", "quiet room")]


# Values


@pytest.mark.parametrize(
    ("one", "other", "annotation", "apart"),
    [
        (1, 1, int, ""),
        (1, 2, int, "not equal"),
        (True, True, bool, ""),
        ("a", "a ", str, "not equal"),
        (b"a", b"a", bytes, ""),
        (NOON, NOON + dt.timedelta(microseconds=1), dt.datetime, "not equal"),
        (None, None, int | None, ""),
        (None, 0, int | None, "null or not"),
        (1.0, 1.00009, float, ""),
        (1.0, 1.0002, float, "by 0.0002"),
        (1e6, 1e6 + 5, float, ""),
        (57.13, 57.1, float, "by 0.03"),
        (float("nan"), float("nan"), float, ""),
        (float("nan"), 1.0, float, "not finite"),
        (float("inf"), float("inf"), float, ""),
        (float("inf"), float("-inf"), float, "by inf"),
        (np.ones(3, "f4"), np.ones(3, "f4") + 1e-5, hr.Vector(3), ""),
        (np.ones(3, "f4"), np.array([1, 1, 1.01], "f4"), hr.Vector(3), "by 0.01 in 1 of 3 elements"),
        (np.ones(3, "f4"), np.ones(2, "f4"), hr.Vector(), "float32[3] and float32[2]"),
        (np.array([1e-5, 0], "f4"), np.array([0, 1e-5], "f4"), hr.Vector(2), "1 - cos = 1"),
        (np.zeros(2, "f4"), np.zeros(2, "f4"), hr.Vector(2), ""),
        (np.array([1, 2], "i4"), np.array([1, 3], "i4"), hr.Vector(2, "int32"), "1 of 2 elements"),
        (["a", None], ["a", None], list[str | None], ""),
        (["a", "b"], ["a", "c"], list[str], "item 1: not equal"),
        (["a"], [], list[str], "1 and 0 items"),
        ([[1.0]], [[1.00001]], list[list[float]], ""),
    ],
)
def test_distance(one, other, annotation, apart):
    """Exact but for floats and vectors, and these within the tolerance."""
    assert distance(one, other, type_of(annotation), tolerance=Tolerance()) == apart


def test_differences_name_row_column_and_target():
    """Each value that differs, in order; a target with another number of rows is one difference."""
    expected = SIZES.local(ROWS)
    found = [dict(row) for row in expected]
    found[1]["size"], found[3]["share"] = 7, 0.5
    del found[2]["size"]
    told = [(one.target, one.row, one.column, one.expected, one.found) for one in compare(expected, found, SIZES.outputs, target="t")]
    assert told == [("t", 1, "size", "6", "7"), ("t", 2, "size", "0", "nothing"), ("t", 3, "share", "0.0", "0.5")]
    assert compare(expected, found[:2], SIZES.outputs) == [Difference("", None, "", "4 rows", "2 rows", "rows in are not rows out")]


def test_tolerances_are_parsed():
    """A number is the absolute one; others are named."""
    assert Tolerance.parse(["0.5", "cosine=0.1"]) == Tolerance(absolute=0.5, cosine=0.1)
    assert Tolerance.parse([]) == Tolerance()
    for wrong in ("x", "relativ=1", "cosine="):
        with pytest.raises(SettingError, match="relative=0.01"):
            Tolerance.parse([wrong])
    with pytest.raises(DefinitionError, match="cosine"):
        Tolerance(cosine=-1)


# Rows


def test_golden_rows_come_from_any_readable_input(tmp_path):
    """Columns that the pipeline does not read are left out, those that it writes are expected values."""
    data = pa.table({"id": [1, 2, 3], "text": ["a", "bb", "aab"], "size": [1, 2, 3]})
    pq.write_table(data, tmp_path / "golden.parquet", row_group_size=2)
    (tmp_path / "golden.csv").write_text("id,text,size\n1,a,1\n2,bb,2\n3,aab,3\n")
    for name in ("golden.parquet", "golden.csv"):
        found = golden(Input(str(tmp_path / name)), SIZES)
        assert found == Golden([{"text": "a"}, {"text": "bb"}, {"text": "aab"}], [{"size": 1}, {"size": 2}, {"size": 3}], ("size",))
    assert golden(Input(str(tmp_path / "golden.csv"), columns=["text"], limit=2), SIZES) == Golden([{"text": "a"}, {"text": "bb"}])
    assert golden(Input(str(tmp_path / "golden.parquet"), where="id > 2"), SIZES).rows == [{"text": "aab"}]


def test_golden_rows_that_do_not_fit_are_refused(tmp_path):
    """With the file, the row and the column."""
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "nulls.parquet")
    pq.write_table(pa.table({"txt": ["a"]}), tmp_path / "names.parquet")
    (tmp_path / "bad.csv").write_text("text,size\na,1\nb,x\n")
    for name, said in (("nulls.parquet", "nulls"), ("names.parquet", "did you mean 'txt'"), ("bad.csv", "size")):
        with pytest.raises(SourceError, match=said):
            golden(Input(str(tmp_path / name)), SIZES)


# The gate


def test_what_is_equal_passes():
    """And is said, with rows, columns and ways."""
    verdict = gate(SIZES, Golden(ROWS), {"twin": SIZES.local})
    assert verdict.require() is verdict and not verdict.differences
    assert str(verdict) == "sizes: all values are equal (4 rows, columns size, share; local against local reversed, local row by row, twin)"


def test_expected_values_of_the_file_are_compared():
    """And named in what is said."""
    verdict = gate(SIZES, Golden(ROWS, [{"size": n} for n in (1, 6, 0, 11)], ("size",)), {})
    assert [(one.target, one.row, one.column) for one in verdict.differences] == [("local", 3, "size")]
    assert "expected values in the input: size" in str(verdict)
    with pytest.raises(ParityError, match="local: row 3, size: 11 became 10"):
        verdict.require()


def test_a_target_that_raises_differs():
    """With its words; the other targets are compared all the same. Where local raises, there is nothing to compare with."""

    def broken(rows):
        raise StageError("no weights")

    verdict = gate(SIZES, Golden(ROWS), {"broken": broken, "short": lambda rows: SIZES.local(rows)[1:], "twin": SIZES.local})
    assert [(one.target, one.row, one.apart) for one in verdict.differences] == [("broken", None, "StageError"), ("short", None, "rows in are not rows out")]
    assert "1 in broken, 1 in short" in str(verdict) and "no weights" in verdict.differences[0].found

    @hr.stage(out={"y": int})
    def fails(text: hr.Column[str]):
        raise ValueError("no")

    with pytest.raises(StageError):
        gate(hr.Pipeline("fails", fails), Golden(ROWS), {})


def test_stages_are_set_up_once():
    """However many ways the rows are run."""
    ready = []

    @hr.stage(out={"y": int})
    class Model:
        def setup(self, device):
            ready.append(device)

        def __call__(self, text: hr.Column[str]):
            return {"y": [len(t) for t in text]}

    gate(hr.Pipeline("model", Model()), Golden(ROWS), {})
    assert ready == ["cpu"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_service_of_ours_is_equal(case):
    """Every column type, over HTTP, through a door and a replica."""
    rows = [{name: row[name] for name in case.pipeline.inputs} for row in case.rows][:5]
    with door(case.pipeline) as url, hr.Client(url) as client:
        verdict = gate(case.pipeline, Golden(rows), over_http(client, case.pipeline.name))
    assert not verdict.differences and len(verdict.targets) == 5


def test_a_service_that_refuses_differs():
    """The gate says what it answered."""
    pretend = Pretend(SIZES)
    pretend.script.extend([refusal(401, "unauthorized", "no such key")] * 99)
    with serving(pretend) as url, hr.Client(url) as client:
        verdict = gate(SIZES, Golden(ROWS), over_http(client, "sizes"))
    assert {one.target: one.apart for one in verdict.differences} == dict.fromkeys(over_http(client, "sizes"), "UnauthorizedError")


# Skew


@pytest.mark.parametrize("skew", ["tokenizer: case kept", "resize: bicubic", "rounding: two digits, as a number", "neighbours: a mean over the batch"])
def test_a_skewed_service_is_caught(skew):
    """Whatever way it is asked in. tests/integration has all skews, and many rows."""
    pytest.importorskip(SKEWS[skew].needs)
    assert len(SKEWS[skew].caught([0])[0]) == 3


@pytest.mark.parametrize("seed", range(5))
def test_a_stage_that_peeks_at_its_neighbours_is_caught_without_a_service(seed):
    """By its rows alone, which is batch-size invariance."""
    verdict = gate(hr.Pipeline("p", centred(peek=True)), Golden(prices(seed)), {})
    assert "local row by row" in {one.target for one in verdict.differences}


def test_a_stage_that_looks_at_the_row_before_is_caught():
    """Reversed rows show what the number of rows does not."""

    @hr.stage(out={"rise": float}, batch=4)
    def rise(price: hr.Column[float]):
        return {"rise": np.diff(price, prepend=price[:1])}

    found = {one.target for one in gate(hr.Pipeline("p", rise), Golden(prices(0)), {}).differences}
    assert found == {"local reversed", "local row by row"}


def test_a_prepared_pipeline_runs_as_local_does():
    """Once set up, for any number of calls and threads."""
    run = prepare(SIZES)
    expected = SIZES.local(ROWS)
    assert run(ROWS) == run(ROWS) == expected
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(ROWS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
