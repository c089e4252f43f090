"""Any causal LM that transformers can load and whose layers attend: slower than the torch engine, as exact.

Every position is computed in the same block of 8 aligned rows over a cache of the same length, whoever asks
for it and with whatever beside it: a partial block is padded behind its end, where causal attention hides
the padding, and computed again when it grows. Same shapes, same rounding, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdlab.models.base import Chunk, ContextFull, Engine, Logits, ModelError, ModelInfo, NoFreeSlot
from dsdlab.models.loading import EngineOptions, eos_of
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.weights_io import file_digest

BLOCK_ROWS = 8
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose only memory are keys and values, one for each position."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cache_word(model: Any) -> str:
    """What a model's forward calls its cache: another name since transformers 5.24, where the old warns."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class HFEngine(Engine):
    """One transformers model; each session has its own dynamic cache, which holds whole blocks only."""

    def __init__(self, model: Any, info: ModelInfo, slots: int = 8) -> None:
        self.info = info
        self._model = model.eval()
        self._free = list(range(slots))[::-1]
        self._slots = slots
        self._cache_word = cache_word(model)
        self._cache: dict[int, Any] = {}
        self._ids: dict[int, list[int]] = {}

    def open(self) -> int:
        from transformers import DynamicCache

        if not self._free:
            raise NoFreeSlot(f"all {self._slots} session slots of {self.info.model_id} are taken")
        slot = self._free.pop()
        self._cache[slot] = DynamicCache()  # full-length layers: a window's crop must never lose keys
        self._ids[slot] = []
        return slot

    def close(self, slot: int) -> None:
        if self._cache.pop(slot, None) is not None:
            del self._ids[slot]
            self._free.append(slot)

    def length(self, slot: int) -> int:
        return len(self._ids[slot])

    def rollback(self, slot: int, length: int) -> None:
        ids = self._ids[slot]
        if not 0 <= length <= len(ids):
            raise ValueError(f"rollback to {length}; allowed: 0 to the session's {len(ids)}")
        whole = len(ids) // BLOCK_ROWS - length // BLOCK_ROWS
        del ids[length:]
        self._drop(slot, whole * BLOCK_ROWS)

    def _drop(self, slot: int, n: int) -> None:
        """Forget the last n positions; transformers takes a negative count for that in every version."""
        if n:
            self._cache[slot].crop(-n)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        for c in chunks:
            total = len(self._ids[c.slot]) + len(c.ids)
            if total > self.info.max_context:
                raise ContextFull(
                    f"{total} positions; {self.info.model_id} is loaded for {self.info.max_context}"
                )
        with torch.inference_mode():
            return [self._extend_one(c) for c in chunks]

    def _extend_one(self, chunk: Chunk) -> Logits:
        ids = self._ids[chunk.slot]
        start = len(ids) // BLOCK_ROWS * BLOCK_ROWS  # the cache ends here
        ids += chunk.ids
        wanted = len(ids) - chunk.rows  # first position whose logits are asked for
        rows: list[Logits] = []
        for at in range(start, len(ids), BLOCK_ROWS):
            block = ids[at : at + BLOCK_ROWS]
            padding = BLOCK_ROWS - len(block)
            logits = self._model(
                input_ids=torch.tensor([block + [0] * padding], device=self._model.device),
                position_ids=torch.arange(at, at + BLOCK_ROWS, device=self._model.device)[None],
                use_cache=True,
                **{self._cache_word: self._cache[chunk.slot]},
            ).logits[0, : len(block)]  # [rows, vocab]
            if padding:
                self._drop(chunk.slot, BLOCK_ROWS)
            if at + len(block) > wanted:
                rows.append(logits[max(wanted - at, 0) :].float().cpu().numpy())
        if not chunk.rows:
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
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=_DTYPES[options.precision])
        model.to(options.device)
    except Exception as e:  # transformers raises whatever its readers raise
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(f"transformers cannot load {folder}: {why}") from None
    text = model.config.get_text_config()  # of a model that also sees, its language part
    others = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    if others or getattr(model, "_is_stateful", False):
        what = ", ".join(sorted(others)) or "recurrent"
        raise ModelError(
            f"{folder}: {type(model).__name__} has layers whose state cannot be rolled back ({what}); "
            "allowed: attention in all layers"
        )
    limit = getattr(text, "max_position_embeddings", options.max_context)
    info = ModelInfo(
        model_id=f"hf:{name}",
        tokenizer=Tokenizer(folder / "tokenizer.json").fingerprint,
        vocab_size=text.vocab_size,
        # padding may reach BLOCK_ROWS - 1 positions past the end
        max_context=min(options.max_context, limit) - BLOCK_ROWS,
        eos_ids=eos_of(folder),
        precision=options.precision,
        n_params=sum(p.numel() for p in model.parameters()),
        digest=file_digest(sorted(folder.glob("*.safetensors"))),
    )
    return HFEngine(model, info, slots=options.slots)
