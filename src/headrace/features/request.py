"""What an output of features is of, in words of JSON: kept beside it, and compared when the job is run again.

The files of the input come in generations: one, unless files are added to an incremental output. Each has the instant as of
which the keys that it tells of are computed.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from headrace import fingerprint
from headrace.errors import ChangedError
from headrace.features.reading import Reading
from headrace.features.view import FeatureView
from headrace.units import Source, Unit

Request = Mapping[str, Any]


def request_of(views: Sequence[FeatureView], inputs: Sequence[Reading], *, at: dt.datetime | None, parts: int, incremental: bool) -> dict[str, Any]:
    """The request of a job that begins now."""
    return {
        "views": {view.name: repr(dataclasses.replace(view, source=None, pipeline=None)) for view in views},
        "code": {view.name: fingerprint.facts(view.pipeline, {}) for view in views if view.pipeline},
        "parts": parts,
        "filters": [reading.source.where and reading.source.where.text for reading in inputs],
        "incremental": incremental,
        "inputs": [{"at": None if at is None else at.isoformat(), "units": [list(map(unit_of, reading.source.units)) for reading in inputs]}],
    }


def grown(before: Request, now: Request) -> dict[str, Any]:
    """The request of an incremental output, with the files that are new in one more generation; where others changed, `now` as it is."""
    was = [unit for generation in before["inputs"] for unit in generation["units"][0]]
    (here,) = now["inputs"]
    if any(unit not in here["units"][0] for unit in was):
        return dict(now)
    known = set(map(repr, was))
    new = [unit for unit in here["units"][0] if repr(unit) not in known]
    return dict(now) | {"inputs": [*before["inputs"], *([here | {"units": [new]}] if new else [])]}


def refuse_changes(before: Request, now: Request, output: str) -> None:
    """Raise ChangedError unless `now` goes on with what `before` began."""
    changed = [name for name, value in now.items() if name != "inputs" and before.get(name) != value]
    if before["inputs"] != now["inputs"][: len(before["inputs"])]:
        changed.append("inputs or another instant")
    if changed:
        raise ChangedError(
            f"the output {output!r} was begun with other {' and '.join(changed)}: features of both would be mixed. "
            "Begin again with --restart, or choose another folder"
        )


def units_of(source: Source, told: Sequence[Sequence[Any]]) -> tuple[Unit, ...]:
    """The units of a source that are told of in a request, in the order of the source."""
    wanted = set(map(repr, told))
    return tuple(unit for unit in source.units if repr(unit_of(unit)) in wanted)


def unit_of(unit: Unit) -> list[Any]:
    """What tells a unit, and the version of its file, apart from others."""
    return [*unit.paths, unit.row_group, unit.start, unit.rows, list(unit.span or ()), unit.size_bytes, unit.modified_ns]
