"""`headrace doctor`: is this machine fit to run?"""

from __future__ import annotations

import os
import time

import typer
from rich.console import Console

from headrace.cli.options import Address
from headrace.doctor import Finding, findings

_MARKS = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}


def doctor(address: Address = None) -> None:
    """Check Python, Ray, hardware, disk, memory and versions, and say what to do about each finding."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    problems = 0
    for finding in [*findings(ray_temp=os.environ.get("RAY_TMPDIR", "/tmp")), *_ray(address)]:
        console.print(f"{_MARKS[finding.state]}  ", end="")
        console.print(finding.what, markup=False)
        if finding.advice:
            console.print(f"         -> {finding.advice}", markup=False)
        problems += finding.state == "problem"
    if problems:
        raise typer.Exit(1)


def _ray(address: str | None) -> list[Finding]:
    """Whether Ray starts, or the cluster answers, and what hardware it sees."""
    from headrace.errors import RunError
    from headrace.on_ray.cluster import connected  # loads ray

    started = time.perf_counter()
    try:
        with connected(address) as cluster:
            took_s = time.perf_counter() - started
            where = "joined" if address or os.environ.get("RAY_ADDRESS") else "started here"
            nodes = [Finding("ok", f"hardware {node}") for node in cluster.nodes]
    except RunError as error:
        return [Finding("problem", str(error), "check the address, ports and Ray's version on both sides")]
    return [Finding("ok", f"Ray {where} in {took_s:.1f} s"), *nodes]
