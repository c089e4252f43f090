"""The testbed as the sweep sees it."""

from __future__ import annotations

from typing import Any

from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.runner import CellFailed
from testbed.control import NodeError
from testbed.controller import Testbed

PING_TIMEOUT_S = 60.0


class SweepBed:
    """Adapts a Testbed: what only one generation suffers becomes CellFailed, the rest passes through."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed

    async def set_link(self, profile: LinkProfile) -> None:
        if profile != self._testbed.profile:
            await self._testbed.set_link(profile)

    async def ping(self, n: int) -> list[float]:
        try:
            return await self._testbed.ping(n, PING_TIMEOUT_S)
        except (NodeError, TimeoutError) as e:
            raise CellFailed(_status(e), f"ping: {e}") from None

    async def generate(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            return await self._testbed.generate(job, timeout_s)
        except (NodeError, TimeoutError) as e:
            raise CellFailed(_status(e), str(e)) from None


def _status(error: NodeError | TimeoutError) -> str:
    timed_out = isinstance(error, TimeoutError) or error.code == "timeout"
    return "timeout" if timed_out else "failed"
