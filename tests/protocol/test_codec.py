"""Codec: every frame survives, nothing else gets in, and sizes are what PROTOCOL.md promises."""

from __future__ import annotations

import math
from typing import get_args

import frame_strategies as fs
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsdlab.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    AnyFrame,
    BadIds,
    Close,
    Commit,
    Draft,
    Error,
    Hello,
    Open,
    Ping,
    ProtocolError,
    Resume,
    Verdict,
    Welcome,
    decode,
    digest_ids,
    encode,
    microseconds,
    pack_ids,
    refusal,
    unpack_ids,
)

raw = msgspec.msgpack.encode
HELLO = [1, PROTOCOL_VERSION, "n", "", "t", "k", 0.5]
OPEN = [3, 1, "dsd-sync", b"\0\0\0", b"", 0, 48, True, 0.0, 0, 1.0, 7]


def test_strategies_cover_every_frame() -> None:
    assert {c.__name__ for c in get_args(AnyFrame)} == set(fs.by_name)


@pytest.mark.parametrize("name", sorted(fs.by_name))
def test_round_trip(name: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(fs.by_name[name])
    def check(frame: AnyFrame) -> None:
        again = decode(encode(frame))
        assert type(again) is type(frame)
        assert again == frame

    check()


@settings(max_examples=80, deadline=None)
@given(fs.drafts)
@example(Draft(0xFFFF, 0xFFFF, (1 << 20) - 1, pack_ids([0xFFFFFF] * 85)))
@example(Draft(0xFFFF, 0xFFFF, (1 << 20) - 1, pack_ids([0xFFFFFF] * 86)))
@example(Draft(0xFFFF, 0xFFFF, (1 << 20) - 1, pack_ids([0xFFFFFF] * 256)))
def test_draft_size(frame: Draft) -> None:
    assert len(encode(frame)) <= 16 + len(frame.ids)


@settings(max_examples=80, deadline=None)
@given(fs.verdicts)
@example(Verdict(0xFFFF, 0xFFFF, (1 << 20) - 1, 256, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF))
def test_verdict_size(frame: Verdict) -> None:
    assert len(encode(frame)) <= 31


def _never_crashes(data: bytes) -> None:
    try:
        frame = decode(data)
    except ProtocolError as error:
        assert error.code in {"bad-frame", "version"}
        assert "\n" not in str(error)
        assert len(str(error)) < 300
    else:
        assert isinstance(frame, AnyFrame)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=100))
@example(b"")
@example(b"\x91\x08")
@example(b"\x94\x09\x00\xa1\xff\xa1\xff")  # not UTF-8
@example(b"\xdd\xff\xff\xff\xff\x08")
@example(b"\xdd\xff\xff\xff\xff\x01")
def test_random_bytes(data: bytes) -> None:
    _never_crashes(data)


@settings(max_examples=150, deadline=None)
@given(fs.any_frame, st.data())
def test_damaged_frames(frame: AnyFrame, data: st.DataObject) -> None:
    octets = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(octets)))
    _never_crashes(bytes(octets))
    _never_crashes(bytes(octets[:cut]))


@pytest.mark.parametrize("depth", [100, 100_000, 1_000_000])
@pytest.mark.parametrize(
    "head", [b"", b"\x92", b"\x92\x01", b"\x92\x08", b"\x9a\x02\x01\xa0\xa0\xa0\x01\x01"]
)
def test_deep_nesting(head: bytes, depth: int) -> None:
    _never_crashes((head + b"\x91" * depth)[:MAX_FRAME_BYTES])


@pytest.mark.parametrize(
    "bad",
    [
        [5, 1, 0, -1, b""],
        [5, 1, -1, 0, b""],
        [5, 1, 1 << 16, 0, b""],
        [5, 0, 0, 0, b""],
        [5, 1 << 16, 0, 0, b""],
        [5, 1, 0, 1 << 20, b""],
        [5, 1, 0, 0, bytes(3 * 257)],
        [5, 1, 0, 0, "text"],
        [5, 1, 0, 0, b"", 0],
        [5, 1, 0, 0],
        [5, 1, 0, 0.0, b""],
        [5, True, 0, 0, b""],
        [6, 1, 0, 0, -1, 0, 0, 0],
        [6, 1, 0, 0, 257, 0, 0, 0],
        [6, 1, 0, 0, 1 << 60, 0, 0, 0],
        [6, 1, 0, 0, 0, 1 << 24, 0, 0],
        [6, 1, 0, 0, 0, -1, 0, 0],
        [6, 1, 0, 0, 0, 0, 1 << 32, 0],
        [7, 1, 0, b"", -1, 0, 0, 0],
        [4, 1, 5, b"1234567"],
        [4, 1, -5, b"12345678"],
        [*OPEN[:4], b"", -1, *OPEN[6:]],
        [*OPEN[:6], -1, *OPEN[7:]],
        [*OPEN[:11], -1],
        [10, 1 << 63, 0.0],
        [10, -1, 0.0],
        [2, PROTOCOL_VERSION, "n", "t", "k", 0, 1, [], [], 0.0],
        [2, PROTOCOL_VERSION, "n", "t", "k", 1, 1, [-1], [], 0.0],
        [2, PROTOCOL_VERSION, "n", "t", "k", 1, 1, list(range(65)), [], 0.0],
        [1, PROTOCOL_VERSION, "n" * 257, "", "", "", 0.0],
        [9, 0, "c", "m" * 1001],
        [8],
        [0, 1],
        [7, 1, 0, b"", 0, 0, 0, 0, 0, 257],
        [7, 1, 0, b"", 0, 0, 0, 0, 0, -1],
        [7, 1, 0, b"", 0, 0, 0, 0, 0, 0, 0],
        [12, 0, 0, True, 0, 1, 0],
        [12, 1, -1, True, 0, 1, 0],
        [12, 1, 1 << 63, True, 0, 1, 0],
        [12, 1, 0, 1, 0, 1, 0],
        [12, 1, 0, True, 1 << 32, 1, 0],
        [12, 1, 0, True, 0, 0, 0],
        [12, 1, 0, True, 0, 257, 0],
        [12, 1, 0, True, 0, 1, 257],
        [12, 1, 0, True, 0, 1],
        [13, 1],
        {"tag": 8},
        8,
        None,
        [],
    ],
    ids=str,
)
def test_out_of_range_is_refused(bad: object) -> None:
    with pytest.raises(ProtocolError, match="not a frame") as caught:
        decode(raw(bad))
    assert caught.value.code == "bad-frame"


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError, match="trailing"):
        decode(encode(Close(1)) + b"\0")


def test_what_may_be_missing() -> None:
    assert decode(raw([9, 0, "busy", "full"])) == Error(0, "busy", "full", 0)
    assert decode(raw([7, 1, 5, b"", 0, 0, 0, 0, 0])) == Commit(1, 5, b"", 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("version", [0, 1, 3, 127, 128, 255, 256, 70_000])
@pytest.mark.parametrize("tag", [1, 2])
@pytest.mark.parametrize("fields", [0, 3, 13, 20])
def test_greeting_of_another_version(tag: int, version: int, fields: int) -> None:
    """A Hello or Welcome whose other fields changed is still recognised by its version."""
    with pytest.raises(
        ProtocolError, match=f"version {version} offered; allowed: {PROTOCOL_VERSION}"
    ) as caught:
        decode(raw([tag, version, *[None] * fields]))
    assert caught.value.code == "version"


def test_broken_hello_of_this_version_is_a_bad_frame() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(raw([1, PROTOCOL_VERSION, None]))
    assert caught.value.code == "bad-frame"


def test_frame_too_large() -> None:
    def of_size(n: int) -> Open:
        empty = Open(1, "m", bytes(1 << 16), b"", 0, 1, True, 0.0, 0, 1.0, 0)
        return msgspec.structs.replace(empty, prompt=bytes((1 << 16) + n - len(encode(empty))))

    exact = of_size(MAX_FRAME_BYTES)
    data = encode(exact)
    assert len(data) == MAX_FRAME_BYTES
    assert decode(data) == exact
    with pytest.raises(
        ProtocolError, match=f"{MAX_FRAME_BYTES + 1} bytes; allowed: {MAX_FRAME_BYTES}"
    ) as caught:
        encode(of_size(MAX_FRAME_BYTES + 1))
    assert caught.value.code == "frame-too-large"
    with pytest.raises(ProtocolError) as caught:
        decode(bytes(MAX_FRAME_BYTES + 1))
    assert caught.value.code == "frame-too-large"


@settings(max_examples=100, deadline=None)
@given(st.lists(fs.ids, max_size=400))
def test_packed_ids(ids: list[int]) -> None:
    packed = pack_ids(iter(ids))
    assert packed == b"".join(i.to_bytes(3, "little") for i in ids)
    assert unpack_ids(packed) == ids


@pytest.mark.parametrize("bad", [-1, 1 << 24, 1 << 32, 1 << 70])
def test_ids_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=r"0 … 16777215"):
        pack_ids([1, bad, 2])


@pytest.mark.parametrize("n", [1, 2, 4, 100])
def test_packed_length(n: int) -> None:
    with pytest.raises(BadIds, match=f"{n} bytes; allowed: a multiple of 3") as caught:
        unpack_ids(bytes(n))
    assert isinstance(caught.value, ValueError)
    assert caught.value.code == "bad-frame"


def test_digest_is_the_head_of_sha256() -> None:
    assert digest_ids(b"abc").hex() == "ba7816bf8f01cfea"  # FIPS 180-4 example
    assert decode(encode(Resume(1, 1, digest_ids(b"abc")))) == Resume(1, 1, digest_ids(b"abc"))


def test_microseconds() -> None:
    assert [microseconds(t) for t in (-1.0, 0.0, 1.5e-6, 0.029, 5000.0)] == [0, 0, 2, 29000, 0xFFFFFFFF]


def test_refusal_fits_the_wire() -> None:
    error = refusal("internal", "line\nline\x1b[31m" + "x" * 5000, session=3, retry_after_ms=5)
    assert decode(encode(error)) == error
    assert len(error.message) == 1000
    assert error.message.isprintable()


def test_token_stays_out_of_repr() -> None:
    hello = Hello(PROTOCOL_VERSION, "n", "s3cret", "t", "k", 0.0)
    assert "s3cret" not in repr(hello)
    assert "s3cret" not in str([hello])


def test_nan_travels() -> None:
    """Floats are the receiver's to judge: the wire carries any."""
    frame = decode(encode(Ping(1, math.nan)))
    assert isinstance(frame, Ping)
    assert math.isnan(frame.t_s)


def test_plain_msgpack_arrays_are_frames() -> None:
    assert decode(raw(HELLO)) == Hello(PROTOCOL_VERSION, "n", "", "t", "k", 0.5)
    assert isinstance(decode(raw(OPEN)), Open)
    assert decode(raw([10, 1, 2])) == Ping(1, 2.0)  # an integer for a float
    assert isinstance(decode(encode(Commit(1, 2, b"", 0, 0, 0, 0, 0))), Commit)
    assert isinstance(
        decode(encode(Welcome(PROTOCOL_VERSION, "n", "t", "k", 9, 9, (2,), ("cloud-ar",), 0.0))), Welcome
    )
