"""The page that explains a service to people: one file that asks for nothing from anywhere, made from its OpenAPI document.

All that comes from the pipeline's author is escaped, and kept from changing the direction of the text around it. No scripts; the
page's own policy forbids them, and every request.
"""

from __future__ import annotations

import importlib.resources
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headrace.console import html as pages

_URL = "http://127.0.0.1:8000"
_LONGEST = 600  # characters of an example that is shown in full
_FORMS = {
    "str": "text",
    "bool": "true or false",
    "int": "an integer of 64 bits",
    "float": 'a number, or "NaN", "Infinity", "-Infinity"',
    "bytes": "base64 text",
    "image": "an encoded image (PNG, JPEG, …) as base64 text",
    "datetime": "ISO 8601 text, such as 2024-02-29T12:00:00Z; UTC where no offset is given",
    "date": "text, such as 2024-02-29",
    "any": "any JSON value, of one kind throughout a request",
}
_PYTHON = {
    "str": '"a short text"',
    "bool": "True",
    "int": "1",
    "float": "0.5",
    "bytes": 'b"bytes"',
    "image": 'Path("image.png").read_bytes()',
    "datetime": "dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)",
    "date": "dt.date(2024, 2, 29)",
    "any": '"a short text"',
}


def page(document: Mapping[str, Any]) -> str:
    """The page as HTML, for a document that `openapi.document` made."""
    info, parts = document["info"], document["components"]["schemas"]
    keys = "securitySchemes" in document["components"]
    path, asked = next((path, operations["post"]) for path, operations in document["paths"].items() if "post" in operations)
    answers = asked["responses"]["200"]["content"]
    style = importlib.resources.files("headrace.serving.bodies").joinpath("docs.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{_safe(info['title'])}</h1>",
        f'<p class="soft">{_prose(info["description"])}</p>',
        f'<p class="call"><b>POST</b>{_safe(path)}</p>',
        f"<p>{_prose(asked['description'])}</p>",
        *_examples(document, path, asked["requestBody"]["content"], keys),
        "<h2>A row</h2>",
        _columns(parts["Row"]),
        "<h2>Its answer</h2>",
        _columns(parts["Answer"], answer=True),
        f'<p>Several rows in one request, as <code>{{"rows": [row, …]}}</code>, are answered by as many, in order. {_prose(parts["Rows"]["description"])}</p>',
        "<h2>Bodies</h2>",
        _table(("Content-Type", "Request", "Answer"), _bodies(asked)),
        "<p>An answer is of the request's own type; <code>Accept: application/vnd.apache.arrow.stream</code> gives Arrow back for JSON, too.</p>",
        *(f"<p>{_prose(answer['schema']['description'])}</p>" for media, answer in answers.items() if media == "text/event-stream"),
        "<h2>Headers of a request</h2>",
        _table(("Header", "Meaning"), [(_code(one["name"]), _prose(one["description"])) for one in asked["parameters"]]),
        *([_table(("Key", "Meaning"), _keys(document))] if keys else []),
        "<h2>Errors</h2>",
        "<p>An answer that is none says why, as JSON: a word for programs, a sentence, and for status 422 what is wrong with each field.</p>",
        _pre(json.dumps(_error(), indent=2, ensure_ascii=False)),
        _table(("Status", "Codes"), [(_text(status), _prose(said)) for status, said in _failures(document, asked)]),
        "<h2>Also here</h2>",
        _table(("Path", "What it tells"), _paths(document, path)),
        "<h2>As JSON schema</h2>",
        *(
            f"<details><summary>{_safe(name)}</summary>{_pre(json.dumps(_brief(parts[name]), indent=2, ensure_ascii=False))}</details>"
            for name in ("Row", "Answer", "Error")
        ),
        '<footer>For programs: <a href="/openapi.json">/openapi.json</a>, which this page was made from.</footer>',
    ]
    return pages.document(_text(info["title"]), body, style=style)


def _text(text: Any) -> str:
    """Text that somebody else wrote, fit for HTML, attributes included."""
    return pages.text(str(text), most=None)


def _safe(text: str) -> str:
    """The same, set apart, so that a name written from right to left leaves its surroundings in order."""
    return f"<bdi>{_text(text)}</bdi>"


def _code(text: str) -> str:
    return f"<code>{_safe(text)}</code>"


def _prose(text: str) -> str:
    """The same, with `code` as Markdown has it."""
    return "".join(_code(part) if at % 2 else _text(part) for at, part in enumerate(text.split("`")))


def _pre(text: str) -> str:
    return f"<pre><code>{_text(text)}</code></pre>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    lines = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _columns(form: Mapping[str, Any], *, answer: bool = False) -> str:
    needed = form["required"]
    rows = []
    for name, column in form["properties"].items():
        kind = column["headrace"]
        row = (_code(name), _code(kind), _text(_form(kind)))
        rows.append(row if answer else (*row, "required" if name in needed else "may be left out"))
    return _table(("Column", "Type", "In JSON") if answer else ("Column", "Type", "In JSON", ""), rows)


def _form(kind: str) -> str:
    """How values of a type look in JSON, in words."""
    if kind.endswith(" | None"):
        return f"{_form(kind.removesuffix(' | None'))}; or null"
    if kind.startswith("list["):
        return f"a list, each: {_form(kind[5:-1])}"
    if kind.startswith("Vector("):
        size, _, dtype = kind[7:-1].partition(", ")
        return f"a list of {'any number of' if size == 'ragged' else size} {'integers' if 'int' in dtype else 'numbers'} ({dtype or 'float32'})"
    return _FORMS[kind]


def _python(kind: str) -> str:
    """A made-up value of a type, as Python source."""
    kind = kind.removesuffix(" | None")
    if kind.startswith("list["):
        return f"[{_python(kind[5:-1])}]"
    if kind.startswith("Vector("):
        size, _, dtype = kind[7:-1].partition(", ")
        return f"[{'1' if 'int' in dtype else '0.5'}] * {4 if size == 'ragged' else size}"
    return _PYTHON[kind]


def _examples(document: Mapping[str, Any], path: str, content: Mapping[str, Any], keys: bool) -> list[str]:
    url = next((server["url"] for server in document.get("servers", ()) if server["url"].startswith("http")), _URL).rstrip("/")
    _, example = next(iter(content["application/json"]["examples"].items()))
    row = json.dumps(example["value"], ensure_ascii=False)
    short = len(row) <= _LONGEST
    curl = [f"curl {shlex.quote(url + path)}", *(['-H "Authorization: Bearer $KEY"'] if keys else []), "-H 'Content-Type: application/json'"]
    shown = [] if short else ["<p>In <code>row.json</code>, shortened:</p>", _pre(json.dumps(_brief(example["value"]), ensure_ascii=False, indent=2))]
    inputs = document["components"]["schemas"]["Row"]["properties"]
    values = ",\n".join(f"    {name!r}: {_python(column['headrace'])}" for name, column in inputs.items())
    imports = [line for line, word in (("import datetime as dt", "dt."), ("from pathlib import Path", "Path(")) if word in values]
    name = document["info"]["title"]
    client = f"client = hr.Client({url!r}, key='hr_...')" if keys else f"client = hr.Client({url!r})"
    python = [*imports, *([""] if imports else []), "import headrace as hr", "", client, f"answer = client[{name!r}]({{\n{values},\n}})"]
    return [
        "<h3>curl</h3>",
        *shown,
        _pre(" \\\n  ".join([*curl, f"-d {shlex.quote(row)}" if short else "-d @row.json"])),
        "<h3>Python</h3>",
        _pre("\n".join(python)),
        "<p>Values are those of the pipeline itself: vectors come back as numpy arrays, instants as datetimes, images as bytes.</p>",
    ]


def _brief(value: Any) -> Any:
    """A JSON value with long lists and texts cut."""
    if isinstance(value, dict):
        return {key: _brief(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_brief(one) for one in value] if len(value) <= 12 else [*map(_brief, value[:3]), f"… {len(value) - 3} more"]
    return value if not isinstance(value, str) or len(value) <= 200 else value[:199] + "…"


def _bodies(asked: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    said = {
        "application/json": ("One row, or several", "The same"),
        "application/vnd.apache.arrow.stream": ("An Arrow IPC stream, not compressed, a column for each name", "The same"),
        "application/x-ndjson": ("One row a line, any number of lines", "One answer a line, in order, as they are ready"),
    }
    return [(_code(media), *said[media]) for media in asked["requestBody"]["content"]]


def _keys(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for scheme in document["components"]["securitySchemes"].values():
        name = scheme.get("name", "Authorization: Bearer …")
        yield _code(name), _prose(scheme["description"])


def _error() -> dict[str, Any]:
    details = [{"loc": ["rows", 3, "text"], "message": "expected a string, got the number 5"}]
    return {"error": {"code": "invalid_row", "message": "rows.3.text: expected a string, got the number 5", "details": details}, "request_id": "…"}


def _failures(document: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    known = document["components"]["responses"]
    return [(status, known[status]["description"]) for status in asked["responses"] if status in known]


def _paths(document: Mapping[str, Any], path: str) -> Iterable[tuple[str, str]]:
    for other, operations in document["paths"].items():
        if "post" in operations and other != path:
            yield f"POST {_code(other)}", _text(operations["post"]["summary"])
        elif "get" in operations and "{" not in other:
            yield f'<a href="{_text(other)}">{_safe(other)}</a>', _text(operations["get"]["summary"])
