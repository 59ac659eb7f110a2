"""Structured answers: a pydantic model as the columns that its fields become, and an answer's text as their values."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.columns import ColumnType, type_of
from headrace.errors import DefinitionError
from headrace.llms.faults import InvalidAnswer

_TEXT = type_of(str)
_SHOWN = 300  # characters of an answer in a message


@dataclass(frozen=True, slots=True)
class Schema:
    """A pydantic model and the columns of its fields; those `as_json` hold a value that no column type stands for, as JSON text."""

    model: Any
    columns: Mapping[str, ColumnType]
    as_json: frozenset[str]

    @staticmethod
    def of(model: Any, where: str) -> Schema:
        """The columns of a model.

        Raises:
            DefinitionError: it is no pydantic model, or has no fields.
        """
        fields = getattr(model, "model_fields", None)
        if not isinstance(model, type) or not hasattr(model, "model_validate_json") or not isinstance(fields, Mapping):
            raise DefinitionError(f"{where}: schema must be a pydantic model, such as class Answer(pydantic.BaseModel), got {model!r}")
        if not fields:
            raise DefinitionError(f"{where}: schema {model.__name__} has no fields, so that an answer would fill no column; give it one")
        columns = {name: _column(field.annotation) for name, field in fields.items()}
        as_json = frozenset(name for name, column in columns.items() if column is None or column.kind == "any")
        texts = {name: dataclasses.replace(_TEXT, optional=_optional(fields[name].annotation)) for name in as_json}
        return Schema(model, {name: texts.get(name, column or _TEXT) for name, column in columns.items()}, as_json)

    def format(self) -> dict[str, Any]:
        """The response format of a request, for constrained decoding."""
        return {"type": "json_schema", "json_schema": {"name": self.model.__name__, "schema": _closed(self.model.model_json_schema())}}

    def values(self, text: str) -> dict[str, Any]:
        """The fields of an answer.

        Raises:
            InvalidAnswer: it is not of the schema: cut off, say.
        """
        import pydantic

        try:
            answer = self.model.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
            raise InvalidAnswer(f"{f'{at}: ' if at else ''}{first['msg']}, in the answer {shown!r}") from error
        plain = answer.model_dump(mode="json", include=set(self.as_json)) if self.as_json else {}
        texts = {name: None if value is None else json.dumps(value, ensure_ascii=False) for name, value in plain.items()}
        return {name: texts[name] if name in texts else _bare(getattr(answer, name)) for name in self.columns}


def _closed(schema: Any) -> Any:
    """The schema whose objects have no other properties than those that it names, unless it says so: a model could go on with some until it is cut off."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(one) for name, one in schema.items()}
    return {"additionalProperties": False, **closed} if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" else closed


def _column(annotation: Any) -> ColumnType | None:
    """The column type of a field, that of its values where it lists them; None where there is none."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = _column(next(arg for arg in args if arg is not type(None)))
        return inner and dataclasses.replace(inner, optional=True)
    if origin is list and len(args) == 1:
        item = _column(args[0])
        return ColumnType("list", item=item) if item and item.kind != "any" else None
    listed = [member.value for member in annotation] if isinstance(annotation, type) and issubclass(annotation, enum.Enum) else None
    if origin is typing.Literal:
        listed = list(args)
    kinds = {type(value) for value in listed} if listed is not None else {annotation}
    if len(kinds) != 1:
        return None
    try:
        return type_of(kinds.pop())
    except DefinitionError:
        return None


def _bare(value: Any) -> Any:
    """A value without the enumerations in it."""
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _optional(annotation: Any) -> bool:
    return annotation is Any or type(None) in typing.get_args(annotation)
