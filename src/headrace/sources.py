"""Sources: find the input, check it against what a pipeline reads, and cut it into units.

Parquet is cut by row group, with columns and `--where` pushed down; CSV and JSON Lines by file; a folder of images, which
has the columns `path` and `image`, into runs of files. Nothing here knows an engine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
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
from headrace.readers import naming, read, text_tables
from headrace.units import Source, Unit, plain

_IMAGE_SCHEMA = pa.schema({"path": pa.string(), "image": pa.binary()})
_NO_NUMBER = r"^[+-]?(0[0-9]|[0-9]{19,}$)"  # as a number, 007 would lose its zeros, and an id of twenty digits its end
_IMAGES_PER_UNIT = 64
_OPENING_THREADS = 32  # opening files is all waiting


def open_source(wanted: Input) -> Source:
    """Find the files, read their footers or first lines, and cut them into units.

    Raises:
        SourceError: nothing matches, formats are mixed, a file cannot be read, or the schemas differ.
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
    schema = footers[0].schema.to_arrow_schema()
    units: list[Unit] = []
    nulls: Counter[str] = Counter()
    heaviest = total = 1
    for info, footer in zip(files, footers, strict=True):
        schema = _merged(schema, footer.schema.to_arrow_schema(), files[0].path, info.path)
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            if not group.num_rows:
                continue
            heaviest = max(heaviest, group.total_byte_size // group.num_rows)
            total += group.total_byte_size
            for column in map(group.column, range(group.num_columns)):
                nulls[column.path_in_schema] += (column.statistics and column.statistics.null_count) or 0
            units.append(Unit(len(units), (info.path,), number, group.num_rows, info.size, _modified(info)))
    return Source(
        place, "parquet", schema, tuple(units), row_bytes=total // max(1, sum(unit.rows or 0 for unit in units)), heaviest_bytes=heaviest, nulls=nulls
    )


def _footer(place: Place, path: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path, filesystem=place.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"cannot read the Parquet file {path!r}: {error}") from error


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
    units = [Unit(number, (info.path,), None, None, info.size, _modified(info)) for number, info in enumerate(files)]
    bare = Source(place, kind, pa.schema([]), tuple(units))
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        starts = list(pool.map(lambda info: _start(bare, info.path), files))
    known = [(path, schema, weight) for info, start in zip(files, starts, strict=True) if start for path, (schema, weight) in [(info.path, start)]]
    if not known:
        raise SourceError(f"the input has no rows: {files[0].path!r}" + (f" and {len(files) - 1} more files" if len(files) > 1 else ""))
    first, schema, _ = known[0]
    for path, other, _ in known[1:]:
        schema = _merged(schema, other, first, path, text=kind)
    weights = [weight for _, _, weight in known]
    return replace(bare, schema=schema, row_bytes=sum(weights) // len(weights), heaviest_bytes=max(weights))


def _start(bare: Source, path: str) -> tuple[pa.Schema, int] | None:
    """The schema that a text file's first rows have, and the weight of one; None when it has no rows."""
    with naming(path):
        first = next(iter(text_tables(bare, path, {})), None)
        if first is None:
            return None
        schema = first.schema
        numbers = [field.name for field in schema if bare.format == "csv" and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type))]
        if numbers:
            as_text = replace(bare, schema=pa.schema([(name, pa.string()) for name in numbers]))
            raw = next(iter(text_tables(as_text, path, dict.fromkeys(numbers, ANY))))
            for name in numbers:
                if pc.any(pc.match_substring_regex(raw[name], _NO_NUMBER)).as_py():
                    schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
    return schema, max(1, first.nbytes // max(1, first.num_rows))


def _open_images(place: Place, files: list[fs.FileInfo]) -> Source:
    units: list[Unit] = []
    for start in range(0, len(files), _IMAGES_PER_UNIT):
        run = files[start : start + _IMAGES_PER_UNIT]
        paths = tuple(info.path for info in run)
        units.append(Unit(len(units), paths, None, len(paths), sum(info.size for info in run), max(map(_modified, run))))
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
    """The source behind a filter: row groups whose statistics rule them out are dropped, other counts become unknown."""
    condition = filters.parse(where, source.schema)
    units = source.units
    if source.format == "parquet":
        from pyarrow.dataset import ParquetFileFormat  # loads pandas where it is installed, and only a filter needs it

        layout = ParquetFileFormat()
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            paths = dict.fromkeys(unit.paths[0] for unit in units)
            kept = pool.map(lambda path: _surviving(layout.make_fragment(path, source.place.filesystem), source.schema, condition), paths)
            alive = dict(zip(paths, kept, strict=True))
        units = tuple(unit for unit in units if unit.row_group in alive[unit.paths[0]])
    return replace(source, where=condition, units=tuple(replace(unit, rows=None) for unit in units))


def _surviving(fragment: Any, schema: pa.Schema, condition: filters.Filter) -> set[int]:
    """Row groups of a file that may hold a row for which `condition` is true, by their statistics."""
    parts = fragment.split_by_row_group(filter=condition.expression, schema=schema)
    return {group.id for part in parts for group in part.row_groups}


def _limited(source: Source, limit: int) -> Source:
    """The units that hold the first `limit` rows, the last one cut. Rows not counted yet are counted by reading."""
    left, units = limit, []
    for unit in source.units:
        rows = unit.rows if unit.rows is not None else _count(source, unit, left)
        take = min(rows, left)
        if take:
            units.append(replace(unit, rows=take, limit=take))
        left -= take
        if not left:
            break
    return replace(source, units=tuple(units))


def _count(source: Source, unit: Unit, enough: int) -> int:
    """Rows of a unit behind the source's filter, counted only up to `enough`."""
    counted = 0
    narrow = source.where.columns if source.where else source.schema.names[:1]
    for part in read(source, unit, dict.fromkeys(narrow, ANY), block_rows=8192):
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
    if not source.units:
        raise SourceError("the input has no rows" + (f" for which --where {where!r} holds" if where else ""))
    return source
