"""llama.cpp behind the engine interface, for those who want its speed: `llama:NAME` or `llama:FILE.gguf`.

Needs the package llama-cpp-python (the extra `llama`). Exactness is not designed here but measured: the
self-test says before a sweep whether a row's logits depend on what is computed beside it, and every text is
compared with the target alone. docs/models.md has what was seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdlab.models.base import Chunk, ContextFull, Logits, ModelError, ModelInfo, SlotEngine

if TYPE_CHECKING:
    from dsdlab.models.loading import EngineOptions

PRECISION = "gguf"  # whatever the file holds
BATCH_ROWS = 512  # of a forward; longer chunks are split


class LlamaEngine(SlotEngine):
    """A GGUF model in llama.cpp; a session is one of its sequences."""

    def __init__(self, lib: Any, model: Any, info: ModelInfo, *, slots: int, threads: int) -> None:
        """lib: the module llama_cpp; model: what its loader gave. Raises ModelError."""
        self.info = info
        self._lib, self._model = lib, model
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = slots * info.max_context, slots
        params.n_batch = params.n_ubatch = BATCH_ROWS
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise ModelError(f"llama.cpp gives {info.model_id} no context of {slots} x {info.max_context}")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(BATCH_ROWS, 0, 1)
        self._begin_slots(slots)

    def close(self, slot: int) -> None:
        if slot in self._length:
            self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        super().close(slot)

    def rollback(self, slot: int, length: int) -> None:
        held = self._length[slot]
        super().rollback(slot, length)
        if length < held and not self._lib.llama_memory_seq_rm(self._memory, slot, length, -1):
            raise ModelError(f"llama.cpp cannot take back positions of {self.info.model_id}")

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        for c in chunks:
            if (wanted := self._length[c.slot] + len(c.ids)) > self.info.max_context:
                most = self.info.max_context
                raise ContextFull(f"{wanted} positions; {self.info.model_id} is loaded for {most}")
        rows = [  # (chunk, slot, id, position, whether logits are wanted)
            (n, c.slot, token, self._length[c.slot] + i, i >= len(c.ids) - c.rows)
            for n, c in enumerate(chunks)
            for i, token in enumerate(c.ids)
        ]
        out: list[list[Logits]] = [[] for _ in chunks]
        for at in range(0, len(rows), BATCH_ROWS):
            part = rows[at : at + BATCH_ROWS]
            self._forward(part)
            for i, (n, *_, wanted) in enumerate(part):
                if wanted:
                    out[n].append(self._row(i))
        for c in chunks:
            self._length[c.slot] += len(c.ids)
        empty = np.zeros((0, self.info.vocab_size), dtype=np.float32)
        return [np.stack(found) if found else empty for found in out]

    def _forward(self, rows: Sequence[tuple[int, int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (_, slot, token, position, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
            batch.logits[i] = wanted
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise ModelError(
                f"llama.cpp could not compute {len(rows)} rows of {self.info.model_id}: {failed}"
            )

    def _row(self, i: int) -> Logits:
        """Logits [vocab] of a row of the last forward."""
        found = self._lib.llama_get_logits_ith(self._context, i)
        return np.ctypeslib.as_array(found, shape=(self.info.vocab_size,)).copy()


_silent: list[Any] = []  # the callback that keeps llama.cpp quiet must outlive it


def load_llama(name: str, options: EngineOptions) -> LlamaEngine:
    """Load a GGUF file, or a named model's, through llama.cpp. Raises ModelError with one line."""
    from dsdlab.models.loading import eos_of
    from dsdlab.models.tokenizer import Tokenizer
    from dsdlab.models.weights_io import file_digest
    from dsdlab.models.zoo import fetch, gguf_of

    if options.precision != PRECISION:
        raise ModelError(f"precision is {options.precision!r}; the llama engine allows: {PRECISION}")
    try:
        import llama_cpp as lib
    except (ImportError, OSError, RuntimeError):  # the last two: its library does not load
        raise ModelError(
            f"model 'llama:{name}': llama.cpp is not here; pip install 'dsdlab[llama]'"
        ) from None
    path: Path = gguf_of(name)
    folder = fetch(name)
    if not _silent:
        _silent.append(lib.llama_log_callback(lambda *_: None))
        lib.llama_log_set(_silent[0], ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise ModelError(f"llama.cpp cannot load {path}")
    if lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model):
        raise ModelError(
            f"{path} has layers whose state cannot be rolled back; allowed: attention in all layers"
        )
    vocab = lib.llama_model_get_vocab(model)
    info = ModelInfo(
        model_id=f"llama:{name}",
        tokenizer=Tokenizer(folder / "tokenizer.json").fingerprint,
        vocab_size=lib.llama_vocab_n_tokens(vocab),
        max_context=min(options.max_context, lib.llama_model_n_ctx_train(model)),
        eos_ids=eos_of(folder),
        precision=PRECISION,
        n_params=lib.llama_model_n_params(model),
        digest=file_digest([path]),
    )
    import torch

    return LlamaEngine(lib, model, info, slots=options.slots, threads=torch.get_num_threads())
