"""What a client is told when it does not get what it asked for, in OpenAI's words."""

from __future__ import annotations

import orjson

from headrace.errors import HeadraceError, StorageError


class DiskFullError(StorageError):
    """There is no room for what was to be written; nothing that was there is lost."""


class RefusedError(HeadraceError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: the parameter at fault.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> bytes:
        """The answer's body."""
        return orjson.dumps({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})


def refuse_storage(error: StorageError) -> RefusedError:
    """What a client is told of trouble with the disk: what it can mend, and no more."""
    if isinstance(error, DiskFullError):
        return RefusedError(
            507, "There is no room left on the server's disk; delete files that you do not need.", code="insufficient_storage", kind="server_error"
        )
    return RefusedError(500, "The server could not read or write its files.", code="storage_error", kind="server_error")
