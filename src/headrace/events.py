"""What happened in a run: a few dataclasses in one stream. Reports, metrics and consoles only read it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at_s`, in seconds since the epoch, on the clock of the machine that saw it."""

    at_s: float = field(default_factory=time.time, kw_only=True)


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run began. `asked_s` is when the command was given; `rows` are those of the input, if known, and `before` those settled by earlier runs.

    `versions` are of headrace and what it stands on, as pairs of name and version.
    """

    pipeline: str
    inputs: tuple[str, ...]
    output: str
    run: str = ""
    asked_s: float | None = None
    rows: int | None = None
    before: int = 0
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class MachinesSeen(Event):
    """The machines of the cluster, from now until this is told again: the fields of `cost.Machine`, in their order, for each."""

    machines: tuple[tuple[str | float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class GroupPlanned(Event):
    """A part of the run, in the order in which rows pass: `kind` is `reader`, `tasks`, `model` or `writer`.

    `cpus` and `gpus` are those of one task or replica; `rules` are the batch rules of its stages.
    """

    group: str
    kind: str
    cpus: float = 0.0
    gpus: float = 0.0
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupSampled(Event):
    """What a group was doing at this moment: blocks that wait for it, tasks of it that run, replicas that are ready, and that get ready."""

    group: str
    queued: int
    running: int
    replicas: int = 0
    starting: int = 0


@dataclass(frozen=True, slots=True)
class UnitRead(Event):
    """An input unit was read to its end; `rows` is how many it has, where only reading could tell."""

    unit: int
    rows: int | None


@dataclass(frozen=True, slots=True)
class UnitLost(Event):
    """An input unit cannot be read, or not to its end."""

    unit: int
    why: str


@dataclass(frozen=True, slots=True)
class ProcessDied(Event):
    """A process died while it did `work`, `deaths` times by now. It is tried again, with more care each time."""

    work: str
    deaths: int


@dataclass(frozen=True, slots=True)
class Committed(Event):
    """Rows are done, or given up as dead letters, and stay so whatever happens. `causes` counts what failed, and why.

    `share` is the part of the run's input that these rows are, by its bytes; None while that is not known.
    """

    rows: int
    dead: int
    causes: tuple[tuple[str, int], ...] = ()
    share: float | None = None


@dataclass(frozen=True, slots=True)
class BlockDone(Event):
    """A group finished a block. `tokens` are the rows' own, `padded_tokens` what the stages were called with."""

    group: str
    rows: int
    busy_s: float
    tokens: int
    padded_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaReady(Event):
    """A replica of a group finished its set-up; `note` is what that returned, if it is text."""

    group: str
    node: str
    device: str
    setup_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class EngineSampled(Event):
    """An engine within a replica of a group: tokens since the last sample, and the state of this moment. See `readings` for each figure."""

    group: str
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
    preempted: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0
    kv_cache_peak: float = 0.0


@dataclass(frozen=True, slots=True)
class LookedUp(Event):
    """A replica of a group asked an online store for features of a view, since it last said so: of how many keys, and how many were not there."""

    group: str
    view: str
    keys: int
    missing: int


@dataclass(frozen=True, slots=True)
class BudgetHalved(Event):
    """An accelerator ran out of memory; from now on this replica divides the stage's batch rule by `divisor`."""

    stage: str
    rule: str
    divisor: int


@dataclass(frozen=True, slots=True)
class FileWritten(Event):
    """A file of the output is complete, which took `busy_s`."""

    path: str
    rows: int
    bytes: int
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkersStarted(Event):
    """The workers of a training began, or began again: how many, and from which step."""

    workers: int
    step: int


@dataclass(frozen=True, slots=True)
class StepsDone(Event):
    """A worker of a training came to `step`. Since it last said so it took `rows`, in `span_s`, of which it waited for them `wait_s`.

    `accelerator_share` is how busy its accelerators were when it said so, 0 to 1, as their driver has it; None where there are none.
    """

    worker: int
    step: int
    rows: int
    wait_s: float
    span_s: float
    accelerator_share: float | None = None


@dataclass(frozen=True, slots=True)
class MetricsReported(Event):
    """What a training's loop reported: steps, and at each of them pairs of name and value."""

    steps: tuple[int, ...]
    values: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A training was saved at `step`, for which its loop was kept waiting `busy_s`; `done` if the loop had ended."""

    step: int
    busy_s: float
    done: bool = False


@dataclass(frozen=True, slots=True)
class RowsFailed(Event):
    """Rows that a training left out because a stage failed on them: pairs of a cause and how many."""

    causes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """A run ended with all rows accounted for: `rows_in` of the input are `rows_out` of the output and `dead` dead letters."""

    rows_in: int
    rows_out: int
    dead: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class RunFailed(Event):
    """A run ended early; what it committed stays. `error` is the class of the error."""

    error: str
    message: str


def to_json_lines(events: Iterable[Event]) -> str:
    """One JSON object a line, with the event's class name under `event`."""
    return "".join(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}) + "\n" for event in events)


def from_json_lines(text: str) -> list[Event]:
    """The inverse of `to_json_lines`; raises KeyError for an event of no known kind."""
    # Not by __subclasses__: slots make a second class of each, and the first may still be listed.
    kinds: dict[str, Callable[..., Event]] = {name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, Event)}
    found = []
    for line in text.splitlines():
        values: dict[str, Any] = json.loads(line)
        kind = kinds[values.pop("event")]
        found.append(kind(**{name: _frozen(value) for name, value in values.items()}))
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
