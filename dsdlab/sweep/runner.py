"""Run a plan on a bed: one generation after the other, each row safe on disk before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from dsdlab.nodes.record import GenerationRecord
from dsdlab.scenario import Scenario
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.plan import Job, sampling_json
from dsdlab.sweep.rows import Row
from dsdlab.sweep.store import Store

PINGS = 3


class CellFailed(Exception):
    """One generation failed; the bed goes on. `status` is the row's: "failed" or "timeout"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bed(Protocol):
    """What the runner needs of a testbed."""

    async def set_link(self, profile: LinkProfile) -> None:
        """Change the link for what is sent from now on."""

    async def ping(self, n: int) -> list[float]:
        """Round trips over the nodes' own path, in ms. Raises CellFailed."""

    async def generate(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One generation's record. Raises CellFailed."""


OnRow = Callable[[Row], None]


def link_profile(job: Job) -> LinkProfile:
    """The link that a cell asks for."""
    cell = job.cell
    return LinkProfile(
        rtt_ms=cell.rtt_ms,
        rate_up_mbit=cell.rate_mbit,
        rate_down_mbit=cell.rate_mbit,
        loss_pct=cell.loss_pct,
    )


async def run_jobs(
    scenario: Scenario,
    jobs: Sequence[Job],
    references: Mapping[str, Sequence[int]],
    bed: Bed,
    store: Store,
    on_row: OnRow,
) -> None:
    """Run `jobs` in order; a generation that fails becomes a row too.

    Raises what the bed raises when it is lost as a whole; finished rows are on disk by then.
    """
    for job in jobs:
        row = await _run_one(scenario, job, references, bed)
        store.append(row)
        on_row(row)


async def _run_one(scenario: Scenario, job: Job, references: Mapping[str, Sequence[int]], bed: Bed) -> Row:
    cell = job.cell
    begun_s = time.monotonic()
    row = Row(
        cell=job.cell_id,
        rep=job.rep,
        status="ok",
        mode=cell.mode,
        policy=cell.policy,
        gamma=cell.gamma,
        runtime=scenario.run.runtime,
        link=scenario.run.link,
        rtt_ms=cell.rtt_ms,
        rate_mbit=cell.rate_mbit,
        loss_pct=cell.loss_pct,
        temperature=cell.temperature,
        seed=job.sampling.seed,
        prompt=job.prompt.key,
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
    try:
        await bed.set_link(link_profile(job))
        rtts_ms = sorted(await bed.ping(PINGS))
        row.rtt_measured_ms = rtts_ms[len(rtts_ms) // 2]
        answer = await bed.generate(
            {
                "mode": cell.mode,
                "policy": cell.policy,
                "gamma": cell.gamma,
                "prompt_ids": list(job.prompt_ids),
                "sampling": sampling_json(job.sampling),
                "max_new_tokens": scenario.workload.max_new_tokens,
                "stop_at_eos": scenario.workload.stop_at_eos,
            },
            scenario.run.timeout_s,
        )
        record = msgspec.convert(answer, GenerationRecord)
        _fill(row, record, references.get(job.reference))
    except CellFailed as e:
        row.status = "timeout" if e.status == "timeout" else "failed"
        row.error = str(e)
    row.wall_s = time.monotonic() - begun_s
    return row


def _fill(row: Row, record: GenerationRecord, reference: Sequence[int] | None) -> None:
    """Copy a record's measures into its row."""
    row.tokens = len(record.ids)
    row.ids = record.ids
    row.finish = record.finish
    row.ttft_ms = 1e3 * record.ttft_s
    row.tpot_ms = _ms(record.tpot_s)
    row.itl_p95_ms = _ms(record.itl_s(0.95))
    row.alpha, row.tau = record.alpha, record.tau
    row.exact = None if reference is None else list(reference) == record.ids
    row.windows = record.windows
    row.t_draft_s, row.t_verify_s, row.t_queue_s = record.t_draft_s, record.t_verify_s, record.t_queue_s
    row.bytes_up, row.bytes_down = record.bytes_up, record.bytes_down
    row.events = record.events
    row.reconnects, row.stale_frames = record.reconnects, record.stale_frames


def _ms(t_s: float | None) -> float | None:
    return None if t_s is None else 1e3 * t_s
