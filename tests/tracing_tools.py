"""Real nodes in one process, engines that tell what they compute, and traces recorded in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Chunk, Engine, Logits
from dsdlab.models.compute import Timing
from dsdlab.models.drafters import Drafter
from dsdlab.models.tracing import reach_beyond, record_beyond, record_windows
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.protocol import ChannelClosed
from dsdlab.protocol.memory import MemoryChannel, memory_pair
from dsdlab.sim.trace import Trace, TracedText

T = TypeVar("T")
Forward = tuple[int, int, int]  # rows, sessions, positions held before


class Inline:
    """Compute that does the work at once and says that it took a millisecond."""

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        return work(), Timing(0.0, 1e-3)


class Metered(Engine):
    """Another engine, with a list of its forwards; now and then it says the next id instead.

    odd: whether it does so at an absolute position; foreign: then it says an id that its peer's vocabulary of
    this size lacks.
    """

    def __init__(
        self, inner: Engine, odd: Callable[[int], bool] = lambda _: False, foreign: int | None = None
    ) -> None:
        self._inner, self._odd, self._foreign = inner, odd, foreign
        self.info = inner.info if foreign is None else replace(inner.info, vocab_size=foreign + 8)
        self.forwards: list[Forward] = []

    def open(self) -> int:
        return self._inner.open()

    def close(self, slot: int) -> None:
        self._inner.close(slot)

    def length(self, slot: int) -> int:
        return self._inner.length(slot)

    def rollback(self, slot: int, length: int) -> None:
        self._inner.rollback(slot, length)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        raise NotImplementedError

    def choose(self, chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
        held = sum(self.length(c.slot) for c in chunks)
        self.forwards.append((sum(len(c.ids) for c in chunks), len(chunks), held))
        size = self._inner.info.vocab_size
        known = [Chunk(c.slot, [i % size for i in c.ids], c.rows) for c in chunks]
        picks = self._inner.choose(known, samplings)
        out = []
        for chunk, row in zip(chunks, picks, strict=True):
            first = self.length(chunk.slot) - chunk.rows + 1
            out.append([self._say(token, first + i) for i, token in enumerate(row)])
        return out

    def _say(self, token: int, position: int) -> int:
        if not self._odd(position):
            return token
        return self._foreign if self._foreign is not None else (token + 1) % self.info.vocab_size


def generate(target: Engine, drafter: Drafter | None, request: GenerationRequest) -> GenerationRecord:
    """One generation of the product's nodes, over a channel in memory."""

    async def main() -> GenerationRecord:
        compute = Inline()
        verifier = VerifierNode(target, compute, drafter=drafter)
        serving: list[asyncio.Task[None]] = []

        async def serve(channel: MemoryChannel) -> None:
            with suppress(ChannelClosed):
                await verifier.serve(channel)

        async def dial() -> MemoryChannel:
            here, there = memory_pair()
            serving.append(asyncio.create_task(serve(there)))
            return here

        node = DrafterNode(dial, compute, drafter=drafter, target=target)
        record = await node.generate(request)
        await node.disconnect()
        await asyncio.gather(*serving)
        await verifier.close()
        return record

    return asyncio.run(main())


def record_text(
    target: Engine,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    gamma: int,
    eos_ids: Sequence[int] = (),
    prompt: str = "p",
) -> TracedText:
    """What the recording process does, here."""
    ids = generate_alone(target, prompt_ids, sampling, max_new_tokens, eos_ids)
    windows = record_windows(drafter, prompt_ids, ids, sampling, gamma)
    reach = reach_beyond(windows, prompt_ids, ids, eos_ids, target.info.max_context)
    return TracedText(
        key=f"{prompt}-{sampling.temperature:g}-{sampling.seed}",
        prompt=prompt,
        prompt_ids=tuple(prompt_ids),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        ids=tuple(ids),
        windows=windows,
        beyond=record_beyond(target, prompt_ids, ids, sampling, reach),
    )


def trace_of(target: Engine, drafter: Drafter, gamma: int, *texts: TracedText) -> Trace:
    info = target.info
    return Trace(
        target=info.model_id,
        drafter=drafter.name,
        precision=info.precision,
        tokenizer=info.tokenizer,
        vocab_size=info.vocab_size,
        eos_ids=info.eos_ids,
        max_context=info.max_context,
        gamma=gamma,
        texts=texts,
    )
