"""Cell summaries, pairing, completeness, verdict: on rows small enough to check by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dsdlab.sweep import stats
from dsdlab.sweep.calibration import LinkMeasure
from dsdlab.sweep.rows import Row


def row(mode: str, rtt_ms: float, tpot_ms: float | None, **changes: Any) -> Row:
    gamma = 0 if mode == "cloud-ar" else changes.pop("gamma", 4)
    fields: dict[str, Any] = {
        "rep": 0,
        "status": "ok",
        "mode": mode,
        "policy": "static",
        "gamma": gamma,
        "runtime": "process",
        "link": "modelled",
        "rtt_ms": rtt_ms,
        "seed": 1,
        "prompt": "a",
        "tokens": 10,
        "tpot_ms": tpot_ms,
        "ttft_ms": 100.0,
        "exact": True,
        "windows": [] if gamma == 0 else [(gamma, 2)] * 3,
        "tau": 1.0 if gamma == 0 else 3.0,
    }
    fields |= changes
    key = (mode, gamma, rtt_ms, fields.get("rate_mbit"), fields.get("loss_pct"), fields.get("temperature"))
    return Row(cell=f"{key}", **fields)


def measure(rtt_ms: float, **fields: Any) -> LinkMeasure:
    return LinkMeasure(instrument="frames", rtt_p50_ms=rtt_ms, rtt_p99_ms=rtt_ms, n=3, **fields)


def grid(ratios: dict[float, float], mode: str = "dsd-sync", **changes: Any) -> list[Row]:
    """Three prompts of different speed; `ratios` gives each RTT's TPOT over cloud-ar's."""
    rows = []
    for prompt, base in (("a", 40.0), ("b", 50.0), ("c", 80.0)):
        for rtt, ratio in ratios.items():
            rows.append(row("cloud-ar", rtt, base, prompt=prompt, **changes))
            rows.append(row(mode, rtt, base * ratio, prompt=prompt, **changes))
    return rows


def test_cell_summary_by_hand() -> None:
    rows = [
        row("cloud-ar", 10, t, rep=k, link_before=measure(10.0 + k)) for k, t in enumerate((1.0, 2.0, 9.0))
    ]
    (cell,) = stats.summarise(rows).cells
    assert cell.tpot_ms.value == 2.0
    assert cell.tpot_p95_ms == pytest.approx(8.3)
    assert cell.tpot_p99_ms == pytest.approx(8.86)
    assert 1.0 <= cell.tpot_ms.lo <= 2.0 <= cell.tpot_ms.hi <= 9.0
    assert (cell.generations, cell.tokens, cell.exact, cell.rtt_measured_ms) == (3, 30, 3, 11.0)
    assert math.isnan(cell.alpha.value)
    assert cell.ratio is None


def test_one_generation_has_no_interval() -> None:
    (cell,) = stats.summarise([row("cloud-ar", 10, 5.0)]).cells
    assert cell.tpot_ms.value == 5.0
    assert not cell.tpot_ms.has_interval


def test_ratios_are_paired() -> None:
    """Prompts differ by a factor of two, the paired ratio does not: its interval has no width."""
    summary = stats.summarise(grid({10: 0.5}))
    cell = next(c for c in summary.cells if c.variant.mode == "dsd-sync")
    assert cell.ratio is not None
    assert (cell.ratio.value, cell.ratio.lo, cell.ratio.hi, cell.ratio.n) == (0.5, 0.5, 0.5, 3)


def test_pairs_never_cross_conditions() -> None:
    rows = grid({10: 0.5}, rate_mbit=1.0) + grid({10: 2.0})
    ratios = {c.condition.rate_mbit: c.ratio for c in stats.summarise(rows).cells if c.ratio}
    assert {rate: e.value for rate, e in ratios.items() if e} == {1.0: 0.5, None: 2.0}


@pytest.mark.parametrize(
    ("ratios", "state", "rtt_ms"),
    [
        ({0: 0.5, 50: 0.9, 100: 1.4}, "crosses", 60.0),
        ({0: 0.5, 50: 0.6}, "always", math.inf),
        ({0: 1.5, 50: 1.6}, "never", -math.inf),
        ({0: 0.5, 50: 1.2, 60: 0.7, 100: 1.5}, "crosses", 60 + 40 * 0.05 / 0.55),  # noise: one crossing
    ],
)
def test_break_even(ratios: dict[float, float], state: str, rtt_ms: float) -> None:
    (found,) = [b for b in stats.summarise(grid(ratios)).break_evens if b.baseline.mode == "cloud-ar"]
    assert found.state == state
    assert found.rtt_ms == pytest.approx(rtt_ms)
    assert found.lo_ms <= found.rtt_ms <= found.hi_ms


def test_break_even_interval_covers_unequal_prompts_and_leaves_the_grid() -> None:
    rows = []
    for prompt, ratios in (("a", (0.5, 0.7)), ("b", (0.8, 1.2)), ("c", (1.1, 1.5))):
        for rtt, ratio in zip((0.0, 100.0), ratios, strict=True):
            rows.append(row("cloud-ar", rtt, 50.0, prompt=prompt))
            rows.append(row("dsd-sync", rtt, 50 * ratio, prompt=prompt))
    (found,) = stats.summarise(rows).break_evens
    assert found.rtt_ms == pytest.approx(50.0)
    assert (found.lo_ms, found.hi_ms) == (-math.inf, math.inf)
    assert found.interval_text == "[<0, >100]"


def test_baseline_is_taken_with_the_same_window() -> None:
    rows = [
        row(mode, rtt, tpot, gamma=gamma, prompt=prompt)
        for prompt in "ab"
        for rtt in (0.0, 100.0)
        for mode, gamma, tpot in (("cloud-sd", 2, 30.0), ("cloud-sd", 8, 20.0), ("dsd-sync", 8, 25.0))
    ]
    (found,) = stats.summarise(rows).break_evens
    assert (found.baseline.mode, found.baseline.gamma, found.state) == ("cloud-sd", 8, "never")


def test_acceptance_per_position() -> None:
    windows = [(4, 4), (4, 0), (4, 1), (2, 2)]  # tested 4+1+2+2, accepted 7
    summary = stats.summarise([row("dsd-sync", 0, 10.0, windows=windows, tau=2.75, prompt=p) for p in "ab"])
    (found,) = summary.acceptance
    assert found.alpha.value == pytest.approx(7 / 9)
    assert found.tested == (8, 6, 2, 2)
    assert found.per_position == pytest.approx((6 / 8, 4 / 6, 2 / 2, 2 / 2))
    assert found.tau.value == 2.75
    assert found.windows == 8


def test_closed_form_inputs_leave_the_prompt_out() -> None:
    rows = [
        row("cloud-ar", 0, 50.0, windows=[(0, 0)] * 4, t_verify_s=[0.9, 0.05, 0.05, 0.05]),
        row(
            "dsd-sync",
            0,
            50.0,
            windows=[(4, 4), (4, 0), (2, 2)],
            t_draft_s=[0.5, 0.008, 0.004],
            t_verify_s=[0.7, 0.9, 0.06, 0.06],  # one entry more: the prompt has its own
            bytes_up={"Hello": 1000, "Draft": 60},
            bytes_down={"Verdict": 30},
        ),
    ]
    alone, sync = stats.closed_form_inputs(rows)
    assert alone.t_verify_s == pytest.approx(0.05)
    assert alone.tpot_ms([0, 100], None) == pytest.approx([50.0, 50.0])
    assert sync.t_draft_s == pytest.approx(0.002)
    assert sync.t_verify_s == pytest.approx(0.06)
    assert (sync.bytes_up, sync.bytes_down) == (20, 10)
    assert sync.alpha == pytest.approx(6 / 7)
    # (4 × 2 + 60 + 100) / E(4)
    at_100 = sync.tpot_ms([100.0], None)
    assert at_100 == pytest.approx([168 / sync.expected_tau()])
    solved = sync.break_even_ms(50.0, None)
    assert solved == pytest.approx(50 * sync.expected_tau() - 68)


def test_an_incomplete_grid_is_refused_in_one_line() -> None:
    rows = grid({0: 0.5, 50: 0.9})
    rows[3].status, rows[3].tpot_ms = "timeout", None
    with pytest.raises(stats.IncompleteGridError, match=r"1 of 3 in dsd-sync \(γ = 4\) at 50 ms") as error:
        stats.summarise(rows)
    assert "\n" not in str(error.value)
    summary = stats.summarise(rows, allow_incomplete=True)
    assert (summary.generations, summary.failures, len(summary.missing)) == (11, 1, 1)


def test_a_cell_that_never_ran_is_missing_too() -> None:
    rows = grid({0: 0.5})
    expected = {r.cell: 3 for r in rows} | {"feed": 3}
    with pytest.raises(stats.IncompleteGridError, match="3 of 3 in cell feed"):
        stats.summarise(rows, expected=expected)


def test_a_retry_replaces_the_failure_and_nothing_counts_twice() -> None:
    rows = grid({0: 0.5})
    failed = row("dsd-sync", 0, None, status="failed", error="lost", tokens=0)
    summary = stats.summarise([failed, *rows, rows[0]])
    assert (summary.generations, summary.failures, summary.missing) == (6, 0, [])


def test_statistics_do_not_depend_on_row_order() -> None:
    rows = grid({0: 0.5, 50: 0.9, 100: 1.3})
    assert stats.summarise(rows).break_evens == stats.summarise(rows[::-1]).break_evens


def test_exact_line_counts() -> None:
    rows = grid({0: 0.5})
    assert stats.summarise(rows).exact_line == "exact: 6 of 6 generations"
    rows[0].exact, rows[1].exact = False, None
    assert stats.summarise(rows).exact_line == "exact: 4 of 6 generations (1 not compared)"


def test_verdict_says_what_beats_streaming_and_that_the_link_is_modelled() -> None:
    rows = grid({0: 0.5, 50: 0.9, 100: 1.4}) + grid({0: 0.5, 50: 0.5, 100: 0.5}, mode="cloud-sd")
    verdict = stats.summarise(rows).verdict
    assert verdict == (
        "With this pair, dsd-sync (γ = 4) beats streaming from the target up to 60 ms RTT [60, 60]; "
        "cloud-sd (γ = 4) at every RTT tried (0–100 ms) "
        "(modelled link, process runtime; greedy, unlimited rate, no loss)."
    )


def test_verdict_takes_the_best_window_and_the_least_constrained_condition() -> None:
    rows = grid({0: 0.5, 100: 1.5}) + grid({0: 0.5, 100: 1.25}, gamma=8) + grid({0: 2, 100: 3}, loss_pct=2.0)
    verdict = stats.summarise(rows, allow_incomplete=True).verdict
    assert "dsd-sync (γ = 8, best of 2 windows) beats streaming from the target up to 67 ms RTT" in verdict
    assert verdict.endswith("no loss; 1 more condition below).")


def test_verdict_names_the_fastest_of_windows_that_win_everywhere() -> None:
    rows = grid({0: 0.8, 100: 0.9}) + grid({0: 0.5, 100: 0.6}, gamma=8) + grid({0: 0.7, 100: 0.7}, gamma=16)
    verdict = stats.summarise(rows, allow_incomplete=True).verdict
    assert "dsd-sync (γ = 8, best of 3 windows) beats streaming from the target at every RTT" in verdict


def test_verdict_without_baseline_or_success() -> None:
    assert "cloud-ar" in stats.summarise([row("dsd-sync", 0, 10.0)]).verdict
    failed = row("dsd-sync", 0, None, status="failed", error="x")
    assert stats.summarise([failed], allow_incomplete=True).verdict.startswith("No generation")


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no results"):
        stats.summarise([])


def test_json_twin_has_the_promised_fields_and_no_nan() -> None:
    rows = grid({0: 0.5, 50: 0.9})
    rows[0].tpot_ms = None
    out = stats.summary_json("quick", stats.summarise(rows))
    assert json.loads(json.dumps(out, allow_nan=False))["name"] == "quick"
    wanted = {"mode", "policy", "gamma", "runtime", "link", "rtt_ms", "rate_mbit", "loss_pct", "temperature"}
    wanted |= {"tpot_ms", "ttft_ms", "alpha", "tau", "tokens", "exact"}
    assert len(out["cells"]) == 4
    assert all(wanted <= set(cell) for cell in out["cells"])
    assert all(cell["exact"] is True for cell in out["cells"])
