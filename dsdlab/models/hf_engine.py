"""Any causal LM that transformers can load: slower than the torch engine, as correct.

Every forward has the same number of rows: shorter chunks are padded behind their end, where causal
attention hides the padding, and the cache is cropped afterwards. One shape means one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdlab.models.base import Chunk, ContextFull, Engine, Logits, ModelError, ModelInfo, NoFreeSlot
from dsdlab.models.loading import EngineOptions, eos_of
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.weights_io import file_digest

BLOCK_ROWS = 8
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class HFEngine(Engine):
    """One transformers model; each session has its own dynamic cache."""

    def __init__(self, model: Any, info: ModelInfo, slots: int = 8) -> None:
        self.info = info
        self._model = model.eval()
        self._free = list(range(slots))[::-1]
        self._slots = slots
        self._cache: dict[int, Any] = {}
        self._length: dict[int, int] = {}

    def open(self) -> int:
        from transformers import DynamicCache

        if not self._free:
            raise NoFreeSlot(f"all {self._slots} session slots of {self.info.model_id} are taken")
        slot = self._free.pop()
        self._cache[slot] = DynamicCache()  # full-length layers: a window's crop must never lose keys
        self._length[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        if self._cache.pop(slot, None) is not None:
            del self._length[slot]
            self._free.append(slot)

    def length(self, slot: int) -> int:
        return self._length[slot]

    def rollback(self, slot: int, length: int) -> None:
        if not 0 <= length <= self._length[slot]:
            raise ValueError(f"rollback to {length}; allowed: 0 to the session's {self._length[slot]}")
        self._drop(slot, self._length[slot] - length)
        self._length[slot] = length

    def _drop(self, slot: int, n: int) -> None:
        """Forget the last n positions; transformers takes a negative count for that in every version."""
        if n:
            self._cache[slot].crop(-n)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        for c in chunks:
            if self._length[c.slot] + len(c.ids) > self.info.max_context:
                raise ContextFull(
                    f"{self._length[c.slot] + len(c.ids)} positions; {self.info.model_id} is loaded for "
                    f"{self.info.max_context}"
                )
        with torch.inference_mode():
            return [self._extend_one(c) for c in chunks]

    def _extend_one(self, chunk: Chunk) -> Logits:
        ids = list(chunk.ids)
        rows: list[np.ndarray] = []
        for at in range(0, len(ids), BLOCK_ROWS):
            block = ids[at : at + BLOCK_ROWS]
            length = self._length[chunk.slot]
            padded = torch.tensor([block + [0] * (BLOCK_ROWS - len(block))], device=self._model.device)
            positions = torch.arange(length, length + BLOCK_ROWS, device=self._model.device)[None]
            logits = self._model(
                input_ids=padded,
                position_ids=positions,
                past_key_values=self._cache[chunk.slot],
                use_cache=True,
            ).logits[0, : len(block)]  # [rows, vocab]
            self._length[chunk.slot] = length + len(block)
            self._drop(chunk.slot, BLOCK_ROWS - len(block))
            keep = max(0, at + len(block) - max(at, len(ids) - chunk.rows))
            if keep:
                rows.append(logits[-keep:].float().cpu().numpy())
        if not rows:
            return np.zeros((0, self.info.vocab_size), dtype=np.float32)
        return np.concatenate(rows)


def load_hf(name: str, options: EngineOptions) -> HFEngine:
    """Load a model folder through transformers. Raises ModelError with one line."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from dsdlab.models.zoo import fetch

    if options.precision not in _DTYPES:
        raise ModelError(f"precision is {options.precision!r}; the hf engine allows: {', '.join(_DTYPES)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder: Path = fetch(name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[options.precision], attn_implementation="sdpa"
        )
        model.to(options.device)
    except Exception as e:  # transformers raises whatever its readers raise
        raise ModelError(f"transformers cannot load {folder}: {str(e).splitlines()[0]}") from None
    limit = getattr(model.config, "max_position_embeddings", options.max_context)
    info = ModelInfo(
        model_id=f"hf:{name}",
        tokenizer=Tokenizer(folder / "tokenizer.json").fingerprint,
        vocab_size=model.config.vocab_size,
        # padding may reach BLOCK_ROWS - 1 positions past the end
        max_context=min(options.max_context, limit) - BLOCK_ROWS,
        eos_ids=eos_of(folder),
        precision=options.precision,
        n_params=sum(p.numel() for p in model.parameters()),
        digest=file_digest(sorted(folder.glob("*.safetensors"))),
    )
    return HFEngine(model, info, slots=options.slots)
