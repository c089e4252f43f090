"""A synthetic drafter: what an emulated model proposes and charges, a window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter, GoesOn
from dsdlab.models.emulated import EmulatedEngine

__all__ = ["SyntheticDrafter"]


class SyntheticDrafter(Drafter):
    """The same proposals and the same forwards as a `ModelDrafter` over an `EmulatedEngine`, without a call
    of the engine for each of them. Like a session's, a slot's committed text may only grow.
    """

    def __init__(self, engine: EmulatedEngine) -> None:
        self._engine = engine
        self.name = engine.info.model_id
        self.tokenizer = engine.info.tokenizer
        self._held: dict[int, tuple[int, list[int]]] = {}
        """By slot: a model holds so much of the committed text, and these tokens after it."""

    def open(self) -> int:
        slot = self._engine.open()
        self._held[slot] = (0, [])
        return slot

    def close(self, slot: int) -> None:
        self._held.pop(slot, None)
        self._engine.close(slot)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        engine, length = self._engine, len(ids)
        base = length + len(tail)
        n = min(n, engine.info.max_context - base)
        if n <= 0:
            self.by_model = self.confidences = ()
            return []
        held, after = self._held[slot]
        if after:
            for token, now in zip(after, chain(islice(ids, held, None), tail), strict=False):
                if token != now:
                    break
                held += 1
        held = min(held, base - 1)  # the last token is always computed again: its logits are wanted
        say, seed = engine.token, sampling.seed
        if goes_on is None:
            out = [say(seed, position) for position in range(base, base + n)]
            self.confidences = ()
        else:
            out = self._while_it_goes_on(base, n, seed, goes_on)
            n = len(out)
        self.by_model = (True,) * n
        self._held[slot] = (length, [*tail, *out[:-1]])
        charge = engine.charge
        if charge is None:
            cost_s = engine.profile.cost_s
            engine.wait(cost_s(base - held, 1) + (n - 1) * cost_s(1, 1))
        else:
            drawn = 0 if sampling.greedy else 1
            charge(base - held, 1, held, drawn)
            for context in range(base, base + n - 1):
                charge(1, 1, context, drawn)
        return out

    def _while_it_goes_on(self, base: int, n: int, seed: int, goes_on: GoesOn) -> list[int]:
        engine = self._engine
        out: list[int] = []
        confidences: list[float] = []
        for position in range(base, base + n):
            out.append(engine.token(seed, position))
            confidences.append(engine.confidence(seed, position))
            if len(out) < n and not goes_on(confidences):
                break
        self.confidences = confidences
        return out
