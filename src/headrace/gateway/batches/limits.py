"""The bounds of what a client may ask for, and of the memory and the disk that it can cost."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds; each is a number above 0.

    Attributes:
        file_bytes: of an uploaded file.
        owner_bytes: of all files of one owner.
        lines: of a batch.
        line_bytes: of a line. JSON takes up to twenty times its length when it is read, and one line at a time is.
        live_batches: of one owner that are not over yet.
        window_hours: the longest completion window.
        upload_s: from the first byte of an upload to its last.
        idle_s: between two pieces of an upload.
        file_days: until an uploaded file expires that says nothing about it.
        free_bytes: on the disk, below which no upload is taken, so that the results of what runs still find room.
        floor_bytes: on the disk, below which results wait too, so that there is room left to delete something.
        open_lines: of a run that are read and not yet on the disk.
        open_bytes: of these lines and their answers.
        gather_s: that a result waits for others, since a group costs two flushes, however large it is.
        attempts: to get an answer for a line, where it was lost or the server was at fault.
        retry_s: before the second of them; twice as long before each after that. A wait that the engine asks for is no attempt.
        most_retry_s: between two attempts.
        grace_s: for lines under way, when a batch is cancelled, expires, or its process is told to stop.
        runs: batches that a process runs side by side.
        poll_s: between two looks for batches to run, or at whether one was cancelled.
        pause_s: before a batch is taken up again whose run failed, or a full disk is tried again.
    """

    file_bytes: int = 2 << 30
    owner_bytes: int = 100 << 30
    lines: int = 5_000_000
    line_bytes: int = 4 << 20
    live_batches: int = 1000
    window_hours: int = 168
    upload_s: float = 3600
    idle_s: float = 60
    file_days: float = 30
    free_bytes: int = 1 << 30
    floor_bytes: int = 64 << 20
    open_lines: int = 8192
    open_bytes: int = 64 << 20
    gather_s: float = 0.05
    attempts: int = 5
    retry_s: float = 1
    most_retry_s: float = 30
    grace_s: float = 30
    runs: int = 4
    poll_s: float = 1
    pause_s: float = 10

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            check_number(getattr(self, name), f"limit {name!r}")
