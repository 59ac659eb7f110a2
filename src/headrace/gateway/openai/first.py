"""A first request to a model that has just come up: that it answers, and how soon."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from typing import Any

import orjson

from headrace.errors import ServiceError
from headrace.speech import COMPLETIONS, EMBEDDINGS

_HEARD_S = 10.0  # for all doors to hear of a new version, or of a key
_PAUSE_S = 0.05
_LATER = (401, 404, 503)


def first_answer(url: str, model: str, paths: Sequence[str], *, key: str | None = None, ca: str | None = None, timeout_s: float = 60.0) -> tuple[str, float]:
    """Ask a model behind doors at `url` for one token, or for a vector: under which of the paths it answered, and after how many seconds.

    A model without a chat template is asked to go on with a text. `ca` is the certificate to trust.

    Raises:
        ServiceError: it answers under none of them.
    """
    import httpx2

    trusted: ssl.SSLContext | bool = False
    if url.startswith("https"):
        trusted = ssl.create_default_context(cafile=ca)
        trusted.check_hostname = False  # it is known by its certificate; its name may be one that only clients use
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    until_s = time.monotonic() + _HEARD_S
    with httpx2.Client(headers=headers, verify=trusted, timeout=timeout_s, trust_env=False) as client:
        while True:
            for path in paths:
                began_s = time.monotonic()
                try:
                    with client.stream("POST", url + path, content=orjson.dumps({"model": model, **_asked(path)})) as answer:
                        status = answer.status_code
                        text = next(answer.iter_text(), "") if status == 200 else answer.read().decode("utf-8", "replace")
                        took_s = time.monotonic() - began_s
                except (httpx2.TransportError, httpx2.DecodingError) as error:
                    raise ServiceError(f"{model} does not answer at {url}{path}: {error or type(error).__name__}") from error
                if status == 200:
                    return path, took_s
                if status != 400:
                    break
            if status not in _LATER or time.monotonic() > until_s:
                raise ServiceError(f"{model} does not answer at {url}{path}: {status} {text[:500]}", status)
            time.sleep(_PAUSE_S)


def _asked(path: str) -> dict[str, Any]:
    if path == EMBEDDINGS:
        return {"input": "Good"}
    prompt: dict[str, Any] = {"prompt": "Good"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Good"}]}
    return {**prompt, "max_tokens": 1, "stream": True}
