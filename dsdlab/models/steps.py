"""A node's model at work without a rest: the same steps again and again, to be compared with others.

What one node takes from another on the same machine shows in them (`testbed.contention`).
"""

from __future__ import annotations

import random
import time

from dsdlab.models.base import Engine, ModelInfo
from dsdlab.models.compute import Compute
from dsdlab.models.drafters import Drafter
from dsdlab.models.forwards import DrafterForwards, TargetForwards, calibration_text, model_of
from dsdlab.models.measures import CalibrationFailed, Measures, Sample

__all__ = ["TARGET_ROWS", "measure_steps"]

TARGET_ROWS = (1, 4, 8)
CONTEXT = 128  # positions held before
RUN = 32  # tokens that a drafter drafts before it begins again
SLICE_S = 0.05  # of steps, between two of which the node may do other work
MOST_S = 60.0


async def measure_steps(
    model: Engine | Drafter | None, compute: Compute, *, seconds: float, seed: int = 0
) -> Measures | None:
    """Steps in a row for so many seconds: of a target with `TARGET_ROWS` rows in random order, of a drafter's
    model with one. None for a drafter without a model.

    Raises CalibrationFailed, NoFreeSlot while sessions are under way.
    """
    if not 0.0 < seconds <= MOST_S:
        raise CalibrationFailed(f"steps_s is {seconds:g}; allowed: above 0 to {MOST_S:g} seconds")
    forwards: _TargetSteps | _DrafterSteps
    if isinstance(model, Engine):
        forwards = _TargetSteps(model, seed)
    elif model is not None and (drafting := model_of(model)) is not None:
        forwards = _DrafterSteps(model, drafting.engine.info, seed)
    else:
        return None
    out = Measures(model=forwards.name)
    begun_s = time.perf_counter()

    def some() -> None:
        until_s = time.perf_counter() + SLICE_S
        while time.perf_counter() < until_s:
            sample = forwards.step(out.repeats)
            out.repeats += 1
            if sample is not None:
                out.forwards.append(sample)

    try:
        while time.perf_counter() - begun_s < seconds:
            await compute.run(some)
        out.wall_s = time.perf_counter() - begun_s
    finally:
        await compute.run(forwards.close)
    return out


def _context(info: ModelInfo) -> int:
    """Positions held before a step. Raises CalibrationFailed."""
    if info.max_context < 4 * RUN:
        raise CalibrationFailed(
            f"a context of {info.max_context} positions is too short for steps; allowed: {4 * RUN} or more"
        )
    return min(CONTEXT, info.max_context - 2 * RUN)


class _TargetSteps:
    """What a verifier does."""

    def __init__(self, engine: Engine, seed: int) -> None:
        info = engine.info
        self.name, self._context = info.model_id, _context(info)
        self._forwards = TargetForwards(engine, calibration_text(info.vocab_size, info.max_context, seed))
        self._rng = random.Random(seed)
        self.close = self._forwards.close

    def step(self, _: int) -> Sample:
        return self._forwards.judge(0, self._context, self._rng.choice(TARGET_ROWS))


class _DrafterSteps:
    """What an edge node does that drafts ahead: a token after the other; then from the beginning again."""

    def __init__(self, drafter: Drafter, info: ModelInfo, seed: int) -> None:
        self.name, self._context = drafter.name, _context(info)
        self._forwards = DrafterForwards(drafter, calibration_text(info.vocab_size, info.max_context, seed))
        self._slot: int | None = None
        self.close = self._forwards.close

    def step(self, number: int) -> Sample | None:
        if self._slot is None:
            self._slot = self._forwards.hold(0, self._context)
        return self._forwards.propose(self._slot, self._context + number % RUN, 1)
