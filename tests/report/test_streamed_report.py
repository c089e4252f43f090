"""The report of the overlapping modes: their price, their timelines, their decisions, and many settings."""

from __future__ import annotations

import re

import pytest
from streamed_rows import WAYS, row_of, rows_of
from synthetic_rows import prediction, run_record
from test_report import Outline

from dsdlab.report import timeline
from dsdlab.report.render import page
from dsdlab.sweep.rows import Row

COMMAND = "dsdlab sweep scenarios/latency-tolerance.toml"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of()


@pytest.fixture(scope="module")
def text(rows: list[Row]) -> str:
    return page(run_record(), rows, COMMAND)


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    return Outline(text)


def legend(text: str) -> list[str]:
    section = text[text.index('id="latency"') :]
    return re.findall(r'class="of-series">.*?</svg>([^<]+)</li>', section[: section.index("</ul>")])


def test_every_mode_has_its_curve_and_its_timeline(outline: Outline, text: str) -> None:
    assert outline.sections[:5] == ["latency", "break-even", "controller", "price", "ttft"]
    assert legend(text) == [
        "cloud-ar",
        "cloud-sd (γ = 4)",
        "dsd-sync (γ = 4)",
        "dsd-pipelined (γ = 4, run-ahead 8)",
        "dsd-pipelined (γ = 4)",
        "dsd-stream",
        "dsd-stream + free run",
        "dsd-stream + free run (3 beside)",
        "dsd-adaptive",
    ]
    assert outline.classes.count("theory") == 2 * len(WAYS) + 1, "each mode has a closed form"
    shown = outline.text("timeline")
    for mode in ("dsd-pipelined", "dsd-stream", "dsd-stream + free run", "dsd-adaptive"):
        assert mode in shown
    for mode in ("dsd-pipelined", "dsd-stream", "dsd-adaptive"):
        shape = re.search(rf'class="key m-{mode}"', text)
        assert shape is not None


def test_the_price_is_beside_the_latency(outline: Outline, text: str, rows: list[Row]) -> None:
    section = text[text.index('id="price"') : text.index('id="ttft"')]
    assert section.count('class="chart wide"') == 2
    assert "Target time, ms per committed token" in outline.text("price")
    assert "Drafts wasted per committed token" in outline.text("price")
    wasted = section[section.index("Drafts wasted") :]
    names = re.findall(r'data-name="([^"]+)"', wasted)
    assert "dsd-stream + free run" in names and "cloud-ar" not in names, "who wastes nothing has no curve"
    assert 'data-suffix=""' in wasted and "log scale" not in re.sub("RTT[^<]*", "", wasted)
    cells = outline.text("cells")
    assert "targetwastedexact" in cells
    alone = next(r for r in rows if r.mode == "cloud-ar")
    assert alone.target_ms_per_token is not None
    assert f"{alone.target_ms_per_token:.1f}0.003/3" in cells


def test_rows_of_before_show_no_price() -> None:
    old = rows_of(reps=1, ways=WAYS[:3])
    for row in old:
        row.wasted = row.drafted = row.target_s = None
    outline = Outline(page(run_record(), old, COMMAND))
    assert "price" not in outline.sections
    assert "wasted" not in outline.text("cells")


def test_decisions_are_listed_under_the_timeline(rows: list[Row]) -> None:
    own = [r for r in rows if r.mode in ("cloud-ar", "dsd-adaptive")]
    outline = Outline(page(run_record(), own, COMMAND))
    shown = [r for r in own if r.mode == "dsd-adaptive" and r.rtt_ms == 60]
    assert any(all(f"{t:.2f} s {what}" in outline.text("timeline") for t, what in r.decisions) for r in shown)
    for row in shown:
        row.decisions = [(k / 10, f"plan <b>{k}</b>") for k in range(40)]
    outline = Outline(page(run_record(), own, COMMAND))
    assert "1.10 s plan <b>11</b>and 28 more decisions" in outline.text("timeline")
    assert "plan <b>12</b>" not in outline.text("timeline")


def test_many_settings_are_drawn_as_the_best_of_each_mode() -> None:
    ways = [{"mode": m, "gamma": g} for m in ("cloud-sd", "dsd-sync", "dsd-pipelined") for g in (2, 4, 8)]
    ways += [{"mode": "cloud-ar", "gamma": 0}]
    ways += [{"mode": "dsd-stream", "gamma": 0, "free_run": True, "beside": b} for b in (0, 3)]
    rows = rows_of(ways=ways, reps=2)
    text = page(run_record(), rows, COMMAND)
    assert legend(text) == [
        "cloud-ar",
        "cloud-sd, best γ",
        "dsd-sync, best γ",
        "dsd-pipelined, best γ",
        "dsd-stream + free run",
        "dsd-stream + free run (3 beside)",  # a drafter beside the target is another deployment
    ]
    section = text[text.index('id="latency"') : text.index('id="break-even"')]
    sync = section[section.index('data-name="dsd-sync, best γ"') :]
    drawn = re.findall(r'data-at="(\d+)" data-value="([\d.]+)', sync)[:3]
    for at, value in drawn:
        medians = []
        for gamma in (2, 4, 8):
            own = [r.tpot_ms for r in rows if (r.mode, r.gamma, r.rtt_ms) == ("dsd-sync", gamma, float(at))]
            medians.append(sum(t for t in own if t) / 2)  # of two, the median
        assert float(value) == pytest.approx(min(medians), abs=0.06)
    outline = Outline(text)
    assert outline.text("cells").count("dsd-sync (γ =") == 9, "the tables have all of them"
    assert len(text.encode()) < 400_000


def test_the_simulator_s_line_does_not_go_to_and_fro() -> None:
    """The best window may be the longest at the least RTT, and the variants come in another order."""
    rows = rows_of(ways=[{"mode": "dsd-sync", "gamma": g} for g in range(1, 11)], reps=1)
    for row in rows:
        row.tpot_ms = float(row.gamma if row.rtt_ms > 1 else 20 - row.gamma)
    text = page(run_record(), rows, COMMAND, prediction(rows))
    lines = re.findall(r'd="M([^"]+)" class="sim"', text[text.index('id="latency"') :])
    drawn = [[float(spot.split()[0]) for spot in line.split("L")] for line in lines]
    assert any(len(xs) == 3 for xs in drawn)
    assert all(xs == sorted(xs) for xs in drawn)


def test_a_long_streaming_generation_stays_small_and_readable() -> None:
    row = row_of(300, mode="dsd-stream", gamma=0, free_run=True, tokens=900)
    assert len(row.events) > 3000
    until_s = max(t1 for _, _, t1 in row.events)
    drawn = str(timeline.timeline(row, until_s, width=960, class_="wide", axis=True))
    assert len(drawn) < 60_000
    (ups,) = re.findall(r'd="([^"]+)" class="flight up"', drawn)
    assert 100 < ups.count("M") <= timeline.MOST_FLIGHTS + 1


def test_a_drafter_beside_the_target_is_drawn_beside_it() -> None:
    assert timeline.lane_of("beside", "dsd-stream") == "cloud"
    assert timeline.lane_of("draft", "dsd-stream") == "edge"


def test_arrivals_hold_every_token() -> None:
    for way in WAYS:
        row = row_of(60, **way)
        assert sum(a.tokens for a in timeline.arrivals(row)) >= row.tokens - 1, way
