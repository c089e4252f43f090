"""Prove on the engine at hand that a position's logits do not depend on what is computed with it.

Exactness rests on the processor's kernels, not on mathematics, so it is measured before it is claimed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsdlab.models.base import Chunk, Engine, Logits, NoFreeSlot

LARGEST_WINDOW = 17  # a window of 16 drafts and the token before it
POSITIONS = 72  # enough to cross a boundary of the padded cache
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was compared, bit for bit, with the logits of each position computed alone."""

    exact: bool
    positions: int
    elements: int  # logits compared
    differing: int  # of them
    seconds: float
    what: str


class _Comparison:
    """Counts elements whose bits differ from the reference [positions, n_out]."""

    def __init__(self, reference: Logits) -> None:
        self._bits = np.ascontiguousarray(reference, dtype=np.float32).view(np.uint32)
        self.elements = 0
        self.differing = 0

    def __call__(self, logits: Logits, start: int) -> None:
        bits = np.ascontiguousarray(logits, dtype=np.float32).view(np.uint32)
        self.elements += bits.size
        self.differing += int(np.count_nonzero(bits != self._bits[start : start + len(bits)]))


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

    Takes two session slots (one: batches are left out, and `what` says so) and gives them back.
    Raises NoFreeSlot without a free slot.
    """
    begun_s = time.perf_counter()
    rng = np.random.default_rng(seed)
    n = min(POSITIONS, engine.info.max_context)
    ids = rng.integers(0, engine.info.vocab_size, n)
    what = f"{n} positions alone, in windows of 1 to {min(n, LARGEST_WINDOW)}, in prefills"
    with _slot(engine) as slot:
        alone = [engine.extend([Chunk(slot, [int(i)], 1)])[0] for i in ids]
        compare = _Comparison(np.concatenate(alone))
        _windows(engine, slot, ids, rng, compare)
        _prefills(engine, slot, ids, rng, compare)
        try:
            with _slot(engine) as other:
                _batches(engine, (slot, other), ids, rng, compare)
            what += ", in batches of two sessions"
        except NoFreeSlot:
            what += "; batches untested for want of a second slot"
    return SelfTest(
        exact=compare.differing == 0,
        positions=n,
        elements=compare.elements,
        differing=compare.differing,
        seconds=time.perf_counter() - begun_s,
        what=what,
    )


def _windows(engine: Engine, slot: int, ids: IdArray, rng: np.random.Generator, compare: _Comparison) -> None:
    """A window of every size, at a random offset, the largest offsets first so that rollback serves all."""
    n = len(ids)
    sizes = range(1, min(n, LARGEST_WINDOW) + 1)
    placed = sorted(((int(rng.integers(0, n - size + 1)), size) for size in sizes), reverse=True)
    for start, size in placed:
        engine.rollback(slot, start)
        compare(engine.extend([Chunk(slot, ids[start : start + size].tolist(), size)])[0], start)


def _prefills(
    engine: Engine, slot: int, ids: IdArray, rng: np.random.Generator, compare: _Comparison
) -> None:
    """The text anew: at once, then in random pieces, so that keys and values come from other shapes too."""
    n = len(ids)
    engine.rollback(slot, 0)
    compare(engine.extend([Chunk(slot, ids.tolist(), n)])[0], 0)
    engine.rollback(slot, 0)
    for start, end in _chunks(rng, n):
        compare(engine.extend([Chunk(slot, ids[start:end].tolist(), end - start)])[0], start)


def _batches(
    engine: Engine, slots: tuple[int, int], ids: IdArray, rng: np.random.Generator, compare: _Comparison
) -> None:
    """Both sessions hold the same text, at other places of it and in either order within the forward."""
    engine.rollback(slots[0], 0)
    cuts = [list(_chunks(rng, len(ids))) for _ in slots]
    while cuts[0] or cuts[1]:
        turn = [(slots[i], cuts[i].pop(0)) for i in (0, 1) if cuts[i]]
        if rng.random() < 0.5:
            turn.reverse()
        chunks = [Chunk(slot, ids[start:end].tolist(), end - start) for slot, (start, end) in turn]
        for logits, (_, (start, _)) in zip(engine.extend(chunks), turn, strict=True):
            compare(logits, start)
