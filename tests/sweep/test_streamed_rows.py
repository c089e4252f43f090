"""The overlapping modes between a generation and its statistics: names, measures, closed forms."""

from __future__ import annotations

import math

import msgspec
import pytest
import streamed_rows
from streamed_rows import ALPHA, BASE_S, ROW_S, T_DRAFT_S, WAYS, row_of, rows_of

from dsdlab.node_process import request_from
from dsdlab.nodes import GenerationRequest
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.scenario import Scenario
from dsdlab.sim.prediction import PredictedCell, PredictedGeneration, Prediction
from dsdlab.sweep import stats
from dsdlab.sweep.breakeven import baseline_for
from dsdlab.sweep.compare import compare, prediction_rows
from dsdlab.sweep.keys import Variant, condition_of, variant_of
from dsdlab.sweep.rows import Row
from dsdlab.sweep.runner import asked_of
from dsdlab.sweep.verdict import verdict_sentence

LABELS = [
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


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of()


@pytest.fixture(scope="module")
def summary(rows: list[Row]) -> stats.Summary:
    return stats.summarise(rows, n_boot=50)


def test_variants_have_names_and_an_order(summary: stats.Summary) -> None:
    assert [v.label for v in summary.variants] == LABELS
    assert Variant("dsd-adaptive", "threshold", 4).label == "dsd-adaptive (threshold, γ = 4)"
    assert Variant("dsd-sync", "threshold", 4).label_with("best of 2 windows") == (
        "dsd-sync (threshold, γ = 4, best of 2 windows)"
    )
    assert Variant("dsd-stream", "static", 0).label_with("best of 2 settings") == (
        "dsd-stream (best of 2 settings)"
    )


def test_a_cell_asks_for_all_that_concerns_it() -> None:
    """From the grid through the control message to the request that a node gets."""
    raw = {
        "name": "s",
        "grid": {
            "mode": ["dsd-pipelined", "dsd-stream", "dsd-adaptive"],
            "rtt_ms": [5],
            "run_ahead": [8],
            "free_run": [True],
            "beside": [3],
        },
    }
    found = {}
    for cell in Scenario.model_validate(raw).cells():
        message = {**asked_of(cell), "prompt_ids": [1], "max_new_tokens": 4}
        found[cell.mode] = request_from(msgspec.json.decode(msgspec.json.encode(message)))
    usual = {"prompt_ids": [1], "max_new_tokens": 4}
    assert found == {
        "dsd-pipelined": GenerationRequest(mode="dsd-pipelined", gamma=4, run_ahead=8, **usual),
        "dsd-stream": GenerationRequest(
            mode="dsd-stream", gamma=0, run_ahead=8, free_run=True, beside=3, **usual
        ),
        "dsd-adaptive": GenerationRequest(mode="dsd-adaptive", policy="adaptive", gamma=0, beside=3, **usual),
    }
    assert request_from({"prompt_ids": [1], "mode": "cloud-ar", "max_new_tokens": 4}).run_ahead == 32


def test_measures_of_what_it_took() -> None:
    free = row_of(200, mode="dsd-stream", gamma=0, free_run=True)
    alone = row_of(200, mode="cloud-ar", gamma=0)
    assert free.exact and free.ids == alone.ids
    assert free.drafted is not None and free.wasted is not None
    assert free.drafted >= free.wasted > 0
    assert free.wasted_per_token == free.wasted / 120
    assert free.target_ms_per_token == pytest.approx(1e3 * sum(free.t_verify_s) / 120)
    assert alone.target_ms_per_token == pytest.approx(1e3 * (120 * (BASE_S + ROW_S) + 2 * ROW_S) / 120)
    assert alone.wasted_per_token == 0
    beside = row_of(200, mode="dsd-stream", gamma=0, free_run=True, beside=3)
    assert beside.beside_s > 0 and free.beside_s == 0
    adaptive = row_of(200, mode="dsd-adaptive", policy="adaptive", gamma=0)
    assert adaptive.decisions and all(isinstance(text, str) for _, text in adaptive.decisions)


def test_rows_of_before_still_load() -> None:
    new = row_of(20, mode="dsd-sync", gamma=4)
    old = msgspec.to_builtins(new)
    late = ("run_ahead", "free_run", "beside", "drafted", "wasted", "target_s", "beside_s", "decisions")
    for name in late:
        del old[name]
    row = msgspec.json.decode(msgspec.json.encode(old), type=Row)
    assert variant_of(row) == variant_of(new)
    assert row.target_ms_per_token == pytest.approx(new.target_ms_per_token)
    assert row.wasted_per_token is None


def test_cells_carry_both_measures(summary: stats.Summary) -> None:
    by_label = {c.variant.label: c for c in summary.cells if c.rtt_ms == 200}
    stream, free = by_label["dsd-stream"], by_label["dsd-stream + free run"]
    assert by_label["cloud-ar"].target_ms == pytest.approx(50.0, abs=0.1)
    assert stream.target_ms < free.target_ms < by_label["cloud-ar"].target_ms
    assert by_label["dsd-sync (γ = 4)"].wasted < stream.wasted
    said = {c["cell"]: c for c in stats.summary_json("s", summary)["cells"]}[free.cell]
    assert said["target_ms_per_token"] == pytest.approx(free.target_ms, abs=1e-3)
    assert said["wasted_per_token"] == pytest.approx(free.wasted, abs=1e-3)
    assert (said["mode"], said["free_run"], said["run_ahead"], said["beside"]) == ("dsd-stream", True, 32, 0)


def test_closed_form_inputs_are_found_again(summary: stats.Summary) -> None:
    for inputs in summary.inputs:
        if inputs.variant.mode not in STREAMING_MODES:
            assert math.isnan(inputs.t_v0_s)
            continue
        assert inputs.t_draft_s == pytest.approx(T_DRAFT_S, rel=0.02)
        assert inputs.t_v0_s == pytest.approx(BASE_S + ROW_S, rel=0.02)
        assert inputs.t_row_s == pytest.approx(ROW_S, rel=0.05)
        assert inputs.alpha == pytest.approx(ALPHA, abs=0.06)
        assert math.isnan(inputs.expected_tau())


def test_closed_form_curves_run_through_what_the_nodes_did() -> None:
    ways = [w for w in WAYS if w["mode"] in STREAMING_MODES]
    for way in ways:
        own = [row_of(rtt, rep=rep, tokens=400, **way) for rtt in (20.0, 100.0) for rep in range(4)]
        (inputs,) = stats.closed_form_inputs(own)
        curve = inputs.tpot_ms([20.0, 100.0], None)
        assert curve is not None
        for rtt, value in zip((20.0, 100.0), curve, strict=True):
            found = [row.tpot_ms for row in own if row.rtt_ms == rtt and row.tpot_ms]
            slack = 0.12 if way["mode"] == "dsd-adaptive" else 0.06  # which has to find its plan first
            assert sum(found) / len(found) == pytest.approx(value, rel=slack), (way, rtt)


def test_solved_break_even() -> None:
    own = [row_of(rtt, mode="dsd-stream", gamma=0) for rtt in (20.0, 100.0)]
    (inputs,) = stats.closed_form_inputs(own)
    solved = inputs.break_even_ms(50.0, None)
    assert solved is not None
    curve = inputs.tpot_ms([solved - 1, solved + 1], None)
    assert curve is not None and curve[0] < 50.0 < curve[1]
    assert inputs.break_even_ms(5.0, None) == -1.0
    free = stats.closed_form_inputs([row_of(20.0, mode="dsd-stream", gamma=0, free_run=True)])[0]
    assert free.break_even_ms(1e3 * (BASE_S + ROW_S) + 1, None) == math.inf


def test_who_has_no_window_is_held_against_the_best_baseline(rows: list[Row]) -> None:
    more = rows + rows_of(ways=({"mode": "cloud-sd", "gamma": 1},))
    found = stats.summarise(more, n_boot=20)
    against = {b.variant.label: b.baseline.label for b in found.break_evens if b.baseline.mode == "cloud-sd"}
    assert against["dsd-stream"] == "cloud-sd (γ = 4)", "γ = 1 comes first and is slower"
    assert against["dsd-sync (γ = 4)"] == "cloud-sd (γ = 4)"
    assert baseline_for(Variant("dsd-stream", "static", 0), "cloud-sd", found.variants) == Variant(
        "cloud-sd", "static", 1
    )


def test_the_verdict_speaks_of_settings(summary: stats.Summary) -> None:
    assert "dsd-stream + free run" in summary.verdict
    assert "best of 3 settings" in summary.verdict
    two = [b for b in summary.break_evens if b.variant.mode == "dsd-pipelined"]
    said = verdict_sentence(two, summary.cells, summary.conditions, good=1)
    assert "best of 2 settings" in said and "))" not in said


def test_windows_that_follow_from_times_are_not_compared(rows: list[Row]) -> None:
    cells: dict[str, PredictedCell] = {}
    for row in rows:
        axes = {name: getattr(row, name) for name in (*variant_of(row)._fields, "rtt_ms", "rate_mbit")}
        axes |= {"loss_pct": 0.0, "temperature": 0.0}
        cell = cells.setdefault(row.cell, PredictedCell(cell=row.cell, axes=axes, generations=[]))
        cell.generations.append(
            PredictedGeneration(
                rep=row.rep, prompt=row.prompt, seed=row.seed, windows=[(1, 1)], tokens=row.tokens,
                finish="length", exact=True, tpot_ms=[40.0], ttft_ms=[9.0], alpha=None, tau=None,
                bytes_up={}, bytes_down={}, drafted=300, wasted=60, target_s=1.2, beside_s=0.5,
            )
        )  # fmt: skip
    made = Prediction(
        scenario="s", digest="d", created_at="", draws=1, seed=1, profile={}, acceptance={}, wall_s=1.0,
        cells=list(cells.values()),
    )  # fmt: skip
    comparison = compare(rows, made)
    windowed = sum(row.mode not in STREAMING_MODES for row in rows)
    assert (comparison.windows_same, comparison.windows_compared) == (0, windowed)
    assert {(c.variant, c.condition) for c in comparison.cells} == {
        (variant_of(r), condition_of(r)) for r in rows
    }
    alone = prediction_rows(made)
    assert {variant_of(r) for r in alone} == {variant_of(r) for r in rows}
    assert alone[0].target_ms_per_token == pytest.approx(1200 / 120)
    assert (alone[0].wasted_per_token, alone[0].beside_s) == (0.5, 0.5)


def test_the_helper_plays_what_it_says() -> None:
    assert (
        streamed_rows.record_of(1, mode="cloud-ar", gamma=0, tokens=4).t_verify_s[1:]
        == [pytest.approx(BASE_S + ROW_S, abs=2e-6)] * 3
    )
