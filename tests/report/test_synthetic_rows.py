"""The statistics find again what the synthetic rows were played from."""

from __future__ import annotations

import pytest
from synthetic_rows import TRUTH, grid

from dsdlab.sim import theory
from dsdlab.sweep import stats

PROMPTS = tuple(f"prompt-{k}" for k in range(16))


@pytest.fixture(scope="module")
def summary() -> stats.Summary:
    return stats.summarise(grid(prompts=PROMPTS, reps=2, tokens=96))


def test_inputs_are_recovered(summary: stats.Summary) -> None:
    found = {i.variant.mode: i for i in summary.inputs}
    assert found["cloud-ar"].t_verify_s == pytest.approx(TRUTH.t_verify1_s, rel=0.02)
    assert found["dsd-sync"].t_draft_s == pytest.approx(TRUTH.t_draft_s, rel=0.02)
    assert found["dsd-sync"].t_verify_s == pytest.approx(TRUTH.t_verify_s(4), rel=0.02)
    assert found["edge-sd"].t_draft_s == pytest.approx(TRUTH.t_draft_s * TRUTH.edge_slowdown, rel=0.02)
    alpha = next(a for a in summary.acceptance if a.variant.mode == "dsd-sync").alpha
    assert alpha.lo < TRUTH.alpha < alpha.hi
    assert alpha.hi - alpha.lo < 0.12


def test_break_even_interval_holds_the_solved_one(summary: stats.Summary) -> None:
    solved_ms = 1e3 * float(
        theory.break_even_rtt_s(TRUTH.alpha, 4, TRUTH.t_draft_s, TRUTH.t_verify_s(4), TRUTH.t_verify1_s)
    )
    by_mode = {b.variant.mode: b for b in summary.break_evens if b.baseline.mode == "cloud-ar"}
    sync = by_mode["dsd-sync"]
    assert sync.state == "crosses"
    assert sync.lo_ms < solved_ms < sync.hi_ms
    assert (by_mode["cloud-sd"].state, by_mode["edge-sd"].state) == ("always", "never")


def test_closed_form_curve_is_near_the_measured_points(summary: stats.Summary) -> None:
    """Within 6 %: finite length and unequal prompts are what the formula leaves out."""
    inputs = {i.variant: i for i in summary.inputs}
    for cell in summary.cells:
        predicted = inputs[cell.variant].tpot_ms([cell.rtt_ms], None)
        assert predicted is not None
        assert predicted[0] == pytest.approx(cell.tpot_ms.value, rel=0.06), cell
