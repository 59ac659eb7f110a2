"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

File = Annotated[str, typer.Argument(metavar="FILE[::NAME]", help="The Python file with the pipeline, and its name if the file has several.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="STAGE.SETTING=VALUE", help="Override a setting of a stage; repeatable.")]
Keep = Annotated[str, typer.Option(metavar="COLUMNS", help="Input columns to carry to the output untouched: a,b,c or all.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster to join; RAY_ADDRESS by default, else Ray starts here.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Price = Annotated[
    list[str] | None, typer.Option("--price", metavar="PRICE", help="What machines cost: 1.20, g6.4xlarge=1.10, L4=0.80, cpu=0.04, spot; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output; progress goes to standard error.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and the workers print.")]
MaxDeadLetters = Annotated[str, typer.Option(metavar="SHARE", help="How many rows may fail before the run is stopped: 1%, or a number.")]


def names(text: str) -> str | tuple[str, ...]:
    """`a,b,c` as a tuple; `all` stays as it is."""
    return text if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
