"""What a client of OpenAI's interface is told when it does not get what it asked for."""

from __future__ import annotations

import orjson

from headrace.serving.wire import Failure

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error", 429: "rate_limit_error"}
_CODES = {"unauthorized": "invalid_api_key", "overloaded": "rate_limit_exceeded"}


class Refused(Exception):  # noqa: N818 - what happens to the request
    """A request that is answered with an error, by the parameter at fault."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def failure(self) -> Failure:
        """The same as a door has it."""
        return Failure(self.status, self.code or "invalid_value", self.message, ({"param": self.param},) if self.param else ())


def error(failure: Failure) -> bytes:
    """The body that tells of a failure."""
    param = failure.details[0].get("param") if failure.details else None
    kind = _KINDS.get(failure.status) or ("server_error" if failure.status >= 500 else "invalid_request_error")
    said = {"message": failure.message, "type": kind, "param": param, "code": _CODES.get(failure.code, failure.code)}
    return orjson.dumps({"error": said})


def last(failure: Failure) -> bytes:
    """The same as the end of a stream that had begun."""
    return b"data: " + error(failure) + b"\n\ndata: [DONE]\n\n"
