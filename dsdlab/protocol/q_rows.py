"""What drafts were drawn from, as bytes: the `q` of a DraftQ frame.

A row for each drafted id, one after the other; all little-endian:

    k − 1                       2 bytes, k = 1 … 65535 ids
    k token ids                 3 bytes each, the first of them the one that takes what is left
    weights of all but the first   2 bytes each, 1 … 65535, in 1/65535

The first id's weight is what the others leave of 65535, so a row is 5k bytes and always adds up. Imported by
whoever needs it: the rest of the package does without numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from dsdlab.decoding import Q_LEVELS, SparseQ
from dsdlab.protocol.errors import ProtocolError
from dsdlab.protocol.frames import pack_ids, unpack_ids

_COUNT = struct.Struct("<H")


def pack_q(rows: Iterable[SparseQ]) -> bytes:
    """Distributions [γ] as a frame's `q`: 5k bytes each, k ids. Raises ValueError for ids beyond 2^24 - 1."""
    parts: list[bytes] = []
    for q in rows:
        parts += (
            _COUNT.pack(len(q.ids) - 1),
            pack_ids(q.ids.tolist()),
            q.weights[1:].astype("<u2").tobytes(),
        )
    return b"".join(parts)


def rows_that_fit(rows: Sequence[SparseQ], n_bytes: int) -> int:
    """How many of the first distributions, each with its drafted id, are `n_bytes` of payload or fewer."""
    used = 0
    for count, q in enumerate(rows):
        used += 5 * len(q.ids) + 3
        if used > n_bytes:
            return count
    return len(rows)


def unpack_q(packed: bytes, draft: list[int], vocab_size: int) -> list[SparseQ]:
    """The distributions that `draft` was drawn from, checked.

    Raises ProtocolError "bad-frame" where a row is no distribution over ids below `vocab_size`, or gives the
    id drafted from it no weight: such an id would always stand.
    """
    rows: list[SparseQ] = []
    at = 0
    for token in draft:
        if at + 2 > len(packed):
            raise _bad(f"{len(rows)} distributions for {len(draft)} ids")
        k = _COUNT.unpack_from(packed, at)[0] + 1
        middle, end = at + 2 + 3 * k, at + 5 * k
        if end > len(packed):
            raise _bad(f"a distribution of {k} ids ends behind the frame")
        ids = np.array(unpack_ids(packed[at + 2 : middle]), dtype=np.int64)
        weights = np.empty(k, dtype=np.int64)
        weights[1:] = np.frombuffer(packed, "<u2", k - 1, middle)
        weights[0] = Q_LEVELS - weights[1:].sum()
        if weights.min() < 1:
            raise _bad("weights leave an id nothing")
        if ids.max() >= vocab_size or len(np.unique(ids)) < k:
            raise _bad("an id is outside the vocabulary, or comes twice")
        if token not in ids:
            raise _bad(f"id {token} was drafted from a distribution without it")
        rows.append(SparseQ(ids, weights))
        at = end
    if at < len(packed):
        raise _bad(f"{len(packed) - at} bytes behind the last distribution")
    return rows


def _bad(why: str) -> ProtocolError:
    return ProtocolError("bad-frame", f"q: {why}")
