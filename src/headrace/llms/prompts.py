"""Prompts: text with columns in braces, or a function that writes the messages of a row. Both say which columns they read."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.columns import ColumnType, types_of
from headrace.errors import DefinitionError, listing, nearest

Message = Mapping[str, Any]
"""A message as OpenAI's interface has it: `{"role": "user", "content": "..."}`."""

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt, parsed: pieces of text, and the column that follows each, "" at the end."""

    pieces: tuple[tuple[str, str], ...]

    @staticmethod
    def parse(text: str, where: str) -> Template:
        """The template of a prompt; `where` opens the message of an error.

        Raises:
            DefinitionError: a brace stands alone, or what it holds is no column name.
        """
        pieces, literal, last = [], "", 0
        for match in _PART.finditer(text):
            literal += text[last : match.start()]
            last, found = match.end(), match[0]
            if found in ("{{", "}}"):
                literal += found[0]
            elif match[1] is not None and match[1].isidentifier():
                pieces.append((literal, match[1]))
                literal = ""
            else:
                problem = f"{found} holds no column name" if match[1] is not None else f"the {found} at character {match.start()} has no partner"
                raise DefinitionError(f"{where}: {problem}; write a column as {{text}}, and a brace that is meant as such twice: {{{{ or }}}}")
        return Template((*pieces, (literal + text[last:], "")))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, in the order in which they come up first."""
        return tuple(dict.fromkeys(name for _, name in self.pieces if name))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for a row; a null is nothing."""
        return "".join(literal + ("" if not name or row[name] is None else str(row[name])) for literal, name in self.pieces)


def template_reads(template: Template, types: Mapping[str, Any] | None, where: str) -> dict[str, ColumnType]:
    """The columns that a template reads: `str`, but for those whose type is given.

    Raises:
        DefinitionError: there is no column in it, or a type is given for one that is not.
    """
    if not template.columns:
        raise DefinitionError(f"{where}: the prompt reads no column, so that all rows would be asked the same; name one in braces, such as {{text}}")
    given = types_of(types or {}, f"{where}: reads")
    if unknown := [name for name in given if name not in template.columns]:
        raise DefinitionError(
            f"{where}: reads names {unknown[0]!r}, which is not in the prompt; it reads {listing(template.columns)}" + nearest(unknown[0], template.columns)
        )
    return {**types_of(dict.fromkeys(template.columns, str), where), **given}


def function_reads(function: Callable[..., Any], where: str) -> dict[str, ColumnType]:
    """The columns that a function of a row's values reads: its parameters, each annotated with a plain type such as `str`.

    Raises:
        DefinitionError: it is no such function; says what is wrong with it.
    """
    if not callable(function):
        raise DefinitionError(f"{where}: messages must be a function that returns a row's messages, got {function!r}")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise DefinitionError(f"{where}: messages: an annotation cannot be evaluated: {error}; write it as text: str") from error
    if not parameters:
        raise DefinitionError(f"{where}: messages reads no column; give it a parameter such as text: str")
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) or parameter.name not in hints:
            raise DefinitionError(f"{where}: messages: parameter {str(parameter)!r} must name a column and its type, such as text: str")
    return types_of({parameter.name: hints[parameter.name] for parameter in parameters}, f"{where}: messages")


def checked(messages: Any) -> list[Message]:
    """The messages that a function returned.

    Raises:
        TypeError: they are none.
    """
    well = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)) and messages
    if not well or not all(isinstance(one, Mapping) and "role" in one for one in messages):
        raise TypeError(f'messages must return a list of messages such as {{"role": "user", "content": "..."}}, and returned {messages!r}')
    return list(messages)
