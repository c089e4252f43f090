"""A sweep against its prediction: on rows small enough to check by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dsdlab.scenario import Cell, Scenario
from dsdlab.sim.prediction import PredictedCell, PredictedGeneration, Prediction
from dsdlab.sweep import stats
from dsdlab.sweep.compare import CompareError, compare, comparison_json, prediction_rows
from dsdlab.sweep.rows import Row

WINDOWS = [(0, 0), (4, 2), (4, 4)]


def row(rtt_ms: float = 10.0, tpot_ms: float | None = 50.0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "mode": "dsd-sync",
        "policy": "static",
        "gamma": 4,
        "rep": 0,
        "status": "ok",
        "runtime": "netns",
        "link": "netem",
        "rtt_ms": rtt_ms,
        "seed": 1,
        "prompt": "a",
        "tokens": 10,
        "tpot_ms": tpot_ms,
        "ttft_ms": 100.0,
        "alpha": 0.75,
        "tau": 3.0,
        "exact": True,
        "windows": WINDOWS,
        "started_at": "2025-06-01T12:00:00.500+00:00",
    } | changes
    key = (fields["mode"], fields["gamma"], rtt_ms, fields.get("loss_pct", 0.0))
    return Row(cell=f"{key}", **fields)


def generation(
    tpot_ms: list[float], ttft_ms: list[float] | None = None, **changes: Any
) -> PredictedGeneration:
    fields: dict[str, Any] = {
        "rep": 0,
        "prompt": "a",
        "seed": 1,
        "windows": WINDOWS,
        "tokens": 10,
        "finish": "length",
        "exact": True,
        "tpot_ms": tpot_ms,
        "ttft_ms": [100.0] * len(tpot_ms) if ttft_ms is None else ttft_ms,
        "alpha": 0.75,
        "tau": 3.0,
        "bytes_up": {"Draft": 30},
        "bytes_down": {"Verdict": 20},
    }
    return PredictedGeneration(**fields | changes)


def predicted(like: Row, *generations: PredictedGeneration, **changes: Any) -> PredictedCell:
    names = ("mode", "policy", "gamma", "rtt_ms", "rate_mbit", "loss_pct", "temperature")
    axes = {name: getattr(like, name) for name in names}
    return PredictedCell(cell=like.cell, axes=axes, generations=list(generations), **changes)


def prediction(*cells: PredictedCell, **changes: Any) -> Prediction:
    fields: dict[str, Any] = {
        "scenario": "quick",
        "digest": "feedbeef",
        "created_at": "2025-06-01T12:00:00+00:00",
        "draws": 3,
        "seed": 1,
        "profile": {"name": "here", "origin": "measured here", "source": "x", "sha256": "ab" * 32},
        "acceptance": {"kind": "trace", "sha256": "cd" * 32},
        "wall_s": 0.1,
    }
    return Prediction(cells=list(cells), **fields | changes)


def test_medians_are_taken_per_draw_and_then_over_draws() -> None:
    """Draws (60, 10, 20), (50, 30, 10) and (70, 20, 90) of three prompts: medians 60, 20, 20."""
    rows = [row(tpot_ms=t, prompt=p, ttft_ms=u) for p, t, u in (("a", 20, 80), ("b", 25, 100), ("c", 99, 90))]
    cell = predicted(
        rows[0],
        generation([60, 10, 20], [99, 99, 99]),
        generation([50, 30, 10], [99, 99, 99], prompt="b"),
        generation([70, 20, 90], [99, 99, 99], prompt="c"),
    )
    (found,) = compare(rows, prediction(cell)).cells
    assert found.tpot.predicted.value == 20.0
    assert (found.tpot.predicted.lo, found.tpot.predicted.hi) == pytest.approx((20.0, 58.0))
    assert found.tpot.measured.value == 25.0
    assert found.tpot.measured == stats.summarise(rows).cells[0].tpot_ms
    assert found.tpot.error_pct == pytest.approx(-20.0)
    assert found.ttft.error_pct == pytest.approx(10.0)
    assert (found.generations, found.missing) == (3, "")


def test_only_generations_of_both_sides_are_compared() -> None:
    """Excluded, failed, single-token and unpredicted generations are in neither median."""
    rows = [
        row(tpot_ms=10),
        row(tpot_ms=1000, prompt="b"),  # not predicted
        row(tpot_ms=1000, prompt="c", excluded="RTT 14 ms"),
        row(tpot_ms=None, prompt="d", tokens=1),
        row(tpot_ms=None, prompt="e", status="failed", error="x"),
    ]
    shared = [generation([500.0] * 3, prompt=p) for p in "ce"]
    cell = predicted(rows[0], generation([11, 11, 11]), generation([], prompt="d"), *shared)
    (found,) = compare(rows, prediction(cell)).cells
    assert (found.tpot.measured.value, found.tpot.predicted.value) == (10, 11)
    assert found.tpot.error_pct == pytest.approx(10.0)
    assert found.generations == 2  # the single token has a TTFT


def test_totals_by_hand() -> None:
    rows = [row(10, 50), row(20, 50), row(10, 50, loss_pct=1.0)]
    cells = [
        predicted(rows[0], generation([51])),
        predicted(rows[1], generation([47])),
        predicted(rows[2], generation([60])),
    ]
    found = compare(rows, prediction(*cells, draws=1))
    assert found.total("tpot") == pytest.approx((28 / 3, (2 - 6 + 20) / 3, 3))
    assert found.total("tpot", loss_free=True) == pytest.approx((4.0, -2.0, 2))
    worst = found.worst_loss_free
    assert worst is not None
    assert (worst.rtt_ms, worst.tpot.error_pct) == (20, pytest.approx(-6.0))
    assert found.total("ttft") == (0.0, 0.0, 3)
    assert math.isnan(found.cells[0].tpot.predicted.lo)  # one draw has no band
    assert found.line == (
        "simulator against measurement: TPOT 9.3 % off over 3 cells, mean signed +5.3 %; "
        "4.0 % over 2 without loss, worst −6.0 % (dsd-sync (γ = 4) at 20 ms); TTFT 0.0 %"
    )


def test_closed_form_is_that_of_the_same_cell() -> None:
    """cloud-ar: t_v(1) = 50 ms measured in the windows, a TPOT of 40: the formula is 25 % above."""
    alone = {"mode": "cloud-ar", "gamma": 0, "windows": [(0, 0)] * 3, "t_verify_s": [0.5, 0.05, 0.05]}
    rows = [row(10, 40, **alone)]
    found = compare(rows, prediction(predicted(rows[0], generation([40, 40, 40])), draws=3))
    (cell,) = found.cells
    assert cell.closed_form_ms == pytest.approx(50.0)
    assert cell.closed_form_error_pct == pytest.approx(25.0)
    assert found.total("closed_form") == pytest.approx((25.0, 25.0, 1))


def test_no_closed_form_for_a_link_that_changes() -> None:
    changing = {"t_draft_s": [0.01] * 2, "t_verify_s": [0.05] * 3, "link_steps": "loss 3 % from 1 s"}
    rows = [row(10, 40, **changing)]
    (cell,) = compare(rows, prediction(predicted(rows[0], generation([40])), draws=1)).cells
    assert math.isnan(cell.closed_form_ms)
    assert cell.lossy


def test_cells_that_one_side_lacks() -> None:
    rows = [row(10), row(20), row(30)]
    lost = predicted(row(40), generation([1.0, 2.0, 3.0]))
    broken = predicted(rows[2], error="3 of 3 draws not finished within 60 s")
    far = "target on the cloud: context 900 (calibrated to 512)"
    found = compare(rows, prediction(predicted(rows[0], generation([50.0] * 3), outside=far), lost, broken))
    assert {c.rtt_ms: c.missing for c in found.cells} == {
        10: "",
        20: "not simulated",
        30: "not simulated",
        40: "not measured",
    }
    assert found.cells[2].problem == "3 of 3 draws not finished within 60 s"
    unmeasured = found.cells[3]
    assert (unmeasured.tpot.predicted.value, unmeasured.condition.runtime) == (2.0, "netns")
    assert math.isnan(unmeasured.tpot.error_pct)
    assert [c.outside for c in found.extrapolated] == [far]
    assert found.total("tpot").cells == 1


def test_no_generation_in_common() -> None:
    rows = [row(10), row(20)]
    cells = [predicted(rows[0], generation([50.0])), predicted(rows[1], generation([50.0], seed=2))]
    found = compare(rows, prediction(*cells, draws=1))
    assert [c.missing for c in found.cells] == ["", "no generation in common"]


def test_windows_of_every_finished_generation() -> None:
    rows = [row(prompt=p) for p in "abcd"]
    rows[2].excluded = "RTT"
    rows[3].status = "failed"
    short, other = WINDOWS[:2], [(0, 0), (4, 3), (4, 4)]
    found = compare(
        rows,
        prediction(
            predicted(
                rows[0],
                generation([50.0]),
                generation([50.0], prompt="b", windows=short),
                generation([50.0], prompt="c", windows=other),
                generation([50.0], prompt="d", windows=other),
            ),
            draws=1,
        ),
    )
    assert (found.windows_same, found.windows_compared) == (1, 3)
    assert found.windows_line == "replay: 1 of 3 generations have the same accepted count in every window"
    assert [item.line for item in found.windows_differ] == [
        "dsd-sync (γ = 4) at 10 ms, greedy, unlimited rate, no loss, prompt b, repetition 0: "
        "window 3 measured 4 of 4 accepted, simulated none",
        "dsd-sync (γ = 4) at 10 ms, greedy, unlimited rate, no loss, prompt c, repetition 0: "
        "window 2 measured 2 of 4 accepted, simulated 3 of 4 accepted",
    ]


@pytest.mark.parametrize(
    ("created_at", "before"),
    [
        ("2025-06-01T12:00:00+00:00", True),
        ("2025-06-01T14:00:00.400+02:00", True),  # another zone, a tenth of a second before
        ("2025-06-01T12:00:00.500+00:00", False),
        ("2025-06-01T12:00:01+00:00", False),  # between the two measurements
        ("yesterday", False),
    ],
)
def test_whether_the_prediction_came_first(created_at: str, before: bool) -> None:
    rows = [row(10, started_at="2025-06-01T12:00:05.000+00:00"), row(20)]
    cells = [predicted(r, generation([50.0])) for r in rows]
    found = compare(rows, prediction(*cells, draws=1, created_at=created_at))
    assert found.predicted_before is before
    assert found.measured_from == "2025-06-01T12:00:00.500+00:00"
    assert ("predicted before the measurements" in found.clause) is before


def test_a_row_without_a_time_proves_nothing() -> None:
    rows = [row(10), row(20, started_at="")]
    found = compare(rows, prediction(predicted(rows[0], generation([50.0])), draws=1))
    assert not found.predicted_before


@pytest.mark.parametrize(
    ("cells", "changes", "message"),
    [
        ([], {}, "is empty: it has no cell"),
        ([predicted(row(99), generation([1.0]))], {}, "of another scenario: none of the 1 measured cells"),
        ([predicted(row(), generation([1.0]))], {"draws": 0}, "has 0 draws; allowed: 1 or more"),
        ([predicted(row(), generation([]))], {}, "has no draws: none of its 1 generations has a time"),
        ([predicted(row(), error="trace too short")], {}, "none of its 1 cells has a generation: trace too"),
    ],
)
def test_refusals_are_one_line(cells: list[PredictedCell], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message) as error:
        compare([row()], prediction(*cells, **changes))
    assert "\n" not in str(error.value)


def test_a_simulation_is_not_held_against_itself() -> None:
    whole = prediction(predicted(row(), generation([1.0])), draws=1)
    with pytest.raises(CompareError, match="simulated themselves"):
        compare(prediction_rows(whole), whole)
    with pytest.raises(CompareError, match="no results"):
        compare([], whole)


def test_axes_of_something_else() -> None:
    rows = [row(10)]
    odd = PredictedCell(cell="x", axes={"mode": "dsd-sync"}, generations=[generation([1.0])])
    with pytest.raises(CompareError, match="cell x of the prediction has no axis policy"):
        compare(rows, prediction(predicted(rows[0], generation([1.0])), odd))


def baseline_and_sync() -> tuple[list[Row], Prediction]:
    rows = []
    for rtt, sync in ((0.0, 25.0), (100.0, 75.0)):
        for prompt in "ab":
            rows.append(row(rtt, 50.0, mode="cloud-ar", gamma=0, prompt=prompt, windows=[(0, 0)] * 3))
            rows.append(row(rtt, sync, prompt=prompt))
    cells = {r.cell: predicted(r) for r in rows}
    for r in rows:
        assert r.tpot_ms is not None
        cells[r.cell].generations.append(
            generation([1.04 * r.tpot_ms] * 3, prompt=r.prompt, windows=r.windows)
        )
    return rows, prediction(*cells.values())


def test_the_verdict_ends_with_the_simulator() -> None:
    rows, whole = baseline_and_sync()
    summary = stats.summarise(rows, comparison=compare(rows, whole))
    assert summary.verdict == (
        "With this pair, dsd-sync (γ = 4) beats streaming from the target up to 50 ms RTT [50, 50] "
        "(netem link, netns runtime; greedy, unlimited rate, no loss); the simulator was 4.0 % off "
        "(TPOT, mean over 4 cells, predicted before the measurements)."
    )
    out = stats.summary_json("quick", summary)
    assert out["verdict"] == summary.verdict
    assert out["simulator"]["tpot"] == {"mape_pct": 4.0, "bias_pct": 4.0, "cells": 4}
    assert stats.summary_json("quick", stats.summarise(rows))["simulator"] is None
    assert "replay: 8 of 8 generations" in summary.notes[-1]


def test_the_json_twin_has_the_promised_fields_and_no_nan() -> None:
    rows, whole = baseline_and_sync()
    rows[0].ttft_ms = None
    whole.cells.append(predicted(row(500), generation([1.0])))
    out = comparison_json("quick", compare(rows, whole))
    assert json.loads(json.dumps(out, allow_nan=False))["name"] == "quick"
    wanted = {"mode", "policy", "gamma", "runtime", "link", "rtt_ms", "rate_mbit", "loss_pct", "temperature"}
    wanted |= {"tpot_ms", "ttft_ms", "alpha", "tau", "tokens", "exact", "lossy", "outside", "missing"}
    wanted |= {"predicted_tpot_ms", "predicted_ttft_ms", "tpot_error_pct", "ttft_error_pct"}
    wanted |= {"closed_form_tpot_ms", "closed_form_error_pct", "predicted_tpot_band_ms", "tpot_interval_ms"}
    assert len(out["cells"]) == 5
    assert all(wanted <= set(cell) for cell in out["cells"])
    assert out["predicted_before"] is True
    assert out["worst_loss_free"]["tpot_error_pct"] == pytest.approx(4.0)
    assert [cell["tpot_error_pct"] for cell in out["cells"]] == [4.0, 4.0, 4.0, 4.0, None]


def test_a_simulation_alone_never_looks_measured() -> None:
    _, whole = baseline_and_sync()
    rows = prediction_rows(whole)
    assert {(r.runtime, r.link, r.started_at) for r in rows} == {("simulated", "modelled", "")}
    assert rows[0].windows == [(0, 0)] * 3
    assert rows[0].bytes_up == {"Draft": 30}
    summary = stats.summarise(rows)
    assert summary.simulated
    assert summary.exact_line == "exact: 8 of 8 simulated generations"
    assert summary.verdict == (
        "In simulation, dsd-sync (γ = 4) beats streaming from the target up to 50 ms RTT [50, 50] "
        "(simulated, not measured; greedy, unlimited rate, no loss)."
    )


def test_median_draw_and_failures_of_a_simulation() -> None:
    done = predicted(row(10), generation([5.0, 1.0, 9.0], [7.0, 7.0, 8.0]))
    lost = predicted(row(20), error="the link model has no words for reordering")
    first, second = prediction_rows(prediction(done, lost))
    assert (first.tpot_ms, first.ttft_ms, first.status) == (5.0, 7.0, "ok")
    assert (second.status, second.error) == ("failed", "the link model has no words for reordering")
    nothing = stats.summarise([second], allow_incomplete=True)
    assert nothing.verdict.startswith("No generation of this simulation succeeded")


def test_what_the_axes_do_not_say_comes_from_the_scenario() -> None:
    scenario = Scenario.model_validate(
        {
            "name": "asymmetric",
            "grid": {"mode": ["cloud-ar"], "rtt_ms": [20.0], "rate_mbit": [10.0]},
            "link": {"rate_up_mbit": 1.0, "steps": [{"at_s": 1.0, "rtt_ms": 80.0}]},
        }
    )
    (cell,) = scenario.cells()
    asked = PredictedCell(
        cell=scenario.cell_id(cell), axes=cell.model_dump(), generations=[generation([50.0])]
    )
    (plain,) = prediction_rows(prediction(asked))
    (full,) = prediction_rows(prediction(asked), scenario)
    assert (plain.link_asked, plain.link_steps) == ({}, "")
    assert full.link_asked == scenario.profile_of(Cell(**cell.model_dump())).to_dict()
    assert full.link_steps == "RTT 80 ms from 1 s"
    assert full.tcp["asked"]["rto_min_ms"] == 200.0
