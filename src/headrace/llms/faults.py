"""What may go wrong with a single row, by the names that its dead letter has. An engine that dies is none of these: see `errors.EngineLostError`."""

from __future__ import annotations


class PromptTooLong(ValueError):  # noqa: N818 - what happened, as a dead letter tells it
    """The prompt does not fit into what the model can see at once, or leaves no room for the answer."""


class InvalidAnswer(ValueError):  # noqa: N818 - the same
    """The model's answer is not of the schema, however often it was asked."""


class EngineError(RuntimeError):
    """The engine refused the request, or failed on it alone."""
