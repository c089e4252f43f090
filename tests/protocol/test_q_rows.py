"""What drafts were drawn from, on the wire: it survives (5k bytes), nothing else gets in, no others pay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsdlab.decoding import Q_LEVELS, SparseQ, sparsify
from dsdlab.protocol import (
    Draft,
    DraftQ,
    Open,
    ProtocolError,
    Verdict,
    decode,
    encode,
    pack_ids,
)
from dsdlab.protocol.q_rows import pack_q, rows_that_fit, unpack_q

V = 60


@st.composite
def rows(draw: st.DrawFn) -> SparseQ:
    q = draw(st.lists(st.floats(0, 1), min_size=1, max_size=V).filter(lambda q: sum(q) > 1e-9))
    return sparsify(np.array(q) / sum(q), draw(st.integers(1, V)))


def same(a: SparseQ, b: SparseQ) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows(), max_size=8), st.data())
def test_round_trip_and_size(window: list[SparseQ], data: st.DataObject) -> None:
    draft = [int(data.draw(st.sampled_from(q.ids.tolist()))) for q in window]
    packed = pack_q(window)
    assert len(packed) == sum(5 * len(q.ids) for q in window)
    again = unpack_q(packed, draft, V)
    assert len(again) == len(window)
    assert all(map(same, window, again))
    frame = DraftQ(0xFFFF, 0xFFFF, (1 << 20) - 1, pack_ids(draft), packed)
    assert decode(encode(frame)) == frame
    assert len(encode(frame)) <= 21 + 3 * len(draft) + len(packed)


@given(rows(), st.integers(0, (1 << 64) - 1))
def test_what_is_drawn_is_reported(q: SparseQ, seed: int) -> None:
    """A drafted id always has weight in its own row, so that the verifier never refuses an honest drafter."""
    assert unpack_q(pack_q([q]), [q.draw(seed, 7)], V)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(0, V - 1), max_size=4))
@example(b"", [3])
@example(b"\xff\xff", [3])
def test_random_bytes_are_distributions_or_refused(packed: bytes, draft: list[int]) -> None:
    try:
        found = unpack_q(packed, draft, V)
    except ProtocolError as error:
        assert error.code == "bad-frame"
    else:
        assert all(q.weights.sum() == Q_LEVELS and q.weights.min() > 0 for q in found)


HONEST = SparseQ(np.array([9, 4, 20]), np.array([40000, 20000, 5535]))
OTHER = pack_q([SparseQ(np.array([9, 9, 20]), HONEST.weights)])
BAD: dict[str, tuple[bytes, str]] = {
    "too few rows": (b"", "0 distributions for 1 ids"),
    "cut": (pack_q([HONEST])[:-1], "a distribution of 3 ids ends behind the frame"),
    "something behind": (pack_q([HONEST]) + b"\0", "1 bytes behind the last distribution"),
    "an id twice": (OTHER, "an id is outside the vocabulary, or comes twice"),
    "an unknown id": (pack_q([SparseQ(np.array([9, 4, V]), HONEST.weights)]), "outside the vocabulary"),
    "no weight": (pack_q([SparseQ(HONEST.ids, np.array([40000, 0, 25535]))]), "weights leave an id nothing"),
    "more than there is": (
        pack_q([SparseQ(HONEST.ids, np.array([1, 40000, 25535]))]),
        "weights leave an id nothing",
    ),
    "drafted elsewhere": (pack_q([SparseQ(np.array([1, 2, 3]), HONEST.weights)]), "id 9 was drafted from"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_distribution_is_refused(what: str) -> None:
    packed, why = BAD[what]
    assert unpack_q(pack_q([HONEST]), [9], V)
    with pytest.raises(ProtocolError, match=why) as caught:
        unpack_q(packed, [9], V)
    assert caught.value.code == "bad-frame"


@pytest.mark.parametrize(
    ("frame", "octets"),
    [
        (
            Open(1, "dsd-sync", pack_ids([1, 504]), b"", 0, 48, True, 0.8, 0, 1.0, 1),
            "9c0301a86473642d73796e63c406010000f80100c4000030c3cb3fe999999999999a00cb3ff000000000000001",
        ),
        (Draft(1, 0, 4, pack_ids([253, 1000])), "9505010004c406fd0000e80300"),
        (Verdict(1, 0, 4, 2, 314, 120, 29500), "980601000402cd013a78cd733c"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_frames_have_not_grown(frame: Open | Draft | Verdict, octets: str) -> None:
    """Greedy and coupled sessions pay no byte for what others ask for: written down before DraftQ existed."""
    assert encode(frame).hex() == octets


@pytest.mark.parametrize("gamma", [0, 1, 4, 8, 85, 86, 256])
@pytest.mark.parametrize("base", [0, 1000, (1 << 20) - 1])
def test_a_draft_without_q_keeps_to_its_bound(gamma: int, base: int) -> None:
    size: Callable[[int, int], int] = lambda session, epoch: len(  # noqa: E731
        encode(Draft(session, epoch, base, pack_ids([0xFFFFFF] * gamma)))
    )
    assert size(1, 0) <= size(0xFFFF, 0xFFFF) <= 16 + 3 * gamma


def test_only_distributions_that_fit_a_frame_go() -> None:
    rows = [sparsify(np.ones(k), k) for k in (10, 20, 30)]
    sizes = [len(pack_q([q])) + 3 for q in rows]
    for count in range(4):
        assert rows_that_fit(rows, sum(sizes[:count])) == count
        assert rows_that_fit(rows, sum(sizes[:count]) + 1) == count
    assert rows_that_fit([], 0) == 0


def test_a_distribution_flatter_than_sixteen_bits_tell() -> None:
    """Of more ids than there are levels none has a level of its own; the likeliest takes them all."""
    flat = sparsify(np.ones(150_000), 150_000)
    assert (flat.ids.tolist(), flat.weights.tolist()) == ([0], [Q_LEVELS])
