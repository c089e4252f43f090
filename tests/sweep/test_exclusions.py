"""Generations whose link was out of tolerance: exact or not they count, fast or slow they do not."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from test_stats import grid, row

from dsdlab.sweep import stats
from dsdlab.sweep.calibration import DirectionMeasure, LinkMeasure
from dsdlab.sweep.exclusions import excluded_line, unique_rows
from dsdlab.sweep.keys import condition_of
from dsdlab.sweep.rows import Row

WHY = "after: RTT is 61.00 ms, asked 50.00 ± 1.50"


def test_excluded_times_enter_nothing_and_the_text_counts() -> None:
    rows = grid({10: 0.5, 50: 0.9})
    clean = stats.summarise(rows)
    for one in rows[1:4:2]:  # two dsd-sync generations that a broken link made fast
        one.tpot_ms, one.ttft_ms, one.windows, one.excluded = 0.1, 0.1, [(4, 4)] * 3, WHY
    summary = stats.summarise(rows)
    assert summary.exact_line == "exact: 12 of 12 generations"
    assert (summary.generations, summary.excluded, summary.failures, summary.missing) == (12, 2, 0, [])
    for before, after in zip(clean.cells, summary.cells, strict=True):
        assert after.tpot_ms.lo >= 20, "an excluded time is in an estimate"
        assert after.alpha.value == pytest.approx(before.alpha.value, nan_ok=True)
        if before.ratio is not None and after.ratio is not None:
            assert after.ratio.value == before.ratio.value
            assert after.ratio.n == 2
        assert after.generations == 3
    assert [b.rtt_ms for b in summary.break_evens] == [b.rtt_ms for b in clean.break_evens]
    assert all(
        i.alpha == j.alpha or i.alpha != i.alpha for i, j in zip(summary.inputs, clean.inputs, strict=True)
    )
    assert summary.exclusions == [
        ("dsd-sync (γ = 4) at 10 ms, greedy, unlimited rate, no loss", WHY, 1),
        ("dsd-sync (γ = 4) at 50 ms, greedy, unlimited rate, no loss", WHY, 1),
    ]
    (note,) = summary.notes
    assert note.startswith("excluded: 2 of 12 generations (link out of tolerance): dsd-sync (γ = 4) at 10 ms")
    out = stats.summary_json("s", summary)
    assert json.loads(json.dumps(out, allow_nan=False))["excluded"] == 2
    assert sorted(c["excluded"] for c in out["cells"]) == [0, 0, 1, 1]
    assert all({"jitter_ms", "loss_burst", "tcp", "excluded"} <= set(c) for c in out["cells"])


def test_a_wholly_excluded_cell_is_listed_and_drawn_nowhere() -> None:
    rows = grid({10: 0.5, 50: 0.9, 100: 1.4})
    for one in rows:
        if (one.mode, one.rtt_ms) == ("dsd-sync", 50):
            one.excluded = WHY
    summary = stats.summarise(rows)
    cell = next(c for c in summary.cells if (c.variant.mode, c.rtt_ms) == ("dsd-sync", 50))
    assert (cell.generations, cell.excluded, cell.tpot_ms.n, cell.ratio) == (3, 3, 0, None)
    (found,) = summary.break_evens
    assert found.rtt_ms == pytest.approx(10 + 90 * 0.5 / 0.9)
    assert summary.exclusions[0].generations == 3
    for one in rows:
        one.excluded = WHY
    assert stats.summarise(rows).verdict.startswith("The link of every generation was out of tolerance")


def test_reasons_that_differ_in_numbers_are_told_once() -> None:
    rows = grid({10: 0.5})
    for index, one in enumerate(r for r in rows if r.mode == "dsd-sync"):
        one.excluded = f"after: RTT is {61 + index}.5 ms, asked 50.00 ± 1.50"
    (found,) = stats.summarise(rows).exclusions
    assert (found.reason, found.generations) == ("after: RTT is 61.5 ms, asked 50.00 ± 1.50", 3)
    line = excluded_line([found] * 5, 40)
    assert line.startswith("excluded: 15 of 40 generations")
    assert line.endswith("(and 2 like it) | and 2 more in the report")
    assert excluded_line([], 40) == ""


def test_which_of_several_tries_counts() -> None:
    failed = row("cloud-ar", 10, None, status="failed", error="x")
    excluded = row("cloud-ar", 10, 1.0, excluded=WHY)
    later = row("cloud-ar", 10, 2.0, excluded=WHY)
    good, second = row("cloud-ar", 10, 3.0), row("cloud-ar", 10, 4.0)
    for tries, kept in (
        ([failed, excluded], excluded),
        ([excluded, failed], excluded),
        ([excluded, later], later),
        ([failed, excluded, good, later, second, failed], good),
    ):
        assert unique_rows(tries) == [kept]
        assert unique_rows(tries)[0] is kept


def test_a_differing_text_is_not_forgotten_when_its_generation_is_tried_again() -> None:
    wrong = row("cloud-ar", 10, 1.0, excluded=WHY, exact=False)
    summary = stats.summarise([wrong, row("cloud-ar", 10, 2.0)])
    assert summary.exact_line == "exact: 1 of 2 generations"
    assert summary.exact < summary.compared
    assert (
        stats.summarise([row("cloud-ar", 10, 1.0, excluded=WHY), row("cloud-ar", 10, 2.0)]).generations == 1
    )


def probed(lost: int, sent: int) -> LinkMeasure:
    way = DirectionMeasure(sent=sent, lost=lost)
    return LinkMeasure(instrument="packets", rtt_p50_ms=10, rtt_p99_ms=10, n=sent - lost, up=way)


def test_a_cell_with_wrong_losses_is_excluded_as_a_whole() -> None:
    rows = grid({10: 0.5}, loss_pct=1.0)
    for one in rows:
        lost = 40 if one.mode == "dsd-sync" else 10
        one.link_before = one.link_after = probed(lost, 1000)
    summary = stats.summarise(rows)
    cells = {c.variant.mode: c for c in summary.cells}
    assert (cells["cloud-ar"].excluded, cells["dsd-sync"].excluded) == (0, 3)
    (found,) = summary.exclusions
    assert found.reason.startswith("loss is 240 of 6000 probes (4 %), asked 1 %")
    assert all(one.excluded == "" for one in rows), "the rows themselves stay as they are"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jitter_ms": 5.0}, "jitter 5 ms"),
        ({"loss_pct": 1.0, "loss_burst": 4.0}, "1 % loss, bursts of 4"),
        ({"tcp": {"asked": {"congestion": "bbr", "rto_min_ms": 40.0}}}, "bbr, RTO floor 40 ms"),
        ({"link_steps": "RTT 150 ms from 2 s"}, "RTT 150 ms from 2 s"),
    ],
)
def test_what_differs_is_never_compared(change: dict[str, Any], words: str) -> None:
    plain, other = row("cloud-ar", 10, 40.0), row("dsd-sync", 10, 20.0, **change)
    assert condition_of(plain) != condition_of(other)
    assert condition_of(other).label.endswith(words)
    summary = stats.summarise([plain, other], allow_incomplete=True)
    assert len(summary.conditions) == 2
    assert [c.ratio for c in summary.cells] == [None, None]


def test_overhead() -> None:
    times = ((8.0, 2.0), (1.0, 1.0), (1.0, 7.0))
    rows = [
        row("cloud-ar", 10, 1.0, rep=k, generate_s=g, overhead_s=o, wall_s=g + o)
        for k, (g, o) in enumerate(times)
    ]
    summary = stats.summarise(rows)
    assert summary.measuring_share == pytest.approx(0.5)
    assert summary.notes == ["measuring 50 % of wall time; 2.00 s between generations (median)"]
    assert stats.summarise([row("cloud-ar", 10, 1.0)]).notes == [], "earlier versions did not say"


def test_rows_of_an_earlier_version_are_read() -> None:
    line = (
        b'{"cell":"c","rep":0,"status":"ok","mode":"cloud-ar","policy":"static","gamma":0,"runtime":"process",'
        b'"link":"modelled","rtt_ms":5.0,"loss_pct":1.0,"tokens":3,"tpot_ms":4.0,"rtt_measured_ms":5.1}'
    )
    old = msgspec.json.decode(line, type=Row)
    assert old.usable
    assert (old.rtt_measured_ms, old.profile.loss_pct, old.tcp_asked.label) == (None, 1.0, "")
    assert stats.summarise([old]).cells[0].tpot_ms.value == 4.0
    for bad in (b'"link_asked":{"rtt_ms":-1}', b'"link_asked":{"speed":1}', b'"tcp":{"asked":{"x":1}}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(line[:-1] + b"," + bad + b"}", type=Row)
