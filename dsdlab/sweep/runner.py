"""Run a plan on a bed: one generation after the other, each row safe on disk before the next begins.

Where a cell asks for several edges, as many generations run at once, one on each; their rows are written
together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Protocol

import msgspec

from dsdlab.nodes.record import GenerationRecord
from dsdlab.scenario import Cell, Scenario
from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure, judge, judge_drift, judge_tcp
from dsdlab.sweep.plan import Job, batches_of, sampling_json
from dsdlab.sweep.rows import Row
from dsdlab.sweep.store import Store

RETRIES = 2  # a link that is not what was asked is set and measured again so often

Timeline = Sequence[tuple[float, LinkProfile, str]]
"""What `LinkStep.timeline` gives: (s since the request, the whole profile from then on, for people)."""


class CellFailed(Exception):
    """One generation failed; the bed goes on. `status` is the row's: "failed" or "timeout"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Generation(msgspec.Struct, kw_only=True):
    """What a bed hands back of one generation."""

    record: dict[str, Any]
    link_changes: list[tuple[float, str]] = msgspec.field(default_factory=list)
    """(s since the request, what), as really applied."""
    link_counters: dict[str, Any] = msgspec.field(default_factory=dict)
    """Packets and drops of each direction's qdisc during it; empty where there are none."""


class Bed(Protocol):
    """What the runner needs of a testbed. Every method raises CellFailed for what one generation suffers.

    edge: which edge node's; calls for different ones may run at once.
    """

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime, edge: int = 0) -> dict[str, Any]:
        """Change the link for what is sent from now on, and the TCP of both ends; that TCP as read back."""

    async def calibrate(self, profile: LinkProfile, edge: int = 0) -> LinkMeasure:
        """Measure the link over the nodes' own path. `profile` is what it is meant to be."""

    async def generate(
        self, job: dict[str, Any], timeout_s: float, timeline: Timeline, edge: int = 0
    ) -> Generation:
        """One generation, the link changing by `timeline`; afterwards it is as it was before."""


OnRow = Callable[[Row], None]


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
    for batch in batches_of(jobs):
        for row in await _run_batch(scenario, batch, references, bed):
            store.append(row)
            on_row(row)


async def _run_batch(
    scenario: Scenario, jobs: Sequence[Job], references: Mapping[str, Sequence[int]], bed: Bed
) -> list[Row]:
    """One generation, or as many at once as there are edges.

    They all begin together and end each on its own; each link is measured before the first begins, and after
    the last has ended. A load that was not whole is no load: when one fails, all do.
    """
    begun_s = time.monotonic()
    runs = [_Run(scenario, job, bed, edge) for edge, job in enumerate(jobs)]
    for step in (_Run.prepare, _Run.generate, _Run.finish):
        await _all_or_none([asyncio.create_task(step(run)) for run in runs])
        failed = next((run for run in runs if run.row.status != "ok"), None)
        if failed is not None:
            for run in runs:
                if run.row.status == "ok":
                    run.row.status = failed.row.status
                    run.row.error = f"another of {len(runs)} edges failed: {failed.row.error}"
            break
    for run in runs:
        row = run.row
        if row.status == "ok" and run.record is not None:
            _fill(row, run.record, references.get(run.job.reference))
        row.wall_s = time.monotonic() - begun_s
        row.overhead_s = row.wall_s - row.generate_s
    return [run.row for run in runs]


async def _all_or_none(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for all; when one fails, or this is cancelled, end the others first."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise


class _Run:
    """One generation on one edge, step by step; what it suffers is told in its row."""

    def __init__(self, scenario: Scenario, job: Job, bed: Bed, edge: int) -> None:
        self.job, self.row = job, _blank_row(scenario, job)
        self.record: GenerationRecord | None = None
        self._scenario, self._bed, self._edge = scenario, bed, edge
        self._profile = scenario.profile_of(job.cell)
        self._reasons: list[str] = []  # why the link was not what was asked

    def _failed(self, e: CellFailed) -> None:
        self.row.status = "timeout" if e.status == "timeout" else "failed"
        self.row.error = str(e)

    def _note(self, when: str, reason: str) -> None:
        if reason:
            self._reasons.append(f"{when}: {reason}")
            self.row.excluded = "; ".join(self._reasons)

    async def prepare(self) -> None:
        try:
            tcp = self.job.cell.tcp
            why = await _set_and_calibrate(self._bed, self._profile, tcp, self.row, self._edge)
            self._note("before", why)
        except CellFailed as e:
            self._failed(e)

    async def generate(self) -> None:
        job, scenario, row = self.job, self._scenario, self.row
        message = {
            **asked_of(job.cell),
            "prompt_ids": list(job.prompt_ids),
            "sampling": sampling_json(job.sampling),
            "max_new_tokens": scenario.workload.max_new_tokens,
            "stop_at_eos": scenario.workload.stop_at_eos,
        }
        timeline = LinkStep.timeline(self._profile, scenario.steps)
        asked_s = time.monotonic()
        try:
            done = await self._bed.generate(message, scenario.run.timeout_s, timeline, self._edge)
            self.record = msgspec.convert(done.record, GenerationRecord)
            row.link_changes, row.link_counters = done.link_changes, done.link_counters
        except CellFailed as e:
            self._failed(e)
        finally:
            row.generate_s = time.monotonic() - asked_s

    async def finish(self) -> None:
        self._note("after", await _calibrate_after(self._bed, self._profile, self.row, self._edge))


def _blank_row(scenario: Scenario, job: Job) -> Row:
    """What was asked; nothing has come of it yet."""
    cell, tcp = job.cell, job.cell.tcp
    return Row(
        cell=job.cell_id,
        rep=job.rep,
        status="ok",
        mode=cell.mode,
        policy=cell.policy,
        gamma=cell.gamma,
        run_ahead=cell.run_ahead,
        free_run=cell.free_run,
        beside=cell.beside,
        edges=cell.edges,
        runtime=scenario.run.runtime,
        link=scenario.run.link,
        rtt_ms=cell.rtt_ms,
        rate_mbit=cell.rate_mbit,
        loss_pct=cell.loss_pct,
        loss_burst=cell.loss_burst,
        jitter_ms=cell.jitter_ms,
        link_asked=scenario.profile_of(cell).to_dict(),
        link_steps=describe_steps(scenario.steps),
        tcp={"asked": asdict(tcp), "read_back": {}},
        temperature=cell.temperature,
        seed=job.sampling.seed,
        prompt=job.prompt.key,
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def asked_of(cell: Cell) -> dict[str, Any]:
    """How a cell's generations are to be decoded, for the control message."""
    return {
        "mode": cell.mode,
        "policy": cell.policy,
        "gamma": cell.gamma,
        "run_ahead": cell.run_ahead,
        "free_run": cell.free_run,
        "beside": cell.beside,
    }


async def _set_and_calibrate(bed: Bed, profile: LinkProfile, tcp: TcpRegime, row: Row, edge: int) -> str:
    """Put the link into force until it is what was asked; why it is not, at last. Raises CellFailed."""
    for left in reversed(range(RETRIES + 1)):
        row.tcp["read_back"] = await bed.set_link(profile, tcp, edge)
        row.link_before = _storable(await bed.calibrate(profile, edge))
        found = (judge_tcp(tcp, row.tcp["read_back"]), _judge(profile, row, row.link_before))
        reason = "; ".join(filter(None, found))
        if not reason or not left:
            break
    return reason


async def _calibrate_after(bed: Bed, profile: LinkProfile, row: Row, edge: int) -> str:
    """Why the link was not what was asked when the generation had ended.

    No second chance here: what the link did while it was in use is the question. Only where it was changed
    meanwhile and is now set back, frames that a thin rate made wait may still have to pass. The generation is
    good, so a measurement that fails excludes it and does not fail it.
    """
    for left in reversed(range(RETRIES + 1 if row.link_changes else 1)):
        try:
            row.link_after = _storable(await bed.calibrate(profile, edge))
        except CellFailed as e:
            return f"not measured ({e})"
        reason = _judge(profile, row, row.link_after)
        if not reason or not left:
            break
    return reason


def _judge(profile: LinkProfile, row: Row, measure: LinkMeasure) -> str:
    """Against what was asked; a WAN, of which nothing is asked, against what it was before."""
    if row.link == "wan":
        return judge_drift(row.link_before or measure, measure)
    return judge(profile, measure)


def _storable(measure: LinkMeasure) -> LinkMeasure:
    """JSON has no NaN, which is what the quantiles of no round trips may be."""
    if isfinite(measure.rtt_p50_ms) and isfinite(measure.rtt_p99_ms):
        return measure
    return msgspec.structs.replace(measure, rtt_p50_ms=0.0, rtt_p99_ms=0.0, n=0)


def describe_steps(steps: Sequence[LinkStep]) -> str:
    """For people: "RTT 150 ms from 2 s, partition from 4 s for 1 s"; empty without steps."""
    return ", ".join(
        f"{s.label} from {s.at_s:g} s" + ("" if s.for_s is None else f" for {s.for_s:g} s") for s in steps
    )


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
    row.drafted, row.wasted = record.drafted, record.wasted
    row.target_s, row.beside_s, row.decisions = record.target_s, record.beside_s, record.decisions
    row.bytes_up, row.bytes_down = record.bytes_up, record.bytes_down
    row.events = record.events
    row.reconnects, row.stale_frames = record.reconnects, record.stale_frames


def _ms(t_s: float | None) -> float | None:
    return None if t_s is None else 1e3 * t_s
