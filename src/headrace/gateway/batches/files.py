"""Files as their owners handle them. What belongs to somebody else is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from headrace.errors import StorageError
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.forms import Form
from headrace.gateway.batches.records import File, new_id
from headrace.gateway.batches.refusal import DiskFullError, RefusedError
from headrace.gateway.batches.shelf import Sheet

_WRITE_BYTES = 1 << 20
_DAY_S = 86_400
EXPIRES_S = (3600, 30 * _DAY_S)
"""The shortest and the longest time that a file may be told to live."""


async def receive(depot: Depot, owner: str, *, content_type: str, length: int | None, body: AsyncIterator[bytes]) -> File:
    """Take an upload, piece by piece. The file is there when this returns, and not at all otherwise.

    Raises:
        RefusedError: the upload is not what it should be, too large or too slow.
        StorageError: the disk refused.
    """
    limits = depot.limits
    form = Form(content_type)
    if length is not None and length > limits.file_bytes + _WRITE_BYTES:  # the form has a little around the file
        raise _too_large(limits.file_bytes)
    if await asyncio.to_thread(depot.shelf.free_bytes) < limits.free_bytes:
        raise DiskFullError("the disk is nearly full")
    name = new_id("file")
    sheet = depot.shelf.begin(name)
    handed_over = False
    try:
        async with asyncio.timeout(limits.upload_s):
            size = await _write(sheet, form, body, limits.file_bytes, limits.idle_s)
        now = int(depot.clock())
        file = File(
            id=name,
            owner=owner,
            filename=form.filename or "",
            purpose=_purpose(form.fields),
            bytes=size,
            created_at=now,
            expires_at=now + _expires_s(form.fields, int(limits.file_days * _DAY_S)),
        )
        handed_over = True
        await asyncio.to_thread(_keep, depot, sheet, file)
    except TimeoutError:
        raise RefusedError(408, "The upload did not come in time.", code="timeout") from None
    finally:
        if not handed_over:
            sheet.close()
            depot.shelf.delete(name)
    return file


async def _write(sheet: Sheet, form: Form, body: AsyncIterator[bytes], most_bytes: int, idle_s: float) -> int:
    """Write the form's file; its size."""
    size = written = 0
    waiting = bytearray()
    pieces = aiter(body)
    while True:
        async with asyncio.timeout(idle_s):
            piece = await anext(pieces, None)
        if piece is None:
            break
        part = form.feed(piece)
        size += len(part)
        if size > most_bytes:
            raise _too_large(most_bytes)
        waiting += part
        if len(waiting) >= _WRITE_BYTES:
            await asyncio.to_thread(sheet.write, written, waiting)
            written = size
            waiting = bytearray()
    form.end()
    await asyncio.to_thread(sheet.write, written, waiting)
    return size


def _keep(depot: Depot, sheet: Sheet, file: File) -> None:
    """Flush the bytes, and name them in the catalog; not to be left half-way, should the client go."""
    named = False
    try:
        with sheet:
            sheet.flush()
        depot.catalog.add_file(file, owner_bytes=depot.limits.owner_bytes)
        named = True
    finally:
        if not named:
            depot.shelf.delete(file.id)


def _purpose(fields: Mapping[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise RefusedError(400, "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose != "batch":
        raise RefusedError(400, f"Invalid value for 'purpose': {purpose[:100]!r}. Files are for 'batch' here.", param="purpose", code="invalid_value")
    return purpose


def _expires_s(fields: Mapping[str, str], otherwise: int) -> int:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return otherwise
    return expiry_s(anchor, int(seconds) if seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else None, "expires_after")


def expiry_s(anchor: object, seconds: object, param: str) -> int:
    """How long a file is to live, as a client says it."""
    if anchor != "created_at":
        raise RefusedError(400, f"Invalid value for '{param}.anchor': it can be 'created_at'.", param=f"{param}.anchor", code="invalid_value")
    least, most = EXPIRES_S
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not least <= seconds <= most:
        text = f"Invalid value for '{param}.seconds': it can be a whole number from {least} to {most}."
        raise RefusedError(400, text, param=f"{param}.seconds", code="invalid_value")
    return seconds


def find(depot: Depot, owner: str, name: str) -> File:
    """A file of this owner."""
    file = depot.catalog.file(owner, name, depot.clock())
    if file is None:
        raise missing(name)
    return file


def remove(depot: Depot, owner: str, name: str) -> None:
    """Remove a file of this owner. Batches that read it go on."""
    depot.remove(find(depot, owner, name).id)


async def content(depot: Depot, file: File) -> AsyncGenerator[bytes, None]:
    """The bytes of a file, piece by piece. It is open when this returns, and can be removed meanwhile."""
    try:
        opened = await asyncio.to_thread(depot.shelf.open, file.id)
    except FileNotFoundError:
        if await asyncio.to_thread(depot.catalog.file, file.owner, file.id, depot.clock()) is None:
            raise missing(file.id) from None  # it was removed at this moment
        raise StorageError(f"the bytes of {file.id} are gone from the disk") from None

    async def pieces() -> AsyncGenerator[bytes, None]:
        with opened:
            while piece := await asyncio.to_thread(opened.read, _WRITE_BYTES):
                yield piece

    return pieces()


def missing(name: str) -> RefusedError:
    """What is told of a file that is not there, or not this owner's."""
    return RefusedError(404, f"No such File object: {name[:100]}", param="id")


def _too_large(most_bytes: int) -> RefusedError:
    return RefusedError(413, f"The file has more than {most_bytes:,} bytes, which is the most.", param="file", code="file_too_large")
