"""Workers: a group's stages over a block, and what is said when a stage breaks its word."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.errors import ContractError, HeadraceError, StageError, WiringError
from headrace.events import BlockDone, BudgetHalved
from headrace.stage import Stage
from headrace.worker import Worker, measure, set_up

OVERLAP = pytest.mark.parametrize("overlap", [False, True])


class OutOfMemoryError(RuntimeError):
    """Named as torch and cupy name theirs."""


def stage_of(function, out=str, reads=str, **options):
    """A stage that reads `x` and writes `y`."""

    def probe(x: hr.Column[reads]):
        return function(x)

    return Stage.of(hr.stage(out={"y": out}, **options)(probe))


def run(stage, values, *, overlap=False, emit=lambda event: None):
    """The values of `y` for those of `x`."""
    return Worker([stage], group="g", overlap=overlap, emit=emit)(pa.table({"x": values}))["y"].to_pylist()


@OVERLAP
@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        (["a"], ["'probe' returned list", "dict of columns", "{'y': [...]}"]),
        (None, ["'probe' returned NoneType", "dict of columns"]),
        ({}, ["did not return 'y'", "it returned nothing"]),
        ({"yy": ["a"]}, ["did not return 'y'", "it returned 'yy'"]),
        ({0: ["a"]}, ["did not return 'y'", "it returned 0"]),
        ({"y": ["a"], "z": ["b"]}, ["returned 'z'", "does not declare", "add it to out"]),
        ({"y": []}, ["wrong 'y', declared as str", "0 values for 1 rows"]),
        ({"y": [None]}, ["wrong 'y'", "1 nulls", "str | None"]),
        ({"y": [1]}, ["wrong 'y'", "int", "expected str"]),
        ({"y": np.array("a")}, ["wrong 'y'", "one value per row"]),
        ({"y": pa.array([{"a": 1}])}, ["wrong 'y'", "struct", "expected string"]),
    ],
)
def test_a_broken_contract_is_named(returned, parts, overlap):
    """Whatever a stage returns wrongly, the error names the stage, the column, what came and what was declared."""
    with pytest.raises(ContractError) as caught:
        run(stage_of(lambda x: returned, batch=1), ["a", "b", "c"], overlap=overlap)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.stage == "probe"


@OVERLAP
def test_a_stage_that_raises(overlap):
    """The error names the stage and the cause, and shows the user's frames without those of headrace."""

    def broken(x):
        return {"y": [1 // 0]}

    with pytest.raises(StageError) as caught:
        run(stage_of(broken), ["a"], overlap=overlap)
    error = caught.value
    assert (str(error), error.stage) == ("stage 'probe' raised: ZeroDivisionError: integer division or modulo by zero", "probe")
    assert "in broken" in error.frames
    assert "headrace/worker.py" not in error.frames
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_an_error_of_headrace_passes_unchanged():
    """What a stage raises for the user to mend is not wrapped once more."""

    def refusing(x):
        raise HeadraceError("bring a bigger wheel")

    with pytest.raises(HeadraceError, match=r"^bring a bigger wheel$"):
        run(stage_of(refusing), ["a"])


@hr.stage(out={"y": str})
class Model:
    prefix: str = "-"
    fails: bool = False

    def setup(self, device: str):
        if self.fails:
            raise OSError("no weights")
        self.loaded = f"{device}{self.prefix}"

    def __call__(self, x: hr.Column[str]):
        return {"y": [self.loaded + value for value in x]}


def test_a_model_is_set_up_on_a_copy():
    """Set-up runs once per worker with the device, on an instance of its own; the user's instance stays as written."""
    model = Model(prefix="/")
    stage = set_up(Stage.of(model), "cuda")
    assert stage.call(["a"]) == {"y": ["cuda/a"]}
    assert not hasattr(model, "loaded")
    assert stage.settings == {"prefix": "/", "fails": False}


def test_a_failing_set_up_is_a_stage_error():
    """A set-up that raises names the stage and the cause."""
    with pytest.raises(StageError, match="stage 'model' setup failed: OSError: no weights"):
        Worker([Stage.of(Model(fails=True))])


@pytest.mark.parametrize(("carries", "names"), [(None, ["id", "x", "y"]), (["y", "id"], ["y", "id"]), (["y", "absent"], ["y"])])
def test_carries(carries, names):
    """Only the columns asked for leave the group, in that order."""
    data = pa.table({"id": [1], "x": ["a"]})
    assert Worker([stage_of(lambda x: {"y": x})])(data, carries).column_names == names


def test_a_column_that_is_also_read_is_replaced_in_place():
    """A stage that writes what it reads changes the values, not the order of columns."""

    @hr.stage(out={"x": str})
    def upper(x: hr.Column[str]):
        return {"x": [value.upper() for value in x]}

    assert Worker([Stage.of(upper)])(pa.table({"x": ["a"], "id": [1]})).to_pydict() == {"x": ["A"], "id": [1]}


def test_no_rows_no_call():
    """An empty block gets its columns, with their types, without a call."""

    def never(x):
        raise AssertionError

    stages = [stage_of(never, hr.Vector(3), batch=hr.tokens(4, of="x"), name=name) for name in ("a", "b")]
    data = Worker(stages)(pa.table({"x": pa.array([], pa.string())}))
    assert (data.num_rows, data.schema.field("y").type) == (0, pa.list_(pa.float32(), 3))


@pytest.mark.parametrize(
    ("values", "options", "lengths"),
    [
        (pa.array(["", "abcd", "abcde", "é" * 4]), {}, [1, 1, 2, 2]),
        (pa.array(["abcd", "ab"]), {"bytes_per_token": 1.0}, [4, 2]),
        (pa.array(["abcd", "ab"]), {"bytes_per_token": 1.0, "longest": 3}, [3, 2]),
        (pa.array(["abcdefgh", None]), {}, [2, 1]),
        (pa.array([b"abcdefgh"]), {}, [2]),
        (pa.array([[1, 2, 3], [], None]), {}, [3, 1, 1]),
        (pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float32(), 2)), {}, [2, 2]),
        (pa.array([[{"a": 1}] * 3]), {}, [3]),
        (pa.nulls(2), {}, [1, 1]),
        (pa.array([], pa.string()), {}, []),
    ],
)
def test_measure(values, options, lengths):
    """A row's length is its bytes over the bytes of a token, or its items; at least 1, at most what the model takes."""
    stage = stage_of(lambda x: None, reads=hr.Column, batch=hr.tokens(8, of="x", **options))
    found = measure(stage, pa.table({"x": values}))
    assert (found.tolist(), found.dtype) == (lengths, np.int64)


def test_an_untyped_column_that_has_no_length_is_refused():
    """Where only the data shows that a column cannot be measured, the error says so."""
    with pytest.raises(WiringError, match=r"'probe': hr.tokens cannot measure 'x', which is int64; it measures text"):
        run(stage_of(lambda x: None, reads=hr.Column, batch=hr.tokens(8, of="x")), [1, 2])


@OVERLAP
def test_a_block_reports_its_rows_and_padding(overlap):
    """Tokens are the rows' own, padded tokens what the stage was called with."""
    seen = []
    values = ["a" * 4 * length for length in (3, 1, 2, 1)]
    run(stage_of(lambda x: {"y": list(x)}, batch=hr.tokens(6, of="x")), values, overlap=overlap, emit=seen.append)
    (event,) = seen
    assert isinstance(event, BlockDone)
    assert (event.group, event.rows, event.tokens, event.padded_tokens) == ("g", 4, 7, 3 * 2 + 1 * 2)


def choking(error, most):
    """A stage body that raises `error` for more than `most` rows at once, and the sizes of all its calls."""
    calls = []

    def body(x):
        calls.append(len(x))
        if len(x) > most:
            raise error
        return {"y": list(x)}

    return body, calls


@OVERLAP
@pytest.mark.parametrize("error", [OutOfMemoryError("9 GiB"), RuntimeError("CUDA error: out of memory"), RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")])
@pytest.mark.parametrize(
    ("rule", "rows", "most", "sizes", "divisors"),
    [
        (hr.rows(8), 8, 4, [8, 4, 4], [2]),
        (hr.rows(8), 8, 3, [8, 4, 2, 2, 2, 2], [2, 4]),
        (hr.rows(64), 6, 3, [6, 2, 2, 2], [32]),
        (hr.tokens(6, of="x"), 6, 3, [6, 3, 3], [2]),
        (hr.tokens(100, of="x"), 4, 2, [4, 1, 1, 1, 1], [64]),
    ],
)
def test_out_of_memory_halves_the_slices(rule, rows, most, sizes, divisors, error, overlap):
    """Too large a call is halved at once, however much smaller than the rule's limit it was, and no row is lost."""
    body, calls = choking(error, most)
    seen = []
    values = [str(row) for row in range(rows)]
    assert run(stage_of(body, batch=rule), values, overlap=overlap, emit=seen.append) == values
    halved = [event for event in seen if isinstance(event, BudgetHalved)]
    assert (calls, [event.divisor for event in halved]) == (sizes, divisors)
    assert {(event.stage, event.rule) for event in halved} == {("probe", str(rule))}


def test_the_smaller_budget_stays():
    """A later block starts with the budget that worked."""
    body, calls = choking(OutOfMemoryError(), 2)
    worker = Worker([stage_of(body, batch=4)], overlap=False)
    for _ in range(2):
        worker(pa.table({"x": list("abcd")}))
    assert calls == [4, 2, 2, 2, 2]


@OVERLAP
@pytest.mark.parametrize("error", [OutOfMemoryError("one row"), RuntimeError("out of memory"), ValueError("CUDA is fine")])
def test_what_halving_cannot_mend_is_raised(error, overlap):
    """One row that does not fit, and an error that is not about an accelerator's memory, end the block."""
    body, calls = choking(error, 0)
    with pytest.raises(StageError) as caught:
        run(stage_of(body, batch=2), list("abcd"), overlap=overlap)
    assert caught.value.__cause__ is error
    assert calls == ([2, 1] if isinstance(error, OutOfMemoryError) else [2])


@OVERLAP
def test_slices_done_before_an_error_are_not_run_again(overlap):
    """Out of memory in the middle of a block repeats only the rows not yet done."""
    calls, fail = [], itertools.chain([False, True], itertools.repeat(False))

    def body(x):
        calls.append(list(x))
        if next(fail):
            raise OutOfMemoryError
        return {"y": list(x)}

    assert run(stage_of(body, batch=2), list("abcdef"), overlap=overlap) == list("abcdef")
    assert calls == [["a", "b"], ["c", "d"], ["c"], ["d"], ["e"], ["f"]]
