"""Sources: find the input, check it against what a pipeline reads, and cut it into units.

Parquet is cut by row group, and a large one by rows, with columns and `--where` pushed down; CSV by file; JSON Lines by file,
and a large one by bytes; a folder of images, which has the columns `path` and `image`, into runs of files. A file that cannot
be read is a unit without rows, as long as others can be. Nothing here knows an engine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from headrace import filters
from headrace.columns import ANY, ColumnType, accepts, from_arrow
from headrace.errors import SourceError, listing, nearest
from headrace.filesystems import Place, find, locate
from headrace.formats import INPUT_ENDINGS, Input
from headrace.readers import naming, read
from headrace.texts import UNSURE, WRONG, text_tables
from headrace.units import UNIT_ROWS, Source, Unit, plain

_IMAGE_SCHEMA = pa.schema({"path": pa.string(), "image": pa.binary()})
_NO_NUMBER = r"^[+-]?(0[0-9]|[0-9]{19,}$)"  # as a number, 007 would lose its zeros, and an id of twenty digits its end
_IMAGES_PER_UNIT = 64
_CUT_BYTES = 64 << 20  # a larger file of JSON Lines becomes several units
_OURS = "__headrace_"  # what the names of hidden columns start with
_OPENING_THREADS = 32  # opening files is all waiting


def open_source(wanted: Input) -> Source:
    """Find the files, read their footers or first lines, and cut them into units.

    Raises:
        SourceError: nothing matches, formats are mixed, no file can be read, or the schemas differ.
    """
    uris, format = wanted.uris, wanted.format
    if not uris:
        raise SourceError("no input given; name at least one file, folder, glob or URI")
    places = [locate(uri, error=SourceError) for uri in uris]
    if any(place.filesystem != places[0].filesystem for place in places):
        raise SourceError(f"inputs lie on different file systems: {listing(uris)}; read them in separate runs")
    files: dict[str, fs.FileInfo] = {}
    for place in places:
        files |= {info.path: info for info in _matches(place, format)}
    source = _OPENERS[format or _format(list(files))](places[0], list(files.values()))
    if wanted.columns is None:
        return source
    if unknown := [name for name in wanted.columns if name not in source.schema.names]:
        names = source.schema.names
        raise SourceError(f"--columns names {unknown[0]!r}, which the input lacks; it has {listing(names)}" + nearest(unknown[0], names))
    return replace(source, schema=pa.schema([source.schema.field(name) for name in wanted.columns]))


def _matches(place: Place, format: str | None) -> list[fs.FileInfo]:
    try:
        infos = find(place)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"cannot list {place.uri!r}: {error}") from error
    if not infos:
        raise SourceError(f"no file matches {place.uri!r}; check the path, and quote a glob so that the shell leaves it alone")
    if len(infos) == 1 or format is not None:
        return infos
    endings = tuple(itertools.chain.from_iterable(INPUT_ENDINGS.values()))
    if known := [info for info in infos if info.path.lower().endswith(endings)]:
        return known
    raise SourceError(f"none of the {len(infos)} files of {place.uri!r} has a known ending ({', '.join(endings)}); say --format")


def _format(paths: Sequence[str]) -> str:
    """The one format of all files, by their endings."""
    found: dict[str, str] = {}
    for path in paths:
        kind = next((kind for kind, endings in INPUT_ENDINGS.items() if path.lower().endswith(endings)), None)
        if kind is None:
            raise SourceError(f"cannot tell the format of {path!r}; say --format {'|'.join(INPUT_ENDINGS)}")
        found.setdefault(kind, path)
    if len(found) > 1:
        raise SourceError(f"the input mixes formats: {', '.join(f'{path!r} is {kind}' for kind, path in found.items())}; narrow the glob or say --format")
    return next(iter(found))


def _modified(info: fs.FileInfo) -> int:
    return info.mtime_ns or 0


def _open_parquet(place: Place, files: list[fs.FileInfo]) -> Source:
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        footers = list(pool.map(lambda info: _footer(place, info.path), files))
    first, schema = next(((info.path, footer[1]) for info, footer in zip(files, footers, strict=True) if not isinstance(footer, str)), (None, None))
    if first is None:
        raise SourceError(_all_unreadable([footer for footer in footers if isinstance(footer, str)]))
    units: list[Unit] = []
    nulls: Counter[str] = Counter()
    unreadable: dict[int, str] = {}
    heaviest = total = rows = 1
    for info, footer in zip(files, footers, strict=True):
        if isinstance(footer, str):
            unreadable[len(units)] = footer
            units.append(Unit(len(units), (info.path,), None, 0, None, info.size, _modified(info)))
            continue
        schema = _merged(schema, footer[1], first, info.path)
        for number in range(footer[0].num_row_groups):
            group = footer[0].row_group(number)
            if not group.num_rows:
                continue
            heaviest = max(heaviest, group.total_byte_size // group.num_rows)
            total += group.total_byte_size
            rows += group.num_rows
            for column in map(group.column, range(group.num_columns)):
                nulls[column.path_in_schema] += (column.statistics and column.statistics.null_count) or 0
            for start in range(0, group.num_rows, UNIT_ROWS):
                count = min(UNIT_ROWS, group.num_rows - start)
                units.append(Unit(len(units), (info.path,), number, start, count, info.size, _modified(info)))
    return Source(place, "parquet", schema, tuple(units), row_bytes=max(1, total // rows), heaviest_bytes=heaviest, nulls=nulls, unreadable=unreadable)


def _footer(place: Place, path: str) -> tuple[pq.FileMetaData, pa.Schema] | str:
    """A file's description of itself, or why there is none."""
    try:
        footer = pq.read_metadata(path, filesystem=place.filesystem)
        return footer, footer.schema.to_arrow_schema()
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"cannot read the Parquet file {path!r}: {error}"


def _all_unreadable(messages: Sequence[str]) -> str:
    return messages[0] + (f"; nor can any of the {len(messages) - 1} other files be read" if len(messages) > 1 else "")


def _merged(schema: pa.Schema, other: pa.Schema, first: str, path: str, *, text: str = "") -> pa.Schema:
    """The schema of files of one input, which must agree in their columns; of two widths or encodings it has the wider."""
    for at, field in enumerate(schema):
        if field.name not in other.names:
            raise SourceError(f"{path!r} has no column {field.name!r}, which {first!r} has; narrow the glob, or run them separately")
        there = other.field(field.name).type
        if field.type == there:
            continue
        kind = _common(field.type, there, text)
        if kind is None:
            here, there = from_arrow(field.type), from_arrow(there)
            raise SourceError(f"column {field.name!r} is {there} in {path!r} but {here} in {first!r}; run them separately")
        schema = schema.set(at, field.with_type(kind))
    return schema


def _common(one: pa.DataType, other: pa.DataType, text: str) -> pa.DataType | None:
    """The type that holds the values of both, or None. The types of CSV and JSON Lines are only guessed: 1 and 1.5 go together."""
    one, other = plain(one), plain(other)
    if not (text or from_arrow(one) == from_arrow(other) or pa.types.is_null(one) or pa.types.is_null(other)):
        return None
    try:
        both = [pa.schema([("column", one)]), pa.schema([("column", other)])]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string() if text == "csv" else None


def _text_source(place: Place, files: list[fs.FileInfo], kind: str) -> Source:
    bare = Source(place, kind, pa.schema([]), ())
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        starts = list(pool.map(lambda info: _start(bare, info.path), files))
    failed = [start for start in starts if isinstance(start, str)]
    known = [(info.path, *start) for info, start in zip(files, starts, strict=True) if start and not isinstance(start, str)]
    if not known and failed:
        raise SourceError(_all_unreadable(failed))
    if not known:
        raise SourceError(f"the input has no rows: {files[0].path!r}" + (f" and {len(files) - 1} more files" if len(files) > 1 else ""))
    first, schema, _ = known[0]
    for path, other, _ in known[1:]:
        schema = _merged(schema, other, first, path, text=kind)
    units: list[Unit] = []
    unreadable: dict[int, str] = {}
    for info, start in zip(files, starts, strict=True):
        if isinstance(start, str):
            unreadable[len(units)] = start
        for span in [None] if isinstance(start, str) else _spans(info, kind):
            units.append(Unit(len(units), (info.path,), None, 0, None, info.size, _modified(info), span))
    weights = [weight for _, _, weight in known]
    mean, most = sum(weights) // len(weights), max(weights)
    return replace(bare, schema=schema, units=tuple(units), row_bytes=mean, heaviest_bytes=most, unreadable=unreadable)


def _spans(info: fs.FileInfo, kind: str) -> list[tuple[int, int] | None]:
    """The parts that a text file is cut into. CSV cannot be: whether a newline ends a row depends on all quotes before it."""
    if kind != "jsonl" or info.size <= _CUT_BYTES or not info.path.lower().endswith((".jsonl", ".ndjson", ".json")):
        return [None]
    return [(start, min(start + _CUT_BYTES, info.size)) for start in range(0, info.size, _CUT_BYTES)]


def _start(bare: Source, path: str) -> tuple[pa.Schema, int] | str | None:
    """The schema of a text file's first rows, and the weight of one; None when it has no rows, or why they cannot be read."""
    try:
        with naming(path):
            first = next(iter(text_tables(bare, path, {})), None)
            if first is None:
                return None
            first = first.drop_columns([name for name in (WRONG, UNSURE) if name in first.column_names])
            schema = first.schema
            numbers = [field.name for field in schema if bare.format == "csv" and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type))]
            if numbers:
                as_text = replace(bare, schema=pa.schema([(name, pa.string()) for name in numbers]))
                raw = next(iter(text_tables(as_text, path, dict.fromkeys(numbers, ANY))))
                for name in numbers:
                    if pc.any(pc.match_substring_regex(raw[name], _NO_NUMBER)).as_py():
                        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
            return schema, max(1, first.nbytes // max(1, first.num_rows))
    except SourceError as error:
        return str(error)


def _open_images(place: Place, files: list[fs.FileInfo]) -> Source:
    units: list[Unit] = []
    for start in range(0, len(files), _IMAGES_PER_UNIT):
        run = files[start : start + _IMAGES_PER_UNIT]
        paths = tuple(info.path for info in run)
        units.append(Unit(len(units), paths, None, 0, len(paths), sum(info.size for info in run), max(map(_modified, run))))
    return Source(
        place, "images", _IMAGE_SCHEMA, tuple(units), row_bytes=sum(info.size for info in files) // len(files), heaviest_bytes=max(info.size for info in files)
    )


_OPENERS = {
    "parquet": _open_parquet,
    "csv": lambda place, files: _text_source(place, files, "csv"),
    "jsonl": lambda place, files: _text_source(place, files, "jsonl"),
    "images": _open_images,
}


def _filtered(source: Source, where: str) -> Source:
    """The source behind a filter: row groups whose statistics rule them out are dropped, of others each is one unit of unknown rows."""
    condition = filters.parse(where, source.schema)
    _refuse_ours(condition.columns)
    units = source.units
    if source.format == "parquet":
        from pyarrow.dataset import ParquetFileFormat  # loads pandas where it is installed, and only a filter needs it

        layout = ParquetFileFormat()
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            paths = dict.fromkeys(unit.paths[0] for unit in units if unit.id not in source.unreadable)
            kept = pool.map(lambda path: _surviving(layout.make_fragment(path, source.place.filesystem), path, source.schema, condition), paths)
            alive = dict(zip(paths, kept, strict=True))
        units = tuple(unit for unit in units if unit.id in source.unreadable or (unit.row_group in alive[unit.paths[0]] and unit.start == 0))
    return replace(source, where=condition, units=tuple(replace(unit, rows=None) for unit in units))


def _refuse_ours(names: Iterable[str]) -> None:
    if ours := [name for name in names if name.startswith(_OURS)]:
        raise SourceError(f"the input has a column {ours[0]!r}; names that start with {_OURS} are headrace's own: rename it, or leave it out")


def _surviving(fragment: Any, path: str, schema: pa.Schema, condition: filters.Filter) -> set[int]:
    """Row groups of a file that may hold a row for which `condition` is true, by their statistics."""
    with naming(path):
        parts = fragment.split_by_row_group(filter=condition.expression, schema=schema)
        return {group.id for part in parts for group in part.row_groups}


def _limited(source: Source, limit: int) -> Source:
    """The units that hold the first `limit` rows, the last one cut. Rows not counted yet are counted by reading."""
    left, units = limit, []
    unreadable: dict[int, str] = {}
    for unit in source.units:
        rows = 0
        try:
            rows = unit.rows if unit.rows is not None else _count(source, unit, left)
        except SourceError as error:  # of a file that cannot be read in the first place, too
            unreadable[unit.id] = str(error)
            units.append(unit)
        take = min(rows, left)
        if take:
            units.append(replace(unit, rows=take))
        left -= take
        if not left:
            break
    return replace(source, units=tuple(units), unreadable=unreadable)


def _count(source: Source, unit: Unit, enough: int) -> int:
    """Rows of a unit behind the source's filter, counted only up to `enough`."""
    counted = 0
    narrow = source.where.columns if source.where else source.schema.names[:1]
    for part in read(source, [(unit, [(0, None)])], dict.fromkeys(narrow, ANY), block_rows=8192):
        counted += part.num_rows
        if counted >= enough:
            break
    return counted


def _parsed_as(column: ColumnType, found: pa.DataType) -> pa.DataType:
    """The Arrow type to parse a column of CSV or JSON Lines as, where `found` is what its first values look like.

    That is the declared type wherever it can be: 007 stays the text 007, and 1 may be followed by 1.5.
    """
    unknown = pa.types.is_null(found)
    if column.kind in ("str", "bytes", "image") or (unknown and column.kind == "any"):
        return pa.string()
    if column.kind == "datetime" and pa.types.is_timestamp(found):
        return pa.timestamp("us", found.tz)  # the first values may have no fractions of a second, and later ones may
    if pa.types.is_list(found) and (column.item or column.vector):
        item = column.item or from_arrow(column.arrow.value_type)
        return pa.list_(pa.field("item", _parsed_as(item, found.value_type)))
    if column.kind in ("int", "float", "bool") and (unknown or accepts(column, found)):
        return column.arrow
    return found


def select(source: Source, wanted: Mapping[str, ColumnType], *, pipeline: str, where: str | None = None, limit: int | None = None) -> Source:
    """The part of a source that a run reads, after a check that it has the columns `wanted`, with types that fit.

    Raises:
        SourceError: names the column, what the pipeline wants, what there is, and the nearest name.
    """
    names = source.schema.names
    _refuse_ours(wanted)
    for name, column in wanted.items():
        if name not in names:
            raise SourceError(f"pipeline {pipeline!r} reads column {name!r}, which the input lacks; it has {listing(names)}" + nearest(name, names))
        found = source.schema.field(name).type
        if source.format in ("csv", "jsonl"):
            source = replace(source, schema=source.schema.set(names.index(name), pa.field(name, _parsed_as(column, found))))
            found = source.schema.field(name).type
            parsed = pa.types.is_string(found) and column.kind in ("str", "bytes", "image")  # bytes and images travel as base64
        else:
            parsed = False
        if not (parsed or accepts(column, found)):
            raise SourceError(
                f"pipeline {pipeline!r} reads column {name!r} as {column}, but in the input it is {found}; "
                f"declare it as {from_arrow(found)}, or convert it in a first stage"
            )
        if (nulls := source.nulls.get(name)) and where is None and limit is None and not (column.optional or column.kind == "any"):
            raise SourceError(
                f"pipeline {pipeline!r} reads column {name!r} as {column}, but the input has {nulls} nulls there; "
                f"declare it as {column} | None, or leave them out with --where '{name} is not None'"
            )
    if where is not None:
        source = _filtered(source, where)
    if limit is not None:
        source = _limited(source, limit)
    if all(unit.id in source.unreadable for unit in source.units):
        lost = next(iter(source.unreadable.values()), None)
        raise SourceError("the input has no rows" + (f" for which --where {where!r} holds" if where else "") + (f"; {lost}" if lost else ""))
    return source
