"""Write docs/reference from the code: every command's options, every public name's signature and docstring.

python docs/generate.py            # write
python docs/generate.py --check    # write nothing; exit code 1 if a page is not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

import headrace
from headrace.cli import app

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code: change the code, then run `make docs`. -->\n"
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ENTRY = re.compile(r" {4}(?P<names>\w[\w, ]*): (?P<text>.*)")
WIDTH = 100


def main() -> int:
    """Write the pages, or with `--check` compare them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not what the code says")
    check = parser.parse_args().check
    stale = 0
    for name, lines in (("api.md", api()), ("cli.md", commands())):
        page, text = REFERENCE / name, "\n".join([NOTE, *lines]).rstrip() + "\n"
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale += 1
            print(f"docs/reference/{name} is not what the code says: run make docs, and commit it", file=sys.stderr)
        else:
            REFERENCE.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
    return 1 if stale else 0


def commands() -> Iterator[str]:
    """A section for each command of the command line, in the order of its own help."""
    group: Any = typer.main.get_command(app)
    outer = group.make_context("headrace", [], resilient_parsing=True)
    yield from ["# Command line", "", inspect.cleandoc(group.help), ""]
    yield from sections(group, outer)


def sections(group: Any, outer: Any) -> Iterator[str]:
    """A section for each command of a group."""
    for name in group.list_commands(outer):
        command = group.get_command(outer, name)
        context = command.make_context(name, [], parent=outer, resilient_parsing=True)
        if hasattr(command, "list_commands"):
            yield from sections(command, context)
            continue
        yield from [f"## {context.command_path}", "", inspect.cleandoc(command.help), ""]
        yield from fence("console", ["$ " + " ".join([context.command_path, *command.collect_usage_pieces(context)])])
        yield from ["| Argument or option | Meaning |", "|---|---|"]
        for parameter in command.get_params(context):
            shown, meaning = parameter.get_help_record(context)
            yield f"| `{cell(shown)}` | {cell(meaning)} |"
        yield ""


def api() -> Iterator[str]:
    """A section for each public name."""
    yield from ["# Python", "", "Everything here is an attribute of `headrace`, imported as `hr`.", ""]
    for name, thing in public():
        yield from [f"## {name}", ""]
        yield from fence("python", head(f"hr.{name}", thing))
        yield from prose(thing)
        if name == "HeadraceError":
            yield from prose(inspect.getmodule(thing))
        for member, attribute in sorted(vars(thing).items()) if inspect.isclass(thing) else []:
            function = attribute.fget if isinstance(attribute, property) else getattr(attribute, "__func__", attribute)
            if not member.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield from [f"### {name}.{member}", ""]
                yield from fence("python", [f"{name}.{member}"] if isinstance(attribute, property) else head(f"{name}.{member}", function))
                yield from prose(function)


def public() -> Iterator[tuple[str, Any]]:
    """Every public name; those of a module follow it."""
    shown = [*headrace.__all__, "features"]  # which is no name of the front door's list, since that has as many as it may have
    for name in sorted(shown, key=lambda name: (not name.isupper(), name)):
        thing = getattr(headrace, name)
        yield name, thing
        if inspect.ismodule(thing):
            yield from ((f"{name}.{member}", getattr(thing, member)) for member in thing.__all__)


class Verbatim:
    """Text that stands in a signature as it is: without quotes, and without an address."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def head(name: str, thing: Any) -> list[str]:
    """The signature, one parameter per line when it is long."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):  # what is not made by calling it, or is written in C
        return [name]
    parameters = [readable(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    returned = signature.return_annotation
    if inspect.isclass(thing):
        returned = inspect.Signature.empty
    elif isinstance(returned, str):
        returned = Verbatim(returned)
    signature = signature.replace(parameters=parameters, return_annotation=returned)
    if len(name) + len(str(signature)) <= WIDTH:
        return [f"{name}{signature}"]
    lines = [f"{name}("]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {parameter},")
    return [*lines, str(signature.replace(parameters=[])).removeprefix("(")]


def readable(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter with its annotation unquoted, and a function as its default by name."""
    if isinstance(parameter.annotation, str):
        parameter = parameter.replace(annotation=Verbatim(parameter.annotation))
    if inspect.isfunction(parameter.default) and parameter.default.__name__ != "<lambda>":
        return parameter.replace(default=Verbatim(parameter.default.__name__))
    if repr(parameter.default).startswith("<") and parameter.default is not parameter.empty:  # a lambda, a dataclass's factory
        return parameter.replace(default=Verbatim("..."))
    return parameter


def prose(thing: Any) -> Iterator[str]:
    """A docstring as Markdown: its sections as lists, and its indented examples as the code blocks that they are already."""
    section = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if heading := SECTION.fullmatch(line):
            section = True
            yield from [f"**{heading[1]}**", ""]
        elif section and (entry := ENTRY.fullmatch(line)):
            yield f"- {', '.join(f'`{name.strip()}`' for name in entry['names'].split(','))}: {entry['text']}"
        else:
            section = section and (not line or line.startswith(" "))
            yield f"  {line.strip()}" if section and line else line
    yield ""


def fence(language: str, lines: Iterable[str]) -> list[str]:
    """Lines as a code block."""
    return [f"```{language}", *lines, "```", ""]


def cell(text: str) -> str:
    """Text that can stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
