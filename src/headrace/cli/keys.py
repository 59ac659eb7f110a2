"""`headrace keys`: who may ask a service."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cli.tables import show
from headrace.errors import KeyFileError
from headrace.serving.keys import KeyFile, default_path

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, '.', '_' and '-'.")]
Service = Annotated[str | None, typer.Option(metavar="NAME", help="The service, whose file is $XDG_CONFIG_HOME/headrace/keys/NAME.json.")]
File = Annotated[Path | None, typer.Option(metavar="PATH", help="The file itself, in place of --service.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON array.")]

keys = typer.Typer(name="keys", help="Make, list and revoke the API keys of a service.", no_args_is_help=True)


@keys.command()
def create(name: Name, service: Service = None, file: File = None) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    kept = _file(service, file)
    token = kept.create(name)
    _say(f"the key of {name}, shown only now; its hash is in {kept.path}")
    print(token)


@keys.command("list")
def list_keys(service: Service = None, file: File = None, json: Json = False) -> None:
    """List names and ages of the valid keys."""
    found = _file(service, file).list()
    if json:
        print(json_module.dumps([{"name": key.name, "created": key.created} for key in found], indent=1))
    elif found:
        show(Console(highlight=False, emoji=False), ("name", "created (UTC)"), [(key.name, key.created[:16].replace("T", " ")) for key in found])
    else:
        _say("no keys: nobody is let in")


@keys.command()
def revoke(name: Name, service: Service = None, file: File = None) -> None:
    """Make a key invalid. Services that use the file notice within seconds."""
    kept = _file(service, file)
    kept.revoke(name)
    _say(f"the key of {name} is no longer in {kept.path}")


def _file(service: str | None, file: Path | None) -> KeyFile:
    if (service is None) == (file is None):
        raise KeyFileError("say whose keys: either --service or --file, and not both")
    return KeyFile(default_path(service) if service is not None else file or "")


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, emoji=False).print(text, markup=False, soft_wrap=True)
