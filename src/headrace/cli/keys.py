"""`headrace keys`: who may ask a service or a gateway, and for a gateway how much, and what it came to."""

from __future__ import annotations

import contextlib
import datetime as dt
import json as json_module
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from headrace.cli.tables import show
from headrace.cost import money
from headrace.errors import AccountsError, KeyFileError, SettingError
from headrace.serving.keys import KeyFile, default_path

if TYPE_CHECKING:
    from headrace.gateway.accounts.keys import Key, Keys
    from headrace.gateway.accounts.usage import By, Sum

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, '.', '_' and '-'.")]
Service = Annotated[str | None, typer.Option(metavar="NAME", help="The service, whose file is $XDG_CONFIG_HOME/headrace/keys/NAME.json.")]
File = Annotated[Path | None, typer.Option(metavar="PATH", help="The file itself, in place of --service.")]
Accounts = Annotated[
    str | None,
    typer.Option(metavar="WHERE", help="A gateway's accounts: an SQLite file, or postgresql+psycopg://user:password@host/name; HEADRACE_ACCOUNTS by default."),
]
Owner = Annotated[str | None, typer.Option(metavar="TEXT", help="Whom to ask about the key.")]
Model = Annotated[list[str] | None, typer.Option(metavar="MODEL", help="A model that it may ask, or all; repeatable.")]
RequestsPerMinute = Annotated[str | None, typer.Option(metavar="N", help="Requests that it may make in any 60 seconds, or none for no limit.")]
TokensPerMinute = Annotated[str | None, typer.Option(metavar="N", help="Tokens, of prompts and answers, in any 60 seconds, or none for no limit.")]
Budget = Annotated[str | None, typer.Option(metavar="USD", help="What it may spend in a calendar month of UTC, or none for no limit.")]
Priority = Annotated[str | None, typer.Option(metavar="interactive|normal|batch", help="Who goes first when there is not room for all; normal by default.")]
LogPrompts = Annotated[bool | None, typer.Option("--log-prompts/--no-log-prompts", help="Whether its owner agrees to prompts and answers being logged.")]
Revoked = Annotated[bool, typer.Option("--revoked", help="Also those that are not valid any more.")]
Of = Annotated[str | None, typer.Option("--key", metavar="NAME", help="Only what this key used.")]
Grouped = Annotated[list[str] | None, typer.Option("--by", metavar="key|owner|model|day", help="What to sum by; repeatable, key and day by default.")]
Since = Annotated[str | None, typer.Option(metavar="DAY", help="The first day, such as 2026-01-31, of UTC.")]
Until = Annotated[str | None, typer.Option(metavar="DAY", help="The day after the last.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON array.")]

WHERE = "HEADRACE_ACCOUNTS"
"""The environment variable with the place of the accounts: other users of a machine see command lines, and a password on them."""

_OPTIONS = {
    "owner": "--owner",
    "models": "--model",
    "requests_per_minute": "--requests-per-minute",
    "tokens_per_minute": "--tokens-per-minute",
    "budget_usd": "--budget",
    "priority": "--priority",
    "log_prompts": "--log-prompts",
    "revoked": "--revoked",
}

keys = typer.Typer(name="keys", help="Make, limit, list and revoke the API keys of a service or a gateway, and sum what they used.", no_args_is_help=True)


@keys.command()
def create(
    name: Name,
    service: Service = None,
    file: File = None,
    accounts: Accounts = None,
    owner: Owner = None,
    model: Model = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    budget: Budget = None,
    priority: Priority = None,
    log_prompts: LogPrompts = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept. An owner and limits are for keys of a gateway."""
    limits = _limits(model, requests_per_minute, tokens_per_minute, budget, priority, log_prompts)
    kept = _file(service, file, accounts, needs=[*limits] if owner is None else ["owner", *limits])
    if kept is not None:
        token, where = kept.create(name), str(kept.path)
    else:
        from headrace.gateway.accounts.limits import Limits

        allowed = Limits(**limits)  # told now, and not after a database was made, if there is a mistake in them
        with _opened(accounts, make=True) as known:
            token, where = known.create(name, owner=owner or "", limits=allowed), known.database.name
    _say(f"the key of {name}, shown only now; its hash is in {where}")
    print(token)


@keys.command("list")
def list_keys(service: Service = None, file: File = None, accounts: Accounts = None, revoked: Revoked = False, json: Json = False) -> None:
    """List names and ages of the valid keys; of a gateway's also owners, limits and what was spent in this month. Days are those of UTC."""
    kept = _file(service, file, accounts, needs=["revoked"] if revoked else ())
    if kept is not None:
        records = [{"name": key.name, "created": key.created} for key in kept.list()]
        rows = [{"name": key["name"], "created (UTC)": key["created"][:16].replace("T", " ")} for key in records]
    else:
        with _opened(accounts) as known:
            found = known.list(revoked=revoked)
        records = [_record(key) for key in found]
        rows = [_row(key) | ({"revoked": _instant(key.revoked)[:10]} if revoked else {}) for key in found]
    if json:
        print(json_module.dumps(records, indent=1))
    elif rows:
        _show(rows)
    else:
        _say("no keys: nobody is let in")


@keys.command()
def limit(
    name: Name,
    accounts: Accounts = None,
    model: Model = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    budget: Budget = None,
    priority: Priority = None,
    log_prompts: LogPrompts = None,
) -> None:
    """Change limits of a gateway's key, those that are named and no others, and print all of them."""
    limits = _limits(model, requests_per_minute, tokens_per_minute, budget, priority, log_prompts)
    with _opened(accounts) as known:
        key = known.limit(name, **limits) if limits else known.get(name)
    _show([_row(key)])


@keys.command()
def revoke(name: Name, service: Service = None, file: File = None, accounts: Accounts = None) -> None:
    """Make a key invalid. Services that use the file, and gateways that use the accounts, notice within seconds."""
    kept = _file(service, file, accounts)
    if kept is not None:
        kept.revoke(name)
        _say(f"the key of {name} is no longer in {kept.path}")
        return
    with _opened(accounts) as known:
        known.revoke(name)
        _say(f"the key of {name} is no longer valid in {known.database.name}; its usage stays there")


@keys.command()
def usage(
    accounts: Accounts = None, key: Of = None, by: Grouped = None, since: Since = None, until: Until = None, csv: Csv = False, json: Json = False
) -> None:
    """Sum what the keys of a gateway used, and what it cost: by key and day unless told otherwise."""
    if csv and json:
        raise SettingError("--csv and --json are two forms of the same; give one of them")
    first, end = _day(since, "--since"), _day(until, "--until")
    if first is not None and end is not None and first >= end:
        raise SettingError(f"--since {since} and --until {until} have no day between them: --until is the day after the last")
    with _opened(accounts) as known:
        from headrace.gateway.accounts.usage import as_csv, as_json, sums

        if key is not None:
            known.get(key, revoked=True)  # which says so, and names the nearest, if there is none
        groups = cast("Sequence[By]", by or ("key", "day"))
        found = sums(known.database, first, end, by=groups, key=key)
    if csv or json:
        print(as_csv(found) if csv else as_json(found), end="")
    elif found:
        _show([{group: getattr(one, group) for group in groups} | _used(one) for one in found])
    else:
        _say("no usage")


def _file(service: str | None, file: Path | None, accounts: str | None, *, needs: Collection[str] = ()) -> KeyFile | None:
    """The file of keys; None if they are in accounts. `needs` are what was asked for that only accounts have."""
    said = sum(each is not None for each in (service, file, accounts))
    if said > 1 or not (said or os.environ.get(WHERE)):
        raise KeyFileError(f"say whose keys: --accounts (or {WHERE}) for a gateway's, --service or --file for a service's, and only one of them")
    if service is None and file is None:
        return None
    if needs:
        options = ", ".join(_OPTIONS[each] for each in needs)
        raise KeyFileError(f"a file of keys holds names only; for {options} give --accounts in its place, which is where the keys of a gateway are")
    return KeyFile(default_path(service) if service is not None else file or "")


@contextlib.contextmanager
def _opened(accounts: str | None, *, make: bool = False) -> Iterator[Keys]:
    where = accounts if accounts is not None else os.environ.get(WHERE)
    if not where:
        raise AccountsError(f"say where the accounts of the gateway are: --accounts, or {WHERE} in the environment")
    from headrace.gateway.accounts.database import Database  # loads sqlalchemy
    from headrace.gateway.accounts.keys import Keys

    with contextlib.closing(Database(where, make=make)) as database:
        yield Keys(database)


def _limits(
    model: list[str] | None, requests_per_minute: str | None, tokens_per_minute: str | None, budget: str | None, priority: str | None, log_prompts: bool | None
) -> dict[str, Any]:
    """The limits that were named, as `Limits` has them."""
    found: dict[str, Any] = {}
    if model:
        if "all" in model and len(model) > 1:
            raise SettingError("--model all allows every model: give it alone, or name models without it")
        found["models"] = None if model == ["all"] else model
    kinds: tuple[tuple[str, str | None, type[int] | type[float]], ...] = (
        ("requests_per_minute", requests_per_minute, int),
        ("tokens_per_minute", tokens_per_minute, int),
        ("budget_usd", budget, float),
    )
    for limit, text, kind in kinds:
        if text is not None:
            try:
                found[limit] = None if text == "none" else kind(text)
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                raise SettingError(f"{_OPTIONS[limit]} {text!r} must be {what}, or none for no limit") from None
    if priority is not None:
        found["priority"] = priority
    if log_prompts is not None:
        found["log_prompts"] = log_prompts
    return found


def _day(text: str | None, option: str) -> dt.date | None:
    try:
        return None if text is None else dt.date.fromisoformat(text)
    except ValueError:
        raise SettingError(f"{option} {text!r} must be a day, such as 2026-01-31") from None


def _record(key: Key) -> dict[str, Any]:
    return {
        "name": key.name,
        "owner": key.owner,
        "created": _instant(key.created),
        "revoked": _instant(key.revoked) or None,
        **asdict(key.limits),
        "spent_usd": key.spent_usd,
    }


def _instant(at_s: float | None) -> str:
    return "" if at_s is None else dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _row(key: Key) -> dict[str, str]:
    limits = key.limits
    return {
        "name": key.name,
        "owner": key.owner,
        "created": _instant(key.created)[:10],
        "priority": limits.priority,
        "models": "all" if limits.models is None else ", ".join(limits.models),
        "n requests/min": "none" if limits.requests_per_minute is None else f"{limits.requests_per_minute:,}",
        "n tokens/min": "none" if limits.tokens_per_minute is None else f"{limits.tokens_per_minute:,}",
        "n budget": "none" if limits.budget_usd is None else money(limits.budget_usd),
        "n spent": money(key.spent_usd),
        "prompts": "logged" if limits.log_prompts else "",
    }


def _used(one: Sum) -> dict[str, str]:
    return {
        "n requests": f"{one.requests:,}",
        "n refused": f"{one.refused:,}",
        "n prompt tokens": f"{one.prompt_tokens:,}",
        "n cached": f"{one.cached_tokens:,}",
        "n answer tokens": f"{one.completion_tokens:,}",
        "n cost": money(one.usd) if one.priced else f"at least {money(one.usd)}" if one.usd else money(None),
    }


def _show(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows by their heads. Whatever is too wide for a terminal takes several lines; nothing is cut off."""
    show(Console(highlight=False, emoji=False), list(rows[0]), [list(row.values()) for row in rows], wrap=range(len(rows[0])))


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, emoji=False).print(text, markup=False, soft_wrap=True)
