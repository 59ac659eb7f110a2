"""Bodies: what is taken, what is refused and with which words, and that nobody can make the reader fail."""

import datetime as dt
import io
import json
import struct

import numpy as np
import orjson
import pyarrow as pa
import pytest

import headrace as hr
from headrace.arrays import table, to_rows
from headrace.columns import type_of
from headrace.serving.bodies.codec import Codec, Refused, sample
from headrace.serving.bodies.streams import write_stream
from headrace.serving.wire import Content

JSON, ARROW = Content.JSON, Content.ARROW


def codec(rows=10, **reads):
    types = {name: type_of(annotation) for name, annotation in reads.items()}
    return Codec(types, types, rows=rows)


def refused(codec, body, content=JSON):
    with pytest.raises(Refused) as caught:
        codec.decode(body, content)
    return caught.value.failure


def rows_of(codec, body, content=JSON):
    return to_rows(codec.table([codec.decode(body, content)]), codec.reads)


TEXT = codec(text=str)


def test_a_row_and_several():
    """An object is a row; an object of the one key `rows` holds several, perhaps none."""
    one, two, none = (TEXT.decode(body, JSON) for body in (b'{"text": "a"}', b'{"rows": [{"text": "b"}, {"text": "c"}]}', b'{"rows": []}'))
    assert [(one.rows, one.single), (two.rows, two.single), (none.rows, none.single)] == [(1, True), (2, False), (0, False)]
    data = TEXT.table([one, two, none, one])
    assert data.equals(pa.table({"text": ["a", "b", "c", "a"]}))
    assert TEXT.encode(data, [(0, 1, True, JSON), (1, 3, False, JSON), (3, 3, False, JSON), (3, 4, True, JSON)]) == [
        b'{"text":"a"}',
        b'{"rows":[{"text":"b"},{"text":"c"}]}',
        b'{"rows":[]}',
        b'{"text":"a"}',
    ]


def test_a_body_may_be_a_view():
    """A body is a piece of a frame."""
    assert TEXT.decode(memoryview(b'xx{"text": "a"}yy')[2:-2], JSON).rows == 1
    stream = bytes(TEXT.encode(pa.table({"text": ["a"]}), [(0, 1, True, ARROW)])[0])
    assert rows_of(TEXT, memoryview(b"x" + stream)[1:], ARROW) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"{", "is not JSON"),
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": "a"} {}', "is not JSON"),
        (b'{"text": NaN}', "is not JSON"),
        (b'{"text": 1e400}', "is not JSON"),
        (b'{"text": 1' + b"0" * 400 + b"}", "is not JSON"),
        (b'{"text": "\\ud800"}', "is not JSON"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "UTF-8"),
        (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
        (b'{"text": "a"}'.decode().encode("utf-16"), ""),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 100_000, "too deeply"),
        (b'{"text": "a\nb"}', "is not JSON"),
        (b"{'text': 'a'}", "is not JSON"),
    ],
)
def test_what_is_no_json(body, words):
    """It is a 400 that says why."""
    failure = refused(TEXT, body)
    assert (failure.status, failure.code) == (400, "not_json")
    assert words in failure.message and len(failure.message) < 200


@pytest.mark.parametrize(
    ("body", "loc", "words"),
    [
        (b"5", [], "expected an object, one row or"),
        (b"null", [], "got null"),
        (b'"text"', [], 'the string "text"'),
        (b"[]", [], "a list of 0"),
        (b"{}", ["text"], "missing; expected a string"),
        (b'{"rows": {}}', ["rows"], "expected a list of rows, got an object"),
        (b'{"rows": null}', ["rows"], "expected a list of rows, got null"),
        (b'{"rows": [{"text": "a"}, 5]}', ["rows", 1], "expected an object, got the number 5"),
        (b'{"rows": [{"text": "a"}], "x": 1}', ["rows"], "there is no such column; there are 'text'"),
        (b'{"text": "a", "txet": 1}', ["txet"], "did you mean 'text'?"),
        (b'{"text": null}', ["text"], "expected a string, got null"),
        (b'{"text": 5}', ["text"], "expected a string, got the number 5"),
        (b'{"text": {"a": 1}}', ["text"], "got an object"),
        (b'{"text": "a", "text": 5}', ["text"], "the number 5"),
    ],
)
def test_rows_that_do_not_fit(body, loc, words):
    """It is a 422 that says where."""
    failure = refused(TEXT, body)
    assert (failure.status, failure.code) == (422, "invalid_row")
    assert failure.details[0]["loc"] == loc and words in failure.details[0]["message"]
    assert failure.details[0]["message"] in failure.message


WRONG = [
    (int, "1.0", "without a fraction"),
    (int, "1e3", "an integer of 64 bits"),
    (int, "true", "got true"),
    (int, '"5"', 'the string "5"'),
    (int, str(2**63), "an integer of 64 bits"),
    (int, str(-(2**63) - 1), "an integer of 64 bits"),
    (int, "1" + "0" * 30, "an integer of 64 bits"),
    (float, "true", "got true"),
    (float, '"1.5"', 'the string "1.5"'),
    (float, '"nan"', 'the string "nan"'),
    (bool, "1", "true or false"),
    (bytes, '"YQ"', "base64 text"),
    (bytes, '"YQ==\\n"', "base64 text"),
    (bytes, '"Y-_="', "base64 text"),
    (hr.Image, "5", "an image as base64 text"),
    (dt.datetime, '"yesterday"', "an instant such as"),
    (dt.datetime, '"2024-02-30T00:00:00Z"', "an instant such as"),
    (dt.datetime, '"0001-01-01T00:00:00+01:00"', "of the years 1 to 9999"),
    (dt.datetime, '"2024-W05-1"', "an instant such as"),
    (dt.datetime, "1700000000", "an instant such as"),
    (dt.date, '"2024-02-30"', "a date such as"),
    (dt.date, '"2024-02-29T00:00:00"', "a date such as"),
    (hr.Vector(2), "[1]", "a list of 2 numbers, got a list of 1"),
    (hr.Vector(2), "null", "a list of 2 numbers, got null"),
    (hr.Vector(2), '"ab"', "a list of 2 numbers"),
    (list[int], "{}", "a list (list[int])"),
    (hr.Column, "[1, {}]", "a value that Arrow has a type for"),
    (hr.Column, "[" * 40 + "]" * 40, "levels of nesting"),
]


@pytest.mark.parametrize(("annotation", "value", "words"), WRONG)
def test_values_of_other_types(annotation, value, words):
    """Exact or refused."""
    failure = refused(codec(x=annotation), f'{{"rows": [{{"x": {value}}}]}}'.encode())
    assert failure.status == 422
    assert failure.details[0]["loc"] == ["rows", 0, "x"] and words in failure.details[0]["message"]


@pytest.mark.parametrize(
    ("annotation", "value", "loc"),
    [
        (hr.Vector(3), '[1, 2, "x"]', [2]),
        (hr.Vector(3), "[1, true, 2]", [1]),
        (hr.Vector(), "[1, null]", [1]),
        (hr.Vector(), "[1e300]", [0]),
        (hr.Vector(dtype="float16"), "[1, 65520]", [1]),
        (hr.Vector(dtype="int8"), "[1, 128]", [1]),
        (hr.Vector(dtype="uint8"), "[-1]", [0]),
        (hr.Vector(dtype="int64"), f"[{2**63}]", [0]),
        (hr.Vector(dtype="int32"), "[1.0]", [0]),
        (list[list[int]], "[[1], [2, null]]", [1, 1]),
        (list[hr.Vector(2)], "[[1, 2], [1]]", [1]),
        (list[str | None] | None, '["a", null, 3]', [2]),
        (list[bytes], '["YQ==", "YQ"]', [1]),
        (list[float], "[" + "1.5," * 5000 + "null]", [5000]),
    ],
)
def test_the_place_inside_a_value_is_named(annotation, value, loc):
    """However deep."""
    failure = refused(codec(x=annotation), f'{{"x": {value}}}'.encode())
    assert [one["loc"] for one in failure.details] == [["x", *loc]]


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, "3", 3.0),
        (float, "1" + "0" * 25, 1e25),
        (float, "9007199254740993", 9007199254740992.0),
        (float, '"-Infinity"', float("-inf")),
        (int, str(2**63 - 1), 2**63 - 1),
        (int, str(-(2**63)), -(2**63)),
        (int, "-0", 0),
        (str, '"\\u0000\\ud83d\\ude00"', "\0😀"),
        (bytes, '""', b""),
        (bytes, '"+/8="', b"\xfb\xff"),
        (dt.datetime, '"2024-02-29T12:00:00"', dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC)),
        (dt.datetime, '"2024-02-29t12:00:00.123456789z"', dt.datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=dt.UTC)),
        (dt.datetime, '"2024-02-29 12:00+05:30"', dt.datetime(2024, 2, 29, 6, 30, tzinfo=dt.UTC)),
        (dt.datetime, '"2024-02-29"', dt.datetime(2024, 2, 29, tzinfo=dt.UTC)),
        (dt.date, '"0001-01-01"', dt.date(1, 1, 1)),
        (list[float] | None, "[]", []),
        (hr.Column, "null", None),
        (hr.Column, '{"a": [1, 2], "b": {}}', {"a": [1, 2], "b": {}}),
    ],
)
def test_values_that_are_taken(annotation, value, expected):
    """What JSON has no type for has a form."""
    found = rows_of(codec(x=annotation), f'{{"x": {value}}}'.encode())[0]["x"]
    assert (type(found), found) == (type(expected), expected)


def test_a_missing_column_is_null_where_nulls_are_allowed():
    """And in all other cases an error, one of type `any` included, which may be null but has to be there."""
    types = codec(a=str | None, v=hr.Vector(2) | None, x=hr.Column)
    assert rows_of(types, b'{"x": null}') == [{"a": None, "v": None, "x": None}]
    assert refused(types, b'{"a": "b"}').details == ({"loc": ["x"], "message": "missing; expected a value that Arrow has a type for"},)


def test_details_are_few_and_short():
    """Whatever is sent: twenty at most, and of a value sixty characters."""
    body = json.dumps({"rows": [{"text": "x" * 100_000, "y" * 100_000: 1}] * 10 + [{"text": ["a" * 1000]}]}).encode()
    failure = refused(codec(text=int, rows=20), body)
    assert len(failure.details) == 20
    assert len(json.dumps(failure.details)) < 8000 and len(failure.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"v": [' + b"1," * 300_000 + b'"x"]}',
        b'{"v": [' + b"null," * 300_000 + b"1]}",
        b'{"v": [], ' + b",".join(b'"%d": 1' % n for n in range(100_000)) + b"}",
        b'{"rows": [' + b"{}," * 100_000 + b"{}]}",
        b'{"v": [1.' + b"1" * 1_000_000 + b"]}",
        b'{"any": [' + b",".join(b'{"%d": 1}' % n for n in range(100_000)) + b"]}",
        b'{"any": [' + b"1," * 300_000 + b'"a"]}',
    ],
)
def test_long_bodies(body):
    """Wrong in the last place, with names without end, with numbers without end: a few passes over them are enough."""
    assert refused(codec(v=hr.Vector(), any=hr.Column), body).status in (413, 422)


def test_more_rows_than_are_taken():
    """It is a 413, in any form."""
    assert TEXT.decode(json.dumps({"rows": [{"text": "a"}] * 10}).encode(), JSON).rows == 10
    assert refused(TEXT, json.dumps({"rows": [{"text": "a"}] * 11}).encode()).status == 413
    data = pa.table({"text": ["a"] * 11})
    assert refused(TEXT, write_stream(data), ARROW).status == 413


def test_a_column_named_rows():
    """An object of the one key `rows` always means several rows; with other columns beside it, `rows` is one like any other."""
    alone, beside = Codec({"rows": type_of(str)}, {}, rows=5), Codec({"rows": type_of(str), "x": type_of(int | None)}, {}, rows=5)
    assert rows_of(alone, b'{"rows": [{"rows": "a"}]}') == [{"rows": "a"}]
    assert '{"rows": [{"rows": ...}]}' in refused(alone, b'{"rows": "a"}').message
    assert rows_of(beside, b'{"rows": "a", "x": null}') == [{"rows": "a", "x": None}]
    assert refused(beside, b'{"rows": "a"}').status == 422


def test_requests_whose_columns_of_any_type_differ_are_told_apart():
    """A neighbour must not change what a stage receives: another type, or a null among the numbers."""
    anything = codec(x=hr.Column, y=int)
    one, other, text, none = (anything.decode(b'{"x": %s, "y": 1}' % value, JSON) for value in (b"1", b"2", b'"a"', b"null"))
    assert one.group == other.group
    assert len({one.group, text.group, none.group}) == 3
    assert anything.table([one, other])["x"].to_pylist() == [1, 2]
    assert TEXT.decode(b'{"text": "a"}', JSON).group == ()
    mixed = refused(anything, b'{"rows": [{"x": 1, "y": 1}, {"x": "a", "y": 1}]}')
    assert mixed.details[0]["loc"] == ["rows", "x"] and "do not go into one column" in mixed.message


def test_answers_of_any_type():
    """What Arrow holds and JSON has no type for is written as text."""
    data = pa.table(
        {"x": [{"a": b"\xff", "b": float("nan"), "c": dt.datetime(2024, 1, 1), "d": dt.date(2024, 1, 1), "e": [float("inf")], "f": dt.timedelta(seconds=1)}]}
    )
    anything = codec(x=hr.Column)
    expected = {"a": "/w==", "b": "NaN", "c": "2024-01-01T00:00:00Z", "d": "2024-01-01", "e": ["Infinity"], "f": "0:00:01"}
    assert orjson.loads(anything.encode(data, [(0, 1, True, JSON)])[0])["x"] == expected
    nanoseconds = pa.table({"x": pa.array([1], pa.timestamp("ns"))})
    assert anything.encode(nanoseconds, [(0, 1, True, JSON)]) == [b'{"x":"1970-01-01T00:00:00Z"}']


def test_floats_that_are_not_finite():
    """They are text both ways, alone and within."""
    both = codec(f=float | None, v=hr.Vector(), w=hr.Vector(2, "float64") | None)
    body = b'{"rows":[{"f":"NaN","v":[1.5,"Infinity"],"w":null},{"f":null,"v":["-Infinity"],"w":[1.0,"NaN"]},{"f":"-Infinity","v":[],"w":[2.0,3.0]}]}'
    assert both.encode(both.table([both.decode(body, JSON)]), [(0, 3, False, JSON)]) == [body]


def test_every_float16_survives():
    """And is as short as may be."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = codec(v=hr.Vector(dtype="float16"))
    data = table([{"v": every[np.isfinite(every)]}], half.reads)
    back = half.table([half.decode(half.encode(data, [(0, 1, True, JSON)])[0], JSON)])
    assert back.equals(data)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_float32_whose_shortest_text_makes_a_double_between_two(sign):
    """Of all finite ones only 7.038531e-26 comes back as its neighbour when it is read as a double and then rounded."""
    number = struct.unpack("<f", struct.pack("<I", 363742205))[0] * sign
    assert str(np.float32(number)) == f"{sign * 7.038531e-26}" and np.float32(sign * 7.038531e-26) != np.float32(number)
    vector = codec(v=hr.Vector(2))
    data = table([{"v": np.array([number, 0.1], np.float32)}], vector.reads)
    [body] = vector.encode(data, [(0, 1, True, JSON)])
    assert np.array_equal(np.array(json.loads(body)["v"]).astype(np.float32), np.array([number, 0.1], np.float32))
    for text in (body, b'{"v":[%s,0.1]}' % str(np.float32(number)).encode()):
        assert vector.table([vector.decode(text, JSON)]).equals(data)


def test_json_and_arrow_in_one_call():
    """Requests of both forms share a table."""
    both = codec(s=str, v=hr.Vector(2), d=dt.datetime)
    rows = [{"s": "a", "v": np.array([1, 2], np.float32), "d": dt.datetime(2024, 1, 1, tzinfo=dt.UTC)}]
    data = table(rows, both.reads)
    texts, stream = both.encode(data, [(0, 1, True, JSON), (0, 1, False, ARROW)])
    parts = [both.decode(texts, JSON), both.decode(stream, ARROW)]
    assert both.table(parts).equals(pa.concat_tables([data, data]).combine_chunks())
    assert not parts[1].single


STREAM = codec(s=str | None, v=hr.Vector(2), l=list[str])
ROWS = table([{"s": "ab" * 20, "v": [1, 2], "l": ["c" * 20]}, {"s": None, "v": [3, 4], "l": []}], STREAM.reads)


@pytest.mark.parametrize(
    "types",
    [
        {"s": pa.string_view()},
        {"s": pa.large_string()},
        {"s": pa.dictionary(pa.int8(), pa.string())},
        {"v": pa.list_(pa.float64())},
        {"v": pa.list_(pa.int8(), 2)},
        {"l": pa.large_list(pa.string_view())},
    ],
)
def test_arrow_types_that_others_write(types):
    """A library's own way of holding texts and lists is as good as ours."""
    data = ROWS
    for name, kind in types.items():
        data = data.set_column(data.column_names.index(name), name, data[name].cast(kind))
    assert STREAM.table([STREAM.decode(write_stream(data), ARROW)]).equals(ROWS)


def written(data, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(data)
    return sink.getvalue().to_pybytes()


def set_type(name, array):
    return ROWS.set_column(ROWS.column_names.index(name), name, array)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "end-of-stream mark"),
        (b"\xff\xff\xff\xff\0\0\0\0", 400, ""),
        (written(ROWS)[:-8], 400, "end-of-stream mark"),
        (written(ROWS)[:100] + written(ROWS)[-8:], 400, ""),
        (written(ROWS, compression="zstd"), 400, "compressed"),
        (written(ROWS, compression="lz4"), 400, "compressed"),
        (written(ROWS.append_column("x", ROWS["s"])), 422, "column 'x' is not asked for"),
        (written(ROWS.append_column("s", ROWS["s"])), 422, "2 columns named 's'"),
        (written(ROWS.drop_columns(["l"])), 422, "column 'l' (list[str]) is missing"),
        (written(set_type("s", pa.array([1, 2]))), 422, "column 's' is int64; expected string"),
        (written(set_type("v", pa.array([[1.0], [1.0, 2.0]]))), 422, "column 'v'"),
        (written(set_type("v", pa.array([None, [1.0, 2.0]]))), 422, "null"),
        (written(set_type("l", pa.array([["a"], None]))), 422, "null"),
        (written(set_type("s", pa.array(["a", "b"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.large_binary())))), 422, "expected string"),
        (written(set_type("l", pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array([["a"]])))), 422, "column 'l'"),
    ],
)
def test_streams_that_are_refused(body, status, words):
    """Cut off, compressed, with other columns or other types."""
    failure = refused(STREAM, body, ARROW)
    assert failure.status == status and words in failure.message, failure


def test_a_stream_without_rows_or_optional_columns():
    """Both are fine."""
    assert STREAM.decode(write_stream(ROWS.slice(0, 0)), ARROW).rows == 0
    assert STREAM.table([STREAM.decode(write_stream(ROWS.drop_columns(["s"])), ARROW)])["s"].null_count == 2


BLOWN_UP = {
    "a dictionary of one long text, referred to by each row": pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int8()), pa.array(["x" * 100_000])),
    "a dictionary of views": pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int8()), pa.array(["x" * 100_000]).cast(pa.string_view())),
    "views of one long text": pa.Array.from_buffers(
        pa.string_view(), 4000, [None, pa.py_buffer(struct.pack("<i4sii", 100_000, b"xxxx", 0, 0) * 4000), pa.py_buffer(b"x" * 100_000)]
    ),
}


@pytest.mark.parametrize("name", BLOWN_UP)
def test_a_small_stream_that_would_become_a_large_one(name):
    """It is refused before it is."""
    many = codec(text=str, rows=5000)
    before = pa.total_allocated_bytes()
    failure = refused(many, write_stream(pa.table({"text": BLOWN_UP[name]})), ARROW)
    assert failure.status == 422 and "400 MB once written out" in failure.message
    assert pa.total_allocated_bytes() - before < 10 << 20


def test_nulls_by_the_million():
    """A list of values that take no room may not be as long as it likes."""
    claims = pa.ListArray.from_arrays(pa.array([0, 20_000_000], pa.int32()), pa.nulls(20_000_000))
    assert "20000000 values of type null" in refused(codec(x=list[str | None]), write_stream(pa.table({"x": claims})), ARROW).message
    assert refused(codec(x=str | None), write_stream(pa.table({"x": pa.nulls(20_000_000)})), ARROW).status == 413


def test_text_that_is_no_text():
    """Arrow's texts are checked to be UTF-8."""
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")])
    assert refused(TEXT, write_stream(pa.table({"text": bad})), ARROW).status == 400


def test_the_view_of_a_null_leads_nowhere():
    """Whatever stands in it."""
    views = struct.pack("<iiii", 1, 97, 0, 0) + struct.pack("<iiii", -488416541, 0, 7, 1 << 30)
    array = pa.Array.from_buffers(pa.string_view(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(views)])
    assert rows_of(codec(s=str | None), write_stream(pa.table({"s": array})), ARROW) == [{"s": "a"}, {"s": None}]


def test_a_made_up_row_has_its_types():
    """It can be computed, sent, and is read as it was; an image can be opened."""
    types = codec(
        s=str, b=bool, i=int | None, f=float, y=bytes, im=hr.Image, d=dt.datetime, day=dt.date, v=hr.Vector(3), r=hr.Vector(dtype="int8"), l=list[str]
    )
    row = sample(types.reads)
    data = table([row], types.reads)
    assert types.table([types.decode(types.encode(data, [(0, 1, True, JSON)])[0], JSON)]).equals(data)
    assert all(value is not None for value in row.values())
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(row["im"]))
    image.load()
    assert (image.size, image.getpixel((31, 31))) == ((32, 32), (128, 128, 128))
