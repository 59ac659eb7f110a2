"""Units: their table comes back as it was, and their digest tells one input from another."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from headrace.filesystems import Place
from headrace.units import Source, Unit, digest, read_units, write_units

UNITS = (
    Unit(0, ("/in/a.parquet",), 0, 0, 4, 100, 1_700_000_000_123_456_789),
    Unit(1, ("/in/a.parquet",), 0, 4, 4, 100, 1_700_000_000_123_456_789),
    Unit(5, ("/in/ü\n.parquet",), 3, 0, None, 0, 0),
    Unit(6, ("/in/x.jsonl",), None, 0, None, 1 << 40, 1, (0, 1 << 35)),
    Unit(7, ("/in/x.png", "/in/y.png"), None, 0, 2, 20, 1),
)


@pytest.mark.parametrize("units", [UNITS, (), UNITS[2:3], UNITS[4:]])
def test_units_come_back(units: tuple[Unit, ...]) -> None:
    """Every field, of any number of units; Python's own types, since they travel as such."""
    found = read_units(write_units(units))
    assert found == units
    assert all(type(unit.start) is int and type(unit.paths) is tuple for unit in found)


def test_the_table_is_plain_parquet() -> None:
    """Any tool can read it."""
    data = pq.read_table(pa.BufferReader(write_units(UNITS)))
    assert data["paths"].to_pylist()[-1] == ["/in/x.png", "/in/y.png"] and data["rows"].to_pylist() == [4, 4, None, None, 2]


def test_what_is_no_table_is_refused() -> None:
    """With an error that the caller can name the file for."""
    with pytest.raises((OSError, pa.ArrowException)):
        read_units(b"nothing")


def test_the_digest_tells_inputs_apart() -> None:
    """Ids do not count; everything else does."""
    seen = digest(UNITS)
    assert seen == digest([replace(unit, id=unit.id + 10) for unit in UNITS]) and len(seen) == 16
    changes = [
        {"paths": ("/in/b.parquet",)},
        {"row_group": 1},
        {"start": 1},
        {"rows": 3},
        {"rows": None},
        {"size_bytes": 1},
        {"modified_ns": 1},
        {"span": (0, 1)},
    ]
    others = [digest((replace(UNITS[0], **change), *UNITS[1:])) for change in changes] + [digest(UNITS[1:]), digest(UNITS[::-1])]
    assert len({seen, *others}) == len(others) + 1


def test_a_key_is_an_identity() -> None:
    """Two units of one input differ in it."""
    assert len({unit.key for unit in UNITS}) == len(UNITS) and replace(UNITS[0], id=9, modified_ns=0).key == UNITS[0].key


def test_rows_of_a_source_leave_out_what_cannot_be_read() -> None:
    """An unreadable unit promises none; one whose rows are unknown makes the sum so."""
    source = Source(Place(fs.LocalFileSystem(), "/in", "/in"), "parquet", pa.schema([]), UNITS[:3], unreadable={5: "why"})
    assert source.rows == 8
    assert replace(source, unreadable={}).rows is None
