"""`headrace rollback`: the version before answers again."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.options import Verbose
from headrace.cli.serve import tell

Service = Annotated[str, typer.Argument(metavar="NAME", help="The service.")]
Address = Annotated[str | None, typer.Option(help="The Ray cluster that it runs on; RAY_ADDRESS by default, else this machine's services.")]


def rollback(name: Service, address: Address = None, verbose: Verbose = False) -> None:
    """Let the version before answer again, at once. A version that is about to take over is taken back."""
    from headrace.on_ray import service  # loads ray

    service.command(name, "rollback", where=service.Where(address, verbose=verbose), tell=tell)
