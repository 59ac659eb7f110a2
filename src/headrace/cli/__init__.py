"""The `headrace` command. Flags say where and when; what runs is in the Python file."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from headrace.cli.doctor import doctor
from headrace.cli.explain import explain
from headrace.cli.run import run
from headrace.errors import HeadraceError, RunError, StageError

app = typer.Typer(
    name="headrace",
    help="One pipeline, every shape of work, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(explain)
app.command()(doctor)

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command. Exit code 1: a stage or the run failed; 2: a mistake to mend before it can run; 130: Ctrl-C."""
    try:
        app()
    except HeadraceError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        if isinstance(error, StageError) and error.frames:
            console.print(error.frames, style="dim", markup=False, end="")
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        sys.exit(FAILED if isinstance(error, (StageError, RunError)) else MISTAKE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
