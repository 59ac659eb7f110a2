"""Units: the pieces that an input is cut into. A unit is read, counted, and later committed, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from headrace.filesystems import Place
from headrace.filters import Filter


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the input that is read as one: a row group, a text file, or a run of image files.

    `rows` is None where only reading tells (text files, and everything behind a filter). `limit` cuts the unit after that
    many rows. `modified_ns` and `size_bytes` identify the version of the file.
    """

    id: int
    paths: tuple[str, ...]
    row_group: int | None
    rows: int | None
    size_bytes: int
    modified_ns: int
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one format on one file system, cut into units.

    `row_bytes` is the weight of a row on average, `heaviest_bytes` that in the heaviest part of the input, `nulls` how many
    nulls the statistics of a column tell of.
    """

    place: Place
    format: str
    schema: pa.Schema
    units: tuple[Unit, ...]
    where: Filter | None = None
    row_bytes: int = 1024
    heaviest_bytes: int = 1024
    nulls: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Rows in all, or None when only reading tells."""
        counts = [unit.rows for unit in self.units]
        return None if None in counts else sum(count for count in counts if count is not None)


def plain(arrow: pa.DataType) -> pa.DataType:
    """The type of a column's values, be they encoded in a dictionary or not."""
    return arrow.value_type if pa.types.is_dictionary(arrow) else arrow
