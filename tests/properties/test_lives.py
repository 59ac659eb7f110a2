"""Rows that kill the process: a block goes through all the same, in as many lives as it takes, whenever they end."""

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from workers import OVERLAPS, worker_of

import headrace as hr
from headrace.errors import HeadraceError
from headrace.lineage import FAULT, Fault, trace
from headrace.stage import Stage
from headrace.worker import DEATHS, Worker

OVERLAP = pytest.mark.parametrize("overlap", OVERLAPS, ids=["in turn", "overlapping", "in a thread"])


def traced(values):
    """A block of `x` as a batch job has it."""
    return trace(pa.table({"x": pa.array(values, pa.string())}), 3, np.arange(10, 10 + len(values)))


def faults_of(data):
    """Row of the block -> its fault."""
    return {row: Fault.from_json(text) for row, text in enumerate(data[FAULT].to_pylist()) if text is not None}


class Died(BaseException):
    """Stands for the end of a process."""


class Notes:
    """A guard, and the world around the processes: at step `kill_at` of all that happens it kills one, whatever it does."""

    def __init__(self, *, forgets=False, kill_at=()):
        self.begun, self.log, self.dead, self.deaths = Counter(), [], False, 0
        self.forgets, self.kill_at, self.step = forgets, kill_at, 0

    def enter(self, key):
        self.log.append(("enter", key))
        self.begun[key] += 1
        self.tick()
        return self.begun[key] - 1

    def leave(self, key):
        if self.dead:
            return  # nobody is left to say it
        self.log.append(("leave", key))
        self.tick()
        self.begun[key] = 0 if self.forgets else self.begun[key] - 1

    def tick(self):
        self.step += 1
        if self.step - 1 in self.kill_at:
            self.die()

    def die(self):
        self.dead = True
        self.deaths += 1
        raise Died

    def live(self, make, data):
        """The block's result, by as many processes as it takes."""
        for _ in range(60):
            try:
                return make(self)(data)
            except Died:
                self.dead = False
        raise AssertionError("no end of deaths")


def deadly(killers, *, batch=4, bad=(), overlap=False):
    """Makes a worker of two stages, the second of which dies of the values in `killers`, and raises for those in `bad`."""

    def make(notes):
        def first(x: hr.Column[str]):
            notes.tick()
            return {"y": [value + "!" for value in x]}

        def second(x: hr.Column[str], y: hr.Column[str]):
            notes.tick()
            if set(killers) & set(x):
                notes.die()
            if set(bad) & set(x):
                raise ValueError
            return {"z": [value.upper() for value in y]}

        stages = [Stage.of(hr.stage(out={"y": str}, batch=3)(first)), Stage.of(hr.stage(out={"z": str}, batch=batch)(second))]
        return worker_of(stages, group="second", overlap=overlap, guard=notes)

    return make


def held(data, killers, bad=()):
    """Exactly the killers died, exactly the bad failed, and all else is right."""
    values, found = data["x"].to_pylist(), faults_of(data)
    assert [values[row] for row, fault in found.items() if fault.error == "ProcessDied"] == [value for value in values if value in killers]
    assert [values[row] for row, fault in found.items() if fault.error == "ValueError"] == [value for value in values if value in bad]
    assert data["z"].to_pylist() == [None if value in {*killers, *bad} else value.upper() + "!" for value in values]
    assert data["y"].to_pylist() == [value + "!" for value in values]


KILLERS = pytest.mark.parametrize("killers", ["", "a", "c", "j", "ab", "cg", "acj", "abcd"])
RULES = pytest.mark.parametrize("batch", [1, 4, 100, hr.tokens(3, of="x")], ids=str)
FORGETS = pytest.mark.parametrize("forgets", [False, True])


@OVERLAP
@FORGETS
@RULES
@KILLERS
def test_rows_that_kill_are_isolated(killers, batch, forgets, overlap):
    """The block goes through after a bounded number of deaths, with a fault for each killer and for each bad row."""
    notes = Notes(forgets=forgets)
    data = notes.live(deadly(killers, batch=batch, bad="ei", overlap=overlap), traced(list("abcdefghij")))
    held(data, killers, "ei")
    assert notes.deaths <= (2 + 3 * len(killers) if killers else 0)
    for fault in faults_of(data).values():
        if fault.error == "ProcessDied":
            assert (fault.stage, fault.frames) == ("second", "")
            assert fault.message == "the process died 2 times while it ran this row alone (a crash, os._exit, or out of memory)"
            assert fault.attempts >= DEATHS


def test_the_lives_of_a_block_with_a_killer():
    """Two deaths as ever, one to find the slice, two of the row alone; the slice is not called whole again."""
    notes = Notes()
    data = notes.live(deadly("b", batch=4), traced(list("abcdef")))
    assert notes.deaths == 5
    assert faults_of(data)[1].attempts == 1 + 2
    entered = [key for what, key in notes.log if what == "enter"]
    assert entered[:2] == ["block of second, rows 3:10 to 3:15, 6 in all"] * 2
    assert Counter(entered)["call of second, rows 3:11 to 3:11, 1 in all"] == 3
    assert Counter(entered)["block of second, rows 3:10 to 3:15, 6 in all"] == 6
    held(notes.live(deadly("b", batch=4), traced(list("abcdef"))), "b")
    assert notes.deaths == 5, "a block that is made once more knows its killers"


@FORGETS
@pytest.mark.parametrize("batch", [1, 2, hr.tokens(3, of="x")], ids=str)
@pytest.mark.parametrize("killers", ["", "b"])
def test_a_kill_from_outside_buries_no_row(killers, batch, forgets):
    """Whenever it comes: it costs one more life, and no row."""
    quiet = Notes(forgets=forgets)
    quiet.live(deadly(killers, batch=batch, bad="e"), traced(list("abcde")))
    for step in range(quiet.step + 1):
        notes = Notes(forgets=forgets, kill_at={step})
        held(notes.live(deadly(killers, batch=batch, bad="e"), traced(list("abcde"))), killers, "e")
        assert notes.deaths <= quiet.deaths + 1


@FORGETS
def test_kills_from_outside_alone_bury_no_row(forgets):
    """Three in a row, at any time, are not enough: two for the block, and two more for a row."""
    for steps in itertools.combinations(range(14), 3):
        notes = Notes(forgets=forgets, kill_at=steps)
        held(notes.live(deadly("", batch=1), traced(list("ab"))), "")
        assert notes.deaths <= 3


def test_without_deaths_only_the_block_is_noted():
    """Calls are not: the guard may be a network away."""
    notes = Notes()
    notes.live(deadly("", bad="c"), traced(list("abcdef")))
    key = "block of second, rows 3:10 to 3:15, 6 in all"
    assert notes.log == [("enter", key), ("leave", key)]


@pytest.mark.parametrize("data", [traced([]), pa.table({"x": ["a"]})])
def test_a_block_without_rows_or_faults_is_not_noted(data):
    """There is nothing to isolate."""
    notes = Notes()
    notes.live(deadly(""), data)
    assert not notes.log


@pytest.mark.parametrize(
    ("error", "deaths"), [(HeadraceError("mend it"), 0), (KeyboardInterrupt(), 0), (Died(), 0), (SystemExit(1), 1)], ids=lambda value: type(value).__name__
)
def test_an_exception_is_no_death(error, deaths):
    """Only SystemExit ends a worker's process; whatever else is raised leaves the block."""
    notes = Notes()

    def body(x: hr.Column[str]):
        raise error

    stage = Stage.of(hr.stage(out={"y": str})(body))
    with pytest.raises(type(error)):
        Worker([stage], group="g", guard=notes)(traced(["a"]))
    assert notes.begun == {"block of g, rows 3:10 to 3:10, 1 in all": deaths}
