"""Models small enough that the law of what they say can be written down: logits by the last token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsdlab.decoding import Sampling, log_softmax, warp
from dsdlab.models.base import Chunk, Engine, Logits, ModelInfo, NoFreeSlot

FloatArray = npt.NDArray[np.float64]


class TableEngine(Engine):
    """Next-token logits [V, V] by the last token, random for a seed. eos: ids that end a sequence."""

    def __init__(self, seed: int, vocab_size: int, eos: tuple[int, ...] = (), slots: int = 4) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0.0, 1.2, (vocab_size, vocab_size)).astype(np.float32)
        self._slots: dict[int, list[int]] = {}
        self._most = slots
        self.info = ModelInfo(
            model_id="table", tokenizer="", vocab_size=vocab_size, max_context=2048, eos_ids=eos,
            precision="fp32", n_params=0,
        )  # fmt: skip

    def open(self) -> int:
        free = next((n for n in range(self._most) if n not in self._slots), None)
        if free is None:
            raise NoFreeSlot("all slots are taken")
        self._slots[free] = []
        return free

    def close(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def length(self, slot: int) -> int:
        return len(self._slots[slot])

    def rollback(self, slot: int, length: int) -> None:
        assert length <= len(self._slots[slot])
        del self._slots[slot][length:]

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        out = []
        for chunk in chunks:
            self._slots[chunk.slot] += chunk.ids
            last = self._slots[chunk.slot][len(self._slots[chunk.slot]) - chunk.rows :]
            out.append(self.table[last])
        return out

    def law(self, last: int, length: int, sampling: Sampling) -> FloatArray:
        """Probability of every text of `length` tokens after `last`, in the order of `itertools.product`."""
        p = np.exp(log_softmax(np.stack([warp(row, sampling) for row in self.table])))
        texts = itertools.product(range(len(p)), repeat=length)
        return np.array([np.prod([p[a, b] for a, b in itertools.pairwise((last, *text))]) for text in texts])
