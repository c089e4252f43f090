"""Two nodes on one machine, against cases reckoned by hand."""

from __future__ import annotations

import asyncio

import pytest

from dsdlab.models.compute import Timing
from dsdlab.sim.contention import SharedCompute, share
from dsdlab.sim.costs import Contention, ForwardCost
from dsdlab.sim.loop import run


def pair(one: float, other: float) -> tuple[SharedCompute, SharedCompute]:
    nodes = SharedCompute(one), SharedCompute(other)
    share(*nodes)
    return nodes


async def work(node: SharedCompute, at_s: float, *durations_s: float) -> list[tuple[float, Timing]]:
    """Works one after the other from `at_s` on: when each was over, and its timing."""
    clock = asyncio.get_running_loop()
    await asyncio.sleep(at_s)
    out = []
    for duration_s in durations_s:
        _, timing = await node.run(lambda d=duration_s: node.spend(d))  # type: ignore[misc]
        out.append((clock.time(), timing))
    return out


def test_alone_nothing_is_slower() -> None:
    async def main() -> None:
        one, _ = pair(2.0, 3.0)
        ((ended_s, timing),) = await work(one, 1.0, 0.5)
        assert ended_s == pytest.approx(1.5)
        assert timing == Timing(0.0, pytest.approx(0.5))

    run(main())


def test_only_the_time_together_is_slower() -> None:
    """One has 10 s from 0 on, the other 2 s from 4 on; together one takes twice as long, the other 1.5 times.

    The other is done at 4 + 3 = 7. One has done 4 by then and 3/2 until 7; 4.5 are left: done at 11.5.
    """

    async def main() -> None:
        one, other = pair(2.0, 1.5)
        long, short = await asyncio.gather(work(one, 0.0, 10.0), work(other, 4.0, 2.0))
        assert short[0][0] == pytest.approx(7.0)
        assert long[0][0] == pytest.approx(11.5)
        assert long[0][1].compute_s == pytest.approx(11.5)

    run(main())


def test_many_short_works_beside_a_long_one() -> None:
    """A drafter that never rests: the long work takes its factor longer, each short one its own."""

    async def main() -> None:
        target, drafter = pair(1.25, 1.6)
        long, short = await asyncio.gather(work(target, 0.0, 0.1), work(drafter, 0.0, *[0.01] * 5))
        assert short[-1][0] == pytest.approx(5 * 0.016)
        # together for 0.08 s, in which 0.064 of the 0.1 were done; alone for the rest
        assert long[0][0] == pytest.approx(0.08 + 0.036)

    run(main())


def test_works_of_one_node_wait_for_each_other() -> None:
    async def main() -> None:
        one, other = pair(2.0, 2.0)
        tasks = [asyncio.create_task(work(one, 0.0, 1.0)) for _ in range(3)]
        ends = sorted(out[0][0] for out in await asyncio.gather(*tasks))
        assert ends == pytest.approx([1.0, 2.0, 3.0])
        assert (await work(other, 0.0, 1.0))[0][1].queue_s == 0.0

    run(main())


def test_a_cancelled_work_keeps_its_place() -> None:
    async def main() -> None:
        one, _ = pair(2.0, 2.0)
        first = asyncio.create_task(work(one, 0.0, 1.0))
        second = asyncio.create_task(work(one, 0.1, 1.0))
        await asyncio.sleep(0.5)
        first.cancel()
        assert (await second)[0][0] == pytest.approx(2.0)

    run(main())


def test_who_waited_for_the_one_before_has_not_rested() -> None:
    """A forward after 0.5 s of rest takes 0.3 s longer; the second of two in a row has had none."""
    cost = ForwardCost(base_s=1.0, after_idle=((0.5, 0.3),))

    async def main() -> None:
        one, _ = pair(2.0, 2.0)
        charge = one.meter(cost)

        async def forward() -> float:
            _, timing = await one.run(lambda: charge(1, 1, 0, 0))
            return timing.compute_s

        assert await forward() == pytest.approx(1.3)  # nothing ran before it
        before = asyncio.create_task(forward())
        await asyncio.sleep(0.6)
        assert [await forward(), await before] == pytest.approx([1.0, 1.0])
        await asyncio.sleep(0.5)
        assert await forward() == pytest.approx(1.3)

    run(main())


@pytest.mark.parametrize("field", ["target", "drafter"])
def test_no_node_is_faster_for_company(field: str) -> None:
    with pytest.raises(ValueError, match=f"contention.{field} is 0.9; allowed: 1 to 100"):
        Contention(**{field: 0.9})
