"""The testbed as the sweep sees it: pings in doubt, changes in mid-generation, and what is put back."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure
from dsdlab.sweep.runner import CellFailed
from testbed.control import NodeDied, NodeError
from testbed.controller import Testbed
from testbed.links.base import LinkError
from testbed.sweepbed import SweepBed

BASE = LinkProfile(rtt_ms=20)


class FakeTestbed:
    """Answers what `SweepBed.generate` and `Testbed.calibrate` ask."""

    def __init__(self, rtts_ms: list[float] | None = None) -> None:
        self.profiles = [BASE, BASE]
        self.lab = SimpleNamespace(boxes=None)
        self.tcp: TcpRegime | None = None
        self.dialled: list[tuple[int, TcpRegime | None]] = []
        self.packets, self.external = False, None
        self.gone: LinkError | None = None
        self.rtts_ms = rtts_ms or []
        self.applied: list[tuple[float, LinkProfile]] = []
        self.packets = 0
        self.lasts_s = 0.0
        self.fails: Exception | None = None

    async def set_link(self, profile: LinkProfile, edge: int = 0) -> None:
        self.profiles[edge] = profile
        self.applied.append((asyncio.get_running_loop().time(), profile))

    async def check_verifier(self) -> None:
        if self.gone is not None:
            raise self.gone

    async def set_tcp(self, regime: TcpRegime) -> None:
        await asyncio.sleep(0.01)
        self.tcp = regime

    async def tcp_state(self, edge: int = 0) -> dict[str, Any]:
        return {"verifier": {"of": edge}}

    async def reconnect(self, edge: int = 0) -> dict[str, Any]:
        self.dialled.append((edge, self.tcp))
        return {"of": edge}

    async def counters(self, edge: int = 0) -> dict[str, Any]:
        assert edge == 0
        self.packets += 10
        return {"up": {"packets": self.packets, "bytes": 0, "drops": 1}}

    async def ping(self, n: int, edge: int = 0) -> list[float]:
        assert edge == 0
        out, self.rtts_ms = self.rtts_ms[:n], self.rtts_ms[n:]
        return out

    async def calibrate(self, profile: LinkProfile, edge: int = 0) -> LinkMeasure:
        if self.fails is not None:
            raise self.fails
        return await Testbed.calibrate(self, profile, edge)  # type: ignore[arg-type]

    async def generate(self, job: dict[str, Any], timeout_s: float, edge: int = 0) -> dict[str, Any]:
        assert edge == 0
        await asyncio.sleep(self.lasts_s)
        if self.fails is not None:
            raise self.fails
        return {"job": job, "timeout_s": timeout_s}


def bed(fake: FakeTestbed) -> SweepBed:
    return SweepBed(fake)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rtts_ms", "n", "median_ms"),
    [
        ([20.1, 20.2, 20.3], 3, 20.2),
        ([20.1, 90.0, 90.0, 20.2, 20.3, 20.4, 20.5], 7, 20.4),  # two of three were late by chance
        ([25.0] * 15, 15, 25.0),  # a link that is wrong stays wrong
    ],
)
def test_more_pings_only_in_doubt(rtts_ms: list[float], n: int, median_ms: float) -> None:
    measure = asyncio.run(bed(FakeTestbed(rtts_ms)).calibrate(BASE))
    assert (measure.instrument, measure.n, measure.rtt_p50_ms) == ("frames", n, median_ms)
    assert measure.rtt_p99_ms == max(rtts_ms)


def test_the_link_changes_in_time_and_is_put_back() -> None:
    fake = FakeTestbed()
    fake.lasts_s = 0.25
    steps = (
        LinkStep(at_s=0.05, for_s=0.1, changes={"rtt_ms": 90.0}),
        LinkStep(at_s=9, changes={"rtt_ms": 1.0}),
    )

    async def main() -> float:
        begun_s = asyncio.get_running_loop().time()
        done = await bed(fake).generate({"mode": "x"}, 5.0, LinkStep.timeline(BASE, steps))
        assert done.record == {"job": {"mode": "x"}, "timeout_s": 5.0}
        assert done.link_counters == {"up": {"packets": 10, "bytes": 0, "drops": 0}}
        assert [what for _, what in done.link_changes] == ["RTT 90 ms", "end of RTT 90 ms"]
        for (at_s, _), asked_s in zip(done.link_changes, (0.05, 0.15), strict=True):
            assert asked_s <= at_s < asked_s + 0.08
        return begun_s

    begun_s = asyncio.run(main())
    assert [p.rtt_ms for _, p in fake.applied] == [90, 20, 20]
    assert fake.applied[-1][0] - begun_s >= 0.25


def test_the_link_is_put_back_when_the_generation_fails() -> None:
    fake = FakeTestbed()
    fake.lasts_s = 0.05
    fake.fails = NodeError("timeout", "not finished")
    timeline = LinkStep.timeline(BASE, (LinkStep(at_s=0.0, changes={"rtt_ms": 90.0}),))
    with pytest.raises(CellFailed, match="not finished") as caught:
        asyncio.run(bed(fake).generate({}, 1.0, timeline))
    assert caught.value.status == "timeout"
    assert fake.profiles == [BASE, BASE]


def test_without_a_timeline_nothing_is_applied() -> None:
    fake = FakeTestbed()
    assert asyncio.run(bed(fake).generate({}, 1.0, [])).link_changes == []
    assert fake.applied == []


def test_a_calibration_that_fails_is_the_generation_s_not_the_sweep_s() -> None:
    fake = FakeTestbed()
    fake.fails = NodeError("gone", "no connection")
    with pytest.raises(CellFailed, match="no connection"):
        asyncio.run(bed(fake).calibrate(BASE))


def test_a_verifier_that_is_gone_ends_the_sweep() -> None:
    fake = FakeTestbed()
    fake.fails, fake.gone = (
        NodeError("timeout", "not finished"),
        LinkError("no verifier at ws://far:1/ (refused)"),
    )
    for work in (bed(fake).calibrate(BASE), bed(fake).generate({}, 1.0, [])):
        with pytest.raises(LinkError, match=r"no verifier at ws://far:1/ .*; what is finished is kept"):
            asyncio.run(work)


def test_a_measurement_that_nobody_waits_for_dies_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """The bed is lost while the link is measured and the connection made: one of the two says so."""
    fake = FakeTestbed()
    fake.lab, fake.tcp = SimpleNamespace(boxes=True), TcpRegime()
    fake.fails = NodeDied("edge0 was killed")

    async def reconnect(edge: int = 0) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        raise NodeDied(f"edge{edge} was killed")

    fake.reconnect = reconnect  # type: ignore[method-assign]

    async def main() -> None:
        with pytest.raises(NodeDied):
            await bed(fake).set_link(BASE, TcpRegime())

    asyncio.run(main())
    gc.collect()
    assert caplog.records == []


def test_edges_dial_anew_once_the_tcp_of_all_has_changed() -> None:
    """Several at once, on links that are only modelled: there a connection stays while its regime does."""
    fake, first, second = FakeTestbed(), TcpRegime(), TcpRegime(nodelay=False)
    fake.tcp = first

    async def main() -> None:
        sweepbed = bed(fake)

        async def together(tcp: TcpRegime) -> list[dict[str, Any]]:
            return await asyncio.gather(*(sweepbed.set_link(LinkProfile(rtt_ms=5), tcp, e) for e in (0, 1)))

        assert await together(first) == [{}, {}]
        assert await together(second) == [{"edge": {"of": e}, "verifier": {"of": e}} for e in (0, 1)]
        assert sorted(fake.dialled, key=lambda d: d[0]) == [(0, second), (1, second)]
        assert await together(second) == [{}, {}]
        assert await sweepbed.set_link(BASE, first, 0) == {"edge": {"of": 0}, "verifier": {"of": 0}}
        assert await sweepbed.set_link(BASE, first, 1) == {"edge": {"of": 1}, "verifier": {"of": 1}}
        assert await sweepbed.set_link(BASE, first, 1) == {}

    asyncio.run(main())
    assert [p.rtt_ms for p in fake.profiles] == [20, 20]


def test_a_wan_is_pinged_without_an_expectation() -> None:
    fake = FakeTestbed([80.0] * 30)
    fake.external = "somewhere"
    measure = asyncio.run(bed(fake).calibrate(BASE))
    assert (measure.instrument, measure.n, measure.rtt_p50_ms) == ("frames", 9, 80.0)
