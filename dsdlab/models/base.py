"""The engine interface: sessions, ragged batched `extend`, `rollback`.

An engine is synchronous and single-threaded; `dsdlab.models.compute` runs it beside the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dsdlab.decoding import Sampling, confidence, pick

Logits = npt.NDArray[np.float32]


class ModelError(Exception):
    """A model cannot be loaded or used; the message is one line for the user."""


class ContextFull(ModelError):
    """A chunk would pass the engine's `max_context`; the session is unchanged."""


class NoFreeSlot(ModelError):
    """All session slots are taken."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the wire handshake and the provenance record say about a loaded model."""

    model_id: str
    tokenizer: str  # fingerprint: both ends must agree
    vocab_size: int
    max_context: int  # positions per session
    eos_ids: tuple[int, ...]
    precision: str
    n_params: int
    digest: str = ""  # sha256 of the weights


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Tokens to append to one session: `ids` go after the session's current length.

    rows: for how many of the last positions logits are wanted (0 ≤ rows ≤ len(ids)).
    """

    slot: int
    ids: Sequence[int]
    rows: int


class Engine(ABC):
    """One model with its session slots. Not thread-safe: one compute thread owns it."""

    info: ModelInfo
    output_ids: npt.NDArray[np.int64] | None = None
    """Token id of each logit [n_out]; None means 0 … vocab - 1 (a drafter may have a reduced output)."""

    @abstractmethod
    def open(self) -> int:
        """Take an empty session slot. Raises NoFreeSlot."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """Give the slot back; closing twice is harmless."""

    @abstractmethod
    def length(self, slot: int) -> int:
        """Positions whose keys and values the session holds."""

    @abstractmethod
    def rollback(self, slot: int, length: int) -> None:
        """Forget every position from `length` on. Raises ValueError if `length` exceeds the session's."""

    @abstractmethod
    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        """Append every chunk in one ragged forward; return per chunk logits [rows, n_out].

        A slot appears at most once per call. Raises ContextFull before any session changes.
        """

    def choose(self, chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
        """`extend`, then the token each wanted row decides on (greedy or coupled): ids [rows] per chunk.

        Row r of a chunk decides the token at absolute position length_after - rows + r + 1.
        """
        logits = self.extend(chunks)
        out = []
        for chunk, sampling, rows in zip(chunks, samplings, logits, strict=True):
            first = self.length(chunk.slot) - chunk.rows + 1
            out.append([pick(row, sampling, first + r, self.output_ids) for r, row in enumerate(rows)])
        return out

    def choose_surely(self, chunk: Chunk, sampling: Sampling) -> tuple[int, float]:
        """`choose` for the last position of one chunk, and how sure: see `dsdlab.decoding.confidence`."""
        row = self.extend([chunk])[0][-1]
        return pick(row, sampling, self.length(chunk.slot), self.output_ids), confidence(row, sampling)


class SlotEngine(Engine):
    """An engine whose sessions are slots with a length, which is all that a rollback changes."""

    def _begin_slots(self, slots: int) -> None:
        """Forget all sessions; from now on there may be this many at once."""
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._length: dict[int, int] = {}

    def open(self) -> int:
        if not self._free:
            raise NoFreeSlot(f"all {self._slots} session slots of {self.info.model_id} are taken")
        slot = self._free.pop()
        self._length[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        if self._length.pop(slot, None) is not None:
            self._free.append(slot)

    def length(self, slot: int) -> int:
        return self._length[slot]

    def rollback(self, slot: int, length: int) -> None:
        if not 0 <= length <= self._length[slot]:
            raise ValueError(f"rollback to {length}; allowed: 0 to the session's {self._length[slot]}")
        self._length[slot] = length
