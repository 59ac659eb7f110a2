"""The parity gate: the same rows in every way that a pipeline can run, compared value by value.

A *target* is a function from rows to the pipeline's outputs, one for each row, in order. `local` says what is correct. Ints, text, bytes, instants
and nulls must be equal; floats and vectors may differ by a `Tolerance`. Nothing here knows an engine: targets that need one are given in.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.columns import ColumnType
from headrace.errors import HeadraceError, ParityError, SettingError, SourceError, check_number, listing
from headrace.formats import Input
from headrace.local import prepare
from headrace.pipeline import Pipeline

if TYPE_CHECKING:
    from headrace.client import Client

Row = Mapping[str, Any]
Target = Callable[[Sequence[Row]], Sequence[Row]]

_TOLERANCES = ("absolute", "relative", "cosine")
_AT_ONCE = 16  # requests under way at a time, where a service is asked concurrently
_ROWS_A_REQUEST = 64
_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far floats may lie apart: by `absolute` plus `relative` of the expected value; vectors in each element, and by `cosine` as a whole.

    `cosine` is the largest allowed 1 - cos of the angle between two vectors; it finds a turn of vectors whose elements are all small.
    """

    absolute: float = 1e-4
    relative: float = 1e-5  # a price of 57.13 that became 57.1 is no matter of float32
    cosine: float = 1e-4

    def __post_init__(self) -> None:
        for name in _TOLERANCES:
            check_number(getattr(self, name), f"the tolerance {name}", zero=True)

    @staticmethod
    def parse(words: Sequence[str]) -> Tolerance:
        """The tolerance that `0.001` (absolute), `relative=0.01` and `cosine=0.01` spell together.

        Raises:
            SettingError: a word is nothing of the kind.
        """
        given: dict[str, float] = {}
        for word in words:
            name, number = word.split("=", 1) if "=" in word else ("absolute", word)
            try:
                given[_TOLERANCES[_TOLERANCES.index(name)]] = float(number)
            except ValueError:
                raise SettingError(f"--tolerance {word!r} must be a number, or one of {listing(_TOLERANCES)} with a number: relative=0.01") from None
        return Tolerance(**given)


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that differs: for which target, in which row (None: the target as a whole) and column, what it should be and is, and how far that is."""

    target: str
    row: int | None
    column: str
    expected: str
    found: str
    apart: str


@dataclass(frozen=True, slots=True)
class Golden:
    """Rows to compare with: the columns that a pipeline reads, and of its outputs those that the file has, too (`columns`), as expected values."""

    rows: Sequence[Row]
    expected: Sequence[Row] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was compared, and what differs."""

    pipeline: str
    rows: int
    columns: tuple[str, ...]
    golden: tuple[str, ...]
    targets: tuple[str, ...]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        compared = f"{self.rows:,} row{'s' * (self.rows != 1)}, columns {', '.join(self.columns)}; local against {', '.join(self.targets)}"
        told = f"; expected values in the input: {', '.join(self.golden)}" if self.golden else ""
        if not self.differences:
            return f"{self.pipeline}: all values are equal ({compared}{told})"
        wrong = Counter(one.target for one in self.differences)
        count = len(self.differences)
        return f"{self.pipeline}: {count:,} value{'s differ' if count != 1 else ' differs'}, {_counts(wrong)} ({compared}{told})"

    def require(self) -> Verdict:
        """The verdict itself, if all is equal.

        Raises:
            ParityError: with the sum, and the first differences.
        """
        if self.differences:
            shown = [
                f"  {one.target}: {'all rows' if one.row is None else f'row {one.row}'}{', ' * bool(one.column)}{one.column}: "
                f"{one.expected} became {one.found} ({one.apart})"
                for one in self.differences[:5]
            ]
            rest = [f"  and {len(self.differences) - 5:,} more"] if len(self.differences) > 5 else []
            raise ParityError("\n".join([str(self), *shown, *rest]))
        return self


def _counts(wrong: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} in {target}" for target, count in wrong.items())


def golden(source: Input, pipeline: Pipeline) -> Golden:
    """The rows of any readable input that `pipeline` reads. A column that it writes, and does not read, holds expected values.

    Raises:
        SourceError: the input lacks a column, or holds another type or a damaged value.
    """
    from headrace.arrays import to_rows  # loaded with the readers of files, which `import headrace` does without
    from headrace.lineage import FAULT, Fault
    from headrace.readers import read
    from headrace.sources import open_source, select

    found = open_source(source)
    told = {name: column for name, column in pipeline.outputs.items() if name in found.schema.names and name not in pipeline.inputs}
    wanted = {**pipeline.inputs, **told}
    found = select(found, wanted, pipeline=pipeline.name, where=source.where, limit=source.limit)
    rows: list[dict[str, Any]] = []
    for unit in found.units:
        for data in read(found, [(unit, [(0, None)])], wanted, block_rows=_BLOCK_ROWS):
            if fault := next(filter(None, data[FAULT].to_pylist()), None):
                raise SourceError(Fault.from_json(fault).message)
            rows += to_rows(data, wanted)
    inputs = [{name: row[name] for name in pipeline.inputs} for row in rows]
    return Golden(inputs, [{name: row[name] for name in told} for row in rows] if told else (), tuple(told))


def gate(pipeline: Pipeline, rows: Golden, targets: Mapping[str, Target], *, tolerance: Tolerance | None = None, device: str = "cpu") -> Verdict:
    """Run `rows` through `local`, once more in three ways that show whether rows influence each other, and through `targets`; compare.

    The stages are set up once for all runs in this process, on `device`. A target that raises counts as a difference.

    Raises:
        StageError, WiringError: as for `Pipeline.local`: without its values there is nothing to compare with.
    """
    tolerance = tolerance or Tolerance()
    run = prepare(pipeline, device=device)
    expected = run(rows.rows)
    every: dict[str, Target] = {
        "local reversed": lambda given: run(given[::-1])[::-1],
        "local row by row": lambda given: [one for row in given for one in run([row])],
        **targets,
    }
    differences: list[Difference] = []
    if rows.columns:
        types = {name: pipeline.outputs[name] for name in rows.columns}
        differences += compare(rows.expected, expected, types, tolerance=tolerance, target="local")
    for name, target in every.items():
        try:
            found = target(rows.rows)
        except HeadraceError as error:
            differences.append(Difference(name, None, "", "values", " ".join(str(error).split())[:300], type(error).__name__))
            continue
        differences += compare(expected, found, pipeline.outputs, tolerance=tolerance, target=name)
    return Verdict(pipeline.name, len(rows.rows), tuple(pipeline.outputs), rows.columns, tuple(every), tuple(differences))


def over_http(client: Client, pipeline: str) -> dict[str, Target]:
    """A service as three targets: one row a request, JSON; many rows a request, Arrow; and many requests at once, JSON.

    A client made with `version=N` asks that version alone.
    """
    remote = client[pipeline]

    def concurrent(rows: Sequence[Row]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda row: remote(row, form="json"), rows))

    def batched(rows: Sequence[Row]) -> list[dict[str, Any]]:
        parts = (rows[at : at + _ROWS_A_REQUEST] for at in range(0, len(rows), _ROWS_A_REQUEST))
        return list(itertools.chain.from_iterable(remote(part, form="arrow") for part in parts))

    return {
        "HTTP row by row": lambda rows: [remote(row, form="json") for row in rows],
        "HTTP in batches": batched,
        "HTTP concurrently": concurrent,
    }


def compare(
    expected: Sequence[Row], found: Sequence[Row], types: Mapping[str, ColumnType], *, tolerance: Tolerance | None = None, target: str = ""
) -> list[Difference]:
    """Every value of `found` that is not the one expected, beyond what its column's type allows, in the order of the rows."""
    tolerance = tolerance or Tolerance()
    if len(expected) != len(found):
        return [Difference(target, None, "", f"{len(expected):,} rows", f"{len(found):,} rows", "rows in are not rows out")]
    return list(_differences(expected, found, types, tolerance, target))


def _differences(expected: Sequence[Row], found: Sequence[Row], types: Mapping[str, ColumnType], tolerance: Tolerance, target: str) -> Iterator[Difference]:
    for at, (one, other) in enumerate(zip(expected, found, strict=True)):
        for name, column in types.items():
            if name not in other:
                yield Difference(target, at, name, _short(one[name]), "nothing", "no such column")
            elif apart := distance(one[name], other[name], column, tolerance=tolerance):
                yield Difference(target, at, name, _short(one[name]), _short(other[name]), apart)


def distance(one: Any, other: Any, column: ColumnType, *, tolerance: Tolerance) -> str:
    """How far apart two values of a column are, in words; empty if they are equal, or within the tolerance. A NaN equals a NaN."""
    if one is None or other is None:
        return "" if one is other else "null or not"
    if column.item:
        return _listed(one, other, column.item, tolerance)
    if column.vector or isinstance(one, np.ndarray):
        return _vectors(np.asarray(one), np.asarray(other), tolerance)
    if column.kind == "float" or (column.kind == "any" and isinstance(one, float)):
        return _numbers(np.float64(one), np.float64(other), tolerance)
    return "" if type(one) is type(other) and one == other else "not equal"


def _listed(one: Sequence[Any], other: Sequence[Any], item: ColumnType, tolerance: Tolerance) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} items"
    for at, (a, b) in enumerate(zip(one, other, strict=True)):
        if apart := distance(a, b, item, tolerance=tolerance):
            return f"item {at}: {apart}"
    return ""


def _vectors(one: np.ndarray, other: np.ndarray, tolerance: Tolerance) -> str:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
    if one.dtype.kind != "f":
        return "" if np.array_equal(one, other) else f"{int((one != other).sum())} of {one.size} elements"
    wide, also = one.astype(np.float64), other.astype(np.float64)
    if apart := _numbers(wide, also, tolerance):
        return apart
    length = np.linalg.norm(wide) * np.linalg.norm(also)
    turned = 1 - float(wide @ also) / float(length) if np.isfinite(length) and length > 0 else 0.0
    return f"1 - cos = {turned:.3g}" if turned > tolerance.cosine else ""


def _numbers(one: Any, other: Any, tolerance: Tolerance) -> str:
    close = np.isclose(other, one, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=True)
    if np.all(close):
        return ""
    wrong = np.abs(np.atleast_1d(other) - np.atleast_1d(one))[~np.atleast_1d(close)]
    most = "not finite" if np.isnan(wrong).any() else f"by {wrong.max():.3g}"
    return most if np.ndim(one) == 0 else f"{most} in {len(wrong)} of {np.size(one)} elements"


def _short(value: Any, most: int = 60) -> str:
    if isinstance(value, np.ndarray):
        return f"[{', '.join(f'{number:.4g}' for number in value[:4])}{', ...' * (len(value) > 4)}]"
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
