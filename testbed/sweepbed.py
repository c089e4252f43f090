"""The testbed as the sweep sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure, judge
from dsdlab.sweep.runner import CellFailed, Generation
from testbed.control import NodeError
from testbed.controller import Testbed
from testbed.links.base import percentile

PING_TIMEOUT_S = 60.0
PINGS = (3, 4, 8)
"""Pings of a calibration. The later ones are sent only while the median of all so far contradicts the
profile: a busy processor or a lost packet makes a few of them late, a wrong link most of them."""


class SweepBed:
    """Adapts a Testbed: what only one generation suffers becomes CellFailed, the rest passes through."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime) -> dict[str, Any]:
        if tcp.congestion != "auto" or not tcp.slow_start_after_idle or not tcp.nodelay:
            raise CellFailed("failed", f"TCP regime {tcp.label!r}: the nodes share the host's TCP here")
        await self._testbed.set_link(profile)
        return {}

    async def calibrate(self, profile: LinkProfile) -> LinkMeasure:
        begun_s = asyncio.get_running_loop().time()
        rtts_ms: list[float] = []
        for n in PINGS:
            try:
                rtts_ms += await self._testbed.ping(n, PING_TIMEOUT_S)
            except (NodeError, TimeoutError) as e:
                raise CellFailed(_status(e), f"ping: {e}") from None
            measure = LinkMeasure(
                instrument="frames",
                rtt_p50_ms=percentile(rtts_ms, 0.5),
                rtt_p99_ms=percentile(rtts_ms, 0.99),
                n=len(rtts_ms),
                wall_s=asyncio.get_running_loop().time() - begun_s,
            )
            if not judge(profile, measure):
                break
        return measure

    async def generate(
        self, job: dict[str, Any], timeout_s: float, timeline: Sequence[tuple[float, LinkProfile, str]]
    ) -> Generation:
        base = self._testbed.profile
        changes: list[tuple[float, str]] = []
        steps = asyncio.create_task(self._play(timeline, changes))
        try:
            record = await self._testbed.generate(job, timeout_s)
        except (NodeError, TimeoutError) as e:
            raise CellFailed(_status(e), str(e)) from None
        finally:
            steps.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await steps
            if timeline:
                await self._testbed.set_link(base)
        return Generation(record=record, link_changes=changes)

    async def _play(
        self, timeline: Sequence[tuple[float, LinkProfile, str]], changes: list[tuple[float, str]]
    ) -> None:
        """Change the link by `timeline`, noting when it really was."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        for at_s, profile, what in timeline:
            await asyncio.sleep(begun_s + at_s - loop.time())
            await self._testbed.set_link(profile)
            changes.append((loop.time() - begun_s, what))


def _status(error: NodeError | TimeoutError) -> str:
    timed_out = isinstance(error, TimeoutError) or error.code == "timeout"
    return "timeout" if timed_out else "failed"
