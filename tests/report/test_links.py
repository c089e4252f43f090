"""What the report says of the network: calibration, TCP, exclusions, changes on the timeline."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_rows import generation, grid, netem_sweep, partition_sweep, run_record
from test_report import Outline

from dsdlab.report import timeline
from dsdlab.report.links import link_table, tcp_table
from dsdlab.report.render import page
from dsdlab.sweep import stats
from dsdlab.sweep.rows import Row

COMMAND = "dsdlab sweep scenarios/lossy.toml"


@pytest.fixture(scope="module")
def lossy() -> Outline:
    return Outline(page(run_record("lossy"), netem_sweep(), COMMAND))


def test_calibration_by_hand() -> None:
    rows = stats.counted_rows(netem_sweep())
    links = {(link.network, link.rtt_ms): link for link in link_table(rows)}
    assert len(links) == 3 * 2
    link = links["20 Mbit/s, 2 % loss, cubic", 20.0]
    mine = [r for r in rows if (r.loss_pct, r.loss_burst, r.rtt_ms) == (2.0, 1.0, 20.0)]
    measures = [m for r in mine for m in (r.link_before, r.link_after) if m is not None]
    assert (link.generations, link.calibrations, link.instrument) == (8, 16, "UDP probes")
    assert (link.up.sent, link.up.lost) == (1600, sum(m.up.lost for m in measures))
    share, low, high = link.up.loss_pct
    assert share == pytest.approx(100 * link.up.lost / 1600)
    assert low < share < high
    assert link.up.packets == sum(r.link_counters["up"]["packets"] for r in mine)
    assert link.down.drops == sum(r.link_counters["down"]["drops"] for r in mine)
    assert link.up.rate_asked_mbit == 20
    assert link.up.rate_mbit == pytest.approx(20, rel=0.02)
    bursty = links["20 Mbit/s, 2 % loss, bursts of 4, cubic", 20.0]
    assert bursty.up.bursts[1] < 4 < bursty.up.bursts[2]
    assert sum(link.excluded for link in links.values()) == 6


def test_calibration_tcp_and_exclusions_are_on_the_page(lossy: Outline) -> None:
    links = lossy.text("links")
    for words in (
        "netem, netns: 20 Mbit/s, 2 % loss, bursts of 4, cubic", "UDP probes", "of 1,600", "20 → 20.0",
        "dropped up", "congestion cubic, slow start after idle yes, RTO floor 200 ms, NODELAY yes",
        "edge: congestion cubic, nodelay yes, rto ms 220", "offloads on none",
    ):  # fmt: skip
        assert words in links, words
    exclusions = lossy.text("exclusions")
    assert "6 of 48 generations finished over a link that was not what was asked" in exclusions
    assert "after: RTT is 32.06 ms, asked 20.08 ± 0.50" in exclusions
    assert "loss is" in exclusions
    assert "(the first of 4 alike)" in exclusions
    assert lossy.text("excluded") == "6 of 48 generations excluded"
    assert re.fullmatch(r"measuring \d\d % of wall time; 0\.20 s between generations \(median\)",
                        lossy.text("overhead"))  # fmt: skip
    assert lossy.text("exact") == "exact: 48 of 48 generations"


def test_conditions_have_panels_of_their_own_without_excluded_points(lossy: Outline) -> None:
    assert lossy.classes.count("chart") == 2 * 2 * 3
    cells = 3 * 2 * 2 - 1  # one is wholly excluded: in no curve …
    assert lossy.classes.count("pt") == 2 * 2 * cells
    assert "bursts of 4" in lossy.text("cells")  # … and listed


def test_a_clean_sweep_says_so_and_an_old_one_too() -> None:
    rows = grid(rtts_ms=(20.0,), reps=1)
    clean = Outline(page(run_record(), rows, COMMAND))
    assert "every link was what was asked" in clean.text("exclusions")
    assert "excluded" not in clean.text("cells")
    for row in rows:
        row.link_before = row.link_after = None
        row.overhead_s = 0.0
    old = Outline(page(run_record(), rows, COMMAND))
    assert "no link was measured" in old.text("exclusions")
    assert "overhead" not in old.ids


def test_tcp_table_ranges_and_words() -> None:
    rows = partition_sweep()
    found = {regime.asked[0]: regime for regime in tcp_table(rows)}
    assert set(found) == {"congestion cubic", "congestion bbr"}
    assert found["congestion bbr"].generations == 4
    assert "edge: congestion bbr" in found["congestion bbr"].read_back[0]
    rows[0].tcp["read_back"] = {"edge": {"congestion": "reno"}}
    (one,) = (r for r in tcp_table(rows) if r.asked[0] == "congestion cubic")
    assert "congestion reno or cubic" in one.read_back[0], "what differs from what was asked must be seen"
    assert tcp_table(grid(rtts_ms=(20.0,), reps=1)) == []


def test_a_partition_is_on_the_timeline() -> None:
    outline = Outline(page(run_record("partition"), partition_sweep(), COMMAND))
    assert outline.classes.count("cut") == 2 * 2 * 3 + 1  # band, beginning and end; and the legend's sample
    assert "shift" not in outline.classes
    assert outline.classes.count("stall") >= 2 * 2
    text = outline.text("timeline")
    assert "s without a token" in text
    assert "nothing got through" in text
    assert outline.text("latency").count("partition from 1 s for 5 s") >= 2
    assert "closed form" not in outline.text("latency"), "it knows no link that changes"
    assert "theory" not in outline.classes


def changed(*changes: tuple[float, str]) -> Row:
    row = generation("dsd-sync", 4, 40.0)
    row.link_changes = list(changes)
    return row


def test_changes_are_paired_with_their_ends() -> None:
    row = changed(
        (3.0, "RTT 9 ms; end of partition"),
        (1.0, "partition"),
        (4.0, "partition"),
        (5.0, "loss 5 %"),
        (7.0, "end of loss 5 %"),
    )
    found = timeline.changes_of(row)
    inf = float("inf")
    assert [(c.t0_s, c.t1_s, c.label, c.cut) for c in found] == [
        (1.0, 3.0, "partition", True), (3.0, inf, "RTT 9 ms", False), (4.0, inf, "partition", True),
        (5.0, 7.0, "loss 5 %", False),
    ]  # fmt: skip


@given(
    st.lists(st.tuples(st.floats(0, 9), st.sampled_from(["partition", "end of partition", "a; end of b"])))
)
def test_any_changes_can_be_drawn(changes: list[Any]) -> None:
    row = changed(*changes)
    for change in timeline.changes_of(row):
        assert change.t0_s <= change.t1_s
    until_s = timeline.span_s([row])
    assert until_s > 0
    drawn = timeline.timeline(row, until_s, width=960, class_="wide", axis=True)
    assert not re.search(r'="-?(nan|inf)', drawn)


def test_stalls_are_gaps_out_of_the_ordinary() -> None:
    assert timeline.stalls_of(generation("dsd-sync", 4, 200.0)) == [], "a long round trip is no stall"
    cut = generation("dsd-sync", 4, 40.0, tokens=96, cut_s=(1.0, 2.0))
    ((begun_s, ended_s),) = timeline.stalls_of(cut)
    assert begun_s < 1.02
    assert ended_s == pytest.approx(2.8)


def test_tokens_that_arrive_together_are_counted_together() -> None:
    cut = generation("cloud-ar", 0, 40.0, tokens=60, cut_s=(1.0, 2.0))
    at_once = sum(a.t_s == pytest.approx(2.8) for a in timeline.arrivals(cut))
    assert at_once > 10
    drawn = timeline.timeline(cut, 4.0, width=960, class_="wide", axis=True)
    assert f">+{at_once}</text>" in drawn


def test_the_axis_reaches_past_the_last_change() -> None:
    cut = generation("dsd-sync", 4, 40.0, tokens=160, cut_s=(3.0, 4.0))
    plain_s = timeline.span_s([cut])
    cut.link_changes = [(3.0, "partition"), (4.0, "end of partition")]
    assert timeline.span_s([cut]) > 4.8 > plain_s


def test_a_long_generation_stays_small() -> None:
    long = generation("cloud-ar", 0, 40.0, tokens=2000)
    long.link_changes = [(90.0, "RTT 80 ms")]
    until_s = timeline.span_s([long])
    assert until_s > 90
    drawn = timeline.timeline(long, until_s, width=960, class_="wide", axis=True)
    assert len(drawn) < 60_000
    assert drawn.count("<path") < 10
