"""Rows of every mode as a sweep would write them: the nodes on a virtual clock, with emulated models."""

from __future__ import annotations

import asyncio
import itertools
import zlib
from contextlib import suppress
from typing import Any

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import run
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.rows import Row
from dsdlab.sweep.runner import _fill

ALPHA, T_DRAFT_S, BASE_S, ROW_S = 0.8, 0.005, 0.049, 0.001
"""A target of 50 ms for one row and 1 ms for each draft more."""

WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "cloud-ar", "gamma": 0},
    {"mode": "cloud-sd", "gamma": 4},
    {"mode": "dsd-sync", "gamma": 4},
    {"mode": "dsd-pipelined", "gamma": 4},
    {"mode": "dsd-pipelined", "gamma": 4, "run_ahead": 8},
    {"mode": "dsd-stream", "gamma": 0},
    {"mode": "dsd-stream", "gamma": 0, "free_run": True},
    {"mode": "dsd-stream", "gamma": 0, "free_run": True, "beside": 3},
    {"mode": "dsd-adaptive", "gamma": 0, "policy": "adaptive"},
)


def record_of(rtt_ms: float, *, seed: int = 1, tokens: int = 120, **way: Any) -> GenerationRecord:
    """One generation."""

    async def main() -> GenerationRecord:
        cloud, edge = SimCompute(), SimCompute()

        def drafter(compute: SimCompute) -> ModelDrafter:
            profile = EmulatedProfile(base_s=T_DRAFT_S, alpha=ALPHA)
            return ModelDrafter(EmulatedEngine(profile, wait=compute.spend))

        target = EmulatedEngine(EmulatedProfile(base_s=BASE_S, per_token_s=ROW_S), wait=cloud.spend)
        here, there = SimLink(LinkProfile(rtt_ms=rtt_ms), seed).pair()
        verifier = VerifierNode(target, cloud, drafter=drafter(cloud))

        async def dial() -> Channel:
            return here

        async def serve() -> None:
            with suppress(ChannelClosed):
                await verifier.serve(there)

        node = DrafterNode(dial, edge, drafter=drafter(edge))
        serving = asyncio.create_task(serve())
        await node.connect()
        request = GenerationRequest(
            prompt_ids=(5, 3, 9), sampling=Sampling(seed=seed), max_new_tokens=tokens, **way
        )
        record = await node.generate(request)
        await node.disconnect()
        await serving
        await verifier.close()
        return record

    return run(main())


def row_of(rtt_ms: float, *, rep: int = 0, tokens: int = 120, **way: Any) -> Row:
    """The same, as a row."""
    record = record_of(rtt_ms, seed=rep + 1, tokens=tokens, **way)
    row = Row(
        cell=f"{zlib.crc32(f'{rtt_ms} {way}'.encode()):08x}", rep=rep, status="ok", runtime="process",
        link="modelled", rtt_ms=rtt_ms, seed=rep + 1, prompt=f"p{rep}", **{"policy": "static", **way},
        started_at="2025-06-01T12:00:00+00:00", wall_s=9.0, generate_s=8.0, overhead_s=1.0,
    )  # fmt: skip
    _fill(row, record, record.ids)
    return row


def rows_of(
    *, rtts_ms: tuple[float, ...] = (1, 60, 200), reps: int = 3, tokens: int = 120, ways: Any = WAYS
) -> list[Row]:
    """A grid of them."""
    return [
        row_of(rtt, rep=rep, tokens=tokens, **way)
        for rep, rtt, way in itertools.product(range(reps), rtts_ms, ways)
    ]
