"""Measuring models on a node: what is measured is what a node does, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import tiny_drafter, tiny_target

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, Engine, NoFreeSlot
from dsdlab.models.calibrate import measure_drafter, measure_node, measure_target
from dsdlab.models.compute import ThreadCompute
from dsdlab.models.drafters import Drafter, LookupFirst, ModelDrafter, PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile, load_emulated
from dsdlab.models.forwards import calibration_text
from dsdlab.models.measures import CalibrationFailed, Measures, Sizes
from dsdlab.models.steps import TARGET_ROWS, measure_steps
from dsdlab.sim.fit import fit_measures

SIZES = Sizes(rows=(1, 2, 5, 9), contexts=(16, 64), batches=(2, 4), prefills=(32, 64), idle_s=(0.002, 0.01))
DRAFTER_SIZES = Sizes(rows=(1, 2, 4), contexts=(16, 64), batches=(), prefills=(32,), idle_s=(0.002, 0.01))


def target_measures(
    engine: Engine, beside: Drafter | None = None, sampling: Sampling | None = None, budget_s: float = 0.0
) -> Measures:
    async def body() -> Measures:
        compute = ThreadCompute()
        try:
            return await measure_target(
                engine,
                compute,
                beside=beside,
                sampling=sampling or Sampling(),
                sizes=SIZES,
                budget_s=budget_s,
            )
        finally:
            compute.close()

    return asyncio.run(body())


def drafter_measures(
    drafter: Drafter, beside: Engine | None = None, budget_s: float = 0.0
) -> Measures | None:
    async def body() -> Measures | None:
        compute = ThreadCompute()
        try:
            return await measure_drafter(
                drafter,
                compute,
                beside=beside,
                sampling=Sampling(temperature=0.8, seed=3),
                sizes=DRAFTER_SIZES,
                budget_s=budget_s,
            )
        finally:
            compute.close()

    return asyncio.run(body())


def open_slots(engine: Engine, slots: int) -> int:
    """How many slots are free."""
    taken: list[int] = []
    with contextlib.suppress(NoFreeSlot):
        while len(taken) <= slots:
            taken += [engine.open()]
    for slot in taken:
        engine.close(slot)
    return len(taken)


def test_emulated_target_costs_what_it_says() -> None:
    engine = load_emulated("base_s=0.004,per_token_s=0.0002,per_session_s=0.001", slots=8, max_context=256)
    measures = target_measures(engine, budget_s=2.0)
    assert measures.repeats >= 3
    cost = fit_measures(measures)
    # a ForwardCost counts sessions from the second on
    for rows, batch, seconds in [(1, 1, 0.0052), (9, 1, 0.0068), (64, 1, 0.0178), (20, 4, 0.012)]:
        assert cost.cost_s(rows, batch, 64 * batch) == pytest.approx(seconds, rel=0.06)
    assert cost.tokens == (1, 64)
    assert cost.batch == (1, 4)
    assert open_slots(engine, 8) == 8
    assert min(measures.hops_s) > 0.0


def test_emulated_drafter_costs_what_it_says() -> None:
    engine = load_emulated("base_s=0.002,per_token_s=0.0005,alpha=0.7", slots=4, max_context=256)
    measures = drafter_measures(LookupFirst(ModelDrafter(engine)), budget_s=1.5)
    assert measures is not None
    cost = fit_measures(measures)
    for rows, seconds in [(1, 0.0025), (4, 0.004), (32, 0.018)]:
        assert cost.cost_s(rows, 1, 64) == pytest.approx(seconds, rel=0.08)
    assert {r.idle_s for r in measures.rested} == {None, 0.002, 0.01}
    assert open_slots(engine, 4) == 4


def test_real_models_are_measured_and_left_as_they_were(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "t", max_context=256, slots=5)
    model = tiny_drafter(tmp_path / "d.safetensors", max_context=256)
    drafter = LookupFirst(ModelDrafter(model))
    measures = target_measures(target, drafter, Sampling(temperature=0.7, seed=5))
    assert measures.repeats == 3
    assert {(s.tokens, s.batch) for s in measures.forwards} == {
        *((n, 1) for n in (1, 2, 5, 9, 32, 64)),
        *((b * n, b) for b in (2, 4) for n in (1, 5)),
    }
    assert all(s.context < 64 + 64 for s in measures.forwards if s.batch == 1)
    assert {r.idle_s for r in measures.rested} == {None, 0.002, 0.01}
    assert {d.rows for d in measures.drawn} == {1, 5}
    fit_measures(measures).check("cloud.target")
    of_drafter = drafter_measures(drafter, target)
    assert of_drafter is not None
    assert {s.tokens for s in of_drafter.forwards} == {1, 2, 4, 32}
    assert all(len(r.forwards) == 6 for r in of_drafter.rested)
    fit_measures(of_drafter).check("cloud.drafter")
    assert open_slots(target, 5) == 5
    assert open_slots(model, 4) == 4
    slot = target.open()  # what it says is not changed by having been measured
    assert target.length(slot) == 0


class Watched:
    """Notes what an engine is asked, and in which thread."""

    def __init__(self, engine: Engine) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.threads: set[str] = set()
        choose = engine.choose

        def noting(chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
            self.asked.append(tuple(len(c.ids) for c in chunks))
            self.threads.add(threading.current_thread().name)
            return choose(chunks, samplings)

        engine.choose = noting  # type: ignore[method-assign]


def test_only_the_compute_thread_touches_the_model() -> None:
    engine = load_emulated("base_s=0.0001", slots=8, max_context=256)
    watched = Watched(engine)

    async def body() -> int:
        compute = ThreadCompute()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.001)
                turns += 1

        other = asyncio.create_task(others())
        await measure_target(engine, compute, sizes=SIZES, budget_s=0.0)
        other.cancel()
        compute.close()
        return turns

    assert asyncio.run(body()) > 20  # the loop ran on
    assert len(watched.threads) == 1
    assert next(iter(watched.threads)).startswith("compute")


def test_time_is_of_the_forward_that_it_says() -> None:
    """Every single measurement, not only their fit: catching up and holding are not in it."""
    engine = load_emulated("base_s=0.001,per_token_s=0.001", slots=8, max_context=256)
    model = ModelDrafter(load_emulated("base_s=0.001,per_token_s=0.001", slots=4, max_context=256))
    found = drafter_measures(model)
    assert found is not None
    every = [*found.forwards, *(s for r in found.rested for s in r.forwards)]
    for samples in (target_measures(engine).forwards, every):
        expected = [0.001 + 0.001 * s.tokens for s in samples]
        assert all(s.seconds > 0.99 * seconds for s, seconds in zip(samples, expected, strict=True))
        right = [s.own_s < 1.1 * seconds for s, seconds in zip(samples, expected, strict=True)]
        assert sum(right) > 0.8 * len(right)


def test_node_with_both_or_one() -> None:
    target = load_emulated("base_s=0.0002", slots=8, max_context=64)
    drafter = ModelDrafter(load_emulated("base_s=0.0001", slots=8, max_context=64))

    async def body(*loaded: object) -> set[str]:
        compute = ThreadCompute()
        found = await measure_node(compute, *loaded, budget_s=0.0)  # type: ignore[arg-type]
        compute.close()
        return set(found)

    assert asyncio.run(body(target, drafter)) == {"target", "drafter"}
    assert asyncio.run(body(None, drafter)) == {"drafter"}
    assert asyncio.run(body(target, PromptLookup())) == {"target"}  # lookup costs nothing
    assert asyncio.run(body(None, None)) == set()


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the kernel does not tell")
def test_waiting_for_the_core_is_noticed() -> None:
    """Two spinning processes on the one core that the compute thread may use."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    engine = load_emulated("base_s=0.02", slots=8, max_context=128)
    engine.wait = busy

    async def body() -> Measures:
        compute = ThreadCompute()
        await compute.run(lambda: os.sched_setaffinity(0, {core}))
        try:
            return await measure_target(engine, compute, sizes=SIZES, budget_s=0.0)
        finally:
            compute.close()

    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        assert asyncio.run(body()).disturbed > 0.5
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def busy(seconds: float) -> None:
    """Compute for so long, of the thread's own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_sizes_fit_the_context() -> None:
    for max_context in (16, 32, 64, 100, 512, 2048):
        for sizes in (Sizes(), Sizes.of_drafter()):
            sizes = sizes.within(max_context)
            assert sizes.rows
            assert max(sizes.contexts) + sizes.spread - 1 + max(sizes.rows) < max_context
            assert all(n < max_context for n in sizes.prefills)
    with pytest.raises(CalibrationFailed, match="8 positions is too short to calibrate; allowed: 16 or more"):
        Sizes().within(8)


def test_a_small_context_can_be_calibrated() -> None:
    engine = load_emulated("base_s=0.0005,per_token_s=0.0001", slots=8, max_context=32)

    async def body() -> Measures:
        compute = ThreadCompute()
        try:
            return await measure_target(engine, compute, budget_s=0.0)
        finally:
            compute.close()

    fit_measures(asyncio.run(body())).check("target")


def test_no_slot_is_said_and_none_is_kept() -> None:
    engine = load_emulated("base_s=0.0001", slots=2, max_context=256)
    with pytest.raises(NoFreeSlot, match="all 2 session slots"):
        target_measures(engine)
    assert open_slots(engine, 2) == 2


def test_text_repeats_nothing() -> None:
    text = calibration_text(1000, 600, seed=1)
    assert len(set(text)) == 600
    assert min(text) > 0
    assert max(text) < 1000
    assert len(calibration_text(4, 50, seed=1)) == 50


def steps_of(model: Engine | Drafter | None, seconds: float = 0.2) -> Measures | None:
    async def body() -> Measures | None:
        compute = ThreadCompute()
        try:
            return await measure_steps(model, compute, seconds=seconds)
        finally:
            compute.close()

    return asyncio.run(body())


def test_steps_without_a_rest(tmp_path: Path) -> None:
    """A target's in random order of rows, a drafter's one by one; always from about the same context."""
    target = tiny_target(tmp_path / "t", max_context=256, slots=2)
    measures = steps_of(target)
    assert measures is not None
    assert {s.tokens for s in measures.forwards} == set(TARGET_ROWS)
    assert {s.context for s in measures.forwards} == {128}
    assert open_slots(target, 2) == 2
    assert measures.wall_s >= 0.2
    model = tiny_drafter(tmp_path / "d.safetensors", max_context=256)
    for drafter in (ModelDrafter(model), LookupFirst(ModelDrafter(model))):
        measures = steps_of(drafter)
        assert measures is not None
        assert len(measures.forwards) == measures.repeats > 3
        assert {s.tokens for s in measures.forwards} == {1}
        assert min(s.context for s in measures.forwards) == 128
        assert max(s.context for s in measures.forwards) < 160
    assert steps_of(PromptLookup()) is None
    assert steps_of(None) is None


def test_a_drafters_steps_are_forwards_of_one_row() -> None:
    forwards: list[tuple[int, ...]] = []
    engine = EmulatedEngine(EmulatedProfile(), charge=lambda *f: forwards.append(f))
    measures = steps_of(ModelDrafter(engine), seconds=0.05)
    assert measures is not None
    assert {rows for rows, *_ in forwards[1:]} == {1}  # the first reads what comes before
    assert {held for _, _, held, _ in forwards[1:]} == set(range(128, 160))


def test_steps_that_cannot_be() -> None:
    engine = load_emulated("base_s=0.001", slots=2, max_context=64)
    with pytest.raises(CalibrationFailed, match="a context of 64 positions is too short for steps"):
        steps_of(engine)
    for seconds in (0.0, 61.0, float("nan")):
        with pytest.raises(CalibrationFailed, match=r"steps_s is .*; allowed: above 0 to 60 seconds"):
            steps_of(engine, seconds)
