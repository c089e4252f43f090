"""A simulated node's models cool down as measured ones do: by idling, and by another model's running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dsdlab.sim import loop
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.costs import ForwardCost

DRAFTER = ForwardCost(
    base_s=0.002, first_s=0.001, after_idle=((0.01, 0.0005), (0.1, 0.002)), fade=0.5, per_drawn_s=0.0002
)
TARGET = ForwardCost(base_s=0.02)


def spent_s(play: Callable[[SimCompute, list[float]], object]) -> list[float]:
    """The compute times of the works that `play` runs."""

    async def main() -> list[float]:
        times: list[float] = []
        await play(SimCompute(hop_s=0.0001), times)  # type: ignore[misc]
        return times

    return loop.run(main())


def test_windows_after_another_model_and_after_idling() -> None:
    async def play(compute: SimCompute, times: list[float]) -> None:
        drafter, target = compute.meter(DRAFTER), compute.meter(TARGET)

        def window() -> None:
            for _ in range(3):
                drafter(1, 1, 0, 0)

        async def work(what: Callable[[], None]) -> None:
            _, timing = await compute.run(what)
            times.append(timing.compute_s)

        await work(lambda: target(5, 1, 0, 0))
        await work(window)  # the target ran before it
        await asyncio.sleep(0.055 - 0.0002)  # and two hops
        await compute.run(lambda: None)  # opening a session warms nothing
        await work(window)  # half way between the two idle times that were measured
        await work(lambda: drafter(1, 1, 0, 0))  # right after: only the hop lies between

    first, fading = 0.001 * 1.75, 0.00125 * 1.75
    times = spent_s(play)
    assert times[:3] == pytest.approx([0.02, 0.006 + first, 0.006 + fading], abs=2e-6)
    assert times[3] == pytest.approx(0.002 + 0.00125 / 8, abs=2e-6)


def test_the_first_forward_ever_has_rested() -> None:
    async def play(compute: SimCompute, times: list[float]) -> None:
        charge = compute.meter(DRAFTER)
        _, timing = await compute.run(lambda: charge(1, 1, 0, 0))
        times.append(timing.compute_s)

    assert spent_s(play) == pytest.approx([0.004])


def test_a_drawn_token_costs_more() -> None:
    async def play(compute: SimCompute, times: list[float]) -> None:
        charge = compute.meter(ForwardCost(base_s=0.01, per_drawn_s=0.001))
        for drawn in (0, 5):
            _, timing = await compute.run(lambda: charge(5, 1, 0, drawn))  # noqa: B023 - awaited at once
            times.append(timing.compute_s)

    assert spent_s(play) == pytest.approx([0.01, 0.015])
