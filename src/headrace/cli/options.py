"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import SettingError

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

# Of services

Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="What the service is called, by default as the pipeline is. If it runs, this is its next version.")
]
Host = Annotated[str, typer.Option(help="The address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any free one.")]
Replicas = Annotated[
    list[str] | None, typer.Option(metavar="[GROUP=]LEAST:MOST", help="Replicas of each group, or of one: 1:8, or 0:4 to end the last while idle; repeatable.")
]
TargetInFlight = Annotated[float, typer.Option(metavar="N", help="Requests under way for each replica, to which replicas are added and taken away.")]
Idle = Annotated[str, typer.Option(metavar="TIME", help="With --replicas 0:N: how long nothing must have been asked for until the last replica ends.")]
Latency = Annotated[str, typer.Option(metavar="TIME", help="The time to answer in, such as 200ms: work that could not be is refused with 429.")]
Deadline = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="When a request is given up that names no deadline of its own, and the most it may name; 60s by default, and 600s of a language model.",
    ),
]
MaxBody = Annotated[str, typer.Option(metavar="SIZE", help="The largest body of a request, such as 16MB.")]
Background = Annotated[
    str,
    typer.Option(
        "--background", metavar="SHARE", help="Of a language model's places, how many requests of the class `batch` have while better ones are asked."
    ),
]
MaxRows = Annotated[int, typer.Option(min=1, metavar="N", help="The most rows of a request.")]
Keys = Annotated[Path | None, typer.Option(metavar="FILE", help="Answer only to keys in this file, which headrace keys makes.")]
Accounts = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE", envvar="HEADRACE_ACCOUNTS", help="Answer only to keys in these accounts, within their limits: an SQLite file or a PostgreSQL URL."
    ),
]
Prices = Annotated[Path | None, typer.Option(metavar="FILE", help="With --accounts: what tokens cost, by model, in TOML.")]
Files = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Keep files here, and run batches of requests in the background: /v1/files and /v1/batches.")
]
Tls = Annotated[str | None, typer.Option(metavar="CERT,KEY", help="Files with a certificate chain and its key, in PEM: https instead of http.")]
AllowNoKeys = Annotated[bool, typer.Option("--allow-no-keys", help="Listen beyond this machine although anybody is answered.")]
Doors = Annotated[int, typer.Option(min=1, max=64, metavar="N", help="Processes that share the port and pass requests to replicas.")]
CanaryShare = Annotated[
    str | None, typer.Option("--canary", metavar="SHARE", help="Give the new version this share of requests, more as it proves no worse, or take it back.")
]
Follow = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="How often, such as 1min, to see whether a registry's alias in a setting has moved; what it names then comes in as a canary."
    ),
]
ShadowShare = Annotated[str | None, typer.Option("--shadow", metavar="SHARE", help="Mirror this share of requests to the new version, and answer none by it.")]
Gate = Annotated[Path | None, typer.Option(metavar="FILE", help="Rows that the new version must compute as this process does before it answers.")]
Behind = Annotated[
    str | None, typer.Option(metavar="NAME", help="Have no doors, but be behind those of this service, which runs: at its address, with its keys and accounts.")
]
Log = Annotated[str | None, typer.Option(metavar="json|off", help="A JSON line for each request on standard output; off on a terminal unless asked for.")]


def names(text: str) -> str | tuple[str, ...]:
    """`a,b,c` as a tuple; `all` stays as it is."""
    return text if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())


def check_behind(
    context: typer.Context,
    behind: str | None,
    names: Iterable[str] = ("host", "port", "doors", "tls", "keys", "accounts", "prices", "files", "log", "allow_no_keys"),
) -> None:
    """Refuse options that are about doors, given on the command line beside `--behind`.

    Raises:
        SettingError: there is one.
    """
    for name in names if behind is not None else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option} is about doors, and with --behind {behind} there are none but those of {behind!r}; leave {option} out")
