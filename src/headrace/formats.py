"""What a run reads and writes, as values. Light: `import headrace` loads it, and no reader or writer of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from headrace.errors import OutputError, SourceError, listing, nearest

INPUT_ENDINGS = {
    "parquet": (".parquet", ".pq", ".parq"),
    "csv": (".csv", ".csv.gz", ".tsv", ".tsv.gz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json"),
    "images": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
}
OUTPUT_ENDINGS = {"parquet": ".parquet", "jsonl": ".jsonl", "delta": ".parquet"}


@dataclass(frozen=True, slots=True)
class Input:
    """What to read.

    Args:
        paths: files, folders, globs or URIs.
        format: `parquet`, `csv`, `jsonl` or `images`; told from the names when left out.
        columns: take the input to have only these columns.
        where: an expression over columns, see `headrace.filters`; pushed down to Parquet's row groups.
        limit: only the first rows in order of path and position; exact, also behind a filter.
    """

    paths: str | Sequence[str]
    _: KW_ONLY
    format: str | None = None
    columns: Sequence[str] | None = None
    where: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise SourceError(f"--limit must be at least 1, got {self.limit}")
        if self.format is not None and self.format not in INPUT_ENDINGS:
            raise SourceError(f"no input format {self.format!r}; there are {listing(INPUT_ENDINGS)}" + nearest(self.format, INPUT_ENDINGS))

    @property
    def uris(self) -> tuple[str, ...]:
        """The paths as a tuple."""
        return (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)


@dataclass(frozen=True, slots=True)
class Output:
    """Where to write: a folder (path or URI) that does not exist or is empty, and `parquet`, `jsonl` or `delta`."""

    path: str
    _: KW_ONLY
    format: str = "parquet"

    def __post_init__(self) -> None:
        if self.format not in OUTPUT_ENDINGS:
            raise OutputError(f"no output format {self.format!r}; there are {listing(OUTPUT_ENDINGS)}" + nearest(self.format, OUTPUT_ENDINGS))
