"""The target alone: the reference that every mode must reproduce, token for token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, Engine


def generate_alone(
    engine: Engine,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Collection[int],
) -> list[int]:
    """Plain autoregressive decoding, one token a forward: new ids, an end-of-sequence id included.

    No protocol, no session state, no verification: as little code as possible to disagree with.
    """
    slot = engine.open()
    try:
        out: list[int] = []
        feed: Sequence[int] = prompt_ids
        while len(out) < max_new_tokens and (not out or out[-1] not in eos_ids):
            [[token]] = engine.choose([Chunk(slot, feed, 1)], [sampling])
            out.append(token)
            feed = [token]
        return out
    finally:
        engine.close(slot)
