"""Compute on the virtual clock: first come, first served; stages in a row; what a meter charges."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.models.compute import Timing
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.costs import ForwardCost
from dsdlab.sim.loop import Deadlock, run


def spending(compute: SimCompute, duration_s: float) -> Callable[[], float]:
    def work() -> float:
        compute.spend(duration_s)
        return duration_s

    return work


def served(
    compute: SimCompute, works: list[tuple[float, float]]
) -> list[tuple[float, Timing]]:  # (asked at, takes) → (answered at, timing)
    async def one(asked_s: float, takes_s: float) -> tuple[float, Timing]:
        await asyncio.sleep(asked_s)
        result, timing = await compute.run(spending(compute, takes_s))
        assert result == takes_s
        return asyncio.get_running_loop().time(), timing

    async def main() -> list[tuple[float, Timing]]:
        return await asyncio.gather(*(one(*work) for work in works))

    return run(main())


def test_works_wait_for_each_other_and_the_hop_is_on_top() -> None:
    out = served(SimCompute(hop_s=0.25), [(0.0, 2.0), (1.0, 3.0), (10.0, 1.0)])
    assert [at for at, _ in out] == [2.25, 5.25, 11.25]
    assert [(t.queue_s, t.compute_s) for _, t in out] == [(0.0, 2.0), (1.0, 3.0), (0.0, 1.0)]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), min_size=1, max_size=12))
def test_one_stage_is_lindleys_recursion(works: list[tuple[float, float]]) -> None:
    works = sorted(works)
    free_s = 0.0
    for (at_s, timing), (asked_s, takes_s) in zip(served(SimCompute(), works), works, strict=True):
        begin_s = max(asked_s, free_s)
        free_s = begin_s + takes_s
        assert at_s == pytest.approx(free_s)
        assert timing.queue_s == pytest.approx(begin_s - asked_s, abs=1e-9)
        assert timing.compute_s == takes_s


def test_stages_overlap_works_but_do_not_hasten_one() -> None:
    """Latency: four stages of a second and three hops; then one work a second."""
    out = served(SimCompute(stages=4, stage_hop_s=0.5), [(0.0, 4.0)] * 5)
    assert [at for at, _ in out] == [5.5, 6.5, 7.5, 8.5, 9.5]
    assert [t.queue_s for _, t in out] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_short_work_waits_in_every_stage_for_the_long_one_before_it() -> None:
    """It begins when the first stage is free, and is then held up in each: 2 s a stage, then 0.5 s."""
    out = served(SimCompute(stages=3, stage_hop_s=0.25), [(0.0, 6.0), (0.0, 1.5)])
    assert [at for at, _ in out] == [6.5, 7.0]
    assert [(t.queue_s, t.compute_s) for _, t in out] == [(0.0, 6.0), (2.0, 1.5)]


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5)), min_size=1, max_size=12),
    st.integers(2, 5),
    st.floats(0, 1),
)
def test_stages_are_a_tandem_of_queues(
    works: list[tuple[float, float]], stages: int, stage_hop_s: float
) -> None:
    works = sorted(works)
    left_s = [0.0] * stages  # when the work before left each stage
    out = served(SimCompute(stages=stages, stage_hop_s=stage_hop_s), works)
    for (at_s, timing), (asked_s, takes_s) in zip(out, works, strict=True):
        assert timing.queue_s == pytest.approx(max(left_s[0] - asked_s, 0.0), abs=1e-9)
        arrives_s = asked_s
        for stage in range(stages):
            left_s[stage] = max(arrives_s, left_s[stage]) + takes_s / stages
            arrives_s = left_s[stage] + stage_hop_s
        assert at_s == pytest.approx(left_s[-1])


def test_a_work_that_fails_takes_no_time_and_keeps_nobody() -> None:
    compute = SimCompute(hop_s=1.0)

    def broken() -> None:
        compute.spend(5.0)
        raise OSError("no")

    async def main() -> float:
        with pytest.raises(OSError, match="no"):
            await compute.run(broken)
        assert asyncio.get_running_loop().time() == 0.0
        await compute.run(spending(compute, 2.0))
        return asyncio.get_running_loop().time()

    assert run(main()) == 3.0


def test_a_cancelled_work_is_still_done_first() -> None:
    """As in a thread: nobody waits for it any more, but it is in the way."""
    compute = SimCompute()

    async def main() -> tuple[float, float]:
        first = asyncio.create_task(compute.run(spending(compute, 10.0)))
        await asyncio.sleep(1.0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        _, timing = await compute.run(spending(compute, 1.0))
        return asyncio.get_running_loop().time(), timing.queue_s

    assert run(main()) == (11.0, 9.0)


def test_a_cancelled_work_leaves_no_timer() -> None:
    compute = SimCompute()

    async def main() -> None:
        work = asyncio.create_task(compute.run(spending(compute, 1000.0)))
        await asyncio.sleep(1.0)
        work.cancel()
        await asyncio.wait([work])
        await asyncio.get_running_loop().create_future()  # nothing is left that time could jump to

    with pytest.raises(Deadlock, match="at 1 s"):
        run(main())


def test_a_meter_charges_every_forward_and_draws_residuals() -> None:
    compute = SimCompute()
    cost = ForwardCost(base_s=1.0, per_token_s=0.1, per_context_s=0.01, residuals=(0.5, 2.0))
    exact, noisy = compute.meter(cost), compute.meter(cost, random.Random(1))

    async def spent_s(charge: Callable[[int, int, int, int], None]) -> float:
        def work() -> None:
            charge(5, 1, 100, 0)
            charge(1, 1, 105, 0)

        _, timing = await compute.run(work)
        return timing.compute_s

    async def main() -> tuple[float, set[float]]:
        return await spent_s(exact), {round(await spent_s(noisy), 6) for _ in range(50)}

    plain_s, drawn_s = run(main())
    one, two = 1.0 + 0.5 + 1.0, 1.0 + 0.1 + 1.05
    assert plain_s == pytest.approx(one + two)
    assert drawn_s == {round(a * one + b * two, 6) for a in (0.5, 2.0) for b in (0.5, 2.0)}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"hop_s": -1.0}, "hop_s is -1.0; allowed: 0 or more"),
        ({"stage_hop_s": float("nan")}, "stage_hop_s is nan"),
        ({"stages": 0}, "stages is 0; allowed: 1 or more"),
    ],
)
def test_computes_that_cannot_be(bad: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SimCompute(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("duration_s", [-0.1, float("inf"), float("nan")])
def test_times_that_cannot_be_spent(duration_s: float) -> None:
    with pytest.raises(ValueError, match="a work spends"):
        SimCompute().spend(duration_s)
