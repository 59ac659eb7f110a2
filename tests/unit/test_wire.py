"""Frames: every one comes out as it went in, however the stream is cut; what is no frame is refused."""

import itertools
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.serving.wire import MOST_BYTES, Content, Decoder, Kind, encode

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8)
heads = st.lists(scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=4), scalars, max_size=3), max_size=8)
frames = st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1), heads, st.binary(max_size=200))


def stream(some):
    return b"".join(bytes(piece) for kind, number, head, body in some for piece in encode(kind, number, head, body))


def heard(pieces):
    decoder = Decoder()
    return [(frame.kind, frame.number, frame.head, bytes(frame.body)) for piece in pieces for frame in decoder.feed(piece)]


@QUICK
@given(st.lists(frames, max_size=6), st.lists(st.integers(0, 2000), max_size=30))
def test_every_frame_comes_out_as_it_went_in_however_the_stream_is_cut(some, cuts):
    whole = stream(some)
    places = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    assert heard(whole[start:stop] for start, stop in itertools.pairwise(places)) == some


@QUICK
@given(st.lists(frames, min_size=1, max_size=3))
def test_frames_come_byte_by_byte(some):
    whole = stream(some)
    assert heard(whole[at : at + 1] for at in range(len(whole))) == some


def test_a_frame_is_complete_with_its_last_byte_and_not_before():
    whole = stream([(Kind.WORK, 7, [0, 0], b"body")])
    decoder = Decoder()
    assert list(decoder.feed(whole[:-1])) == []
    (frame,) = decoder.feed(whole[-1:])
    assert (frame.kind, frame.number, frame.head, bytes(frame.body)) == (Kind.WORK, 7, [0, 0], b"body")


def test_a_large_body_is_not_copied_on_its_way_out():
    body = b"x" * 1_000_000
    assert encode(Kind.DONE, 1, (), body)[1] is body
    assert heard([b"".join(encode(Kind.DONE, 1, (), memoryview(body)))])[0][3] == body


def test_a_large_body_in_many_pieces_takes_one_join():
    whole = stream([(Kind.WORK, 1, [], b"y" * 300_000), (Kind.PING, 0, [], b"")])
    assert [kind for kind, *_ in heard(whole[at : at + 1000] for at in range(0, len(whole), 1000))] == [Kind.WORK, Kind.PING]


def test_enums_travel_as_numbers():
    ((_, _, head, _),) = heard(encode(Kind.WORK, 1, (Content.ARROW, Content.JSON)))
    assert head == [1, 0]


def raw(length, kind, number, packed, rest=b""):
    return struct.pack("!IBQI", length, kind, number, packed) + rest


@pytest.mark.parametrize(
    "data",
    [
        raw(MOST_BYTES + 1, 1, 0, 0),
        raw(20, 1, 0, 8, b"1234567"),  # a list that is longer than the frame
        raw(12, 1, 0, 0),  # shorter than its own head
        raw(13 + 1, 99, 0, 1, b"\x90"),  # of no known kind
        raw(13, 1, 0, 0),  # without a list
        raw(13 + 1, 1, 0, 1, b"\xc1"),  # no msgpack
        raw(13 + 2, 1, 0, 2, b"\x90\x90"),  # two lists
        raw(13 + 1, 1, 0, 1, b"\x91"),  # a list that is cut off
        raw(13 + 2, 1, 0, 2, b"\xa1\xff"),  # text that is not UTF-8
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says: the connection is closed
        list(Decoder().feed(data))


@settings(QUICK, max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=5))
@example([b"\0\0\0\x0e", b"\x03" + b"\0" * 8 + b"\0\0\0\x01\x90"])
def test_noise_gives_frames_or_a_value_error(pieces):
    try:
        for kind, *_ in heard(pieces):
            assert kind in Kind
    except ValueError:
        pass


def test_what_a_decoder_said_before_it_refused_stands():
    decoder = Decoder()
    frames = decoder.feed(stream([(Kind.PING, 0, [], b"")]) + raw(12, 1, 0, 0))
    assert next(frames).kind is Kind.PING
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says: the connection is closed
        next(frames)
