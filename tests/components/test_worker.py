"""Workers: a group's stages over a block, and what is said when a stage breaks its word."""

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from workers import OVERLAPS, worker_of

import headrace as hr
from headrace.calls import set_up
from headrace.errors import ContractError, HeadraceError, StageError, WiringError
from headrace.events import BlockDone, BudgetHalved
from headrace.lineage import FAULT, HIDDEN, Fault, trace
from headrace.stage import Stage
from headrace.worker import Worker, measure

OVERLAP = pytest.mark.parametrize("overlap", OVERLAPS)


class OutOfMemoryError(RuntimeError):
    """Named as torch and cupy name theirs."""


def stage_of(function, out=str, reads=str, **options):
    """A stage that reads `x` and writes `y`."""

    def probe(x: hr.Column[reads]):
        return function(x)

    return Stage.of(hr.stage(out={"y": out}, **options)(probe))


def run(stage, values, *, overlap=False, emit=lambda event: None):
    """The values of `y` for those of `x`."""
    return worker_of([stage], group="g", overlap=overlap, emit=emit)(pa.table({"x": values}))["y"].to_pylist()


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
    assert "headrace/calls.py" not in error.frames
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
    stage, _ = set_up(Stage.of(model), "cuda")
    assert stage.call(["a"]) == {"y": ["cuda/a"]}
    assert not hasattr(model, "loaded")
    assert stage.settings == {"prefix": "/", "fails": False}


def test_what_a_set_up_returns_is_noted():
    """Text, for the report; anything else is not meant for it."""

    class Chatty(Model):
        def setup(self, device: str):
            super().setup(device)
            return "8 bits" if self.prefix else 8

    chatty = hr.stage(out={"y": str})(Chatty)
    assert Worker([Stage.of(chatty(prefix="/"))]).note == "8 bits"
    assert Worker([Stage.of(chatty(prefix=""))]).note == ""


def test_a_thread_of_its_own():
    """Stages are set up and called in it, one call at a time, while several threads run a block each."""
    seen, busy, both = [], threading.Lock(), threading.Barrier(2)

    class Bound(Model):
        def setup(self, device: str):
            super().setup(device)
            self.thread = threading.get_ident()

        def __call__(self, x: hr.Column[str]):
            assert busy.acquire(blocking=False), "two calls at a time"
            seen.append((threading.get_ident() == self.thread, set(x)))
            busy.release()
            return super().__call__(x)

    with ThreadPoolExecutor(1) as own, ThreadPoolExecutor(2) as pool:
        worker = Worker([Stage.of(hr.stage(out={"y": str}, batch=2)(Bound)())], thread=own)

        def block(values):
            both.wait(10)
            return worker(pa.table({"x": values}))["y"].to_pylist()

        one, other = pool.map(block, [["a"] * 20, ["b"] * 20])
    assert (one, other) == (["cpu-a"] * 20, ["cpu-b"] * 20)
    assert all(same for same, _ in seen)
    assert [values for _, values in seen] in ([{"a"}] * 10 + [{"b"}] * 10, [{"b"}] * 10 + [{"a"}] * 10)  # a block at a time, too


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


# ---- Isolating: a block with the column FAULT


def traced(values, faults=None):
    """A block of `x` as a batch job has it."""
    return trace(pa.table({"x": pa.array(values, pa.string())}), 3, np.arange(10, 10 + len(values)), faults)


def faults_of(data):
    """Row of the block -> its fault."""
    return {row: Fault.from_json(text) for row, text in enumerate(data[FAULT].to_pylist()) if text is not None}


def picky(bad=("bad",), answer=None):
    """A stage body that upper-cases; for slices with a value in `bad` it raises, or returns `answer`. And the slices of all its calls."""
    calls = []

    def body(x):
        calls.append(list(x))
        if not set(bad) & set(x):
            return {"y": [value.upper() for value in x]}
        if answer is None:
            raise ValueError("cannot read " + ", ".join(sorted(set(bad) & set(x))))
        return answer(x)

    return body, calls


@hr.stage(out={"y": hr.Vector(3)}, batch=4)
class Picky:
    def __call__(self, x: hr.Column[str]):
        if "bad" in list(x):
            raise KeyError("bad")
        return {"y": np.ones((len(x), 3), "f4")}


BAD_ROWS = pytest.mark.parametrize("bad", [[], [0], [9], [5], [2, 3], [0, 4, 9], list(range(10))], ids=str)


@OVERLAP
@BAD_ROWS
@pytest.mark.parametrize("rule", [hr.rows(1), hr.rows(4), hr.rows(100), hr.tokens(3, of="x"), hr.tokens(100, of="x", bytes_per_token=1)], ids=str)
def test_rows_that_raise_are_isolated(bad, rule, overlap):
    """They get a fault that tells what the user needs, and no value; all other rows are as if they had not been there."""
    values = ["bad" if row in bad else "a" * row for row in range(10)]
    body, calls = picky()
    data = worker_of([stage_of(body, batch=rule)], overlap=overlap)(traced(values))
    found = faults_of(data)
    assert list(found) == bad
    assert data["y"].to_pylist() == [None if row in bad else "A" * row for row in range(10)]
    assert data.drop(["y", FAULT]) == traced(values).drop([FAULT])
    assert all((fault.stage, fault.error, fault.message) == ("probe", "ValueError", "cannot read bad") for fault in found.values())
    assert all(
        "in body" in fault.frames and "ValueError: cannot read bad" in fault.frames and "headrace/calls.py" not in fault.frames for fault in found.values()
    )
    assert sum(fault.attempts for fault in found.values()) == sum(call.count("bad") for call in calls)


@OVERLAP
@BAD_ROWS
def test_a_models_vectors_are_null_where_it_failed(bad, overlap):
    """Vectors of fixed size keep their type, also where no row is left."""
    data = worker_of([Stage.of(Picky())], overlap=overlap)(traced(["bad" if row in bad else "a" for row in range(10)]))
    data.validate(full=True)
    assert data["y"].type == pa.list_(pa.float32(), 3)
    assert data["y"].to_pylist() == [None if row in bad else [1, 1, 1] for row in range(10)]
    assert {(fault.stage, fault.error, fault.message) for fault in faults_of(data).values()} <= {("picky", "KeyError", "'bad'")}


@OVERLAP
def test_a_slice_that_fails_is_halved(overlap):
    """Only the halves with the bad row are called again; the row counts every call that it took part in."""
    body, calls = picky()
    data = worker_of([stage_of(body, batch=8)], overlap=overlap)(traced([*"abcd", "bad", *"fgh"]))
    assert calls == [[*"abcd", "bad", *"fgh"], [*"abcd"], ["bad", *"fgh"], ["bad", "f"], ["g", "h"], ["bad"], ["f"]]
    assert faults_of(data)[4].attempts == 4


@OVERLAP
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: {"y": ["a"] * (len(x) + 1)}, "2 values for 1 rows"),
        (lambda x: {"z": list(x)}, "did not return 'y'"),
        (lambda x: {"y": list(x), "z": list(x)}, "does not declare"),
        (list, "returned list"),
        (lambda x: {"y": [5] * len(x)}, "a value of Python type int; expected str"),
        (lambda x: {"y": [float("nan") if value == "bad" else value for value in x]}, "float; expected str"),
        (lambda x: {"y": [None if value == "bad" else value for value in x]}, "1 nulls"),
    ],
)
def test_rows_with_a_wrong_result_are_isolated(answer, message, overlap):
    """The fault goes to the row whose result is wrong, though it shows only while the next slice runs; and no good slice runs twice."""
    body, calls = picky(answer=answer)
    values = ["a", "b", "bad", "c", "d", "bad", "e", "f", "bad"]
    data = worker_of([stage_of(body, batch=2)], overlap=overlap)(traced(values))
    found = faults_of(data)
    assert list(found) == [2, 5, 8]
    assert all(fault.error == "ContractError" and message in fault.message and not fault.frames for fault in found.values())
    assert data["y"].to_pylist() == [None if value == "bad" else value.upper() for value in values]
    assert Counter(map(tuple, calls)) == {("a", "b"): 1, ("bad", "c"): 1, ("d", "bad"): 1, ("e", "f"): 1, ("bad",): 3, ("c",): 1, ("d",): 1}


@OVERLAP
def test_a_failure_that_no_row_has_alone_is_no_fault(overlap):
    """What fails only in company is done in parts."""
    body, calls = choking(ValueError("one at a time, please"), 1)
    data = worker_of([stage_of(body, batch=4)], overlap=overlap)(traced(list("abcdef")))
    assert (data["y"].to_pylist(), faults_of(data)) == (list("abcdef"), {})
    assert sorted(calls) == [1] * 6 + [2] * 3 + [4]


@OVERLAP
def test_rows_at_fault_skip_the_further_stages(overlap):
    """Neither a row that failed before the block nor one that fails in it is shown to a later stage, and their first fault stays."""
    earlier = Fault("reader", "ArrowInvalid", "no JSON")
    first, _ = picky()
    upper, calls = picky(["E"])

    def second(y: hr.Column[str]):
        return {"z": [len(value) for value in upper(y)["y"]]}

    stages = [stage_of(first, batch=hr.tokens(2, of="x"), name="first"), Stage.of(hr.stage(out={"z": int}, batch=2)(second))]
    data = traced(["a", "bad", "failed earlier", "d", "e"], pa.array([None, None, earlier.to_json(), None, None], pa.string()))
    seen = []
    data = worker_of(stages, overlap=overlap, emit=seen.append)(data)
    found = faults_of(data)
    assert {row: (fault.stage, fault.error) for row, fault in found.items()} == {
        1: ("first", "ValueError"),
        2: ("reader", "ArrowInvalid"),
        4: ("second", "ValueError"),
    }
    assert found[2] == earlier
    assert {value for call in calls for value in call} == {"A", "D", "E"}
    assert data["y"].to_pylist() == ["A", None, None, "D", "E"]
    assert data.select(["z"]).to_pydict() == {"z": [1, None, None, 1, None]}
    assert data.schema.field("z").type == pa.int64()
    assert [(event.rows, event.tokens) for event in seen] == [(5, 4 + 3)]
    assert seen[0].padded_tokens >= seen[0].tokens


def test_a_block_of_faults_makes_no_call():
    """Its columns are there, null, and of the types declared."""
    types = {"y": hr.Vector(3), "list": list[str], "ragged": hr.Vector(), "int": int, "maybe": str | None}

    def probe(x: hr.Column[str]):
        raise AssertionError

    faults = pa.array([Fault("reader", "E", "m").to_json()] * 2, pa.string())
    for batch in (2, hr.tokens(4, of="x")):
        stage = Stage.of(hr.stage(out=types, batch=batch)(probe))
        data = Worker([stage, stage])(traced([None, None], faults))
        data.validate(full=True)
        assert {name: data.schema.field(name).type for name in types} == {name: column.arrow for name, column in stage.writes.items()}
        assert all(data[name].null_count == 2 for name in types)
        assert data[FAULT].combine_chunks() == faults


@OVERLAP
@pytest.mark.parametrize("rule", [hr.rows(3), hr.tokens(4, of="x")], ids=str)
def test_without_a_fault_isolating_changes_nothing(rule, overlap):
    """The table is that of a run that does not isolate, and nothing of the block is copied."""
    stages = [stage_of(lambda x: {"y": [value * 2 for value in x]}, batch=rule)]
    data = traced([str(row) * row for row in range(8)])
    plain = worker_of(stages, overlap=overlap)(data.drop(list(HIDDEN)))
    isolated = worker_of(stages, overlap=overlap)(data)
    assert isolated.select(plain.column_names) == plain
    assert isolated.select(HIDDEN) == data.select(HIDDEN)
    for name in data.column_names:
        before, after = ([buffer and buffer.address for buffer in table[name].chunk(0).buffers()] for table in (data, isolated))
        assert before == after


@pytest.mark.parametrize(("carries", "names"), [(["y"], ["y", *HIDDEN]), (["x", FAULT], ["x", FAULT, *HIDDEN[:2]]), ([], [*HIDDEN])])
def test_the_lineage_is_carried(carries, names):
    """Hidden columns leave the group, whether or not anybody asked for them."""
    assert Worker([stage_of(lambda x: {"y": x})])(traced(["a"]), carries).column_names == names


def test_what_is_no_rows_fault_is_raised():
    """A model that cannot be set up, wiring, and what the user is to mend end an isolating run too."""

    def refusing(x):
        raise HeadraceError("bring a bigger wheel")

    with pytest.raises(StageError, match="setup failed"):
        Worker([Stage.of(Model(fails=True))])
    with pytest.raises(HeadraceError, match=r"^bring a bigger wheel$"):
        Worker([stage_of(refusing)])(traced(["a"]))
    with pytest.raises(WiringError, match=r"hr.tokens cannot measure 'x'"):
        Worker([stage_of(refusing, reads=hr.Column, batch=hr.tokens(8, of="x"))])(trace(pa.table({"x": [1]}), 0, np.arange(1)))


def test_a_fault_is_of_bounded_size_and_valid_text():
    """Beginning and end of a long message are kept, and what UTF-8 cannot hold is spelled out: it goes to a Parquet file."""

    def shouting(x):
        raise ValueError("from" + "\ud800" * 50_000 + "to")

    (fault,) = faults_of(Worker([stage_of(shouting)])(traced(["a"]))).values()
    assert fault.message.startswith("from\\ud800") and fault.message.endswith("to") and " ... " in fault.message
    assert "in shouting" in fault.frames
    assert len(fault.message) < 6 * 2_100 and len(fault.frames) < 6 * 8_100
    fault.message.encode()


class PanicException(BaseException):
    """Named as libraries written in Rust name theirs, which are no Exceptions."""


@pytest.mark.parametrize("isolate", [True, False])
def test_a_panic_is_a_failure_like_any_other(isolate):
    """A library in Rust that fails on a row leaves the process alive."""

    def panicking(x):
        if "bad" in x:
            raise PanicException("index out of bounds")
        return {"y": x}

    data = traced(["a", "bad", "b"])
    if isolate:
        (fault,) = faults_of(Worker([stage_of(panicking)])(data)).values()
        assert (fault.error, fault.message) == ("PanicException", "index out of bounds")
    else:
        with pytest.raises(StageError, match="PanicException: index out of bounds"):
            Worker([stage_of(panicking)])(data.drop([FAULT]))


# ---- Isolating and accelerators out of memory


@OVERLAP
@pytest.mark.parametrize(("rule", "sizes", "divisors"), [(hr.rows(8), [8, 4, 2, 2, 2, 2], [2, 4]), (hr.tokens(8, of="x"), [8, 4, 2, 2, 2, 2], [2, 4])])
def test_out_of_memory_still_halves_the_budget(rule, sizes, divisors, overlap):
    """It is no row's fault as long as there are rows to take away."""
    body, calls = choking(OutOfMemoryError(), 2)
    seen = []
    data = worker_of([stage_of(body, batch=rule)], overlap=overlap, emit=seen.append)(traced(list("abcdefgh")))
    assert (data["y"].to_pylist(), faults_of(data), calls) == (list("abcdefgh"), {}, sizes)
    assert [event.divisor for event in seen if isinstance(event, BudgetHalved)] == divisors


@OVERLAP
def test_a_row_too_large_alone_is_at_fault(overlap):
    """Out of memory at a single row is that row's fault, after as many attempts as it had."""

    def body(x):
        if "huge" in x:
            raise OutOfMemoryError("9 GiB")
        return {"y": list(x)}

    data = worker_of([stage_of(body, batch=4)], overlap=overlap)(traced(["a", "b", "huge", "c", "d"]))
    assert faults_of(data)[2] == Fault("probe", "OutOfMemoryError", "9 GiB", faults_of(data)[2].frames, attempts=3)
    assert data["y"].to_pylist() == ["a", "b", None, "c", "d"]


@OVERLAP
@pytest.mark.parametrize("rule", [hr.rows(8), hr.tokens(64, of="x", bytes_per_token=1), hr.tokens(24, of="x", bytes_per_token=1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_out_of_memory_while_bisecting(rule, most, overlap):
    """Both ways of cutting a slice smaller go together, whichever comes first."""

    def body(x):
        if len(x) > most and "d" in x:
            raise OutOfMemoryError
        if "bad" in x or "a very bad one" in x:
            raise ValueError
        if len(x) > most:
            raise OutOfMemoryError
        return {"y": list(x)}

    values = ["a", "b", "bad", "d", "a very bad one", *"efghijklmnop", "bad", "r"]
    data = worker_of([stage_of(body, batch=rule)], overlap=overlap)(traced(values))
    assert list(faults_of(data)) == [2, 4, 17]
    assert data["y"].to_pylist() == [None if "bad" in value else value for value in values]


def meeting(parties):
    """A stage of which so many calls must be under way before any returns."""

    @hr.stage(out={"y": int}, batch=1, concurrency=parties)
    class Meeting:
        def setup(self, device):
            self.barrier = threading.Barrier(parties, timeout=20)

        def __call__(self, x: hr.Column[int]):
            self.barrier.wait()
            if x[0] < 0:
                raise ValueError("below zero")
            return {"y": x * 2}

    return Stage.of(Meeting())


def test_a_stage_that_waits_is_called_several_times_at_once():
    worker = Worker([meeting(4)])
    assert worker(pa.table({"x": list(range(12))}))["y"].to_pylist() == [2 * x for x in range(12)]


def test_blocks_under_way_share_the_calls_and_count_their_time_once():
    events = []
    worker = Worker([meeting(4)], emit=events.append)
    before = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        blocks = list(threads.map(worker, [pa.table({"x": [1, 2]}), pa.table({"x": [3, 4]})]))
    assert [block["y"].to_pylist() for block in blocks] == [[2, 4], [6, 8]]
    assert sum(event.busy_s for event in events) <= time.perf_counter() - before


def test_of_calls_at_once_a_failing_row_is_set_aside_or_raised():
    out = Worker([meeting(2)])(trace(pa.table({"x": [1, -1, 3, 4]}), 0, np.arange(4)))
    assert out["y"].to_pylist() == [2, None, 6, 8]
    assert [text is not None for text in out[FAULT].to_pylist()] == [False, True, False, False]
    with pytest.raises(StageError, match="below zero"):
        Worker([meeting(2)])(pa.table({"x": [1, -1, 3, 4]}))
