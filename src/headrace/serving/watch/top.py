"""What `headrace top` shows: a service's `/status` as a view for a terminal, or as text.

`/status` is a JSON object. Figures that end in `_per_s`, `p50_s`, `p99_s`, `fill` and `prefix_hits` are of the last ten seconds, and null while unknown;
control takes the differences of what doors have counted (`figures.Lately`), so that whoever asks once is told as much as whoever watches.
Whatever else is counted, is since control began.

    service, at_s                name; the time on control's clock, in seconds since the epoch
    trouble                      what keeps control from acting, in words; "" where nothing does
    doors: [
        name, silent_s           seconds since it was heard last
    ]
    versions: [
        version, role, since_s   number; one of `versions.Role`, and since when
        why                      it is that
        weight, shadow           share of the requests that it answers, and of those mirrored to it
        counts                   a `VersionReport` without latencies, or null: in_flight, queued, answered, errors, rejected, expired, retries, ...
        answered_per_s, errors_per_s, rejected_per_s, expired_per_s, retries_per_s, p50_s, p99_s
        speech               null, or of streamed answers of OpenAI's interface: ttft_p50_s, ttft_p99_s (to the first token),
                             itl_p50_s, itl_p99_s (between tokens)
        groups: [
            name, ready, wanted  replicas
            in_flight, queued    requests in its replicas; those of them that no call has begun on
            background           those of work that nobody waits for, which are not in in_flight
            waiting              requests that doors hold because it has no replica
            shed                 requests turned away on its account
            rows_per_s, calls_per_s, p50_s, p99_s
            fill                 how full calls were, of 1
            memory_bytes         of its largest replica
            engine               null, or of its language models' engines: running, waiting and sequences (at most running) of all together, kv_cache (how
                                 full the fullest is, of 1), input_tokens_per_s, output_tokens_per_s, preempted_per_s, prefix_hits (share of 1)
        ]
    ]
    rollout                      null, or how a version takes over: version, kind (rolling, canary, shadow), step, mirror,
                                 waits (for what), seen (by the trial so far, in words), numbers (the same)
    events: [
        number, at_s, what, version, why, numbers, text    the latest last
    ]
    door                         the one that was asked: name, in_flight, connections, held_bytes
    guests                       the same of each service behind these doors, if there are any
"""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.report import count, rate, size

_EVENTS = 8
_WIDE = 200  # characters of a line of text
_SILENT_S = 5.0
_FULL = 0.95  # of 1, of an engine's memory
_UNKNOWN = "-"
_STYLES = {"current": "green", "previous": "dim", "retired": "dim", "failed": "red"}
_VERSION = (">version", "<state", ">weight", ">mirrored", ">requests/s", ">in flight", ">p50", ">p99", ">errors/s", ">shed/s", ">late/s", ">retries/s")
_GROUP = (">version", "<group", ">replicas", ">in flight", ">queue", ">rows/s", ">fill", ">p50", ">p99", ">shed", ">memory")
_ENGINE = (
    ">version", "<group", ">tokens/s in", ">out", ">TTFT p50", ">TTFT p99", ">ITL p50", ">ITL p99", ">running", ">waiting", ">KV cache", ">cached",
    ">preempted/s",
)  # fmt: skip


def frame(status: Mapping[str, Any], *, url: str = "", note: str = "") -> RenderableType:
    """The view. `note` is what the viewer itself has to say, such as that the service no longer answers."""
    versions = _maps(status, "versions")
    parts: list[RenderableType] = [_head(status, versions, url)]
    parts += [Text(_clean(said), style="red") for said in (note, status.get("trouble")) if said]
    parts += [Text(f"door {_clean(door.get('name'))} was last heard {door['silent_s']:.0f} s ago", style="yellow") for door in _silent(status)]
    kinds = _kinds(status)
    rows = [_version(version, kinds.get(version.get("version"), "")) for version in versions]
    groups = [_group(version.get("version"), group) for version in versions for group in _maps(version, "groups")]
    engines = [row for version in versions for group in _maps(version, "groups") if (row := _engine(version, group))]
    for heads, cells in ((_VERSION, rows), (_GROUP, groups), (_ENGINE, engines)):
        if cells:
            parts += [Text(""), _table(heads, cells)]
    if told := _rollout(status):
        parts += [Text(""), told]
    if events := _maps(status, "events")[-_EVENTS:]:
        lines = [Text.assemble((_time(event.get("at_s")), "dim"), "  ", _clean(event.get("text"))) for event in events]
        parts += [Text(""), *lines]
    for guest in _maps(status, "guests"):
        parts += [Text(""), frame(guest)]
    return Group(*parts)


def text(status: Mapping[str, Any], *, url: str = "") -> str:
    """The same as plain lines."""
    console = Console(file=io.StringIO(), width=_WIDE, color_system=None, force_terminal=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(frame(status, url=url))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _head(status: Mapping[str, Any], versions: Sequence[Mapping[str, Any]], url: str) -> Text:
    answered = [value for version in versions if isinstance(value := version.get("answered_per_s"), (int, float))]
    said = [_clean(url)] if url else []
    said.append(count(len(_maps(status, "doors")), "door"))
    if answered:
        said.append(f"{rate(sum(answered))} requests/s")
    return Text.assemble((_clean(status.get("service")), "bold"), "  ", (", ".join(said), "dim"))


def _kinds(status: Mapping[str, Any]) -> dict[Any, str]:
    """The version that takes over, and how."""
    rollout = status.get("rollout")
    return {rollout.get("version"): str(rollout.get("kind", ""))} if isinstance(rollout, Mapping) else {}


def _version(version: Mapping[str, Any], kind: str) -> list[Text]:
    role = str(version.get("role", ""))
    state = kind if role == "joining" and kind else role
    counted = version.get("counts")
    in_flight = counted.get("in_flight", 0) if isinstance(counted, Mapping) else 0
    return [
        Text(str(version.get("version", ""))),
        Text(_clean(state), style=_STYLES.get(state, "cyan")),
        Text(_share(version.get("weight"))),
        Text(_share(version.get("shadow"))),
        Text(_rate(version.get("answered_per_s"))),
        Text(f"{in_flight:,}"),
        Text(_time_of(version.get("p50_s"))),
        Text(_time_of(version.get("p99_s"))),
        *(
            _alarm(version.get(f"{name}_per_s"), style)
            for name, style in (("errors", "red"), ("rejected", "yellow"), ("expired", "yellow"), ("retries", "yellow"))
        ),
    ]


def _group(version: Any, group: Mapping[str, Any]) -> list[Text]:
    ready, wanted = group.get("ready", 0), group.get("wanted", 0)
    waiting = group.get("queued", 0) + group.get("waiting", 0)
    fill, memory = group.get("fill"), group.get("memory_bytes")
    return [
        Text(str(version)),
        Text(_clean(group.get("name"))),
        Text(f"{ready} of {wanted}" if ready != wanted else f"{ready}", style="yellow" if ready < wanted else ""),
        Text(f"{group.get('in_flight', 0):,.0f}"),
        Text(f"{waiting:,}"),
        Text(_rate(group.get("rows_per_s"))),
        Text(_part(fill)),
        Text(_time_of(group.get("p50_s"))),
        Text(_time_of(group.get("p99_s"))),
        Text(f"{group.get('shed', 0):,}", style="yellow" if group.get("shed") else ""),
        Text(size(memory) if memory else _UNKNOWN),
    ]


def _engine(version: Mapping[str, Any], group: Mapping[str, Any]) -> list[Text]:
    """The row of a group whose replicas are language models; nothing for others."""
    engine, speech = group.get("engine"), version.get("speech")
    if not isinstance(engine, Mapping):
        return []
    speech = speech if isinstance(speech, Mapping) else {}
    waiting, kv_cache = engine.get("waiting", 0), engine.get("kv_cache")
    return [
        Text(str(version.get("version", ""))),
        Text(_clean(group.get("name"))),
        *(Text(_rate(engine.get(f"{name}_tokens_per_s"))) for name in ("input", "output")),
        *(Text(_time_of(speech.get(name))) for name in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")),
        Text(f"{engine.get('running', 0):,.0f} of {engine.get('sequences', 0):,.0f}"),
        Text(f"{waiting:,.0f}", style="yellow" if waiting else ""),
        Text(_part(kv_cache), style="yellow" if kv_cache is not None and kv_cache >= _FULL else ""),
        Text(_part(engine.get("prefix_hits"))),
        _alarm(engine.get("preempted_per_s"), "yellow"),
    ]


def _rollout(status: Mapping[str, Any]) -> Text | None:
    """How a version takes over: what was seen of it, and what it waits for."""
    rollout = status.get("rollout")
    if not isinstance(rollout, Mapping):
        return None
    said = [_clean(rollout[name]) for name in ("seen", "waits") if rollout.get(name)]
    return Text.assemble((f"{_clean(rollout.get('kind'))} of version {rollout.get('version')}", "cyan"), f": {'; '.join(said)}" if said else "")


def _silent(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [door for door in _maps(status, "doors") if door.get("silent_s", 0) > _SILENT_S]


def _table(heads: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head[1:], justify="right" if head[0] == ">" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _maps(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [value for value in values.get(name) or [] if isinstance(value, Mapping)]


def _share(value: Any) -> str:
    return f"{value:.{0 if value >= 0.1 else 1}%}".replace(".0%", "%") if value else ""


def _part(value: Any) -> str:
    return _UNKNOWN if value is None else f"{value:.0%}" if value >= 0.01 or not value else "<1%"


def _rate(value: Any) -> str:
    return _UNKNOWN if value is None else "0" if value == 0 else rate(value)


def _alarm(value: Any, style: str) -> Text:
    return Text(_rate(value), style=style if value else "")


def _time_of(value_s: Any) -> str:
    if value_s is None:
        return _UNKNOWN
    value_ms = value_s * 1000
    return f"{value_ms:.1f} ms" if value_ms < 10 else f"{value_ms:.0f} ms" if value_ms < 1000 else f"{value_s:.1f} s"


def _time(at_s: Any) -> str:
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%H:%M:%S") if isinstance(at_s, (int, float)) and 0 <= at_s < 1e11 else ""


def _clean(value: Any) -> str:
    """Text from elsewhere without characters that would move a terminal's cursor, or colour it."""
    return "".join(one if one.isprintable() else "\ufffd" for one in str(value if value is not None else ""))
