"""The second step of a job of features: the events of one part become one file of the output."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.features.asof import as_of, latest
from headrace.features.parts import Part
from headrace.features.view import FeatureView
from headrace.store import Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A task: the features of one part, into one file of the output.

    `files` are those with rows of the part, for each view and at last for labels, if there are any. Where events were `added` to an
    output, only the keys in those files are computed again.
    """

    number: int
    views: tuple[FeatureView, ...]
    schemas: tuple[pa.Schema, ...]
    files: tuple[tuple[Mapping[str, Any], ...], ...]
    folder: Folder
    output: Folder
    at: dt.datetime | None
    memory_bytes: int
    generation: int = 0
    added: tuple[Mapping[str, Any], ...] | None = None

    @property
    def name(self) -> str:
        """See `Task`."""
        return f"{self.generation}-{self.number:05d}"

    def __call__(self) -> dict[str, Any]:
        """See `Task`."""
        parts = [Part(self.folder, schema, files, self.number) for schema, files in zip(self.schemas, self.files, strict=True)]
        if self.added is not None:
            table = self._renewed(parts[0])
        elif self.at is not None:
            table = latest(self.views[0], parts[0], at=self.at)
        else:
            table = parts[-1].table()
            for view, part in zip(self.views, parts[:-1], strict=True):
                table = as_of(view, table, part)
        if table.num_rows or self.added is not None:
            stream = io.BytesIO()
            pq.write_table(table, stream, compression="zstd")
            self.output.put(self._file, stream.getvalue())
        return {"rows": table.num_rows}

    @property
    def _file(self) -> str:
        return f"part-{self.number:05d}.parquet"

    def _renewed(self, events: Part) -> pa.Table:
        """What is there already, but for the keys with added events, and these computed anew."""
        view, key = self.views[0], list(self.views[0].key)
        assert self.at is not None
        keys = Part(self.folder, pa.schema([events.schema.field(name) for name in key]), self.added or (), self.number).table()
        table = latest(view, events, at=self.at, keys=keys)
        if self._file in self.output.names(""):
            place = self.output.place.child(self._file)
            there = pq.read_table(place.path, filesystem=place.filesystem, partitioning=None)
            same = there.select(key).append_column("row", pa.array(range(there.num_rows), pa.int64())).join(keys, key, join_type="left anti")["row"]
            table = pa.concat_tables([there.take(same), table])
        return table.sort_by([(name, "ascending") for name in key])
