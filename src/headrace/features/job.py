"""Features as a job over files: events and labels are cut by key into parts, each part is joined, and both steps can go on after any death.

    _headrace/features/request.json               what the output is of; nothing else may go on in it
    _headrace/features/parts/0-0-00003-1.parquet  rows of an input, cut by key; gone when the job is done, unless it is incremental
    _headrace/features/cut/0-0-00003.json         a cut that is done, with its files
    _headrace/features/joined/0-00012.json        a part that is done, whose rows are part-00012.parquet
    _headrace/report.json                         when all is done, together with _SUCCESS

The name and content of every file follow from the request. So a step that is done again writes the same file again, whole, and
a step counts when its small file is there. The ledger's claims see to it that of two jobs on one output the older stops.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from headrace import ledger
from headrace.errors import DefinitionError, OutputError, WiringError, check_number, listing
from headrace.features.asof import as_of
from headrace.features.joins import Join
from headrace.features.parts import Cut
from headrace.features.reading import Paths, Reading, read_events, read_labels
from headrace.features.request import Request, grown, refuse_changes, request_of, units_of
from headrace.features.view import FeatureView
from headrace.filesystems import locate
from headrace.heartbeat import Heartbeat, wait_until_free
from headrace.ledger import REPORT, SUCCESS, Ledger
from headrace.store import Folder
from headrace.units import Source

HOME = f"{ledger.HOME}/features"
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


Watch = Callable[[str, int, int], object]


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

    def to_dict(self, *, run: str, started_s: float) -> dict[str, Any]:
        """As JSON has it; with what `headrace runs` reads of every run."""
        rows = {"rows_in": self.events, "rows": self.events, "dead_letters": self.left_out}
        about = {"pipeline": ", ".join(self.views), "kind": "features", "output": self.output, "run": run, "state": "succeeded", "started_s": started_s}
        return {**about, **rows, "wall_s": self.wall_s, "features": dataclasses.asdict(self)}

    def __str__(self) -> str:
        out = f", {self.left_out:,} of them without key or time" if self.left_out else ""
        when = f" as of {self.at}" if self.at else ""
        return f"{self.rows:,} rows{when} from {self.events:,} events{out}, in {self.parts} parts, {self.wall_s:.1f} s: {self.output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureJob:
    """Views, the events that they read, and labels or an instant; checked, and nothing touched yet.

    `inputs` are the events of each view, and the labels last if there are any.
    """

    views: tuple[FeatureView, ...]
    inputs: tuple[Reading, ...]
    output: Folder
    parts: int
    request: Request

    @property
    def at(self) -> dt.datetime | None:
        """As of when what is new is computed; None where labels say so."""
        told = self.request["inputs"][-1]["at"]
        return None if told is None else dt.datetime.fromisoformat(told)

    @staticmethod
    def of(
        views: Sequence[FeatureView],
        *,
        output: str,
        input: Paths | None = None,
        labels: Paths | None = None,
        at: dt.datetime | None = None,
        parts: int | None = None,
        incremental: bool = False,
    ) -> FeatureJob:
        """The job: with `labels` the features as of each label, else what is known `at` an instant, of one view.

        `input` is read instead of the only view's source. What an output was begun with holds for `at` and `parts` that are left out.
        An `incremental` output keeps its parts. When files are added to the input, only keys with events in these are computed again, as of
        the new instant.

        Raises:
            DefinitionError, WiringError, SourceError: as `training_set`, and for views with different keys.
            OutputError: the output cannot be opened.
        """
        _check(views, input, labels, at)
        if incremental and labels is not None:
            raise DefinitionError("an incremental output is of what is known at an instant; with labels, join them anew")
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
        asked = at if at is None or at.tzinfo else at.replace(tzinfo=dt.UTC)
        first = before["inputs"][0]["at"] if before else None
        if labels is None and asked is None:
            asked = dt.datetime.fromisoformat(first) if first and not incremental else dt.datetime.now(dt.UTC)
        count = parts or before.get("parts") or max(map(_parts, inputs))
        request = request_of(views, inputs, at=asked, parts=count, incremental=incremental)
        if incremental and before.get("incremental"):
            request = grown(before, request)
        return FeatureJob(views=tuple(views), inputs=tuple(inputs), output=place, parts=count, request=request)

    def finished(self) -> FeatureReport | None:
        """The report of this job where it is done already; None where there is something to do.

        Raises:
            OutputError: the folder holds something else.
            ChangedError: the output was begun with another request.
        """
        names = self.output.names("")
        before = _request_in(self.output)
        if not before:
            if set(names) - {ledger.HOME} or ledger.load(self.output):
                raise OutputError(f"output {self.output.place.uri!r} holds no features: it has {listing(names)}; choose an empty folder")
            return None
        refuse_changes(before, self.request, self.output.place.uri)
        if SUCCESS not in names or before != self.request:
            return None
        values = json.loads(self.output.read(REPORT))["features"]
        return FeatureReport(**values | {"views": tuple(values["views"])})

    def run(
        self,
        *,
        each: Each = here,
        rows: Callable[[FeatureView, Reading], Reading] | None = None,
        watch: Watch = lambda step, done, total: None,
        restart: bool = False,
    ) -> FeatureReport:
        """Do what is not done yet, and finish the output.

        `each` says where tasks run, in this process when left out, and `rows` what is read instead of events whose pipeline is not to run
        within the tasks. `watch` is told how many tasks of a step are done, and how many there are.

        Raises:
            OutputError: the folder holds something else.
            ChangedError: the output was begun with another request.
            TakenOverError: another run is at work on the output, or has taken it over.
            SourceError, StageError, StorageError: as they come.
        """
        home = Folder(self.output.place.child(HOME))
        if restart:
            self._clear()
        elif (report := self.finished()) is not None:
            return report
        asked_s, started = time.time(), time.perf_counter()
        wait_until_free(self.output, uri=self.output.place.uri)
        held, _ = Ledger.claim(self.output, restart=True)  # for its claim alone: what is done, files say
        with Heartbeat(self.output, held.run):
            self.output.delete(SUCCESS)  # before the request: whoever sees both would take the output for one of this request
            home.put("request.json", json.dumps(self.request, indent=1).encode())
            inputs = [rows(view, reading) if rows and reading.pipeline else reading for view, reading in zip(self.views, self.inputs, strict=False)]
            inputs += self.inputs[len(self.views) :]
            cuts = self._cuts(inputs, Folder(home.place.child("parts")))
            cut = _done(home, "cut", cuts, each, held, watch)
            joined: dict[int, int] = {}
            for generation in range(len(self.request["inputs"])):
                joins = self._joins(generation, cut, Folder(home.place.child("parts")))
                done = _done(home, "joined", joins, each, held, watch)
                joined |= {join.number: done[join.name]["rows"] for join in joins}
            events = [outcome for name, outcome in cut.items() if int(name.partition("-")[0]) < len(self.views)]
            report = FeatureReport(
                views=tuple(view.name for view in self.views),
                output=self.output.place.uri,
                rows=sum(joined.values()),
                events=sum(outcome["rows"] for outcome in events),
                left_out=sum(outcome["left_out"] for outcome in events),
                parts=self.parts,
                wall_s=time.perf_counter() - started,
                at=self.request["inputs"][-1]["at"],
            )
            self.output.put(REPORT, json.dumps(report.to_dict(run=held.run, started_s=asked_s), indent=1).encode())
            held.check()
            self.output.put(SUCCESS, b"")
            for folder in () if self.request["incremental"] else ("parts", "rows"):
                home.delete(folder)
        return report

    def tables(self) -> Iterator[pa.Table]:
        """What a finished job has written, part by part."""
        for name in self.output.names(""):
            if name.startswith("part-"):
                place = self.output.place.child(name)
                yield pq.read_table(place.path, filesystem=place.filesystem, partitioning=None)

    def _clear(self) -> None:
        """Throw away what a job left."""
        names = self.output.names("")
        if set(names) - {ledger.HOME} and not _request_in(self.output):
            raise OutputError(f"output {self.output.place.uri!r} holds no features: it has {listing(names)}; choose another folder")
        wait_until_free(self.output, uri=self.output.place.uri)
        for name in [SUCCESS, *(name for name in names if name.startswith("part-")), ledger.HOME]:
            self.output.delete(name)

    def _cuts(self, inputs: Sequence[Reading], folder: Folder) -> list[Cut]:
        cuts = []
        for number, reading in enumerate(inputs):
            view = None if number == len(self.views) else self.views[number]
            needed = () if view is None else (*view.key, view.time)
            bare = dataclasses.replace(reading, source=dataclasses.replace(reading.source, units=()))
            whole = reading is not self.inputs[number]  # what a pipeline has made of the events, all of it
            for generation, told in enumerate(self.request["inputs"]):
                units = reading.source.units if whole else units_of(reading.source, told["units"][number])
                for at, some in enumerate(_packed(dataclasses.replace(reading.source, units=units))):
                    name, key = f"{number}-{generation}-{at:05d}", tuple(self.views[0].key)
                    cuts.append(Cut(name=name, reading=bare, units=some, key=key, needed=needed, parts=self.parts, folder=folder))
        return cuts

    def _joins(self, generation: int, cut: Mapping[str, Mapping[str, Any]], folder: Folder) -> list[Join]:
        """The joins of what was cut up to a generation: of all parts in the first, then of those to which events were added."""
        placed = [(int(name.split("-")[0]), int(name.split("-")[1]), file) for name, outcome in cut.items() for file in outcome["files"]]

        def files(number: int, part: str, first: int = 0) -> tuple[Mapping[str, Any], ...]:
            return tuple(file for of, when, file in placed if of == number and first <= when <= generation and part in file["rows"])

        told = self.request["inputs"][generation]["at"]
        joins = []
        for number in range(self.parts):
            part = str(number)
            every = tuple(files(at, part) for at in range(len(self.inputs)))
            added = files(0, part, generation) if generation else None
            costs = [(_ROW_COST_BYTES + 2 * reading.source.row_bytes) for reading in self.inputs]
            join = Join(
                number=number,
                views=tuple(dataclasses.replace(view, pipeline=None, source=None) for view in self.views),
                schemas=tuple(reading.schema for reading in self.inputs),
                files=every,
                folder=folder,
                output=self.output,
                at=None if told is None else dt.datetime.fromisoformat(told),
                memory_bytes=sum(cost * sum(file["rows"][part] for file in those) for cost, those in zip(costs, every, strict=True)),
                generation=generation,
                added=added,
            )
            if added is None or added:
                joins.append(join)
        return joins


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


def _done(home: Folder, step: str, tasks: Sequence[Task], each: Each, held: Ledger, watch: Watch) -> dict[str, dict[str, Any]]:
    """The outcome of every task by its name; those that a run before has done are not done again."""
    there = set(home.names(step))
    found = {task.name: json.loads(home.read(f"{step}/{task.name}.json")) for task in tasks if f"{task.name}.json" in there}
    for name, outcome in each([task for task in tasks if task.name not in found]):
        held.check()
        home.put(f"{step}/{name}.json", json.dumps(outcome).encode())
        found[name] = outcome
        watch(step, len(found), len(tasks))
    return {task.name: found[task.name] for task in tasks}


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
