"""A chunk of a stream: lines of JSON sent, and those that came back; what is missing is sent again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.client.attempts import Answer, error_from
from headrace.errors import OverloadedError, ServiceError, UnavailableError

MEDIA = "application/x-ndjson"
_ERROR = b'{"error":'


class Lines:
    """Lines of a request, and the line or the error that answers each. Two attempts at once may fill it: the first good line counts."""

    def __init__(self, sent: Mapping[int, bytes], *, columns: Mapping[str, Any]) -> None:
        self.sent = sent
        self.good: dict[int, bytes] = {}
        self.failed: dict[int, ServiceError] = {}
        self._errors = "error" not in columns  # else a row may look like an error, and is told apart by its other keys
        self._columns = columns

    def missing(self) -> tuple[list[int], bytes]:
        """The numbers of the lines that have no answer yet, and a body that asks for them."""
        numbers = [at for at in self.sent if at not in self.good and at not in self.failed]
        return numbers, b"".join(self.sent[at] + b"\n" for at in numbers)

    def received(self, numbers: Sequence[int], answer: Answer) -> Answer:
        """Take the lines of an answer to those numbered; the answer itself, or one with the status of the rows that are still missing."""
        if answer.status != 200:
            return answer
        request_id = str(answer.headers.get("x-request-id", ""))
        again: ServiceError | None = None
        answered = [line for line in answer.content.split(b"\n") if line.strip()]
        for at, line in zip(numbers, answered, strict=False):
            error = self._error(line)
            if error is None:
                self.good.setdefault(at, line)
                continue
            problem = error_from(error, int(error.get("status") or 0), request_id)
            if isinstance(problem, (OverloadedError, UnavailableError)):
                again = problem
            else:
                self.failed.setdefault(at, problem)
        if again is not None or len(answered) < len(numbers):
            status = 429 if isinstance(again, OverloadedError) else 503
            told = {"code": again.code, "message": again.message} if again else {"code": "unavailable", "message": "the answer was cut off"}
            return Answer(status, answer.headers, json.dumps({"error": told}).encode())
        return answer

    def _error(self, line: bytes) -> Mapping[str, Any] | None:
        if not line.startswith(_ERROR):
            return None
        told = json.loads(line)
        if not isinstance(told.get("error"), Mapping) or not (self._errors or self._columns.keys() - told.keys()):
            return None
        return dict(told["error"])
