"""Events and labels from files: what a view needs of them, checked before it is read, and read in bounded tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from headrace.columns import ANY
from headrace.errors import DefinitionError, SourceError, WiringError
from headrace.features.view import FeatureView, schema_of
from headrace.formats import Input
from headrace.lineage import FAULT, HIDDEN, Fault
from headrace.pipeline import Pipeline
from headrace.readers import read
from headrace.sources import open_source, select
from headrace.units import Source, Unit, plain
from headrace.worker import Worker

Paths = str | Sequence[str] | Input

_BLOCK_ROWS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Columns of an input, behind a pipeline if there is one. `schema` is that of the tables that it gives."""

    source: Source
    schema: pa.Schema
    pipeline: Pipeline | None = None

    def tables(self, units: Sequence[Unit] | None = None) -> Iterator[pa.Table]:
        """The rows of these units, or of all, in order, in tables of bounded size.

        Raises:
            SourceError: a file cannot be read, or a value does not fit its column. A missing event would be a wrong feature.
            StageError: a stage of the pipeline raised.
        """
        wanted = dict(self.pipeline.inputs) if self.pipeline else {}
        written = self.pipeline.outputs if self.pipeline else {}
        wanted |= {name: ANY for name in self.schema.names if name not in wanted and name not in written}
        worker = Worker(self.pipeline.stages, overlap=False) if self.pipeline else None
        for unit in self.source.units if units is None else units:
            for table in read(self.source, [(unit, [(0, None)])], wanted, block_rows=_BLOCK_ROWS):
                if table[FAULT].null_count < table.num_rows:
                    raise SourceError(Fault.from_json(table[FAULT].drop_null()[0].as_py()).message)
                rows = table.drop_columns(list(HIDDEN))
                yield (worker(rows) if worker else rows).select(self.schema.names).cast(self.schema)

    def whole(self) -> pa.Table:
        """All rows as one table."""
        return pa.concat_tables([self.schema.empty_table(), *self.tables()])


def read_events(view: FeatureView, *, input: Paths | None = None) -> Reading:
    """What a view reads of its source, or of `input` instead.

    Raises:
        DefinitionError: the view names no source, and none is given.
        SourceError: the input cannot be found or read.
        WiringError: it is not what the view needs.
    """
    paths = view.source if input is None else input
    if paths is None:
        raise DefinitionError(f"feature view {view.name!r} has no source; give it one, such as hr.FeatureView({view.name!r}, 'events/*.parquet', ...)")
    wanted = paths if isinstance(paths, Input) else Input(paths)
    source = open_source(wanted)
    written = view.pipeline.outputs if view.pipeline else {}
    kept = [name for name in view.columns if name not in written]
    there = {field.name: plain(field.type) for field in source.schema} | {name: column.arrow for name, column in written.items()}
    whole = pa.schema(list(there.items()))
    schema_of(view, whole)  # tells what is missing in the words of the view
    inputs = view.pipeline.inputs if view.pipeline else {}
    source = select(source, dict.fromkeys(kept, ANY) | dict(inputs), pipeline=view.name, where=wanted.where, limit=wanted.limit)
    _refuse_unreadable(source)
    return Reading(source=source, schema=pa.schema([whole.field(name) for name in view.columns]), pipeline=view.pipeline)


def read_labels(labels: Paths) -> Reading:
    """All columns of an input of labels.

    Raises:
        SourceError: it cannot be found or read.
    """
    wanted = labels if isinstance(labels, Input) else Input(labels)
    source = open_source(wanted)
    source = select(source, dict.fromkeys(source.schema.names, ANY), pipeline="labels", where=wanted.where, limit=wanted.limit)
    _refuse_unreadable(source)
    return Reading(source=source, schema=pa.schema([pa.field(field.name, plain(field.type)) for field in source.schema]))


def without_pipeline(reading: Reading, source: Source) -> Reading:
    """The same columns from where the pipeline's results lie.

    Raises:
        WiringError: they do not lie there.
    """
    if missing := [name for name in reading.schema.names if name not in source.schema.names]:
        raise WiringError(f"{source.place.uri!r} lacks column {missing[0]!r}")
    return replace(reading, source=source, pipeline=None)


def _refuse_unreadable(source: Source) -> None:
    """A file that cannot be read holds events that nobody would miss."""
    for why in source.unreadable.values():
        raise SourceError(f"{why}; features without its rows would be wrong: mend it, or leave it out of the input")
