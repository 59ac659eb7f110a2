"""Whether a file is fit to be run as a batch, told line by line, in memory that does not grow with its lines but for 16 bytes each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson

from headrace.gateway.batches.lines import Raw
from headrace.gateway.batches.records import Fault

MOST_FAULTS = 100
_MOST_ID = 512
_REQUIRED = (("custom_id", str, "a string"), ("method", str, "a string"), ("url", str, "a string"), ("body", dict, "an object"))
_DIGEST_BYTES = 16


class Check:
    """Looks at the lines of a file as they come. `faults` are the first that it found, in the order of the lines once it has ended."""

    def __init__(self, endpoint: str, *, lines: int, line_bytes: int) -> None:
        self.total = 0
        self.model: str | None = None
        self.faults: list[Fault] = []
        self._endpoint, self._most_lines, self._line_bytes = endpoint, lines, line_bytes
        self._digests = bytearray()

    def add(self, lines: Iterable[Raw]) -> bool:
        """Look at the next lines. False if there are too many: then the rest need not come."""
        for number, raw in lines:
            if number > self._most_lines:
                self.faults = [Fault("too_many_lines", f"The file has more than {self._most_lines:,} lines, which is the most.")]
                return False
            self.total += 1
            custom_id = self._look(number, raw)
            # Who has no id gets one that nobody else has, so that a digest's place is its line's.
            self._digests += blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest() if custom_id is not None else os.urandom(_DIGEST_BYTES)
        return True

    def end(self) -> None:
        """No more lines come."""
        if not self.total:
            self.faults = [Fault("empty_file", "The input file holds no requests.")]
        for number in _repeated(self._digests):
            text = "The custom_id for this request is used by an earlier line; each request of a batch needs its own."
            self.faults.append(Fault("duplicate_custom_id", text, number, "custom_id"))
        self.faults = sorted(self.faults, key=lambda fault: fault.line or 0)[:MOST_FAULTS]

    def _look(self, number: int, raw: bytes | None) -> str | None:
        """Note what is wrong with a line; its id, as far as it has one."""
        if raw is None:
            self._note(Fault("line_too_long", f"This line has more than {self._line_bytes:,} bytes, which is the most.", number))
            return None
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            self._note(Fault("invalid_json_line", "This line is not valid JSON.", number))
            return None
        if not isinstance(value, dict):
            self._note(Fault("invalid_json_line", "This line is not a JSON object.", number))
            return None
        for name, kind, called in _REQUIRED:
            if name not in value:
                self._note(Fault("missing_required_parameter", f"Missing required parameter: '{name}'.", number, name))
            elif not isinstance(value[name], kind):
                self._note(Fault("invalid_type", f"Invalid type for '{name}': expected {called}.", number, name))
        self._look_at_values(number, value)
        custom_id = value.get("custom_id")
        return custom_id if isinstance(custom_id, str) else None

    def _look_at_values(self, number: int, value: dict[str, Any]) -> None:
        custom_id, method, url, body = (value.get(name) for name, _, _ in _REQUIRED)
        if isinstance(custom_id, str) and not 0 < len(custom_id) <= _MOST_ID:
            self._note(Fault("invalid_value", f"The custom_id has to have 1 to {_MOST_ID} characters.", number, "custom_id"))
        if isinstance(method, str) and method != "POST":
            self._note(Fault("invalid_method", "The method for this request is not 'POST'.", number, "method"))
        if isinstance(url, str) and url != self._endpoint:
            self._note(Fault("invalid_url", f"The URL for this request is not the batch's endpoint, {self._endpoint}.", number, "url"))
        if isinstance(body, dict):
            self._look_at_body(number, body)

    def _look_at_body(self, number: int, body: dict[str, Any]) -> None:
        model = body.get("model")
        if not isinstance(model, str) or not model:
            self._note(Fault("missing_required_parameter", "Missing required parameter: 'model'.", number, "body.model"))
        elif self.model is None:
            self.model = model
        elif model != self.model:
            text = f"The model for this request, {model[:100]!r}, is not that of the lines before, {self.model[:100]!r}; a batch is for one model."
            self._note(Fault("mismatched_model", text, number, "body.model"))
        if body.get("stream"):
            self._note(Fault("invalid_value", "A request of a batch cannot be streamed.", number, "body.stream"))

    def _note(self, fault: Fault) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)


def _repeated(digests: bytearray) -> list[int]:
    """The numbers of the first lines whose digest an earlier line has. Half a digest is sorted, and the other half confirms."""
    pairs = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    order = np.argsort(pairs[:, 0], kind="stable")  # among equals, the earlier line stays first
    halves = pairs[order, 0]
    at = np.flatnonzero(halves[1:] == halves[:-1])
    earlier, later = order[at], order[at + 1]
    found = np.sort(later[pairs[earlier, 1] == pairs[later, 1]])[:MOST_FAULTS]
    return [int(place) + 1 for place in found]
