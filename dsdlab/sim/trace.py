"""A trace: the target's text for each prompt, and what the drafter would propose at every position of it.

Replaying it repeats the accept/reject sequence of a real run exactly, because a window depends on the committed
text alone: the drafter's arithmetic is a function of the text, whatever was computed before.
"""

from __future__ import annotations

import msgspec

__all__ = ["Trace", "TracedText", "TracedWindow"]

TRACE_VERSION = 1


class TracedWindow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the drafter proposes after the first `base` tokens (prompt included), and how it comes to it.

    ids: up to the trace's `gamma` tokens, fewer where the drafter had no idea.
    by_model: for each of them, whether the model said it; otherwise lookup did, at no cost.
    """

    base: int
    ids: tuple[int, ...]
    by_model: tuple[bool, ...]


class TracedText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt under one sampling."""

    key: str  # the reference's key: hash of target, precision, prompt, sampling, limits
    prompt: str  # the prompt's key
    prompt_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ids: tuple[int, ...]  # the target alone, an end-of-sequence id included
    windows: tuple[TracedWindow, ...]  # base = len(prompt_ids) + 1 … len(prompt_ids) + len(ids) - 1


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All texts of a scenario. `gamma`: the longest window recorded."""

    version: int = TRACE_VERSION
    target: str
    drafter: str
    precision: str
    tokenizer: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_context: int
    gamma: int
    texts: tuple[TracedText, ...]
    provenance: dict[str, object] = {}
