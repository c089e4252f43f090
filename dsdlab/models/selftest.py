"""Prove on the engine at hand that a position's logits do not depend on what is computed with it.

Exactness rests on the processor's kernels, not on mathematics, so it is measured before it is claimed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dsdlab.models.base import Chunk, Engine, Logits, NoFreeSlot

LARGEST_WINDOW = 17  # a window of 16 drafts and the token before it
POSITIONS = 72  # computed one by one, as the reference
DEPTHS = (128, 192, 256, 320, 512)
"""Windows that straddle these positions: a kernel may sum a longer cache in other steps."""
_BEFORE, _AFTER = 5, 11  # rows on either side of a depth; no block of rows ends there by chance


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The verdict: were the logits of a position, however it was computed, the same bits?"""

    exact: bool
    positions: int
    elements: int  # logits compared
    differing: int  # of them
    seconds: float
    what: str


class _Comparison:
    """Counts elements whose bits differ."""

    def __init__(self) -> None:
        self.elements = 0
        self.differing = 0

    def __call__(self, got: Logits, expected: Logits) -> None:
        """Both [rows, n_out]; rows of `expected` beyond those of `got` are ignored."""
        a = np.ascontiguousarray(got, dtype=np.float32).view(np.uint32)
        b = np.ascontiguousarray(expected, dtype=np.float32).view(np.uint32)
        self.elements += a.size
        self.differing += int(np.count_nonzero(a != b[: len(a)]))


@contextmanager
def _slot(engine: Engine) -> Iterator[int]:
    slot = engine.open()
    try:
        yield slot
    finally:
        engine.close(slot)


def _chunks(rng: np.random.Generator, n: int) -> Iterator[tuple[int, int]]:
    """Random cuts of 0 … n into (start, end) of 1 to 17 positions."""
    start = 0
    while start < n:
        end = min(n, start + int(rng.integers(1, LARGEST_WINDOW + 1)))
        yield start, end
        start = end


def selftest(engine: Engine, seed: int = 0) -> SelfTest:
    """Compare each position alone with windows of 1 to 17 rows, prefills and batches of two sessions.

    Windows deep in the context are compared with parts of them. Takes two
    session slots (one: batches are left out, and `what` says so) and gives them back.
    Raises NoFreeSlot without a free slot.
    """
    begun_s = time.perf_counter()
    rng = np.random.default_rng(seed)
    context = engine.info.max_context
    n = min(POSITIONS, context)
    ids = rng.integers(0, engine.info.vocab_size, min(context, DEPTHS[-1] + _AFTER)).tolist()
    compare = _Comparison()
    what = f"{n} positions alone, in windows of 1 to {min(n, LARGEST_WINDOW)}, in prefills"
    with _slot(engine) as slot:
        alone = np.concatenate([engine.extend([Chunk(slot, [i], 1)])[0] for i in ids[:n]])
        _windows(engine, slot, ids, alone, rng, compare)
        _prefills(engine, slot, ids, alone, rng, compare)
        try:
            with _slot(engine) as other:
                _batches(engine, (slot, other), ids, alone, rng, compare)
            what += ", in batches of two sessions"
        except NoFreeSlot:
            what += "; batches untested for want of a second slot"
        deepest = _depths(engine, slot, ids, compare)
    if deepest:
        what += f"; windows across depths up to {deepest} and their parts"
    return SelfTest(
        exact=compare.differing == 0,
        positions=n,
        elements=compare.elements,
        differing=compare.differing,
        seconds=time.perf_counter() - begun_s,
        what=what,
    )


def _windows(
    engine: Engine,
    slot: int,
    ids: list[int],
    alone: Logits,
    rng: np.random.Generator,
    compare: _Comparison,
) -> None:
    """A window of every size, at a random offset, the largest offsets first so that rollback serves all."""
    n = len(alone)
    sizes = range(1, min(n, LARGEST_WINDOW) + 1)
    for start, size in sorted(((int(rng.integers(0, n - size + 1)), size) for size in sizes), reverse=True):
        engine.rollback(slot, start)
        compare(engine.extend([Chunk(slot, ids[start : start + size], size)])[0], alone[start:])


def _prefills(
    engine: Engine,
    slot: int,
    ids: list[int],
    alone: Logits,
    rng: np.random.Generator,
    compare: _Comparison,
) -> None:
    """The text anew: at once, then in random pieces, so that keys and values come from other shapes too."""
    n = len(alone)
    engine.rollback(slot, 0)
    compare(engine.extend([Chunk(slot, ids[:n], n)])[0], alone)
    engine.rollback(slot, 0)
    for start, end in _chunks(rng, n):
        compare(engine.extend([Chunk(slot, ids[start:end], end - start)])[0], alone[start:])


def _batches(
    engine: Engine,
    slots: tuple[int, int],
    ids: list[int],
    alone: Logits,
    rng: np.random.Generator,
    compare: _Comparison,
) -> None:
    """Both sessions hold the same text, at other places of it and in either order within the forward."""
    engine.rollback(slots[0], 0)
    cuts = [list(_chunks(rng, len(alone))) for _ in slots]
    while cuts[0] or cuts[1]:
        turn = [(slots[i], cuts[i].pop(0)) for i in (0, 1) if cuts[i]]
        if rng.random() < 0.5:
            turn.reverse()
        chunks = [Chunk(slot, ids[start:end], end - start) for slot, (start, end) in turn]
        for logits, (_, (start, _)) in zip(engine.extend(chunks), turn, strict=True):
            compare(logits, alone[start:])


def _depths(engine: Engine, slot: int, ids: list[int], compare: _Comparison) -> int:
    """Windows across each of DEPTHS, against parts of them; returns the deepest that fits."""
    deepest = 0
    for depth in DEPTHS:
        start, end = depth - _BEFORE, depth + _AFTER
        if end > len(ids):
            break
        deepest = depth
        done = engine.length(slot)
        engine.rollback(slot, min(done, start))
        if done < start:
            engine.extend([Chunk(slot, ids[done:start], 0)])
        window = engine.extend([Chunk(slot, ids[start:end], end - start)])[0]
        for first, last in ((start, depth), (start, start + 1), (depth - 1, depth)):
            if first != start:
                engine.extend([Chunk(slot, ids[engine.length(slot) : first], 0)])
            else:
                engine.rollback(slot, start)
            part = engine.extend([Chunk(slot, ids[first:last], last - first)])[0]
            compare(part, window[first - start :])
    return deepest
