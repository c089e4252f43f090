"""The report of a sweep with its prediction, and of a simulation alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec
import pytest
from synthetic_rows import VARIANTS, generation, grid, prediction, run_record
from test_report import COMMAND, Outline

from dsdlab.report import render
from dsdlab.report.render import page
from dsdlab.sim.prediction import Prediction
from dsdlab.sweep import stats
from dsdlab.sweep.breakeven import BreakEven
from dsdlab.sweep.compare import CompareError, Comparison, compare, prediction_rows
from dsdlab.sweep.rows import Row

VISIBLE = re.compile(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", re.S)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [msgspec.structs.replace(row, link="netem") for row in grid(reps=2)]


@pytest.fixture(scope="module")
def predicted(rows: list[Row]) -> Prediction:
    return prediction(rows)


@pytest.fixture(scope="module")
def comparison(rows: list[Row], predicted: Prediction) -> Comparison:
    return compare(rows, predicted)


@pytest.fixture(scope="module")
def text(rows: list[Row], predicted: Prediction) -> str:
    return page(run_record() | {"prediction": {"sha256": "34" * 32}}, rows, COMMAND, predicted)


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    return Outline(text)


def test_structure(outline: Outline, rows: list[Row], comparison: Comparison) -> None:
    """The golden outline of a sweep that was predicted."""
    assert outline.sections == [
        "latency",
        "break-even",
        "ttft",
        "simulator",
        "timeline",
        "acceptance",
        "bytes",
        "inputs",
        "cells",
        "links",
        "exclusions",
        "failures",
        "provenance",
    ]
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.text("verdict") == stats.summarise(rows, comparison=comparison).verdict
    assert outline.text("verdict").endswith("24 cells, predicted before the measurements).")
    assert outline.text("replay") == (
        "replay: 192 of 192 generations have the same accepted count in every window"
    )
    charts, variants = 4, len(VARIANTS)
    assert outline.classes.count("chart") == charts
    assert outline.classes.count("pt") == charts * 24
    assert outline.classes.count("sim") == charts * variants + 2  # and the legends' samples
    assert outline.classes.count("draws") == charts * variants
    assert outline.classes.count("theory") == 2 * variants + 1
    assert outline.classes.count("slow") + outline.classes.count("fast") == 24 + 2  # map and its legend


def test_errors_are_those_of_the_comparison(text: str, outline: Outline, comparison: Comparison) -> None:
    shown = outline.text("simulator")
    total, ttft = comparison.total("tpot"), comparison.total("ttft")
    assert f"simulator, TPOT{total.mape_pct:.1f}" in shown
    assert f"simulator, TTFT{ttft.mape_pct:.1f}" in shown
    worst = comparison.worst_loss_free
    assert worst is not None
    assert f"worst cell: {worst.label}{abs(worst.tpot.error_pct):.1f}" in shown
    for cell in comparison.cells:
        error = f"{cell.tpot.error_pct:+.1f}".replace("-", "−")
        assert text.count(f"<td>{error}{'†' if cell.outside else ''}</td>") >= 1, cell
        assert f'data-sim="{cell.tpot.predicted.value:.0f}' in text or f"{error} %" in text


def test_promises_kept_and_missed(rows: list[Row]) -> None:
    kept = Outline(page(run_record(), rows, COMMAND, prediction(rows, off=0.01, spread=0.001)))
    missed = Outline(page(run_record(), rows, COMMAND, prediction(rows, off=0.3)))
    assert "≤ 5, kept" in kept.text("simulator")
    assert "missed" not in kept.text("simulator")
    assert "≤ 5, missed" in missed.text("simulator")
    assert "≤ 10, missed" in missed.text("simulator")


def test_where_the_prediction_comes_from(outline: Outline) -> None:
    made = outline.text("prediction")
    for fact in (
        "imaginary-cpu, origin measured here, source dsdlab calibrate on test data, 120 forwards, sha256 "
        + "ef" * 32,
        "trace, sha256 " + "09" * 32,
        "2025-06-01T11:00:00+00:00",
        "2025-06-01T12:00:00+00:00, after the prediction",
        "sha256 " + "34" * 32,
        "5, seed 1",
    ):
        assert fact in made, fact
    assert "4 cells: target on the cloud: context 1900 (calibrated to 1024)" in outline.text("simulator")


def test_a_prediction_made_afterwards_says_so(rows: list[Row], predicted: Prediction) -> None:
    late = msgspec.structs.replace(predicted, created_at="2025-06-01T13:00:00+00:00")
    outline = Outline(page(run_record(), rows, COMMAND, late))
    assert "predicted before" not in outline.text("verdict")
    assert outline.text("verdict").endswith("(TPOT, mean over 24 cells).")
    assert "not known to be after the prediction" in outline.text("prediction")


def test_without_a_prediction_nothing_is_said_of_a_simulator(rows: list[Row]) -> None:
    plain = page(run_record(), rows, COMMAND)
    assert "simul" not in VISIBLE.sub("", plain)
    assert not {"sim", "draws"} & set(Outline(plain).classes)


def test_break_even_of_all_three(outline: Outline, rows: list[Row], comparison: Comparison) -> None:
    (item,) = [
        b
        for b in stats.summarise(rows).break_evens
        if (b.variant.mode, b.baseline.mode) == ("dsd-sync", "cloud-ar")
    ]
    other = comparison.break_even(item)
    assert isinstance(other, BreakEven)
    assert other.state == "crosses"
    assert not other.interval_text
    measured = f"{item.bound(item.rtt_ms)} {item.interval_text}"
    assert f"{measured}{other.bound(other.rtt_ms)}" in outline.text("break-even")


def test_gaps_and_differences_are_shown(rows: list[Row], predicted: Prediction) -> None:
    cells = [msgspec.structs.replace(cell, generations=list(cell.generations)) for cell in predicted.cells]
    late = msgspec.structs.replace(cells[1], generations=[], error="3 of 5 draws not finished within 60 s")
    first = cells[0].generations[0]
    cells[0].generations[0] = msgspec.structs.replace(first, windows=first.windows[:-1])
    partial = msgspec.structs.replace(predicted, cells=[cells[0], late, *cells[3:]])
    outline = Outline(page(run_record(), rows, COMMAND, partial))
    shown = outline.text("simulator")
    assert "not simulated; 3 of 5 draws not finished within 60 s" in shown
    assert "Replay: 175 of 176 generations" in shown
    assert "window 48 measured 0 of 0 accepted, simulated none" in shown
    assert "over 22 cells" in outline.text("verdict")


def test_another_scenario_is_refused_and_nothing_written(tmp_path: Path, rows: list[Row]) -> None:
    other = prediction(grid(rtts_ms=(33.0,), reps=1))
    with pytest.raises(CompareError, match="another scenario"):
        render(run_record(), rows, tmp_path / "report.html", COMMAND, other)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_was_only_simulated_is_drawn(rows: list[Row], predicted: Prediction) -> None:
    lone = [row for row in rows if (row.mode, row.rtt_ms) != ("dsd-sync", 200.0)]
    outline = Outline(page(run_record(), lone, COMMAND, predicted))
    assert outline.classes.count("pt") == 4 * 23
    assert "not measured" in outline.text("simulator")
    assert "over 23 cells" in outline.text("verdict")


def test_everything_a_prediction_says_is_escaped(rows: list[Row]) -> None:
    evil = "</style></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    p = prediction(rows)
    p.profile = {"name": evil, "source": evil, evil: evil}
    p.acceptance = {"kind": evil}
    p.scenario = p.digest = evil
    p.cells[0].outside = evil
    p.cells[1].error = evil
    p.cells[1].generations = []
    for text in (
        page(run_record() | {"prediction": {evil: evil}}, rows, COMMAND, p),
        page(run_record(), prediction_rows(p), COMMAND, p),
    ):
        found = Outline(text)
        assert found.tags.count("script") == 1
        assert "img" not in found.tags
        assert evil in "".join(found.words["prediction"])


def test_a_large_grid_stays_under_a_megabyte() -> None:
    large = grid(
        rates_mbit=(None, 20.0, 5.0, 1.0),
        losses_pct=(0.0, 1.0),
        temperatures=(0.0, 0.8),
        variants=(*VARIANTS, ("dsd-sync", 2), ("dsd-sync", 8)),
        prompts=("p",),
        reps=2,
    )
    text = page(run_record(), large, COMMAND, prediction(large))
    assert len(prediction(large).cells) == 576
    assert len(text.encode()) < 1_000_000
    assert Outline(text).text("simulator")


def test_coordinates_are_finite(text: str) -> None:
    for match in re.finditer(r'\b(?:x1|x2|y1|y2|x|y|width|height)="([^"]+)"', text):
        assert math.isfinite(float(match[1]))
    assert not re.search(r"(?i)\b(nan|inf)\b", "".join(re.findall(r'\bd="[^"]*"', text)))


def test_a_single_rtt_and_a_single_draw() -> None:
    one = [generation(mode, gamma, 20.0) for mode, gamma in VARIANTS]
    outline = Outline(page({}, one, COMMAND, prediction(one, draws=1)))
    assert "draws" not in outline.classes
    assert "sim" in outline.classes
    assert "nan" not in outline.text("simulator")


def test_a_simulation_alone_says_so_everywhere(predicted: Prediction) -> None:
    run = run_record() | {"runtime": "", "link": ""}
    text = page(run, prediction_rows(predicted), "dsdlab simulate x.toml", predicted)
    outline = Outline(text)
    assert outline.sections == [
        "latency",
        "break-even",
        "ttft",
        "simulation",
        "acceptance",
        "bytes",
        "cells",
        "failures",
        "provenance",
    ]
    assert "<title>quickstart, simulated · dsdlab</title>" in text
    assert outline.text("simulated") == "simulated"
    assert outline.text("verdict").startswith("In simulation, ")
    assert "(simulated, not measured;" in outline.text("verdict")
    assert outline.text("exact") == "exact: 192 of 192 simulated generations"
    assert "curve" not in outline.classes  # every line is drawn as the simulator's
    assert outline.classes.count("sim") == 4 * len(VARIANTS) + 2 * len(VARIANTS)
    for section in ("latency", "break-even", "ttft", "cells"):
        assert "simulated" in outline.text(section), section
    words = VISIBLE.sub("", text).replace("over a modelled link", "")
    for honest in ("not measured", "nothing was measured", "origin measured here"):
        assert honest in words
        words = words.replace(honest, "")
    assert "modelled" not in words
    assert "measured" not in words
    assert "ef" * 32 in outline.text("prediction")


def test_a_simulation_without_its_prediction_still_gives_a_page(predicted: Prediction) -> None:
    outline = Outline(page({}, prediction_rows(predicted), COMMAND))
    assert "simulation" not in outline.sections
    assert outline.text("simulated") == "simulated"
