"""Files and batches as values: what is kept of them, and how they are shown, which is OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson

from headrace.intervals import Intervals

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
Ending = Literal["", "expired", "cancelled"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
LIVE = frozenset[Status]({"validating", "in_progress", "finalizing", "cancelling"})

_STAMPS = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


def new_id(kind: str) -> str:
    """A name that nobody can guess, such as `file-6f1e…` or `batch_09ab…`."""
    return f"{kind}{'_' if kind == 'batch' else '-'}{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of an owner. Its `filename` is for show: on the disk it goes by its `id`."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def shown(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. Those from the cache are among the input, those of reasoning among the output."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    def shown(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


@dataclass(frozen=True, slots=True)
class Charge:
    """What a line costs. Its `id` is the same however often the line is run, so that it can be booked once."""

    batch_id: str
    owner: str
    model: str
    line: int
    usage: Usage

    @property
    def id(self) -> str:
        """`batch:<id of the batch>:<number of the line>`."""
        return f"batch:{self.batch_id}:{self.line}"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an input file; `line` is counted from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is: the lines that are done, counted from 1, and how much of the two files of results holds them."""

    completed: int = 0
    failed: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    usage: Usage = Usage()
    done: Intervals = field(default_factory=Intervals)

    def dump(self) -> bytes:
        """The form in which it is kept."""
        return orjson.dumps({name: getattr(self, name) for name in self.__slots__} | {"done": self.done.flat})

    @classmethod
    def load(cls, kept: bytes) -> Progress:
        """The inverse of `dump`."""
        found = orjson.loads(kept)
        return cls(**found | {"usage": Usage(**found["usage"]), "done": Intervals.of(found["done"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch. `output_id` and `error_id` are what its files will be called; `ending` says why lines stay without an answer, once that is so."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    output_expires_s: int | None = None
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    ending: Ending = ""
    model: str | None = None
    total: int = 0
    faults: tuple[Fault, ...] = ()
    stamps: dict[str, int] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @property
    def live(self) -> bool:
        """Whether it is not over yet."""
        return self.status in LIVE

    def moved(self, status: Status, now: float) -> Batch:
        """It, with another status since now."""
        return replace(self, status=status, stamps={**self.stamps, f"{status}_at": int(now)})

    def shown(self) -> dict[str, Any]:
        """As OpenAI shows it."""
        over, progress = not self.live, self.progress
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": [orjson.loads(orjson.dumps(fault)) for fault in self.faults]} if self.faults else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_id if over and progress.output_bytes else None,
            "error_file_id": self.error_id if over and progress.error_bytes else None,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{stamp: self.stamps.get(stamp) for stamp in _STAMPS},
            "request_counts": {"total": self.total, "completed": progress.completed, "failed": progress.failed},
            "usage": progress.usage.shown(),
            "metadata": self.metadata,
        }

    def dump(self) -> bytes:
        """The form in which it is kept, its progress apart."""
        return orjson.dumps({name: getattr(self, name) for name in self.__slots__ if name != "progress"})

    @classmethod
    def load(cls, kept: bytes, progress: bytes) -> Batch:
        """The inverse of `dump`."""
        found = orjson.loads(kept)
        return cls(**found | {"faults": tuple(Fault(**fault) for fault in found["faults"]), "progress": Progress.load(progress)})


Change = Callable[[Batch], Batch]
