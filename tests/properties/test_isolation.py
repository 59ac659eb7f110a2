"""Isolation: whatever the bad rows and the batch rule, exactly they get a fault, and all other rows come out as from `local`."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from workers import OVERLAPS, worker_of

import headrace as hr
from headrace.arrays import to_rows
from headrace.events import BlockDone
from headrace.lineage import FAULT, HIDDEN, Fault, trace
from headrace.local import local
from headrace.stage import Stage
from headrace.testing import same
from headrace.worker import Worker

RAISES, WRONG, NULL, HUGE, DEADLY = "!?~#x"
"""What a text begins with makes the stage raise, return too much or a null, run out of memory, or kill the process."""

GOOD = st.text("abé", max_size=12)
BAD = st.tuples(st.sampled_from([RAISES, WRONG, NULL, HUGE]), GOOD).map("".join)
KILLERS = GOOD.map(DEADLY.__add__)
RULES = st.integers(1, 30).map(hr.rows) | st.integers(1, 40).map(lambda budget: hr.tokens(budget, of="text", bytes_per_token=1))
OUT = {"upper": str, "size": int, "fixed": hr.Vector(2), "ragged": hr.Vector(), "letters": list[str]}
ERRORS = {RAISES: "ValueError", WRONG: "ContractError", NULL: "ContractError", HUGE: "OutOfMemoryError", DEADLY: "ProcessDied"}


class OutOfMemoryError(RuntimeError):
    """Named as torch and cupy name theirs."""


class Died(BaseException):
    """Stands for the end of a process."""


class Notes:
    """A guard that outlives the processes. `kill_at` is the note at which somebody else kills one."""

    def __init__(self, kill_at=None):
        self.begun, self.dead, self.deaths, self.steps, self.kill_at = {}, False, 0, 0, kill_at

    def enter(self, key):
        self.step()
        self.begun[key] = self.begun.get(key, 0) + 1
        return self.begun[key] - 1

    def leave(self, key):
        if not self.dead:
            self.step()
            del self.begun[key]

    def step(self):
        self.steps += 1
        if self.steps == self.kill_at:
            self.die()

    def die(self):
        self.dead = True
        self.deaths += 1
        raise Died


def stages_of(rule, notes=None, most=1000):
    """Two stages; the first fails for texts that are bad, and runs out of memory above `most` rows."""

    def features(text: hr.Column[str]):
        marks = {t[:1] for t in text}
        if DEADLY in marks:
            notes.die()
        if HUGE in marks or len(text) > most:
            raise OutOfMemoryError
        if RAISES in marks:
            raise ValueError(RAISES)
        return {
            "upper": [None if t.startswith(NULL) else t.upper() for t in text] + ["one more"] * (WRONG in marks),
            "size": np.array([len(t) for t in text]),
            "fixed": np.array([[len(t), t.count("a")] for t in text], "f4").reshape(len(text), 2),
            "ragged": [np.arange(len(t), dtype="f4") for t in text],
            "letters": [list(t) for t in text],
        }

    def twice(upper: hr.Column[str], fixed: hr.Column[hr.Vector(2)]):
        return {"upper": [u * 2 for u in upper], "sum": fixed.sum(axis=1, dtype=float)}

    return [Stage.of(hr.stage(out=OUT, batch=rule)(features)), Stage.of(hr.stage(out={"upper": str, "sum": float}, batch=3)(twice))]


def block(texts, cut=0):
    """The texts as a block of two chunks, with lineage."""
    data = pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, pa.string())})
    return trace(pa.concat_tables([data.slice(0, cut), data.slice(cut)]), 7, np.arange(len(texts)) * 3)


def held(texts, data, rule):
    """Exactly the bad texts have a fault, of the right kind, and the others what `local` gives for them alone."""
    data.validate(full=True)
    assert data.select(["id", "text", *HIDDEN[:2]]) == block(texts).combine_chunks().select(["id", "text", *HIDDEN[:2]])
    faults = [text and Fault.from_json(text) for text in data[FAULT].to_pylist()]
    assert [fault and fault.error for fault in faults] == [ERRORS.get(text[:1]) for text in texts]
    assert all(fault.attempts >= 1 and fault.stage == "features" for fault in faults if fault)
    stages = stages_of(rule)
    writes = {**stages[0].writes, **stages[1].writes}
    for name, column in writes.items():
        assert data.schema.field(name).type == column.arrow
        assert [value is None for value in data[name].to_pylist()] == [text[:1] in ERRORS for text in texts]
    pipeline = hr.Pipeline("p", *(stage.call for stage in stages))
    expected = local(pipeline, [{"text": text} for text in texts if text[:1] not in ERRORS])
    found = to_rows(data.filter(data[FAULT].is_null()), pipeline.outputs)
    assert len(found) == len(expected)
    assert all(same(one[name], other[name], tolerance=0) for one, other in zip(found, expected, strict=True) for name in one)


@given(st.lists(GOOD | BAD, max_size=20), RULES, st.sampled_from(OVERLAPS), st.integers(0, 20), st.integers(1, 20))
def test_exactly_the_bad_rows_get_a_fault(texts, rule, overlap, cut, most):
    """Also where too many rows for the accelerator's memory are cut smaller at the same time."""
    seen = []
    data = worker_of(stages_of(rule, most=most), overlap=overlap, emit=seen.append)(block(texts, cut))
    held(texts, data, rule)
    (done,) = [event for event in seen if isinstance(event, BlockDone)]
    assert done.rows == len(texts)
    assert done.padded_tokens >= done.tokens


@given(st.lists(GOOD | BAD, max_size=20), RULES, st.integers(0, 20))
def test_overlap_never_shows_in_faults(texts, rule, cut):
    """The same rows fail in the same way after as many attempts."""
    one, other, third = (worker_of(stages_of(rule), overlap=overlap)(block(texts, cut)) for overlap in OVERLAPS)
    assert one == other == third


@given(st.lists(GOOD | GOOD | BAD | KILLERS, max_size=12), RULES, st.none() | st.integers(1, 60))
def test_exactly_the_rows_that_kill_are_given_up(texts, rule, kill_at):
    """After a bounded number of deaths, and whenever somebody else kills a process in between."""
    notes, data = Notes(kill_at), None
    killers = sum(text.startswith(DEADLY) for text in texts)
    while data is None:
        try:
            data = Worker(stages_of(rule, notes), guard=notes)(block(texts))
        except Died:
            notes.dead = False
            assert notes.deaths <= (2 + 3 * killers if killers else 0) + (kill_at is not None)
    held(texts, data, rule)
