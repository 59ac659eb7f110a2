"""Events: one stream that can be written and read again."""

import pytest

from headrace import events
from headrace.events import (
    BlockDone,
    BudgetHalved,
    CheckpointSaved,
    Committed,
    EngineSampled,
    Event,
    FileWritten,
    GroupPlanned,
    GroupSampled,
    LookedUp,
    MachinesSeen,
    MetricsReported,
    ProcessDied,
    ReplicaReady,
    RowsFailed,
    RunFailed,
    RunFinished,
    RunStarted,
    StepsDone,
    UnitLost,
    UnitRead,
    WorkersStarted,
)

ALL = [
    RunStarted("reviews", ("a.parquet", "b.parquet"), "out", at_s=1.0),
    GroupPlanned("embed", "model", 1.0, 0.5, ("32 rows",), at_s=1.0),
    MachinesSeen((("10.0.0.1", "g6.4xlarge", None, 16.0, 64.0, 1.0, "L4"),), at_s=1.0),
    GroupSampled("embed", 3, 2, 1, 1, at_s=1.5),
    UnitRead(3, 100, at_s=2.0),
    UnitRead(4, None, at_s=2.0),
    UnitLost(5, "cannot read 'c.parquet'", at_s=2.5),
    ReplicaReady("embed", "node-1", "cuda", 2.5, at_s=3.0),
    ProcessDied("block of embed", 2, at_s=3.5),
    BlockDone("embed", 100, 0.25, 900, 1000, at_s=4.0),
    EngineSampled("embed", 100, 20, 100, 64, 1, 8, 3, 0.25, 0.5, at_s=4.5),
    LookedUp("score", "stays", 1000, 20, at_s=4.7),
    BudgetHalved("embed", "32 rows", 2, at_s=5.0),
    FileWritten("part-0.parquet", 98, 4096, at_s=6.0),
    Committed(98, 2, (("ValueError in embed", 1), ("ProcessDied in embed", 1)), at_s=6.5),
    RunFinished(100, 98, 2, 9.5, at_s=7.0),
    RunFailed("StorageError", "the disk is full", at_s=7.0),
    WorkersStarted(2, 100, at_s=8.0),
    StepsDone(1, 150, 3200, 0.25, 5.0, 0.75, at_s=9.0),
    MetricsReported((149, 150), ((("loss", 0.5),), (("loss", 0.25), ("accuracy", 0.75))), at_s=9.0),
    CheckpointSaved(150, 0.125, True, at_s=9.5),
    RowsFailed((("ValueError in clean", 3),), at_s=9.5),
]


def test_every_kind_of_event_is_covered_here():
    """A new kind of event of a run must be added to the list above."""
    assert {type(event).__name__ for event in ALL} == {kind.__name__ for kind in Event.__subclasses__() if kind.__module__ == Event.__module__}


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_round_trip(event):
    """An event read from its own line is the same event, pairs within it included."""
    assert events.from_json_lines(events.to_json_lines([event])) == [event]


def test_order_is_kept():
    """A stream is read in the order in which it was written, a line each."""
    text = events.to_json_lines(ALL)
    assert len(text.splitlines()) == len(ALL)
    assert events.from_json_lines(text) == ALL


def test_an_unknown_kind_is_refused():
    """A line of a kind that this version does not know is an error, not a guess."""
    with pytest.raises(KeyError, match="Exploded"):
        events.from_json_lines('{"event": "Exploded", "at_s": 1.0}\n')


def test_the_clock_is_read_when_it_happens():
    """Without a time given, an event takes the time of its making."""
    assert UnitRead(0, 1).at_s > 1.6e9
