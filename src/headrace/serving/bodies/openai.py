"""OpenAI's interface in the OpenAPI document of a service that speaks it: the paths, and the parts that they refer to.

The forms name what most clients send and read. The engine knows more fields, which are allowed by not being named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS

_JSON, _EVENTS = "application/json", "text/event-stream"
_FAILS = {
    400: "Something in the body or in a header is not allowed: `param` says what.",
    401: "A key is missing or not valid.",
    403: "The key may not ask this model.",
    404: "There is no such model or path.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes or parts.",
    415: "The body is not JSON, or is packed.",
    429: "The service, or the key, has more to do than it can: `Retry-After` says when to come back.",
    500: "The service made a mistake.",
    503: "Nothing is there to answer now.",
    504: "The deadline passed before there was an answer.",
}
_SHOWN = (401, 404, 503)
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
    named = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    return {
        **found,
        "/v1/models": {"get": _get("models", "The models that answer", "OpenAIModels")},
        "/v1/models/{model}": {"get": {**_get("model", "One of the models", "OpenAIModel"), "parameters": [named]}},
    }


def responses() -> dict[str, Any]:
    """What goes wrong, by the names that the paths refer to."""
    return {f"OpenAI{status}": {"description": said, "content": {_JSON: {"schema": _ref("schemas", "OpenAIError")}}} for status, said in _FAILS.items()}


def schemas(speech: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """The forms of bodies; a pipeline's name stands for whatever model it has."""
    model = {"model": {"type": "string", "enum": list(dict.fromkeys((speech["model"], pipeline)))}}
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
        content[_EVENTS] = {"schema": {"type": "string", "description": "With `stream`: events of the answer's pieces, and `data: [DONE]` at the end."}}
    return {
        "operationId": called,
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref("schemas", f"OpenAI{form}Request")}}},
        "responses": {"200": {"description": "The answer.", "content": content}, **_failures(_FAILS)},
    }


def _get(called: str, summary: str, form: str) -> dict[str, Any]:
    answer = {"description": summary, "content": {_JSON: {"schema": _ref("schemas", form)}}}
    return {"operationId": called, "summary": summary, "responses": {"200": answer, **_failures(_SHOWN)}}


def _failures(statuses: Any) -> dict[str, Any]:
    return {str(status): _ref("responses", f"OpenAI{status}") for status in statuses}


def _object(properties: Mapping[str, Any], but: Any = ()) -> dict[str, Any]:
    """An object that has all of these properties, but for some that may be left out."""
    return {"type": "object", "properties": dict(properties), "required": [name for name in properties if name not in but]}


def _list(item: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


def _ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}
