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
        edge_models=(scenario.models.edge_target, scenario.models.edge_drafter),
        profiles=[LinkProfile()] * max(scenario.grid.edges),
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
        self._early: dict[int, asyncio.Task[LinkMeasure]] = {}  # by edge: a calibration under way
        self._first = testbed.tcp  # the regime of every edge's first connection
        self._dialled: dict[int, TcpRegime] = {}  # by edge: that of the present one
        self._regime = asyncio.Lock()

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime, edge: int = 0) -> dict[str, Any]:
        """The link, the TCP, a fresh connection under both; while it is made, packets measure the link."""
        bed = self._testbed
        if (early := self._early.pop(edge, None)) is not None:
            early.cancel()
        try:
            await bed.set_link(profile, edge)
            async with self._regime:  # it is one for all nodes
                if tcp != bed.tcp:
                    await bed.set_tcp(tcp)
            if tcp == self._dialled.get(edge, self._first) and not bed.lab.boxes:
                return {}
            self._dialled[edge] = tcp
            if bed.lab.boxes:
                self._early[edge] = early = asyncio.create_task(bed.calibrate(profile, edge))
                early.add_done_callback(_look)
            return {"edge": await bed.reconnect(edge), **await bed.tcp_state(edge)}
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e) from None
        except (LinkError, RuntimeFailed) as e:
            if not bed.lab.alive:
                raise
            raise CellFailed("failed", str(e)) from None

    async def calibrate(self, profile: LinkProfile, edge: int = 0) -> LinkMeasure:
        early = self._early.pop(edge, None)
        try:
            return await (early or self._testbed.calibrate(profile, edge))
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e, "calibration: ") from None

    async def generate(
        self,
        job: dict[str, Any],
        timeout_s: float,
        timeline: Sequence[tuple[float, LinkProfile, str]],
        edge: int = 0,
    ) -> Generation:
        base = self._testbed.profiles[edge]
        changes: list[tuple[float, str]] = []
        before = await self._testbed.counters(edge)
        steps = asyncio.create_task(self._play(timeline, changes, edge))
        try:
            record = await self._testbed.generate(job, timeout_s, edge)
        except (NodeError, TimeoutError) as e:
            raise await self._failed(e) from None
        finally:
            steps.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await steps
            if timeline:
                await self._testbed.set_link(base, edge)
        counters = await self._counted(before, edge)
        return Generation(record=record, link_changes=changes, link_counters=counters)

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

    async def _counted(self, before: dict[str, Any], edge: int) -> dict[str, Any]:
        """What went through the link since `before`."""
        after = await self._testbed.counters(edge)
        names = ("packets", "bytes", "drops")
        return {way: {n: after[way][n] - before[way][n] for n in names} for way in before}

    async def _play(
        self, timeline: Sequence[tuple[float, LinkProfile, str]], changes: list[tuple[float, str]], edge: int
    ) -> None:
        """Change the link by `timeline`, noting when it really was."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        for at_s, profile, what in timeline:
            await asyncio.sleep(begun_s + at_s - loop.time())
            await self._testbed.set_link(profile, edge)
            changes.append((loop.time() - begun_s, what))


def _look(early: asyncio.Task[LinkMeasure]) -> None:
    """Nobody may ask for it: when the bed is lost, what is said about that is enough."""
    if not early.cancelled():
        early.exception()


def _status(error: NodeError | TimeoutError) -> str:
    timed_out = isinstance(error, TimeoutError) or error.code == "timeout"
    return "timeout" if timed_out else "failed"
