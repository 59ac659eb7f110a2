"""`headrace top`: a service, as it is now."""

from __future__ import annotations

import json as json_module
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from headrace.errors import ServiceError, ServingError, UnauthorizedError, UnavailableError, listing
from headrace.serving import place
from headrace.serving.watch import top as view

if TYPE_CHECKING:
    import httpx2

Where = Annotated[str | None, typer.Argument(metavar="URL|NAME", help="Where a service answers, or the name of one of this machine; its only one by default.")]
Once = Annotated[bool, typer.Option("--once", help="Print it once, as text; so it is where no terminal is.")]
Json = Annotated[bool, typer.Option("--json", help="Print what /status says, once, as JSON.")]
Key = Annotated[str | None, typer.Option(metavar="KEY", help="The service's API key; HEADRACE_KEY by default.")]
Ca = Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates to trust, in PEM, where the service has one of its own making.")]

_EVERY_S = 1.0
_TIMEOUT_S = 5.0


def top(where: Where = None, once: Once = False, json: Json = False, key: Key = None, ca: Ca = None) -> None:
    """Show a service live: its versions, replicas, requests under way, latencies, how full calls are, and what happened last."""
    url, service = _place(where)
    console = Console(highlight=False, emoji=False)
    with open_client(url, key or os.environ.get("HEADRACE_KEY"), ca) as client:
        status = ask(client, url, service)
        if json:
            print(json_module.dumps(status, indent=1))
        elif once or not console.is_terminal:
            print(view.text(status, url=url), end="")
        else:
            watch(client, url, status, console, service)


def ask(client: httpx2.Client, url: str, service: str | None = None) -> dict[str, Any]:
    """What a service says of itself; of all behind its doors, the one of that name.

    Raises:
        ServiceError: it does not answer, asks for a key, or is no service of headrace.
    """
    import httpx2

    try:
        answer = client.get(f"{url}/status")
    except (httpx2.TransportError, httpx2.DecodingError, httpx2.TooManyRedirects) as error:
        raise UnavailableError(f"nothing answers at {url}: {error or type(error).__name__}") from error
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise ServingError(f"{url!r} is no URL: {error}; a service answers at one like http://127.0.0.1:8000") from error
    if answer.status_code == 401:
        raise UnauthorizedError(f"{url} asks for a key: give --key, or set HEADRACE_KEY; headrace keys makes one", 401)
    try:
        status = answer.json() if answer.status_code == 200 else None
    except ValueError:
        status = None
    if not isinstance(status, dict) or "versions" not in status:
        raise ServiceError(f"what answers at {url} is no service of headrace: {url}/status gives {answer.status_code}", answer.status_code)
    if service is None:
        return status
    guests: dict[str, dict[str, Any]] = {guest.get("service", ""): guest for guest in status.get("guests") or () if isinstance(guest, dict)}
    if service not in guests:
        raise ServiceError(f"the door that answered at {url} has not heard of {service!r} yet")
    return guests[service]


def watch(client: httpx2.Client, url: str, status: Mapping[str, Any], console: Console, service: str | None = None) -> None:
    """Show it every second until Ctrl-C. A service that no longer answers is waited for."""
    heard_s = time.monotonic()
    with Live(view.frame(status, url=url), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_EVERY_S)
                note = ""
                try:
                    status = ask(client, url, service)
                    heard_s = time.monotonic()
                except ServiceError as error:
                    note = f"{error}; this is of {time.monotonic() - heard_s:.0f} s ago"
                live.update(view.frame(status, url=url, note=note), refresh=True)
        except KeyboardInterrupt:
            return


def open_client(url: str, key: str | None, ca: Path | None) -> httpx2.Client:
    """A client that shows the key and trusts these certificates.

    Raises:
        ServingError: this can be no key, or there are no certificates in the file.
    """
    import ssl

    import httpx2  # a tenth of a second

    if key is not None and not (key.isascii() and key.isprintable()):
        raise ServingError("the key must be one as headrace keys prints it, without line breaks")
    try:
        trusted = ssl.create_default_context(cafile=ca) if url.startswith("https") else False
    except OSError as error:
        raise ServingError(f"the certificates in {str(ca)!r} cannot be read: {error.strerror or error}") from error
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx2.Client(headers=headers, verify=trusted, timeout=_TIMEOUT_S, trust_env=False)


def _place(where: str | None) -> tuple[str, str | None]:
    """Where to ask, a URL as it is given, else where a service of this machine answers; and for which one behind that address, if only one is meant."""
    if where is not None and ("/" in where or ":" in where):
        return (where if "://" in where else f"http://{where}").rstrip("/").removesuffix("/status"), None
    known = place.known()
    if where is None:
        alone = [one for one in known if not one.behind]
        if len(alone) != 1:
            there = f"say which of {listing(one.service for one in known)}" if known else "give the URL of one that runs elsewhere"
            raise ServingError(f"{len(alone)} services run here; {there}")
        return alone[0].url, None
    found = place.find(where)
    if found is None:
        raise place.unknown(where, [one.service for one in known])
    return found.url, found.service if found.behind else None
