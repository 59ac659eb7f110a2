"""Batches as their owners handle them: ordered, looked at, cancelled. What belongs to somebody else is not there."""

from __future__ import annotations

import re
from typing import Any

from headrace.errors import listing
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.files import expiry_s
from headrace.gateway.batches.records import ENDPOINTS, Batch, new_id
from headrace.gateway.batches.refusal import RefusedError

_WINDOW = re.compile(r"([1-9][0-9]{0,3})h")
_MOST_PAIRS, _MOST_KEY, _MOST_VALUE = 16, 64, 512


def place(depot: Depot, owner: str, order: dict[str, Any]) -> Batch:
    """Begin a batch, from the JSON object that orders it.

    Raises:
        RefusedError: it does not say what it must, or something that is not allowed.
    """
    for name in ("input_file_id", "endpoint", "completion_window"):
        if name not in order:
            raise RefusedError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
        if not isinstance(order[name], str):
            raise RefusedError(400, f"Invalid type for '{name}': expected a string.", param=name, code="invalid_type")
    if order["endpoint"] not in ENDPOINTS:
        raise RefusedError(400, f"Invalid value for 'endpoint': it can be {listing(ENDPOINTS)}.", param="endpoint", code="invalid_value")
    window, most = _WINDOW.fullmatch(order["completion_window"]), depot.limits.window_hours
    if window is None or int(window[1]) > most:
        text = f"Invalid value for 'completion_window': it can be hours from '1h' to '{most}h', such as '24h'."
        raise RefusedError(400, text, param="completion_window", code="invalid_value")
    now = int(depot.clock())
    batch = Batch(
        id=new_id("batch"),
        owner=owner,
        endpoint=order["endpoint"],
        input_file_id=order["input_file_id"],
        completion_window=order["completion_window"],
        created_at=now,
        expires_at=now + int(window[1]) * 3600,
        output_id=new_id("file"),
        error_id=new_id("file"),
        output_expires_s=_output_expires_s(order.get("output_expires_after")),
        metadata=_metadata(order.get("metadata")),
    )
    depot.catalog.add_batch(batch, live=depot.limits.live_batches)
    return batch


def find(depot: Depot, owner: str, name: str) -> Batch:
    """A batch of this owner."""
    batch = depot.catalog.batch(name, owner)
    if batch is None:
        raise RefusedError(404, f"No batch found with id '{name[:100]}'.", param="id")
    return batch


def cancel(depot: Depot, owner: str, name: str) -> Batch:
    """Begin to cancel a batch. To do so again is no mistake; what is over, or all but over, cannot be cancelled any more."""

    def cancelled(found: Batch) -> Batch:
        if found.status in ("validating", "in_progress"):
            return found.moved("cancelling", depot.clock())
        if found.status in ("cancelling", "cancelled"):
            return found
        raise RefusedError(409, f"Cannot cancel a batch with status '{found.status}'.", code="batch_not_cancellable")

    return depot.catalog.change(find(depot, owner, name).id, cancelled)


def _output_expires_s(wanted: Any) -> int | None:
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise RefusedError(400, "Invalid type for 'output_expires_after': expected an object.", param="output_expires_after", code="invalid_type")
    return expiry_s(wanted.get("anchor"), wanted.get("seconds"), "output_expires_after")


def _metadata(wanted: Any) -> dict[str, str] | None:
    if wanted is None:
        return None
    if (
        not isinstance(wanted, dict)
        or len(wanted) > _MOST_PAIRS
        or not all(isinstance(value, str) and len(key) <= _MOST_KEY and len(value) <= _MOST_VALUE for key, value in wanted.items())
    ):
        text = f"Invalid value for 'metadata': at most {_MOST_PAIRS} pairs, of keys of {_MOST_KEY} characters at most, and strings of {_MOST_VALUE}."
        raise RefusedError(400, text, param="metadata", code="invalid_value")
    return wanted
