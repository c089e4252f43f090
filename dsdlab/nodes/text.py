"""A session's text: the state that both ends of the wire keep and must agree on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dsdlab.decoding import Sampling, apply_limits


class Gap(Exception):
    """Tokens begin beyond the text's end: something in between is missing."""


class Text:
    """Prompt and committed tokens. Positions are absolute: position 0 is the prompt's first token.

    INVARIANT T1: committed tokens never change; the text only grows.
    INVARIANT T2: applying the same tokens at the same position again changes nothing.
    INVARIANT T3: nothing is committed after `finish` is set.
    """

    __slots__ = ("eos_ids", "finish", "ids", "max_new_tokens", "n_prompt", "sampling")

    def __init__(
        self,
        prompt: Sequence[int],
        committed: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Collection[int],
    ) -> None:
        self.ids: list[int] = list(prompt)
        self.n_prompt = len(self.ids)
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.eos_ids = tuple(eos_ids)  # seldom more than two; a set would take more room than the text
        self.finish: str | None = None
        if committed:
            self.append(committed)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def committed(self) -> list[int]:
        return self.ids[self.n_prompt :]

    @property
    def room(self) -> int:
        """Tokens that may still be committed."""
        return self.max_new_tokens - (len(self.ids) - self.n_prompt)

    def append(self, new: Sequence[int]) -> list[int]:
        """Commit tokens at the end; returns those that count before a stop."""
        if self.finish is not None:
            return []
        kept, self.finish = apply_limits(
            new, len(self.ids) - self.n_prompt, self.max_new_tokens, self.eos_ids
        )
        self.ids += kept
        return kept

    def merge(self, base: int, new: Sequence[int]) -> list[int]:
        """Commit tokens that stand at absolute position `base`; what is already held is skipped.

        Returns the tokens that were new. Raises Gap.
        """
        if base > len(self.ids):
            raise Gap(f"tokens at position {base}, but the text ends at {len(self.ids)}")
        fresh = new[len(self.ids) - base :]
        return self.append(fresh) if fresh else []
