"""What a loaded model costs on this node: measured in its compute thread, by the functions that nodes call.

A forward's cost depends on its sizes, and on what ran before it. So sizes are measured in random order, each
repeat at other contexts; and apart from them, what forwards take after the node was idle for a while, and
after another model, whose weights have gone through the caches. A target's work is `judge`, a drafter's one
token of `propose`: choosing the token and all the Python around it are in the time, as they are in a node's.
Sessions are rolled back between measurements, so that nothing grows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dsdlab.decoding import Sampling
from dsdlab.models.base import Engine
from dsdlab.models.compute import Compute
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.models.forwards import (
    GREEDY,
    WINDOW_STEPS,
    DrafterForwards,
    TargetForwards,
    calibration_text,
    model_of,
)
from dsdlab.models.measures import Drawn, Measures, Rested, Sample, Sizes

__all__ = ["measure_drafter", "measure_node", "measure_target"]

T = TypeVar("T")
Work = Callable[[], Awaitable[None]]

SWEEP_BYTES = 64 << 20  # twice the last-level cache of common processors
LEAST_REPEATS = 3
PREFILL_EVERY = 3  # prompts take long: after the first repeats they are measured in every third
REST_EVERY = 2  # a target's rests, likewise
OTHER_TIMES = 3  # a drafter follows another model, in every repeat
FEW_ROWS = 3  # of the row counts, so many are measured at every context
WINDOW = 5  # rows of a target's window where its size does not matter
DRAWN_ROWS = (1, WINDOW)
TARGET_BUDGET_S, DRAFTER_BUDGET_S = 30.0, 10.0


class _Caches:
    """Memory to pull through the caches, more than they hold, as another model's weights are."""

    def __init__(self) -> None:
        self._memory: npt.NDArray[np.float64] = np.ones(SWEEP_BYTES // 8)

    def sweep(self) -> None:
        self._memory.sum()


class _Run:
    """One calibration under way: how long it may go on, and what has been found."""

    def __init__(self, model: str, compute: Compute, sizes: Sizes, budget_s: float, seed: int) -> None:
        self.out = Measures(model=model)
        self.rng = random.Random(seed)
        self.sizes = sizes
        self.middle = len(sizes.contexts) // 2
        self._compute = compute
        self._budget_s = budget_s

    def contexts(self) -> list[int]:
        """Positions held before, for a repeat."""
        return [c + self.rng.randrange(self.sizes.spread) for c in self.sizes.contexts]

    def pairs(self) -> list[tuple[int, int]]:
        """(session, rows): every row count at the middle context, some at the others, one row twice."""
        pairs = [(self.middle, rows) for rows in (1, *self.sizes.rows)]
        others = [i for i in range(len(self.sizes.contexts)) if i != self.middle]
        return pairs + [(session, rows) for session in others for rows in _few(self.sizes.rows)]

    def repeats(self) -> Iterator[int]:
        """Numbers of repeats: as many as the budget allows, and never fewer than three."""
        begun_s = time.perf_counter()
        longest_s = 0.0
        while self.out.repeats < LEAST_REPEATS or self.out.wall_s + longest_s < self._budget_s:
            before_s = self.out.wall_s
            yield self.out.repeats
            self.out.repeats += 1
            self.out.wall_s = time.perf_counter() - begun_s
            longest_s = max(longest_s, self.out.wall_s - before_s)

    @staticmethod
    def turn(number: int, every: int) -> bool:
        """Whether a repeat measures what only every so many do."""
        return number < LEAST_REPEATS or number % every == 0

    async def quietly(self, work: Callable[[], T]) -> T:
        """Run in the compute thread what is not measured."""
        return (await self._compute.run(work))[0]

    async def timed(self, work: Callable[[], T]) -> T:
        """Run a measurement in the compute thread, and note the hop there and back."""
        asked_s = time.perf_counter()
        found, timing = await self._compute.run(work)
        self.out.hops_s.append(time.perf_counter() - asked_s - timing.queue_s - timing.compute_s)
        return found

    async def in_random_order(self, work: list[Work]) -> None:
        self.rng.shuffle(work)
        for one in work:
            await one()


def _few(rows: Sequence[int]) -> list[int]:
    """Some of them: the least and others evenly between it and the middle."""
    step = max(1, len(rows) // (2 * FEW_ROWS - 1))
    return list(rows[: FEW_ROWS * step : step])


class _TargetRun(_Run):
    """What is measured of a target, repeat by repeat."""

    def __init__(
        self, engine: Engine, compute: Compute, sizes: Sizes, sampling: Sampling, budget_s: float, seed: int
    ) -> None:
        super().__init__(engine.info.model_id, compute, sizes, budget_s, seed)
        text = calibration_text(engine.info.vocab_size, engine.info.max_context, seed)
        self.forwards = TargetForwards(engine, text)
        self.beside: DrafterForwards | None = None
        self._sampling = sampling
        self._contexts: list[int] = []

    async def repeat(self, number: int) -> None:
        sizes = self.sizes
        self._contexts = self.contexts()
        for session, context in enumerate(self._contexts):
            await self.quietly(partial(self.forwards.hold, session, context))
        work: list[Work] = [partial(self._window, session, rows) for session, rows in self.pairs()]
        work += [partial(self._batch, many, rows) for many in sizes.batches for rows in sizes.batch_rows]
        if self.turn(number, PREFILL_EVERY):
            work += [partial(self._prompt, rows) for rows in sizes.prefills]
        if self.turn(number, REST_EVERY):
            work += [partial(self._after_idle, idle_s) for idle_s in sizes.idle_s]
        if self.beside is not None:
            work.append(self._after_other)
        if not self._sampling.greedy:
            work += [partial(self._draw, rows) for rows in DRAWN_ROWS]
        await self.in_random_order(work)

    def _here(self, rows: int = WINDOW, sampling: Sampling = GREEDY) -> Sample:
        return self.forwards.judge(self.middle, self._contexts[self.middle], rows, sampling)

    async def _window(self, session: int, rows: int) -> None:
        context = self._contexts[session]
        self.out.forwards.append(await self.timed(lambda: self.forwards.judge(session, context, rows)))

    async def _batch(self, many: int, rows: int) -> None:
        held = [*self._contexts, *[self._contexts[self.middle]] * many][:many]
        for session, context in enumerate(held):
            await self.quietly(partial(self.forwards.hold, session, context))
        self.out.forwards.append(await self.timed(lambda: self.forwards.batch(held, rows)))

    async def _prompt(self, rows: int) -> None:
        session = -1  # of its own
        self.out.forwards.append(await self.timed(lambda: self.forwards.prompt(session, rows)))

    async def _after_idle(self, idle_s: float) -> None:
        await self.quietly(self._here)
        await asyncio.sleep(idle_s)
        found = [await self.timed(self._here) for _ in range(3)]
        self.out.rested.append(Rested(idle_s, found))

    async def _after_other(self) -> None:
        assert self.beside is not None
        here = self._contexts[self.middle]
        await self.quietly(partial(self.beside.hold, 0, here))
        await self.quietly(partial(self.beside.window, 0, here))
        self.out.rested.append(Rested(None, [await self.timed(self._here)]))

    async def _draw(self, rows: int) -> None:
        greedy = await self.timed(partial(self._here, rows))
        drawn = await self.timed(partial(self._here, rows, self._sampling))
        self.out.drawn.append(Drawn(rows, greedy.own_s, drawn.own_s))


class _DrafterRun(_Run):
    """What is measured of a drafter's model, repeat by repeat."""

    def __init__(
        self,
        drafter: Drafter,
        model: ModelDrafter,
        compute: Compute,
        sizes: Sizes,
        sampling: Sampling,
        budget_s: float,
        seed: int,
    ) -> None:
        super().__init__(model.name, compute, sizes, budget_s, seed)
        info = model.engine.info
        self.text = calibration_text(info.vocab_size, info.max_context, seed)
        self.forwards = DrafterForwards(drafter, self.text)
        self.beside: TargetForwards | None = None
        self.caches: _Caches | None = None
        self._sampling = sampling
        self._contexts: list[int] = []

    async def repeat(self, number: int) -> None:
        sizes = self.sizes
        self._contexts = self.contexts()
        work: list[Work] = [partial(self._catch_up, session, rows) for session, rows in self.pairs()]
        if self.turn(number, PREFILL_EVERY):
            work += [partial(self._prompt, rows) for rows in sizes.prefills]
        work += [self._after_other] * OTHER_TIMES
        if self.beside is None:  # else it runs only after the target
            work += [partial(self._after_idle, idle_s) for idle_s in sizes.idle_s]
        if not self._sampling.greedy:
            work += [self._draw] * 2
        await self.in_random_order(work)

    def _warm(self, session: int) -> None:
        """Several forwards in a row, so that the next one finds its weights in the caches."""
        for _ in range(3):
            self.forwards.hold(session, self._contexts[session])

    async def _catch_up(self, session: int, rows: int) -> None:
        context = self._contexts[session]

        def work() -> Sample | None:
            self._warm(session)
            return self.forwards.catch_up(session, context, rows)

        if (found := await self.quietly(work)) is not None:
            self.out.forwards.append(found)

    async def _prompt(self, rows: int) -> None:
        await self.quietly(partial(self._warm, self.middle))
        if (found := await self.timed(lambda: self.forwards.prompt(rows))) is not None:
            self.out.forwards.append(found)

    async def _window(self) -> list[Sample]:
        return await self.timed(lambda: self.forwards.window(self.middle, self._contexts[self.middle]))

    async def _after_idle(self, idle_s: float) -> None:
        """The other node computes meanwhile; where it shares this one's caches, so does the sweep."""
        await self.quietly(partial(self.forwards.hold, self.middle, self._contexts[self.middle]))
        if self.caches is not None:
            await self.quietly(self.caches.sweep)
        await asyncio.sleep(idle_s)
        self.out.rested.append(Rested(idle_s, await self._window()))

    async def _after_other(self) -> None:
        here = self._contexts[self.middle]
        await self.quietly(partial(self.forwards.hold, self.middle, here))
        if self.beside is not None:
            await self.quietly(partial(self.beside.judge, 0, here, WINDOW))
        elif self.caches is not None:
            await self.quietly(self.caches.sweep)
        else:
            return
        self.out.rested.append(Rested(None, await self._window()))

    async def _draw(self) -> None:
        context = self._contexts[self.middle]
        pair: list[Sample | None] = []
        for sampling in (GREEDY, self._sampling):
            await self.quietly(partial(self._warm, self.middle))
            pair.append(
                await self.quietly(partial(self.forwards.catch_up, self.middle, context, 1, sampling))
            )
        greedy, drawn = pair
        if greedy is not None and drawn is not None:
            self.out.drawn.append(Drawn(1, greedy.own_s, drawn.own_s))


async def measure_target(
    engine: Engine,
    compute: Compute,
    *,
    beside: Drafter | None = None,
    sampling: Sampling = GREEDY,
    sizes: Sizes | None = None,
    budget_s: float = TARGET_BUDGET_S,
    seed: int = 0,
) -> Measures:
    """Measure a target where it is loaded; the event loop stays free.

    beside: the drafter on the same node: what the target takes after it. sampling: how tokens are drawn,
    where they are not chosen greedily. budget_s: no new repeat that would not end before; three are always
    made.
    Raises NoFreeSlot while sessions are under way, CalibrationFailed where there is too little context.
    """
    sizes = (sizes or Sizes()).within(engine.info.max_context)
    run = _TargetRun(engine, compute, sizes, sampling, budget_s, seed)
    if beside is not None and (model := model_of(beside)) is not None:
        info = model.engine.info
        run.beside = DrafterForwards(beside, calibration_text(info.vocab_size, info.max_context, seed))
    try:
        for number in run.repeats():
            await run.repeat(number)
    finally:
        await compute.run(run.forwards.close)
        if run.beside is not None:
            await compute.run(run.beside.close)
    return run.out


async def measure_drafter(
    drafter: Drafter,
    compute: Compute,
    *,
    beside: Engine | None = None,
    shared_caches: bool = True,
    sampling: Sampling = GREEDY,
    sizes: Sizes | None = None,
    budget_s: float = DRAFTER_BUDGET_S,
    seed: int = 0,
) -> Measures | None:
    """Measure a drafter's model where it is loaded; None where it has none (prompt lookup costs nothing).

    beside: the target on the same node. shared_caches: whether whoever computes while this node is idle pulls
    its weights through this processor's caches, as on the testbed. The rest is as for `measure_target`.
    """
    model = model_of(drafter)
    if model is None:
        return None
    max_context = model.engine.info.max_context
    if beside is not None:
        max_context = min(max_context, beside.info.max_context)
    sizes = (sizes or Sizes.of_drafter()).within(max_context - WINDOW_STEPS)
    run = _DrafterRun(drafter, model, compute, sizes, sampling, budget_s, seed)
    if beside is not None:
        length = beside.info.max_context
        run.beside = TargetForwards(beside, calibration_text(beside.info.vocab_size, length, seed))
    if shared_caches:
        run.caches = _Caches()
    try:
        for number in run.repeats():
            await run.repeat(number)
    finally:
        await compute.run(run.forwards.close)
        if run.beside is not None:
            await compute.run(run.beside.close)
    return run.out


async def measure_node(
    compute: Compute,
    target: Engine | None,
    drafter: Drafter | None,
    *,
    sampling: Sampling = GREEDY,
    shared_caches: bool = True,
    budget_s: float | None = None,
    seed: int = 0,
) -> dict[str, Measures]:
    """Measure what a node has loaded: "target", "drafter" or both.

    budget_s: for all of it, divided as the defaults are.
    """
    out = {}
    budgets = [TARGET_BUDGET_S] * (target is not None) + [DRAFTER_BUDGET_S] * (model_of(drafter) is not None)
    scale = 1.0 if budget_s is None or not budgets else budget_s / sum(budgets)
    if target is not None:
        out["target"] = await measure_target(
            target,
            compute,
            beside=drafter,
            sampling=sampling,
            budget_s=TARGET_BUDGET_S * scale,
            seed=seed,
        )
    if drafter is not None:
        found = await measure_drafter(
            drafter,
            compute,
            beside=target,
            shared_caches=shared_caches,
            sampling=sampling,
            budget_s=DRAFTER_BUDGET_S * scale,
            seed=seed,
        )
        if found is not None:
            out["drafter"] = found
    return out
