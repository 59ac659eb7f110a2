"""What lies in a checkpoint beside the loop's own files."""

from __future__ import annotations

from headrace.errors import OutputError
from headrace.filesystems import Place
from headrace.intervals import Intervals
from headrace.loops import position
from headrace.loops.run import NOTES, POSITIONS, Notes
from headrace.store import Folder


def read(place: Place) -> tuple[Notes, dict[int, Intervals]]:
    """A checkpoint's notes on itself, and the rows that had been given before it.

    Raises:
        OutputError: it is damaged, or a part of it is missing.
    """
    store = Folder(place)
    try:
        notes = Notes.from_json(store.read(NOTES).decode())
        names = [name for name in store.names("") if name.startswith(POSITIONS)]
        if len(names) != notes.workers:
            raise ValueError(f"it was made by {notes.workers} workers, and has the positions of {len(names)}")
        return notes, position.united(position.from_json(store.read(name).decode()) for name in names)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"the checkpoint {place.uri!r} is damaged: {error}; begin again in an empty folder, or with --restart") from error
