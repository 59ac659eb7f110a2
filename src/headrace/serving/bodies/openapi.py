"""What a service says about itself: the contract of its pipeline, its JSON schema, its OpenAPI document, and a page for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from headrace.arrays import table
from headrace.columns import ColumnType
from headrace.pipeline import Pipeline
from headrace.serving.bodies import openai
from headrace.serving.bodies.codec import Codec, sample
from headrace.serving.bodies.docs import page
from headrace.serving.routes import Limits
from headrace.serving.wire import Content
from headrace.speech import Speech, Writing

__all__ = ["contract", "document", "page", "schema"]

JSON, ARROW, NDJSON = "application/json", "application/vnd.apache.arrow.stream", "application/x-ndjson"
EVENTS = "text/event-stream"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_CODES = {  # of errors, with the status and the words that explain it
    "bad_header": (400, "A header has a value that it cannot have."),
    "not_json": (400, "The body is no JSON: empty, cut off, nested too deeply, or not UTF-8."),
    "not_arrow": (400, "The body is no Arrow IPC stream that can be read."),
    "unauthorized": (401, "A key is missing or not valid."),
    "not_found": (404, "There is no such pipeline or path."),
    "method_not_allowed": (405, "The path takes another method."),
    "not_acceptable": (406, "There is no answer of the type that is asked for: `text/event-stream` of rows that no language model writes, or of several."),
    "timeout_reading": (408, "The body did not arrive in time."),
    "too_large": (413, "The body has too many bytes or too many rows."),
    "unsupported_media_type": (415, "The body is of a type that is not understood."),
    "invalid_row": (422, "Rows do not have the columns or the types that the pipeline reads; `details` says where."),
    "overloaded": (429, "The service has more to do than it can; `Retry-After` says when to come back."),
    "stage_failed": (500, "A stage raised an exception on the row."),
    "deadly_row": (500, "The request ended the process that computed it, more than once."),
    "unavailable": (503, "Nothing is there to compute the request now."),
    "deadline_exceeded": (504, "The deadline passed before there was an answer."),
}
_TAKES_ROWS = (400, 401, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504)


def contract(pipeline: Pipeline) -> dict[str, Any]:
    """What a pipeline reads and writes, of JSON values alone: for each column its JSON schema, and its type under the key `headrace`.

    `required` names the columns that a row must have, and `sample` is a made-up row as a body holds it. A pipeline that is one language model
    and nothing else has `speech`: the `model`'s name, and the `paths` of OpenAI's interface that it answers. One whose last stage is a language model
    that writes text has `streams`: the column whose text is sent as it is written to who asks for that.
    """
    made_up = Codec({}, pipeline.inputs, rows=1).encode(table([sample(pipeline.inputs)], pipeline.inputs), [(0, 1, True, Content.JSON)])
    return {
        "pipeline": pipeline.name,
        "inputs": {name: _described(column) for name, column in pipeline.inputs.items()},
        "outputs": {name: _described(column) for name, column in pipeline.outputs.items()},
        "required": [name for name, column in pipeline.inputs.items() if not column.optional],
        "sample": orjson.loads(made_up[0]),
        **_speech(pipeline),
        **_streams(pipeline),
    }


def _speech(pipeline: Pipeline) -> dict[str, Any]:
    speaks = [stage.call.speaks for stage in pipeline.stages if hasattr(stage.call, "speaks")]
    if len(pipeline.stages) > 1 or not speaks:
        return {}
    speech: Speech = speaks[0]()
    return {"speech": {"model": speech.model, "paths": list(speech.paths)}}


def _streams(pipeline: Pipeline) -> dict[str, str]:
    last: Any = pipeline.stages[-1].call
    writing: Writing | None = last.writing() if hasattr(last, "speaks") and hasattr(last, "writing") else None
    return {"streams": writing.column} if writing is not None and writing.column in pipeline.outputs else {}


def _described(column: ColumnType) -> dict[str, Any]:
    return {**column.json_schema(), "headrace": str(column)}


def schema(contract: Mapping[str, Any]) -> dict[str, Any]:
    """The contract, with the JSON schema of a row under `row` and of what comes back for it under `answer`."""
    return {
        **contract,
        "row": {"$schema": _DIALECT, "title": f"{contract['pipeline']}: a row", **_row(contract)},
        "answer": {"$schema": _DIALECT, "title": f"{contract['pipeline']}: the answer to a row", **_answer(contract)},
    }


def _row(contract: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(contract["inputs"]), "required": list(contract["required"]), "additionalProperties": False}


def _answer(contract: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(contract["outputs"]), "required": list(contract["outputs"]), "additionalProperties": False}


def document(contract: Mapping[str, Any], limits: Limits, *, keys: bool, files: bool = False, guests: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The service as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1).

    `keys`: whether requests need an API key; `files`: whether it keeps files and batches; `guests`: the contracts of those behind the same address.
    """
    name = contract["pipeline"]
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": name,
            "version": "1",
            "description": f"The pipeline `{name}` as a service. A row has {_named(contract['inputs'])}; the answer to it has {_named(contract['outputs'])}.",
        },
        "paths": {
            f"/{name}": {"post": _post(contract, limits)},
            f"/{name}/schema": {"get": _get("schema", "The columns of rows and of answers, as JSON schema", JSON, {"type": "object"})},
            "/openapi.json": {"get": _get("openapi", "This document", JSON, {"type": "object"})},
            "/docs": {"get": _get("docs", "This document as a page", "text/html", {"type": "string"})},
            "/status": {"get": _get("status", "What the service is doing now", JSON, {"type": "object"})},
            "/metrics": {"get": _get("metrics", "The same for Prometheus", "text/plain", {"type": "string"})},
            "/healthz": {"get": _get("healthz", "Whether the process lives", None, {}, free=True)},
            "/readyz": {"get": _ready()},
        },
        "components": {
            "schemas": _schemas(contract, limits),
            "headers": {
                "X-Request-ID": {"description": "The id of the request: the one that it came with, or one made for it.", "schema": {"type": "string"}},
                "X-Headrace-Version": {"description": "The version of the pipeline that answered.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
                "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer", "minimum": 1}},
                "WWW-Authenticate": {"description": "How to present a key.", "schema": {"type": "string"}},
            },
            "responses": {str(status): _failure(status) for status in sorted({status for status, _ in _CODES.values()})},
        },
    }
    if (speech := contract.get("speech")) is not None:
        made["paths"] |= openai.paths(speech)
        speaking = [(each["speech"]["model"], each["pipeline"]) for each in (contract, *guests) if each.get("speech") is not None]
        made["components"]["schemas"] |= openai.schemas(model for names in speaking for model in names)
        made["components"]["responses"] |= openai.responses()
        if files:
            made["paths"] |= openai.shelf_paths(speech)
            made["components"]["schemas"] |= openai.shelf_schemas()
    if keys:
        made["security"] = [{"bearer": []}, {"header": []}]
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of the service, `hr_...`"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key, where `Authorization` is taken"},
        }
    else:
        _drop_unauthorized(made)
    return made


def _named(columns: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` ({column['headrace']})" for name, column in columns.items())


def _ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _schemas(contract: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "type": "object",
        "description": f"Up to {limits.rows} rows. An object with the one key `rows` always means several.",
        "properties": {"rows": {"type": "array", "items": _ref("schemas", "Row"), "maxItems": limits.rows}},
        "required": ["rows"],
        "additionalProperties": False,
    }
    return {
        "Row": {**_row(contract), "description": "One row: the columns that the pipeline reads.", "examples": [contract["sample"]]},
        "Rows": {**rows, "examples": [{"rows": [contract["sample"]]}]},
        "Answer": {**_answer(contract), "description": "What the pipeline computes of one row."},
        "Answers": {
            **rows,
            "description": "The same for several rows, in their order.",
            "properties": {"rows": {"type": "array", "items": _ref("schemas", "Answer")}},
        },
        "Error": {
            "type": "object",
            "properties": {
                "error": {
                    "type": "object",
                    "properties": {
                        "code": {"type": "string", "enum": list(_CODES)},
                        "message": {"type": "string"},
                        "details": {
                            "type": "array",
                            "description": "What is wrong with each field, of 20 fields at most.",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "loc": {"type": "array", "items": {"type": ["string", "integer"]}, "examples": [["rows", 3, "text"]]},
                                    "message": {"type": "string"},
                                },
                                "required": ["loc", "message"],
                            },
                        },
                    },
                    "required": ["code", "message"],
                },
                "request_id": {"type": "string"},
            },
            "required": ["error", "request_id"],
        },
    }


def _post(contract: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    single, several = _ref("schemas", "Row"), _ref("schemas", "Rows")
    bodies = [single, several]
    examples = {"row": {"summary": "One row", "value": contract["sample"]}, "rows": {"summary": "Several rows", "value": {"rows": [contract["sample"]] * 2}}}
    if list(contract["inputs"]) == ["rows"]:  # an object with this one key means several rows
        bodies, examples = [several], {"rows": examples["rows"]}
    elif "rows" in contract["inputs"] and set(contract["required"]) <= {"rows"}:
        bodies = [{"allOf": [single, {"not": {"required": ["rows"], "maxProperties": 1}}]}, several]
    body = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
    answers = _ref("schemas", "Answers") if len(bodies) == 1 else {"anyOf": [_ref("schemas", "Answer"), _ref("schemas", "Answers")]}
    lines = {"type": "string", "description": "One JSON object a line. A line that fails has an object `error` in place of its answer; the others go on."}
    return {
        "operationId": "compute",
        "summary": "Compute the pipeline for one row or several",
        "description": f"Rows go in and answers come out in the same order. A body has up to {limits.body_bytes} bytes and {limits.rows} rows, but for "
        f"`{NDJSON}`, which streams any number of lines both ways.",
        "parameters": _parameters(limits),
        "requestBody": {
            "description": f"`{ARROW}` is an Arrow IPC stream, not compressed, with a column for each name; ask for one back with `Accept`.",
            "required": True,
            "content": {JSON: {"schema": body, "examples": examples}, ARROW: {}, NDJSON: {"schema": lines}},
        },
        "responses": {
            "200": {
                "description": "One answer for one row, or several in order.",
                "headers": {name: _ref("headers", name) for name in ("X-Request-ID", "X-Headrace-Version")},
                "content": {JSON: {"schema": answers}, ARROW: {}, NDJSON: {"schema": lines}, **_events(contract)},
            },
            **{str(status): _ref("responses", str(status)) for status in _TAKES_ROWS},
        },
    }


def _events(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Of an answer that is sent as it is written."""
    if not (column := contract.get("streams")):
        return {}
    piece, row = f'{{"column": "{column}", "text": "a piece"}}', "the whole row, as it is answered in JSON"
    text = (
        f"With `Accept: {EVENTS}`, the answer to one row as it is written: `event: text` with `data: {piece}` as often as there are pieces of `{column}`, "
        f"then `event: row` with {row}, or if there is none `event: error` with its `code` and `message`."
    )
    return {EVENTS: {"schema": {"type": "string", "description": text}}}


def _parameters(limits: Limits) -> list[dict[str, Any]]:
    told = {
        "X-Request-Timeout": (
            f"Seconds within which the answer is of use, at most {limits.deadline_s:g}; or `Deadline`, which may be an instant of RFC 3339, too.",
            {"type": "string", "pattern": r"^(0\.[0-9]{0,8}[1-9]|[1-9][0-9]{0,8}(\.[0-9]{1,9})?)$", "examples": ["1.5"]},
        ),
        "X-Priority": ("Who goes first when there is more to do than can be done.", {"type": "string", "enum": ["interactive", "normal", "batch"]}),
        "X-Request-ID": ("An id for logs, returned with the answer; one is made where there is none.", {"type": "string", "pattern": "^[!-~]{1,128}$"}),
    }
    return [{"name": name, "in": "header", "required": False, "description": text, "schema": form} for name, (text, form) in told.items()]


def _failure(status: int) -> dict[str, Any]:
    headers = ["X-Request-ID", *{401: ["WWW-Authenticate"], 429: ["Retry-After"]}.get(status, [])]
    return {
        "description": " ".join(f"`{code}`: {text}" for code, (at, text) in _CODES.items() if at == status),
        "headers": {name: _ref("headers", name) for name in headers},
        "content": {JSON: {"schema": _ref("schemas", "Error")}},
    }


def _get(called: str, summary: str, media: str | None, form: dict[str, Any], *, free: bool = False) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": summary}
    if media:
        answer["content"] = {media: {"schema": form}}
    made: dict[str, Any] = {"operationId": called, "summary": summary, "responses": {"200": answer}}
    if free:
        made["security"] = []
    else:
        made["responses"]["401"] = _ref("responses", "401")
    return made


def _ready() -> dict[str, Any]:
    made = _get("readyz", "Whether each part of the pipeline has a place to run", None, {}, free=True)
    made["responses"]["503"] = {"description": "Not yet, or no more; the body says what is missing."}
    return made


def _drop_unauthorized(made: dict[str, Any]) -> None:
    """A service without keys refuses nobody."""
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("401", None)
    made["components"]["responses"].pop("OpenAI401", None)
    del made["components"]["responses"]["401"], made["components"]["headers"]["WWW-Authenticate"]
