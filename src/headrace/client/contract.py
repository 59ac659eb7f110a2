"""What a version of a pipeline reads and writes, as its service tells it, and how rows travel there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from headrace.arrays import table, to_rows
from headrace.columns import ColumnType, Vector
from headrace.errors import DefinitionError, RowError, ServiceError, listing, nearest
from headrace.serving.bodies.codec import Codec, Refused
from headrace.serving.wire import Content

Row = Mapping[str, Any]
Form = Literal["json", "arrow"]

MEDIA = {"json": "application/json", "arrow": "application/vnd.apache.arrow.stream"}
_CONTENT = {"json": Content.JSON, "arrow": Content.ARROW}
_JSON_ROWS = 32  # from how many on Arrow is quicker
_BULKY = ("vector", "image", "bytes", "any")
_MOST_ROWS = 1 << 31


@dataclass(frozen=True, slots=True)
class Contract:
    """The columns of a pipeline, and the forms that they travel in.

    `codec` is the service's own with its sides changed: it reads outputs, and writes inputs.
    """

    pipeline: str
    version: str
    codec: Codec

    @staticmethod
    def of(pipeline: str, version: str, content: bytes) -> Contract:
        """The contract that a service tells at `/{pipeline}/schema`.

        Raises:
            ServiceError: this is nothing that a service of headrace says.
        """
        try:
            told = json.loads(content)
            inputs, outputs = ({name: parse(str(column["headrace"])) for name, column in told[side].items()} for side in ("inputs", "outputs"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServiceError(f"the schema of {pipeline!r} is none of a headrace service: {type(error).__name__}: {error}") from error
        return Contract(pipeline, version, Codec(outputs, inputs, rows=_MOST_ROWS))

    @property
    def inputs(self) -> Mapping[str, ColumnType]:
        """The columns of a row that is sent."""
        return self.codec.writes

    @property
    def outputs(self) -> Mapping[str, ColumnType]:
        """The columns of a row that comes back."""
        return self.codec.reads

    def form(self, rows: int) -> Form:
        """How to write so many rows."""
        if ["rows"] in (list(self.inputs), list(self.outputs)):
            return "arrow"  # in JSON, a single row {"rows": ...} would look like several
        bulky = any(_innermost(column).kind in _BULKY for column in (*self.inputs.values(), *self.outputs.values()))
        return "arrow" if rows > _JSON_ROWS or bulky else "json"

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Rows as they are sent.

        Raises:
            RowError: as the service would refuse them, and `Pipeline.local`.
        """
        for at, row in enumerate(rows):
            if isinstance(row, Mapping) and not row.keys() <= self.inputs.keys():
                name = next(name for name in row if name not in self.inputs)
                raise self._refused(f"row {at} has a column {name!r}, which is not read; there are {listing(self.inputs)}" + nearest(str(name), self.inputs))
        try:
            return table(rows, self.inputs)
        except ValueError as error:
            raise self._refused(str(error)) from error

    def _refused(self, why: str) -> RowError:
        return RowError(f"pipeline {self.pipeline!r}: {why}", 422, "invalid_row")

    def body(self, data: pa.Table, form: Form, *, single: bool) -> bytes:
        """Such a table as a request's body."""
        return bytes(self.codec.encode(data, [(0, len(data), single, _CONTENT[form])])[0])

    def lines(self, data: pa.Table) -> dict[int, bytes]:
        """The same as lines of JSON, without their ends, by the number of their row."""
        return dict(enumerate(map(bytes, self.codec.encode(data, [(at, at + 1, True, Content.JSON) for at in range(len(data))]))))

    def good_lines(self, rows: Sequence[Row], first_row: int) -> tuple[dict[int, bytes], dict[int, ServiceError]]:
        """The same of those rows that can be sent, and the errors of the others, which are counted from `first_row` there."""
        lines: dict[int, bytes] = {}
        errors: dict[int, ServiceError] = {}
        for at, row in enumerate(rows):
            try:
                lines[at] = self.lines(self.table([row]))[0]
            except RowError as error:
                errors[at] = RowError(f"row {first_row + at} of the stream: {error}", error.status, error.code)
        return lines, errors

    def rows(self, body: bytes, form: Form, *, expected: int) -> list[dict[str, Any]]:
        """The rows of an answer.

        Raises:
            ServiceError: the answer does not hold so many rows of these columns.
        """
        return self._read([body], _CONTENT[form], expected)

    def parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        """The rows of lines of JSON; errors as above."""
        return self._read(lines, Content.JSON, len(lines)) if lines else []

    def _read(self, bodies: Sequence[bytes], content: Content, expected: int) -> list[dict[str, Any]]:
        try:
            found = to_rows(self.codec.table([self.codec.decode(body, content) for body in bodies]), self.outputs)
        except Refused as refused:
            why = "".join(f": {detail['loc']}: {detail['message']}" for detail in refused.failure.details[:1])
            raise ServiceError(f"the answer of {self.pipeline!r} is not what its schema says: {refused}{why}", 200) from refused
        if len(found) != expected:
            raise ServiceError(f"{self.pipeline!r} answered {expected} rows with {len(found)}", 200)
        return found


def _innermost(column: ColumnType) -> ColumnType:
    while column.item:
        column = column.item
    return column


def parse(text: str) -> ColumnType:
    """The column type whose text it is: the inverse of `str`.

    Raises:
        ValueError: no column type has this text.
    """
    if text.endswith(" | None"):
        return replace(parse(text.removesuffix(" | None")), optional=True)
    if text.startswith("list[") and text.endswith("]"):
        return ColumnType("list", item=parse(text[5:-1]))
    if text.startswith("Vector(") and text.endswith(")"):
        size, _, dtype = text[7:-1].partition(", ")
        try:
            return ColumnType("vector", vector=Vector(None if size == "ragged" else int(size), dtype or "float32"))
        except DefinitionError as error:
            raise ValueError(str(error)) from error
    if text not in ("str", "bool", "int", "float", "bytes", "image", "datetime", "date", "any"):
        raise ValueError(f"no column type {text!r}")
    return ColumnType(text)
