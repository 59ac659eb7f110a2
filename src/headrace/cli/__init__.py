"""The `headrace` command. Flags say where and when; what runs is in the Python file.

Exit codes:

    0    done, or nothing to do
    1    a stage's set-up or the engine failed, a service gave no answer, or headrace check or a model's gate found fault
    2    a mistake to mend before anything can run
    3    more rows failed than --max-dead-letters allows
    4    input, code or settings changed since the output was begun
    5    another run holds the output
    6    the output's file system refused (full, read-only, out of reach), or the ledger is damaged
    130  told to stop, by Ctrl-C or SIGTERM; what was done is committed
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from headrace.cli.check import check
from headrace.cli.diff import diff
from headrace.cli.doctor import doctor
from headrace.cli.explain import explain
from headrace.cli.features import features
from headrace.cli.keys import keys
from headrace.cli.lineage import lineage
from headrace.cli.llm import llm
from headrace.cli.models import models
from headrace.cli.promote import promote
from headrace.cli.replay import replay
from headrace.cli.rollback import rollback
from headrace.cli.run import run
from headrace.cli.runs import runs
from headrace.cli.serve import serve
from headrace.cli.stop import stop
from headrace.cli.top import top
from headrace.cli.train import train
from headrace.errors import HeadraceError, StageError, StoppedError

app = typer.Typer(
    name="headrace",
    help="One pipeline, every shape of work, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(train)
app.command()(serve)
app.command()(llm)
app.command()(promote)
app.command()(rollback)
app.command()(stop)
app.command()(top)
app.command()(check)
app.command()(features)
app.command()(replay)
app.command()(runs)
app.command()(diff)
app.command()(explain)
app.command()(lineage)
app.command()(doctor)
app.add_typer(keys)
app.add_typer(models)


def main() -> None:
    """Run the command, and exit with the code that belongs to what happened."""
    try:
        app()
    except HeadraceError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        if isinstance(error, StageError) and error.frames:
            console.print(error.frames, style="dim", markup=False, end="")
        if not isinstance(error, StoppedError):
            console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False)
        for note in getattr(error, "__notes__", ()):
            console.print(note, markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(StoppedError.exit_code)
