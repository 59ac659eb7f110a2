"""HTML that holds what others wrote: a page with a policy that forbids scripts and every request, and texts that are made harmless."""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Iterable

_LONGEST = 600  # characters of a name or a message
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters, those that turn the writing direction among them, and what is no character."""


def report(name: str, state: str, body: Iterable[str]) -> str:
    """The page of a run called `name`, in the colours of its state."""
    style = importlib.resources.files("headrace.console").joinpath("page.css").read_text(encoding="utf-8")
    return document(f"{text(name)}: {text(state)}", body, style=style, kind=text(state))


def document(title: str, body: Iterable[str], *, style: str, kind: str = "") -> str:
    """The lines of a body as a whole page; `title` is HTML already, `style` its CSS, `kind` the class of its body."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        f'<body class="{kind}">' if kind else "<body>",
        "<main>",
        *(line for line in body if line),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def text(words: str, *, most: int | None = _LONGEST) -> str:
    """Text that somebody else wrote, fit for HTML, attributes included; it cannot turn the direction of what stands beside it for good."""
    words = _UNPRINTABLE.sub("\ufffd", words)
    return html.escape(words if most is None or len(words) <= most else words[: most - 1] + "…")


def safe(words: str) -> str:
    """The same, set apart, so that a name in a script that is written from right to left leaves its surroundings in order."""
    return f"<bdi>{text(words)}</bdi>"
