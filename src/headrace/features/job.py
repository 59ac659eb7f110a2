"""Features as a job over files: events and labels are cut by key into parts, each part is joined, and both steps can go on after any death.

    _features/request.json             what the output is of; nothing else may go on in it
    _features/parts/0-00003-1.parquet  rows of an input, cut by key; gone when the job is done
    _features/cut/0-00003.json         a cut that is done, with its files
    _features/joined/00012.json        a part that is done, whose rows are part-00012.parquet
    _features/report.json              when all is done, together with _SUCCESS

The name and content of every file follow from the request. So a step that is done again writes the same file again, whole, and
a step counts when its small file is there. The ledger's claims see to it that of two jobs on one output the older stops.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from headrace import fingerprint
from headrace.errors import ChangedError, DefinitionError, OutputError, WiringError, check_number, listing
from headrace.features.asof import as_of, latest
from headrace.features.parts import Cut, Part
from headrace.features.reading import Paths, Reading, read_events, read_labels
from headrace.features.view import FeatureView
from headrace.filesystems import locate
from headrace.heartbeat import Heartbeat, wait_until_free
from headrace.ledger import SUCCESS, Ledger
from headrace.store import Folder
from headrace.units import Source

HOME = "_features"
_PART_ROWS = 1 << 20
_PART_BYTES = 256 << 20
_MOST_PARTS = 4096
_TASK_ROWS = 1 << 20  # of several small units that are cut by one task
_TASK_BYTES = 256 << 20
_LINE_BYTES = 64  # of text, where nobody has counted the rows
_ROW_COST_BYTES = 160  # of order and windows, beside the columns themselves


class Task(Protocol):
    """A step: it does its work wherever it is called, and says in words of JSON what came of it."""

    @property
    def name(self) -> str:
        """What it is called in the output's folder."""

    @property
    def memory_bytes(self) -> int:
        """About how much it takes."""

    def __call__(self) -> dict[str, Any]:
        """Do it."""


Each = Callable[[Sequence[Task]], Iterator[tuple[str, dict[str, Any]]]]
"""Does tasks in any order, somewhere, and gives the name and the outcome of each as it ends."""


def here(tasks: Sequence[Task]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do tasks in this process, one after the other."""
    for task in tasks:
        yield task.name, task()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureReport:
    """What a job made: of rows in the output, of events that were read and those without key or time, which count for nothing."""

    views: tuple[str, ...]
    output: str
    rows: int
    events: int
    left_out: int
    parts: int
    wall_s: float
    at: str | None = None

    def __str__(self) -> str:
        out = f", {self.left_out:,} of them without key or time" if self.left_out else ""
        when = f" as of {self.at}" if self.at else ""
        return f"{self.rows:,} rows{when} from {self.events:,} events{out}, in {self.parts} parts, {self.wall_s:.1f} s: {self.output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A task: the features of one part, into one file of the output."""

    number: int
    views: tuple[FeatureView, ...]
    schemas: tuple[pa.Schema, ...]
    files: tuple[tuple[Mapping[str, Any], ...], ...]
    folder: Folder
    output: Folder
    at: dt.datetime | None
    memory_bytes: int

    @property
    def name(self) -> str:
        """See `Task`."""
        return f"{self.number:05d}"

    def __call__(self) -> dict[str, Any]:
        """See `Task`."""
        parts = [Part(self.folder, schema, files, self.number) for schema, files in zip(self.schemas, self.files, strict=True)]
        if self.at is not None:
            table = latest(self.views[0], parts[0], at=self.at)
        else:
            table = parts[-1].table()
            for view, part in zip(self.views, parts[:-1], strict=True):
                table = as_of(view, table, part)
        if table.num_rows:
            stream = io.BytesIO()
            pq.write_table(table, stream, compression="zstd")
            self.output.put(f"part-{self.name}.parquet", stream.getvalue())
        return {"rows": table.num_rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureJob:
    """Views, the events that they read, and labels or an instant; checked, and nothing touched yet.

    `inputs` are the events of each view, and the labels last if there are any.
    """

    views: tuple[FeatureView, ...]
    inputs: tuple[Reading, ...]
    output: Folder
    at: dt.datetime | None
    parts: int
    request: Mapping[str, Any]

    @staticmethod
    def of(
        views: Sequence[FeatureView],
        *,
        output: str,
        input: Paths | None = None,
        labels: Paths | None = None,
        at: dt.datetime | None = None,
        parts: int | None = None,
    ) -> FeatureJob:
        """The job: with `labels` the features as of each label, else what is known `at` an instant, of one view.

        `input` is read instead of the only view's source. What an output was begun with holds for `at` and `parts` that are left out.

        Raises:
            DefinitionError, WiringError, SourceError: as `training_set`, and for views with different keys.
            OutputError: the output cannot be opened.
        """
        _check(views, input, labels, at)
        if parts is not None:
            check_number(parts, "the number of parts", whole=True)
        inputs = [read_events(view, input=input) for view in views]
        if labels is not None:
            inputs.append(read_labels(labels))
            checked = inputs[-1].schema.empty_table()
            for view, reading in zip(views, inputs[:-1], strict=True):
                checked = as_of(view, checked, reading.schema.empty_table())
        place = Folder(locate(output, error=OutputError))
        before = _request_in(place)
        if labels is None and at is None:
            at = dt.datetime.fromisoformat(before["at"]) if before.get("at") else dt.datetime.now(dt.UTC)
        count = parts or before.get("parts") or max(map(_parts, inputs))
        request = {
            "views": {view.name: repr(dataclasses.replace(view, source=None, pipeline=None)) for view in views},
            "code": {view.name: fingerprint.facts(view.pipeline, {}) for view in views if view.pipeline},
            "at": None if at is None else at.isoformat(),
            "parts": count,
            "inputs": [_units(reading.source) for reading in inputs],
        }
        return FeatureJob(views=tuple(views), inputs=tuple(inputs), output=place, at=at, parts=count, request=request)

    def finished(self) -> FeatureReport | None:
        """The report of this job where it is done already; None where there is something to do.

        Raises:
            OutputError: the folder holds something else.
            ChangedError: the output was begun with another request.
        """
        names = self.output.names("")
        before = _request_in(self.output)
        if not before:
            if set(names) - {HOME}:
                raise OutputError(f"output {self.output.place.uri!r} holds no features: it has {listing(names)}; choose an empty folder")
            return None
        if changed := [name for name, value in self.request.items() if before.get(name) != value]:
            raise ChangedError(
                f"the output {self.output.place.uri!r} was begun with other {' and '.join(changed)}: features of both would be mixed. "
                "Begin again with --restart, or choose another folder"
            )
        if SUCCESS not in names:
            return None
        values = json.loads(self.output.read(f"{HOME}/report.json"))
        return FeatureReport(**values | {"views": tuple(values["views"])})

    def run(self, *, each: Each = here, rows: Callable[[FeatureView, Reading], Reading] | None = None, restart: bool = False) -> FeatureReport:
        """Do what is not done yet, and finish the output.

        `each` says where tasks run, in this process when left out, and `rows` what is read instead of events whose pipeline is not to run
        within the tasks.

        Raises:
            OutputError: the folder holds something else.
            ChangedError: the output was begun with another request.
            TakenOverError: another run is at work on the output, or has taken it over.
            SourceError, StageError, StorageError: as they come.
        """
        home = Folder(self.output.place.child(HOME))
        if restart:
            self._clear()
        elif (done := self.finished()) is not None:
            return done
        started = time.perf_counter()
        wait_until_free(home, uri=self.output.place.uri)
        held, _ = Ledger.claim(home, restart=True)  # for its claim alone: what is done, files say
        with Heartbeat(home, held.run):
            home.put("request.json", json.dumps(self.request, indent=1).encode())
            inputs = [rows(view, reading) if rows and reading.pipeline else reading for view, reading in zip(self.views, self.inputs, strict=False)]
            inputs += self.inputs[len(self.views) :]
            cuts = self._cuts(inputs, Folder(home.place.child("parts")))
            cut = _done(home, "cut", cuts, each, held)
            joins = self._joins(cuts, cut, Folder(home.place.child("parts")))
            joined = _done(home, "joined", joins, each, held)
            events = [outcome for name, outcome in cut.items() if int(name.partition("-")[0]) < len(self.views)]
            report = FeatureReport(
                views=tuple(view.name for view in self.views),
                output=self.output.place.uri,
                rows=sum(outcome["rows"] for outcome in joined.values()),
                events=sum(outcome["rows"] for outcome in events),
                left_out=sum(outcome["left_out"] for outcome in events),
                parts=self.parts,
                wall_s=time.perf_counter() - started,
                at=self.request["at"],
            )
            home.put("report.json", json.dumps(dataclasses.asdict(report), indent=1).encode())
            held.check()
            self.output.put(SUCCESS, b"")
            for folder in ("parts", "rows"):
                home.delete(folder)
        return report

    def _clear(self) -> None:
        """Throw away what a job left."""
        names = self.output.names("")
        if names and HOME not in names:
            raise OutputError(f"output {self.output.place.uri!r} holds no features: it has {listing(names)}; choose another folder")
        wait_until_free(Folder(self.output.place.child(HOME)), uri=self.output.place.uri)
        for name in [SUCCESS, *(name for name in names if name.startswith("part-")), HOME]:
            self.output.delete(name)

    def _cuts(self, inputs: Sequence[Reading], folder: Folder) -> list[Cut]:
        cuts = []
        for number, reading in enumerate(inputs):
            labels = number == len(self.views)
            key = tuple(self.views[0].key)
            view = None if labels else dataclasses.replace(self.views[number], pipeline=None, source=None)
            bare = dataclasses.replace(reading, source=dataclasses.replace(reading.source, units=()))
            for at, units in enumerate(_packed(reading.source)):
                needed = () if view is None else (*view.key, view.time)
                cuts.append(Cut(name=f"{number}-{at:05d}", reading=bare, units=units, key=key, needed=needed, parts=self.parts, folder=folder))
        return cuts

    def _joins(self, cuts: Sequence[Cut], cut: Mapping[str, Mapping[str, Any]], folder: Folder) -> list[Join]:
        files = tuple(tuple(f for c in cuts if int(c.name.partition("-")[0]) == number for f in cut[c.name]["files"]) for number in range(len(self.inputs)))
        wide = [_ROW_COST_BYTES + 2 * reading.source.row_bytes for reading in self.inputs]
        return [
            Join(
                number=part,
                views=tuple(dataclasses.replace(view, pipeline=None, source=None) for view in self.views),
                schemas=tuple(reading.schema for reading in self.inputs),
                files=tuple(tuple({"name": f["name"], "rows": f["rows"]} for f in those if str(part) in f["rows"]) for those in files),
                folder=folder,
                output=self.output,
                at=self.at,
                memory_bytes=sum(cost * sum(f["rows"].get(str(part), 0) for f in those) for cost, those in zip(wide, files, strict=True)),
            )
            for part in range(self.parts)
        ]


def _check(views: Sequence[FeatureView], input: Paths | None, labels: Paths | None, at: dt.datetime | None) -> None:
    if not views:
        raise DefinitionError("there is no feature view to compute")
    names = listing(view.name for view in views)
    if labels is not None and at is not None:
        raise DefinitionError("labels have times of their own, so that no instant can be given beside them")
    if labels is None and len(views) > 1:
        raise DefinitionError(f"what is known at an instant is computed of one view at a time, and there are {names}; name one of them, or give labels")
    if input is not None and len(views) > 1:
        raise DefinitionError(f"an input instead of a view's source can be given where there is one view, and there are {names}")
    for view in views[1:]:
        if view.key != views[0].key:
            raise WiringError(
                f"feature view {view.name!r} has the key {listing(view.key)}, but {views[0].name!r} has {listing(views[0].key)}, and a job is cut by one key; "
                "run them one after the other: what the first makes are the labels of the second"
            )


def _request_in(output: Folder) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(output.read(f"{HOME}/request.json"))
        return values
    except FileNotFoundError:
        return {}


def _done(home: Folder, step: str, tasks: Sequence[Task], each: Each, held: Ledger) -> dict[str, dict[str, Any]]:
    """The outcome of every task by its name; those that a run before has done are not done again."""
    there = set(home.names(step))
    found = {task.name: json.loads(home.read(f"{step}/{task.name}.json")) for task in tasks if f"{task.name}.json" in there}
    for name, outcome in each([task for task in tasks if task.name not in found]):
        held.check()
        home.put(f"{step}/{name}.json", json.dumps(outcome).encode())
        found[name] = outcome
    return {task.name: found[task.name] for task in tasks}


def _units(source: Source) -> list[list[Any]]:
    """What tells the versions of an input's files apart."""
    return [[*unit.paths, unit.row_group, unit.start, unit.rows, unit.size_bytes, unit.modified_ns] for unit in source.units]


def _rows(source: Source) -> int:
    """About how many rows there are."""
    sizes = {unit.paths: unit.size_bytes for unit in source.units}
    return source.rows if source.rows is not None else sum(sizes.values()) // _LINE_BYTES


def _parts(reading: Reading) -> int:
    rows = _rows(reading.source)
    return min(_MOST_PARTS, max(1, math.ceil(rows / _PART_ROWS), math.ceil(rows * reading.source.row_bytes / _PART_BYTES)))


def _packed(source: Source) -> Iterator[tuple[Any, ...]]:
    """The units, several small ones together."""
    task: list[Any] = []
    rows = 0
    most = max(1, min(_TASK_ROWS, _TASK_BYTES // max(1, source.row_bytes)))
    for unit in source.units:
        count = most if unit.rows is None else unit.rows
        if task and rows + count > most:
            yield tuple(task)
            task, rows = [], 0
        task.append(unit)
        rows += count
    if task:
        yield tuple(task)
