"""A synthetic drafter: what an emulated model proposes and charges, a window at a time."""

from __future__ import annotations

from collections.abc import Sequence

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter
from dsdlab.models.emulated import EmulatedEngine

__all__ = ["SyntheticDrafter"]


class SyntheticDrafter(Drafter):
    """The same proposals and the same forwards as a `ModelDrafter` over an `EmulatedEngine`, without a call
    of the engine for each of them. Like a session's, a slot's text may only grow.
    """

    def __init__(self, engine: EmulatedEngine) -> None:
        self._engine = engine
        self.name = engine.info.model_id
        self.tokenizer = engine.info.tokenizer
        self._windows: dict[int, tuple[int, list[int]]] = {}  # by slot: where the last one began, and it

    def open(self) -> int:
        slot = self._engine.open()
        self._windows[slot] = (0, [])
        return slot

    def close(self, slot: int) -> None:
        self._windows.pop(slot, None)
        self._engine.close(slot)

    def propose(self, slot: int, ids: Sequence[int], n: int, sampling: Sampling) -> list[int]:
        engine, base = self._engine, len(ids)
        n = min(n, engine.info.max_context - base)
        if n <= 0:
            self.by_model = ()
            return []
        self.by_model = (True,) * n
        # a model holds the text of the last window and of its drafts all but the last
        held, drafted = self._windows[slot]
        for place in range(len(drafted) - 1):
            if held >= base or drafted[place] != ids[held]:
                break
            held += 1
        held = min(held, base - 1)  # the last token is always computed again: its logits are wanted
        token, seed = engine.token, sampling.seed
        out = [token(seed, position) for position in range(base, base + n)]
        self._windows[slot] = (base, out)
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
