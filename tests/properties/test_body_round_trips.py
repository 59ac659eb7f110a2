"""Bodies of requests: what goes out comes back, in JSON and in Arrow, and what does not fit is refused, whatever it is."""

import base64
import datetime as dt
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import orjson
import pytest
from conformance import CASES as CASES_OF_ALL_TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_round_trips import CASES, COLUMNS, equal

import headrace as hr
from headrace.arrays import table, to_rows
from headrace.columns import ColumnType, type_of
from headrace.serving.bodies import openapi
from headrace.serving.bodies.codec import Codec, Refused
from headrace.serving.bodies.streams import write_stream
from headrace.serving.routes import Limits
from headrace.serving.wire import Content

JSON, ARROW = Content.JSON, Content.ARROW
KINDS = [str, bool, int, float, bytes, hr.Image, dt.datetime, dt.date, hr.Vector(2), hr.Vector(), hr.Vector(dtype="int8"), hr.Vector(dtype="int64")]
LEAVES = st.sampled_from([type_of(kind) for kind in KINDS])
TYPES = st.recursive(
    LEAVES, lambda inner: inner.map(lambda one: ColumnType("list", item=one)) | inner.map(lambda one: replace(one, optional=True)), max_leaves=3
)


def codec_of(annotation):
    types = {"x": type_of(annotation)}
    return Codec(types, types, rows=1000)


@given(COLUMNS, st.booleans())
def test_rows_survive_the_way_there_and_back(column, single):
    """Rows to a body and back are the same rows, of the same types, whatever form they take; and the second body is the first."""
    annotation, values = column
    codec = codec_of(annotation)
    data = table([{"x": value} for value in values], codec.reads)
    for form in (JSON, ARROW):
        cuts = [(at, at + 1, single, form) for at in range(len(values))] if single else [(0, len(values), False, form)]
        bodies = codec.encode(data, cuts)
        parts = [codec.decode(body, form) for body in bodies]
        assert all(part.single == single for part in parts)
        if not parts:
            continue
        back = codec.table(parts)
        back.validate(full=True)
        assert back.schema == data.schema and back["x"].num_chunks == 1
        found = [row["x"] for row in to_rows(back, codec.reads)]
        assert equal([None if one is None else one.tolist() for one in found] if codec.reads["x"].vector else found, values)
        assert [bytes(body) for body in codec.encode(back, cuts)] == [bytes(body) for body in bodies]


@given(COLUMNS)
def test_what_is_written_is_plain_json(column):
    """Without numbers that only some parsers take."""
    annotation, values = column
    codec = codec_of(annotation)
    [body] = codec.encode(table([{"x": value} for value in values], codec.reads), [(0, len(values), False, JSON)])

    def never(text):
        raise AssertionError(text)

    assert len(json.loads(body, parse_constant=never)["rows"]) == len(values)


def leaf(annotation):
    """JSON that is, or almost is, a value of the type."""
    texts = st.sampled_from(["", "YQ==", "YQ", "2024-02-29", "2024-02-30", "2024-02-29T12:00:00Z", "2024-02-29T12:00:00.5+05:30", "NaN", "-Infinity", "5"])
    numbers = st.integers(-(2**65), 2**65) | st.integers(-300, 300) | st.floats(allow_nan=False, allow_infinity=False) | st.floats(-10, 10, width=16)
    return st.none() | st.booleans() | numbers | texts | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)


def almost(column):
    """The same for lists and what is in them."""
    if not (column.item or column.vector):
        return leaf(column)
    inner = almost(column.item) if column.item else st.integers(-300, 300) | st.floats(width=32, allow_nan=False, allow_infinity=False)
    return st.lists(inner, max_size=3) | st.lists(inner | leaf(column), max_size=3) | leaf(column)


def natural(value, column):
    """The Python value that JSON stands for, or one that is refused in its place: what `arrays.table` is asked about."""
    wrong = object()
    if value is None:
        return None
    if column.vector:
        return [number(one, column.vector.dtype) for one in value] if isinstance(value, list) else wrong
    if column.item:
        return [natural(one, column.item) for one in value] if isinstance(value, list) else wrong
    match column.kind:
        case "float" | "int":
            return number(value, "float64" if column.kind == "float" else "int64")
        case "bytes" | "image":
            whole = isinstance(value, str) and re.fullmatch("([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", value)
            return base64.b64decode(value) if whole else wrong
        case "datetime" | "date" if isinstance(value, str):
            try:
                return dt.datetime.fromisoformat(value) if column.kind == "datetime" else dt.date.fromisoformat(value)
            except ValueError:
                return wrong
    return value


def number(value, dtype):
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return "no number"
    if dtype.startswith("int"):
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else "no integer"
    if isinstance(value, str):
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value, "no number")
    return float(value) if abs(value) <= np.finfo(dtype).max else "out of range"


@given(TYPES.flatmap(lambda column: st.tuples(st.just(column), st.lists(almost(column), min_size=1, max_size=4))))
def test_what_is_refused_is_what_rows_in_python_are_refused_for(case):
    """The same values are taken, and come to the same table."""
    column, values = case
    codec = Codec({"x": column}, {}, rows=1000)
    body = json.dumps({"rows": [{"x": value} for value in values]}).encode()
    try:
        expected = table([{"x": natural(value, column)} for value in values], codec.reads)
    except ValueError:
        with pytest.raises(Refused) as caught:
            codec.decode(body, JSON)
        failure = caught.value.failure
        assert failure.status == 422 and failure.details
        for detail in failure.details:
            assert detail["loc"][0] == "rows" and detail["loc"][2] == "x"
            find(values, detail["loc"])
    else:
        found = codec.table([codec.decode(body, JSON)])
        assert equal([row["x"] for row in to_rows(found, codec.reads)], [row["x"] for row in to_rows(expected, codec.reads)])


def find(values, loc):
    """The place exists."""
    at = values[loc[1]]
    for step in loc[3:]:
        at = at[step]


@given(st.lists(CASES.flatmap(lambda case: st.tuples(st.just(case[0]), case[1])), min_size=1, max_size=3), st.data())
def test_requests_share_a_table_without_a_trace(columns, data):
    """Some rows in one request, the others in others, of either form: together they are the rows."""
    types = {f"c{at}": type_of(annotation) for at, (annotation, _) in enumerate(columns)}
    codec = Codec(types, types, rows=1000)
    row = {f"c{at}": value for at, (_, value) in enumerate(columns)}
    whole = table([row] * 4, types)
    forms = [data.draw(st.sampled_from([JSON, ARROW])) for _ in range(3)]
    cuts = [(0, 1, True, forms[0]), (1, 3, False, forms[1]), (3, 4, False, forms[2])]
    parts = [codec.decode(body, cut[3]) for body, cut in zip(codec.encode(whole, cuts), cuts, strict=True)]
    together = codec.table(parts)
    assert codec.encode(together, [(0, 4, False, JSON)]) == codec.encode(whole, [(0, 4, False, JSON)])


def check(failure):
    """It is the client's fault, and told shortly, in what JSON can hold."""
    assert failure.status in (400, 413, 422) and 0 < len(failure.message) < 1000 and len(orjson.dumps(failure.details)) < 20_000


WHATEVER = Codec({"s": type_of(str), "v": type_of(hr.Vector(2) | None), "a": type_of(hr.Column)}, {}, rows=5)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("sva") | st.text(), inner),
)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_taken_or_refused(body):
    """Nothing else is ever raised."""
    for form in (JSON, ARROW):
        try:
            WHATEVER.table([WHATEVER.decode(body, form)])
        except Refused as refused:
            check(refused.failure)


STREAM = Codec(dict.fromkeys(["s"], type_of(str | None)) | {"v": type_of(hr.Vector(2)), "l": type_of(list[str])}, {}, rows=5)
BODY = write_stream(table([{"s": "ab", "v": [1, 2], "l": ["c"]}, {"s": None, "v": [3, 4], "l": []}], STREAM.reads)).tobytes()


@given(
    st.lists(
        st.tuples(st.integers(0, len(BODY) - 8), st.sampled_from([0, 1, 127, 255, 2**31, 2**32 - 1, 2**62, 2**64 - 1]) | st.integers(0, 2**64 - 1)), max_size=4
    )
)
def test_a_damaged_stream_is_taken_or_refused(changes):
    """And what is taken is sound."""
    body = bytearray(BODY)
    for at, value in changes:
        body[at : at + 8] = value.to_bytes(8, "little")
    try:
        data = STREAM.table([STREAM.decode(bytes(body), ARROW)])
    except Refused as refused:
        check(refused.failure)
    else:
        data.validate(full=True)
        assert data.schema.types == [column.arrow for column in STREAM.reads.values()]


def test_a_frame_of_polars():
    """Its streams are taken as they come: views of text, large lists, categories."""
    pl = pytest.importorskip("polars")
    data = table([{"s": "ab" * 20, "v": [1, 2], "l": ["c" * 20]}, {"s": None, "v": [3, 4], "l": []}], STREAM.reads)
    sink = io.BytesIO()
    pl.from_arrow(data).with_columns(pl.col("s").cast(pl.Categorical)).write_ipc_stream(sink)
    assert STREAM.table([STREAM.decode(sink.getvalue(), ARROW)]).equals(data)


@hr.stage(out={"ok": bool})
def every_type(
    s: hr.Column[str],
    b: hr.Column[bool | None],
    i: hr.Column[int],
    f: hr.Column[float],
    y: hr.Column[bytes],
    image: hr.Column[hr.Image],
    at: hr.Column[dt.datetime | None],
    day: hr.Column[dt.date],
    v: hr.Column[hr.Vector(3)],
    ragged: hr.Column[hr.Vector(dtype="float16")],
    ids: hr.Column[hr.Vector(dtype="uint8")],
    lists: hr.Column[list[list[str | None]] | None],
):
    return {}


def whole(value):
    """To a JSON schema 1.0 is an integer; here it is one only when it is written as 1."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def test_every_body_that_the_document_allows_is_taken():
    """As a tool makes them that reads nothing but the document."""
    schemathesis = pytest.importorskip("schemathesis")
    pipeline = hr.Pipeline("every", every_type)
    codec = Codec(pipeline.inputs, {}, rows=100)
    document = openapi.document(openapi.contract(pipeline), Limits(rows=100), keys=False)
    body = document["paths"]["/every"]["post"]["requestBody"]
    body["content"] = {"application/json": body["content"]["application/json"]}
    taken = set()

    @given(schemathesis.openapi.from_dict(document)["/every"]["POST"].as_strategy())
    @settings(suppress_health_check=list(HealthCheck))
    def run(case):
        taken.add(codec.decode(json.dumps(whole(case.body)).encode(), JSON).single)

    run()
    assert taken == {True, False}


@pytest.mark.parametrize("case", CASES_OF_ALL_TARGETS, ids=lambda case: case.name)
def test_rows_of_every_target(case):
    """What every target must run alike goes through bodies unchanged: rows in, and what `local` makes of them out."""
    pipeline = case.pipeline
    sent = [{name: row[name] for name in pipeline.inputs if name in row} for row in case.rows]
    for rows, types in ((sent, pipeline.inputs), (pipeline.local(case.rows), pipeline.outputs)):
        codec = Codec(types, types, rows=1000)
        data = table(rows, types)
        for form in (JSON, ARROW):
            [body] = codec.encode(data, [(0, len(rows), False, form)])
            assert codec.encode(codec.table([codec.decode(body, form)]), [(0, len(rows), False, JSON)]) == codec.encode(data, [(0, len(rows), False, JSON)])
            one = codec.table([codec.decode(body, form) for body in codec.encode(data, [(0, 1, True, form)])])
            assert one.schema == data.schema and codec.encode(one, [(0, 1, True, JSON)]) == codec.encode(data, [(0, 1, True, JSON)])
