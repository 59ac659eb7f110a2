"""`headrace lineage`: what was made from what, both ways."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headrace.cli.tables import clean

if TYPE_CHECKING:
    from headrace.registry import Origin

Thing = Annotated[
    str,
    typer.Argument(metavar="MODEL|RUN|VIEW|PATH", help="A model (stays, stays@prod, models:/stays/3), a run's id, view:NAME, or a path that a run used."),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


def lineage(thing: Thing, json: Json = False) -> None:
    """Print what a thing was made from, and what was made from it: data, views, runs, versions of models, services."""
    from headrace import registry

    found = registry.lineage(thing)
    if json:
        print(json_module.dumps(found.to_dict(), indent=1))
        return
    console = Console(highlight=False, emoji=False)
    console.print(_line(found.of), markup=False, soft_wrap=True)
    for title, things in (("made from", found.made_from), ("made", found.made)):
        console.print(f"{title}:" if things else f"{title}: nothing that is known", markup=False)
        for line in _tree(things, "  "):
            console.print(line, markup=False, soft_wrap=True)


def _tree(things: Sequence[Origin], indent: str) -> Iterator[str]:
    for one in things:
        yield indent + _line(one)
        yield from _tree(one.further, indent + "  ")


def _line(one: Origin) -> str:
    return clean(f"{one.name}  {'; '.join(one.details)}".rstrip())
