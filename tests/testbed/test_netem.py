"""Real netem, in a User-Mode Linux router where the host has none: links are what they are asked to be."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from bed_tools import run
from needs import need, need_netns, need_uml

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.emulated import EmulatedEngine, parse_profile
from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure, burst_interval, judge, judge_loss
from testbed.controller import Testbed
from testbed.host import docker_problem
from testbed.links.base import Endpoint, LinkError
from testbed.links.uml import UmlBoxes
from testbed.runtimes.base import NodeError
from testbed.sweepbed import SweepBed

TARGET = "emulated:base_s=0.02,per_token_s=0.0005"
DRAFTER = "emulated:base_s=0.002,alpha=0.8"

pytestmark = pytest.mark.netem


def bed(run_dir: Path, **options: Any) -> Testbed:
    options = {"runtime": "netns", "link": "netem-uml", **options}
    return Testbed(run_dir, target=TARGET, drafter=DRAFTER, **options)


def job(n: int, mode: str = "dsd-sync") -> dict[str, Any]:
    return {"mode": mode, "gamma": 4, "prompt_ids": [1, 2, 3], "max_new_tokens": n, "stop_at_eos": False}


def alone(n: int) -> list[int]:
    engine = EmulatedEngine(parse_profile(TARGET.removeprefix("emulated:")), wait=lambda _: None)
    return generate_alone(engine, [1, 2, 3], Sampling(), n, ())


def test_links_are_what_was_asked(tmp_path: Path) -> None:
    """A short form of `make bench-links`."""
    need_uml()

    async def body() -> None:
        async with bed(tmp_path) as testbed:
            for profile in (
                LinkProfile(rtt_ms=1),
                LinkProfile(rtt_ms=100),
                LinkProfile(rtt_ms=40, up_fraction=0.25),
                LinkProfile(rtt_ms=20, rate_up_mbit=1, rate_down_mbit=10),
                LinkProfile(rtt_ms=50, jitter_ms=10),
            ):
                await testbed.set_link(profile)
                measure = await testbed.calibrate()
                if judge(profile, measure):  # a hiccup of the machine is no property of the link
                    measure = await testbed.calibrate()
                assert judge(profile, measure) == ""
                assert measure.up.lost == measure.down.lost == measure.up.reordered == 0
                assert measure.up.delay_p50_ms is not None
                queueing = 0.0 if profile.rate_up_mbit is None else 106 * 8 / (profile.rate_up_mbit * 1e3)
                asked = profile.rtt_ms * profile.up_fraction + queueing
                assert measure.up.delay_p50_ms == pytest.approx(asked, abs=0.5 + profile.jitter_ms / 4)

    run(body())


def test_loss_bursts_and_reordering(tmp_path: Path) -> None:
    need_uml()

    async def body() -> None:
        async with bed(tmp_path) as testbed:
            for profile in (
                LinkProfile(rtt_ms=2, loss_pct=5),
                LinkProfile(rtt_ms=2, loss_pct=10, loss_burst=4),
            ):
                await testbed.set_link(profile)
                before = await testbed.counters()
                measure = await testbed.calibrate(n=2000)
                assert judge_loss(profile, [measure], level=0.9999) == ""
                low, high = burst_interval(measure.up.bursts + measure.down.bursts, level=0.9999)
                # independent losses come in runs of 1 / (1 - p) too
                assert low <= max(profile.loss_burst, 1 / (1 - profile.loss_pct / 100)) <= high
                after = await testbed.counters()
                assert (
                    after["up"]["drops"] - before["up"]["drops"] >= measure.up.lost
                )  # the qdisc says so too
            assert judge_loss(LinkProfile(loss_pct=1), [measure]) != ""
            await testbed.set_link(LinkProfile(rtt_ms=40, reorder_pct=5))
            assert (await testbed.calibrate(n=400)).up.reordered > 0

    run(body())


@pytest.mark.parametrize("runtime", ["netns", pytest.param("docker", marks=pytest.mark.docker)])
def test_eight_edges_with_eight_profiles_at_the_same_time(tmp_path: Path, runtime: str) -> None:
    need_uml()
    if runtime == "docker":
        need(docker_problem())
    profiles = [
        LinkProfile(rtt_ms=1),
        LinkProfile(rtt_ms=5),
        LinkProfile(rtt_ms=20, up_fraction=0.8),
        LinkProfile(rtt_ms=50),
        LinkProfile(rtt_ms=100, rate_up_mbit=10, rate_down_mbit=50),
        LinkProfile(rtt_ms=200),
        LinkProfile(rtt_ms=30, rate_up_mbit=2, rate_down_mbit=5),
        LinkProfile(rtt_ms=10, loss_pct=2),
    ]

    async def body() -> None:
        async with bed(tmp_path, profiles=profiles, runtime=runtime) as testbed:
            measures: list[LinkMeasure] = []
            for _ in range(3):  # eight probers share two cores with the router
                measures = list(await asyncio.gather(*(testbed.calibrate(edge=i) for i in range(8))))
                wrong = [judge(p, m) for p, m in zip(profiles, measures, strict=True)]
                if not any(wrong):
                    break
            assert wrong == [""] * 8
            assert judge_loss(profiles[7], measures[7:]) == ""
            records = await asyncio.gather(*(testbed.generate(job(12), 60, edge=i) for i in range(8)))
            assert [record["ids"] for record in records] == [alone(12)] * 8

    run(body())


def test_a_partition_in_mid_generation(tmp_path: Path) -> None:
    """Nothing passes for a while, then a burst of loss: a stall that is seen, and the same tokens."""
    need_uml()
    base = LinkProfile(rtt_ms=20)
    steps = (
        LinkStep(at_s=0.5, for_s=2.0, changes={"partitioned": True}),
        LinkStep(at_s=3.0, for_s=1.0, changes={"loss_pct": 5.0}),
    )

    async def body() -> None:
        async with bed(tmp_path) as testbed:
            sweepbed = SweepBed(testbed)
            await sweepbed.set_link(base, TcpRegime())
            done = await sweepbed.generate(job(150), 60, LinkStep.timeline(base, steps))
            assert done.record["ids"] == alone(150)
            assert [what for _, what in done.link_changes] == [
                "partition", "end of partition", "loss 5 %", "end of loss 5 %",
            ][: len(done.link_changes)]  # fmt: skip
            assert len(done.link_changes) >= 2
            assert done.link_changes[0][0] == pytest.approx(0.5, abs=0.4)
            times = [when for when, _ in done.record["commits"]]
            assert max(later - earlier for earlier, later in itertools.pairwise(times)) > 1.5
            assert done.link_counters["up"]["packets"] > 0
            assert done.link_counters["up"]["drops"] + done.link_counters["down"]["drops"] > 0
            # and the link is as before
            assert judge(base, await sweepbed.calibrate(base)) == ""

    run(body())


def test_connections_can_be_reset(tmp_path: Path) -> None:
    need_uml()

    async def body() -> None:
        async with bed(tmp_path, profiles=[LinkProfile(rtt_ms=10)]) as testbed:
            generation = asyncio.create_task(testbed.generate(job(60), 60))
            await asyncio.sleep(0.5)
            assert await testbed.drop_connections() >= 1
            record = await generation
            assert record["ids"] == alone(60)
            assert record["reconnects"] >= 1

    run(body())


def test_a_router_that_dies_in_mid_run(tmp_path: Path) -> None:
    need_uml()

    async def body() -> None:
        async with bed(tmp_path) as testbed:
            assert isinstance(testbed.lab.boxes, UmlBoxes)
            pid = testbed.lab.boxes.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(LinkError, match=r"link netem-uml: router was killed by SIGKILL"):
                for _ in range(100):
                    await testbed.set_link(LinkProfile(rtt_ms=5))
            assert not testbed.lab.alive
            with pytest.raises(NodeError, match="no probe to UDP"):
                await testbed.calibrate()

    run(body())


def test_what_a_link_refuses(tmp_path: Path) -> None:
    need_uml()

    async def body() -> None:
        async with bed(tmp_path) as testbed:
            with pytest.raises(LinkError, match="reorder_pct"):
                await testbed.set_link(LinkProfile(rtt_ms=5, reorder_pct=1, rate_up_mbit=1))
            with pytest.raises(LinkError, match="the verifier has one address"):
                await testbed.lab.links[0].set_target(Endpoint("10.0.0.1", 80))
            assert (await testbed.generate(job(4), 20))["ids"] == alone(4)

    run(body())


def test_no_router_without_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.links.uml.KERNEL", "no-such-kernel")

    async def body() -> None:
        with pytest.raises(LinkError, match=r"link netem-uml: no no-such-kernel \(apt install"):
            async with bed(tmp_path):
                raise AssertionError("started")

    need_netns()
    run(body())
