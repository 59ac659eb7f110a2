"""OpenAI's interface in the OpenAPI document of a service that speaks it: the paths, and the parts that they refer to.

The forms name what most clients send and read. The engine knows more fields, which are allowed by not being named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

_JSON, _EVENTS = "application/json", "text/event-stream"
_FAILS = {
    400: "Something in the body or in a header is not allowed: `param` says what.",
    401: "A key is missing or not valid.",
    403: "The key may not ask this model.",
    404: "There is no such model or path.",
    408: "The body did not arrive in time.",
    409: "What is asked for cannot be done in the state that this is in.",
    413: "The body has too many bytes or parts.",
    415: "The body is not JSON, or is packed.",
    429: "The service, or the key, has more to do than it can: `Retry-After` says when to come back.",
    500: "The service made a mistake.",
    503: "Nothing is there to answer now.",
    507: "There is no room on the disk for what is to be kept.",
    504: "The deadline passed before there was an answer.",
}
_SHOWN = (401, 404, 503)
_ASKING = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
_CHANGING = (400, 401, 404, 408, 409, 413, 415, 503, 507)
_NUMBER, _WHOLE, _TEXT, _FLAG = {"type": "number"}, {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
_ASKED = {
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4}, {"type": "null"}]},
    "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,6}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {"anyOf": [{"type": "object", "properties": {"include_usage": _FLAG}}, {"type": "null"}]},
    "user": _TEXT,
}


def paths(speech: Mapping[str, Any]) -> dict[str, Any]:
    """The paths that a model answers, and the list of models; `speech` is as in `openapi.contract`."""
    asked = {CHAT: ("chat", "Answer a conversation", "Chat"), COMPLETIONS: ("complete", "Go on with a text", "Completion")}
    asked[EMBEDDINGS] = ("embed", "Turn texts into vectors", "Embedding")
    found = {path: {"post": _post(*asked[path], streams=path != EMBEDDINGS)} for path in speech["paths"] if path in asked}
    return {
        **found,
        "/v1/models": {"get": _get("models", "The models that answer", "OpenAIModels")},
        "/v1/models/{model}": {"get": {**_get("model", "One of the models", "OpenAIModel"), "parameters": [_in_path("model")]}},
    }


def shelf_paths(speech: Mapping[str, Any]) -> dict[str, Any]:
    """The paths of files and batches, where a service keeps them."""
    paged = [_query("after", _TEXT), _query("limit", {"type": "integer", "minimum": 1})]
    file, batch = _in_path("file_id"), _in_path("batch_id")
    form = {"purpose": {"enum": ["batch"]}, "file": {"type": "string", "contentMediaType": "application/jsonl"}}
    order = {
        "input_file_id": _TEXT,
        "endpoint": {"enum": list(speech["paths"])},
        "completion_window": {"type": "string", "pattern": "^[1-9][0-9]{0,3}h$"},
        "metadata": {"type": ["object", "null"]},
    }
    text = {"description": "The file.", "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    return {
        "/v1/files": {
            "get": {**_get("files", "The files, the newest first", "OpenAIFiles"), "parameters": [*paged, _query("purpose", _TEXT)]},
            "post": _change("upload", "Keep a file: a request in each line", "OpenAIFile", body=("multipart/form-data", _object(form))),
        },
        "/v1/files/{file_id}": {
            "get": {**_get("file", "What is known of a file", "OpenAIFile"), "parameters": [file]},
            "delete": {**_change("remove", "Delete a file", "OpenAIDeleted"), "parameters": [file]},
        },
        "/v1/files/{file_id}/content": {
            "get": {"operationId": "content", "summary": "A file itself", "parameters": [file], "responses": {"200": text, **_failures(_SHOWN)}}
        },
        "/v1/batches": {
            "get": {**_get("batches", "The batches, the newest first", "OpenAIBatches"), "parameters": paged},
            "post": _change("order", "Have the requests of a file answered in the background", "OpenAIBatch", body=(_JSON, _object(order, but=("metadata",)))),
        },
        "/v1/batches/{batch_id}": {"get": {**_get("batch", "How far a batch is", "OpenAIBatch"), "parameters": [batch]}},
        "/v1/batches/{batch_id}/cancel": {"post": {**_change("cancel", "Cancel a batch; what is answered stays", "OpenAIBatch"), "parameters": [batch]}},
    }


def shelf_schemas() -> dict[str, Any]:
    """The forms of files and batches."""
    maybe, at = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    file = {"id": _TEXT, "object": {"const": "file"}, "bytes": _WHOLE, "created_at": _WHOLE, "expires_at": at, "filename": _TEXT, "purpose": _TEXT}
    statuses = ["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    counts = _object({"total": _WHOLE, "completed": _WHOLE, "failed": _WHOLE})
    batch = {"id": _TEXT, "object": {"const": "batch"}, "endpoint": _TEXT, "input_file_id": _TEXT, "completion_window": _TEXT, "status": {"enum": statuses}}
    batch |= {"output_file_id": maybe, "error_file_id": maybe, "created_at": _WHOLE, "expires_at": at, "request_counts": counts, "usage": {"type": "object"}}

    def listed(name: str) -> dict[str, Any]:
        return _object({"object": {"const": "list"}, "data": _list(_ref("schemas", name)), "has_more": _FLAG})

    return {
        "OpenAIFile": _object(file),
        "OpenAIFiles": listed("OpenAIFile"),
        "OpenAIDeleted": _object({"id": _TEXT, "object": {"const": "file"}, "deleted": {"const": True}}),
        "OpenAIBatch": _object(batch),
        "OpenAIBatches": listed("OpenAIBatch"),
    }


def responses() -> dict[str, Any]:
    """What goes wrong, by the names that the paths refer to."""
    return {f"OpenAI{status}": {"description": said, "content": {_JSON: {"schema": _ref("schemas", "OpenAIError")}}} for status, said in _FAILS.items()}


def schemas(models: Iterable[str]) -> dict[str, Any]:
    """The forms of bodies that ask one of these models."""
    model = {"model": {"type": "string", "enum": list(dict.fromkeys(models))}}
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    texts = [{"type": "string", "minLength": 1}, {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 4}, tokens]
    part = _object({"type": {"const": "text"}, "text": _TEXT})
    message = {"role": {"enum": ["system", "user", "assistant"]}, "content": {"anyOf": [_TEXT, {"type": "array", "items": part, "minItems": 1}]}}
    said = {"role": _TEXT, "content": {"type": ["string", "null"]}, "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}}}
    known = {"id": _TEXT, "object": _TEXT, "created": _WHOLE, "model": _TEXT}
    ended = {"index": _WHOLE, "finish_reason": {"type": ["string", "null"]}}
    error = {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "integer", "null"]}}
    usage = _object({"prompt_tokens": _WHOLE, "total_tokens": _WHOLE, "completion_tokens": {"type": ["integer", "null"]}}, but=("completion_tokens",))
    one = _object({"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE, "owned_by": _TEXT})
    vector = {"object": {"const": "embedding"}, "index": _WHOLE, "embedding": {"anyOf": [{"type": "array", "items": _NUMBER}, _TEXT]}}
    forms = {
        "ChatRequest": _object({**model, "messages": _list(_object(message), least=1), **_ASKED}, but=_ASKED),
        "CompletionRequest": _object({**model, "prompt": {"anyOf": texts}, **_ASKED}, but=_ASKED),
        "EmbeddingRequest": _object({**model, "input": {"anyOf": texts}, "encoding_format": {"enum": ["float", "base64"]}}, but=("encoding_format",)),
        "ChatAnswer": _object({**known, "choices": _list(_object({**ended, "message": _object(said, but=("tool_calls",))})), "usage": usage}),
        "CompletionAnswer": _object({**known, "choices": _list(_object({**ended, "text": _TEXT})), "usage": usage}),
        "EmbeddingAnswer": _object({"object": {"const": "list"}, "model": _TEXT, "data": _list(_object(vector)), "usage": usage}),
        "Model": one,
        "Models": _object({"object": {"const": "list"}, "data": _list(_ref("schemas", "OpenAIModel"))}),
        "Error": _object({"error": _object(error)}),
    }
    return {f"OpenAI{name}": form for name, form in forms.items()}


def _post(called: str, summary: str, form: str, *, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _ref("schemas", f"OpenAI{form}Answer")}}
    if streams:
        content[_EVENTS] = {"schema": {**_object({"data": _TEXT}), "description": "With `stream`: an event for each piece, and one of `[DONE]` at the end."}}
    return {
        "operationId": called,
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref("schemas", f"OpenAI{form}Request")}}},
        "responses": {"200": {"description": "The answer.", "content": content}, **_failures(_ASKING)},
    }


def _get(called: str, summary: str, form: str) -> dict[str, Any]:
    answer = {"description": summary, "content": {_JSON: {"schema": _ref("schemas", form)}}}
    return {"operationId": called, "summary": summary, "responses": {"200": answer, **_failures(_SHOWN)}}


def _change(called: str, summary: str, form: str, *, body: tuple[str, Any] | None = None) -> dict[str, Any]:
    answer = {"description": summary, "content": {_JSON: {"schema": _ref("schemas", form)}}}
    asked = {} if body is None else {"requestBody": {"required": True, "content": {body[0]: {"schema": body[1]}}}}
    return {"operationId": called, "summary": summary, **asked, "responses": {"200": answer, **_failures(_CHANGING)}}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}


def _query(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}


def _failures(statuses: Any) -> dict[str, Any]:
    return {str(status): _ref("responses", f"OpenAI{status}") for status in statuses}


def _object(properties: Mapping[str, Any], but: Any = ()) -> dict[str, Any]:
    """An object that has all of these properties, but for some that may be left out."""
    return {"type": "object", "properties": dict(properties), "required": [name for name in properties if name not in but]}


def _list(item: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


def _ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}
