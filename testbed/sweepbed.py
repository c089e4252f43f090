"""The testbed as the sweep sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdlab.scenario import Scenario
from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure
from dsdlab.sweep.runner import CellFailed, Generation
from testbed.control import NodeError
from testbed.controller import NodeLimits, Testbed
from testbed.links.base import Endpoint, LinkError
from testbed.planning import link_token
from testbed.runtimes.base import RuntimeFailed


def bed_of(scenario: Scenario, run_dir: Path, external: Endpoint | None = None) -> Testbed:
    """The testbed that a scenario asks for, not yet started. `external`: a verifier started by hand."""
    nodes = scenario.nodes
    return Testbed(
        run_dir,
        target=scenario.models.target,
        drafter=scenario.models.drafter,
        precision=scenario.models.precision,
        runtime=scenario.run.runtime,
        link=scenario.run.link,
        seed=scenario.run.seed,
        external=external,
        token=link_token(scenario),
        edge_limits=NodeLimits(nodes.edge_cpu_quota, nodes.edge_memory_mb),
        cloud_limits=NodeLimits(nodes.cloud_cpu_quota, nodes.cloud_memory_mb),
        edge_target="edge-sd" in scenario.grid.mode,
        node_args=("--max-context", str(scenario.models.max_context)),
    )


class SweepBed:
    """Adapts a Testbed: what only one generation suffers becomes CellFailed, the rest passes through."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self._early: asyncio.Task[LinkMeasure] | None = None  # a calibration under way

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime) -> dict[str, Any]:
        """The link, the TCP, a fresh connection under both; while it is made, packets measure the link."""
        bed = self._testbed
        if self._early is not None:
            self._early.cancel()
            self._early = None
        try:
            await bed.set_link(profile)
            if tcp != bed.tcp:
                await bed.set_tcp(tcp)
            elif not bed.lab.boxes:
                return {}
            if bed.lab.boxes:
                self._early = asyncio.create_task(bed.calibrate(profile))
                self._early.add_done_callback(_look)
            return {"edge": await bed.reconnect(), **await bed.tcp_state()}
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e) from None
        except (LinkError, RuntimeFailed) as e:
            if not bed.lab.alive:
                raise
            raise CellFailed("failed", str(e)) from None

    async def calibrate(self, profile: LinkProfile) -> LinkMeasure:
        early, self._early = self._early, None
        try:
            return await (early or self._testbed.calibrate(profile))
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e, "calibration: ") from None

    async def generate(
        self, job: dict[str, Any], timeout_s: float, timeline: Sequence[tuple[float, LinkProfile, str]]
    ) -> Generation:
        base = self._testbed.profile
        changes: list[tuple[float, str]] = []
        before = await self._testbed.counters()
        steps = asyncio.create_task(self._play(timeline, changes))
        try:
            record = await self._testbed.generate(job, timeout_s)
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e) from None
        finally:
            steps.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await steps
            if timeline:
                await self._testbed.set_link(base)
        return Generation(record=record, link_changes=changes, link_counters=await self._counted(before))

    async def _failed(self, error: NodeError | TimeoutError, what: str = "") -> CellFailed:
        """What a failure is to the sweep. Raises NodeDied when the verifier has ended, LinkError when one
        elsewhere is gone: then the next generation would fail as this one did."""
        try:
            await self._testbed.check_verifier()
        except LinkError as gone:
            raise LinkError(
                f"{gone}; what is finished is kept, the same command goes on from there"
            ) from None
        return CellFailed(_status(error), f"{what}{error}")

    async def _counted(self, before: dict[str, Any]) -> dict[str, Any]:
        """What went through the link since `before`."""
        after = await self._testbed.counters()
        names = ("packets", "bytes", "drops")
        return {way: {n: after[way][n] - before[way][n] for n in names} for way in before}

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


def _look(early: asyncio.Task[LinkMeasure]) -> None:
    """Nobody may ask for it: when the bed is lost, what is said about that is enough."""
    if not early.cancelled():
        early.exception()


def _status(error: NodeError | TimeoutError) -> str:
    timed_out = isinstance(error, TimeoutError) or error.code == "timeout"
    return "timeout" if timed_out else "failed"
