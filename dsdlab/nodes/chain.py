"""A chain: drafts of one epoch that continue a session's text, as far as the verifier has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from dsdlab.nodes.text import Text


class Chain:
    """What a streaming client drafted beyond the text. Frames may come twice, late or in any order.

    INVARIANT C1: a draft is judged only while every draft of its epoch before it is in the text: one that
    differs from the text ends the chain, and what is left of it or comes after it never reaches the engine.
    INVARIANT C2: an epoch ends every lower one.
    """

    __slots__ = ("alive", "epoch", "tokens")

    def __init__(self) -> None:
        self.epoch = 0
        self.alive = True
        self.tokens: dict[int, int] = {}  # by absolute position, beyond the text's end

    def receive(self, epoch: int, base: int, ids: Sequence[int], text: Text) -> bool:
        """Take a frame's drafts, the first of them for position `base`; whether any may yet be judged."""
        if epoch < self.epoch:
            return False
        if epoch > self.epoch:
            self.epoch, self.alive, self.tokens = epoch, True, {}
        if not self.alive:
            return False
        end = len(text)
        known = max(0, min(end - base, len(ids)))  # drafts for places where the text stands already
        if known and list(ids[:known]) != text.ids[base : base + known]:
            self._die()
            return False
        for position, token in zip(count(base + known), ids[known:], strict=False):
            self.tokens[position] = token
        return known < len(ids)

    def settle(self, text: Text, since: int) -> None:
        """Compare with what the text holds from position `since` on; called after each commit."""
        take = self.tokens.pop
        for position in range(since, len(text)):
            token = take(position, None)
            if token is not None and token != text.ids[position]:
                self._die()
                return

    def window(self, text: Text, most: int) -> list[int]:
        """At most so many drafts that follow the text's end without a gap."""
        tokens, out = self.tokens, []
        for position in range(len(text), len(text) + most):
            token = tokens.get(position)
            if token is None:
                break
            out.append(token)
        return out

    def _die(self) -> None:
        self.alive = False
        self.tokens.clear()
