"""One generation on a bed of lies: when is a link set again, what is excluded, what does the row say?"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsdlab.nodes.record import GenerationRecord
from dsdlab.scenario import Scenario
from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure
from dsdlab.sweep.plan import plan_jobs, remaining
from dsdlab.sweep.rows import Row
from dsdlab.sweep.runner import CellFailed, Generation, run_jobs
from dsdlab.sweep.store import Store, read_rows
from dsdlab.sweep.workload import Prompt

RAW: dict[str, Any] = {
    "name": "s",
    "grid": {"mode": ["cloud-ar"], "rtt_ms": [50]},
    "link": {"steps": [{"at_s": 2, "for_s": 1, "rtt_ms": 150}]},
    "tcp": {"rto_min_ms": [40]},
    "run": {"repeats": 1},
}


def measure(rtt_ms: float, n: int = 3) -> LinkMeasure:
    return LinkMeasure(instrument="frames", rtt_p50_ms=rtt_ms, rtt_p99_ms=rtt_ms, n=n)


class FakeBed:
    """Measures what it is told to, in order; the last measure is repeated."""

    def __init__(self, *rtts_ms: float | CellFailed, changes: bool = False) -> None:
        self.rtts_ms = list(rtts_ms)
        self.changes = [(2.001, "RTT 150 ms")] if changes else []
        self.said: list[str] = []
        self.timeline: Sequence[tuple[float, LinkProfile, str]] = ()
        self.generate_fails: CellFailed | None = None

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime, edge: int = 0) -> dict[str, Any]:
        assert edge == 0
        self.said.append("set")
        assert profile == LinkProfile(rtt_ms=50, rto_min_ms=tcp.rto_min_ms)
        return {"congestion": "cubic", "rto_min_ms": tcp.rto_min_ms}

    async def calibrate(self, profile: LinkProfile, edge: int = 0) -> LinkMeasure:
        assert edge == 0
        self.said.append("calibrate")
        assert profile.rtt_ms == 50
        found = self.rtts_ms.pop(0) if len(self.rtts_ms) > 1 else self.rtts_ms[0]
        if isinstance(found, CellFailed):
            raise found
        return measure(found) if math.isfinite(found) else measure(found, 0)

    async def generate(
        self,
        job: dict[str, Any],
        timeout_s: float,
        timeline: Sequence[tuple[float, LinkProfile, str]],
        edge: int = 0,
    ) -> Generation:
        assert edge == 0
        self.said.append("generate")
        assert (job["mode"], job["prompt_ids"], timeout_s) == ("cloud-ar", [1], 120.0)
        self.timeline = timeline
        await asyncio.sleep(0.02)
        if self.generate_fails is not None:
            raise self.generate_fails
        record = GenerationRecord(ids=[1, 2], finish="length", ttft_s=0.1, commits=[(0.1, 1), (0.2, 1)])
        return Generation(
            record=msgspec.to_builtins(record), link_changes=self.changes,
            link_counters={"up": {"packets": 7, "bytes": 900, "drops": 0}},
        )  # fmt: skip


def run(bed: FakeBed, folder: Path, raw: dict[str, Any] = RAW) -> Row:
    scenario = Scenario.model_validate(raw)
    jobs = plan_jobs(scenario, [Prompt("p", "x")], [[1]])
    with Store(folder) as store:
        asyncio.run(run_jobs(scenario, jobs, {jobs[0].reference: [1, 2]}, bed, store, lambda _: None))
    rows, problems = read_rows(folder)
    assert problems == []
    assert bool(remaining(jobs, rows)) is not rows[0].usable, "excluded and failed ones are tried again"
    return rows[0]


def test_a_good_link_is_measured_before_and_after(tmp_path: Path) -> None:
    bed = FakeBed(50.2, 50.7, changes=True)
    row = run(bed, tmp_path)
    assert bed.said == ["set", "calibrate", "generate", "calibrate"]
    assert (row.status, row.excluded, row.exact, row.usable) == ("ok", "", True, True)
    assert row.link_before is not None and row.link_after is not None
    assert (row.link_before.rtt_p50_ms, row.link_after.rtt_p50_ms, row.rtt_measured_ms) == (50.2, 50.7, 50.2)
    assert row.profile == LinkProfile(rtt_ms=50, rto_min_ms=40)
    assert row.tcp_asked == TcpRegime(rto_min_ms=40)
    assert row.tcp["read_back"] == {"congestion": "cubic", "rto_min_ms": 40}
    assert row.link_steps == "RTT 150 ms from 2 s for 1 s"
    assert [(t, p.rtt_ms) for t, p, _ in bed.timeline] == [(2, 150), (3, 50)]
    assert row.link_changes == [(2.001, "RTT 150 ms")]
    assert row.link_counters == {"up": {"packets": 7, "bytes": 900, "drops": 0}}
    assert row.generate_s >= 0.02
    assert row.wall_s == pytest.approx(row.generate_s + row.overhead_s)


def test_a_wrong_link_is_set_again_at_most_twice(tmp_path: Path) -> None:
    bed = FakeBed(61.0, 61.0, 50.0)
    assert run(bed, tmp_path / "mended").usable
    assert bed.said == ["set", "calibrate"] * 3 + ["generate", "calibrate"]
    bed = FakeBed(61.0, 62.0, 63.0, 50.0)
    row = run(bed, tmp_path / "not")
    assert bed.said == ["set", "calibrate"] * 3 + ["generate", "calibrate"]
    assert row.excluded == "before: RTT is 63.00 ms, asked 50.00 ± 2.00"
    assert (row.status, row.exact, row.ids) == ("ok", True, [1, 2])


def test_a_link_that_went_wrong_has_no_second_chance(tmp_path: Path) -> None:
    bed = FakeBed(50.0, 47.9)
    row = run(bed, tmp_path / "after")
    assert bed.said == ["set", "calibrate", "generate", "calibrate"]
    assert row.excluded == "after: RTT is 47.90 ms, asked 50.00 ± 2.00"
    row = run(FakeBed(9.0), tmp_path / "both")
    assert row.excluded.startswith("before: RTT is 9.00 ms")
    assert "; after: RTT is 9.00 ms" in row.excluded


def test_what_a_thin_rate_held_back_may_pass_before_a_link_is_judged(tmp_path: Path) -> None:
    bed = FakeBed(50.0, 2172.1, 112.4, 50.1, changes=True)
    row = run(bed, tmp_path / "drained")
    assert bed.said == ["set", "calibrate", "generate"] + ["calibrate"] * 3
    assert (row.excluded, row.link_after and row.link_after.rtt_p50_ms) == ("", 50.1)
    row = run(FakeBed(50.0, 2172.1, 112.4, 112.4, 50.1, changes=True), tmp_path / "not")
    assert row.excluded == "after: RTT is 112.40 ms, asked 50.00 ± 2.00"


def test_measurements_that_fail(tmp_path: Path) -> None:
    lost = CellFailed("timeout", "ping: nobody answers")
    row = run(FakeBed(lost), tmp_path / "before")
    assert (row.status, row.error, row.link_before) == ("timeout", "ping: nobody answers", None)
    row = run(FakeBed(50.0, lost), tmp_path / "after")
    assert (row.status, row.exact) == ("ok", True)
    assert row.excluded == "after: not measured (ping: nobody answers)"
    row = run(FakeBed(math.nan, math.nan, math.nan, 50.0), tmp_path / "nothing")  # JSON has no NaN
    assert row.excluded == "before: no probe came back"
    assert row.rtt_measured_ms is None


def test_a_generation_that_fails_is_a_row_with_its_time(tmp_path: Path) -> None:
    bed = FakeBed(50.0)
    bed.generate_fails = CellFailed("failed", "refused")
    row = run(bed, tmp_path)
    assert bed.said == ["set", "calibrate", "generate"]
    assert (row.status, row.error, row.link_after) == ("failed", "refused", None)
    assert row.generate_s >= 0.02


WAN: dict[str, Any] = {
    "name": "s",
    "grid": {"mode": ["cloud-ar"], "rtt_ms": [50]},
    "run": {"repeats": 1, "link": "wan", "verifier": "ws://far:1/"},
}


def test_of_a_wan_nothing_is_asked_but_that_it_holds_still(tmp_path: Path) -> None:
    bed = FakeBed(83.0, 90.0)
    row = run(bed, tmp_path / "still", WAN)
    assert bed.said == ["set", "calibrate", "generate", "calibrate"]
    assert (row.link, row.excluded, row.rtt_measured_ms) == ("wan", "", 83.0)
    row = run(FakeBed(83.0, 92.0), tmp_path / "moved", WAN)
    assert row.excluded == "after: RTT is 92.00 ms, was 83.00 ± 8.30"
    bed = FakeBed(math.nan)
    assert (
        run(bed, tmp_path / "dead", WAN).excluded == "before: no probe came back; after: no probe came back"
    )
    assert bed.said == ["set", "calibrate"] * 3 + ["generate", "calibrate"]


class CrowdedBed:
    """Two edges: notes who does what while whom; one of them may fail."""

    def __init__(self, fails_on: str = "") -> None:
        self.said: list[tuple[str, int]] = []
        self.fails_on = fails_on
        self.busy = self.most_busy = 0

    async def _step(self, what: str, edge: int) -> None:
        self.said.append((what, edge))
        await asyncio.sleep(0.01 + 0.01 * edge)
        if self.fails_on == what and edge == 1:
            raise CellFailed("timeout", "not finished")

    async def set_link(self, profile: LinkProfile, tcp: TcpRegime, edge: int = 0) -> dict[str, Any]:
        assert (profile.rtt_ms, tcp) == (50, TcpRegime())
        await self._step("set", edge)
        return {}

    async def calibrate(self, profile: LinkProfile, edge: int = 0) -> LinkMeasure:
        await self._step("calibrate", edge)
        return measure(profile.rtt_ms + edge / 10)

    async def generate(
        self, job: dict[str, Any], timeout_s: float, timeline: Sequence[Any], edge: int = 0
    ) -> Generation:
        assert timeout_s and not timeline
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        await self._step("generate", edge)
        self.busy -= 1
        ids = [job["sampling"]["seed"] % 1000]
        return Generation(record=msgspec.to_builtins(GenerationRecord(ids=ids, finish="length")))


def crowd(bed: CrowdedBed, folder: Path) -> list[Row]:
    raw = {
        "name": "s",
        "grid": {"mode": ["cloud-ar"], "rtt_ms": [50], "edges": [2]},
        "run": {"repeats": 2},
        "sampling": {"temperature": [0.5]},
    }
    scenario = Scenario.model_validate(raw)
    jobs = plan_jobs(scenario, [Prompt("p", "x"), Prompt("q", "y")], [[1], [2]])
    references = {job.reference: [job.sampling.seed % 1000] for job in jobs}
    with Store(folder) as store:
        asyncio.run(run_jobs(scenario, jobs, references, bed, store, lambda _: None))
    return read_rows(folder)[0]


def test_edges_generate_at_once_over_links_of_their_own(tmp_path: Path) -> None:
    bed = CrowdedBed()
    rows = crowd(bed, tmp_path)
    assert bed.most_busy == 2
    assert [(r.rep, r.prompt, r.edges, r.status, r.exact) for r in rows] == [
        (0, "p", 2, "ok", True),
        (1, "q", 2, "ok", True),
    ]
    before = [r.link_before.rtt_p50_ms for r in rows if r.link_before]
    assert before == [50.0, 50.1], "each has the measures of its own link"
    last_begun = max(k for k, (what, _) in enumerate(bed.said) if what == "generate")
    assert all(what == "calibrate" for what, _ in bed.said[last_begun + 1 :])
    assert len(bed.said) == 2 * 4


@pytest.mark.parametrize("what", ["set", "generate"])
def test_a_load_that_is_not_whole_counts_for_nobody(tmp_path: Path, what: str) -> None:
    rows = crowd(CrowdedBed(fails_on=what), tmp_path)
    assert [(r.status, r.error) for r in rows] == [
        ("timeout", "another of 2 edges failed: not finished"),
        ("timeout", "not finished"),
    ]
    assert not any(r.ids for r in rows)
