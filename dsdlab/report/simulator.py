"""The report's section on the simulator: how far off it was, where, and what it was made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsdlab.sim.prediction import Prediction
from dsdlab.sweep.comparison import (
    STREAMING_BAR_PCT,
    TPOT_BAR_PCT,
    TPOT_WORST_BAR_PCT,
    TTFT_BAR_PCT,
    ComparedCell,
    Comparison,
    Kind,
    signed_pct,
)
from dsdlab.sweep.keys import Condition, Variant

FULL_COLOUR_PCT = 10.0  # an error of this size has the strongest colour
STRONGEST = 60  # percent of the ink


class TotalRow(NamedTuple):
    """One line of the table of totals; bar: what is promised, percent, None: nothing."""

    what: str
    mape: str
    bias: str
    cells: int
    bar: float | None
    met: bool


class HeatCell(NamedTuple):
    """One field of a map of errors: its text, tooltip, sign ("slow", "fast", "") and strength in percent."""

    text: str
    title: str
    sign: str
    strength: int


class HeatMap(NamedTuple):
    """Signed TPOT errors under one condition, variants down and RTTs across; None: no such cell."""

    condition: Condition
    rtts_ms: list[float]
    lines: list[tuple[Variant, list[HeatCell | None]]]


def _totals(comparison: Comparison) -> list[TotalRow]:
    lossy = any(cell.lossy for cell in comparison.cells)
    rows = []

    def add(what: str, kind: Kind, loss_free: bool, bar: float | None, *, streaming: bool = False) -> None:
        total = comparison.total(kind, loss_free=loss_free, streaming=streaming)
        if total.cells:
            met = bar is not None and total.mape_pct <= bar
            mape, bias = f"{total.mape_pct:.1f}", signed_pct(total.bias_pct)
            rows.append(TotalRow(what, mape, bias, total.cells, bar, met))

    add("simulator, TPOT", "tpot", False, TPOT_BAR_PCT)
    if lossy:
        add("simulator, TPOT, without loss", "tpot", True, None)
    add("simulator, TPOT, where drafts stream", "tpot", False, STREAMING_BAR_PCT, streaming=True)
    worst = comparison.worst_loss_free
    if worst is not None:
        error = worst.tpot.error_pct
        met = abs(error) <= TPOT_WORST_BAR_PCT
        what = f"simulator, TPOT, worst cell{' without loss' if lossy else ''}: {worst.label}"
        rows.append(TotalRow(what, f"{abs(error):.1f}", signed_pct(error), 1, TPOT_WORST_BAR_PCT, met))
    add("simulator, TTFT", "ttft", False, TTFT_BAR_PCT)
    add("closed form, TPOT", "closed_form", False, None)
    if lossy:
        add("closed form, TPOT, without loss", "closed_form", True, None)
    return rows


def note_of(cell: ComparedCell) -> str:
    """Why a cell lacks a number, or rests on fewer draws; empty where nothing is to be said."""
    words = [cell.missing, cell.problem]
    return "; ".join(word for word in words if word)


def _heat(cell: ComparedCell) -> HeatCell:
    error = cell.tpot.error_pct
    if math.isnan(error):
        return HeatCell("–", note_of(cell) or "no time on one side", "", 0)
    title = f"{cell.tpot.measured.value:.2f} measured, {cell.tpot.predicted.value:.2f} ms simulated"
    title += f"; {note}" if (note := note_of(cell)) else ""
    title += "; extrapolated" if cell.outside else ""
    strength = round(STRONGEST * min(abs(error) / FULL_COLOUR_PCT, 1.0))
    mark = "†" if cell.outside else ""
    return HeatCell(signed_pct(error) + mark, title, "slow" if error > 0 else "fast", strength)


def _heat_maps(comparison: Comparison) -> list[HeatMap]:
    maps = []
    for condition in sorted({cell.condition for cell in comparison.cells}, key=lambda c: c.order):
        cells = {(c.variant, c.rtt_ms): c for c in comparison.cells if c.condition == condition}
        rtts = sorted({rtt for _, rtt in cells})
        lines = [
            (
                variant,
                [_heat(cells[variant, rtt]) if (variant, rtt) in cells else None for rtt in rtts],
            )
            for variant in sorted({variant for variant, _ in cells}, key=lambda v: v.order)
        ]
        maps.append(HeatMap(condition, rtts, lines))
    return maps


def _words(known: Mapping[str, str], *, first: tuple[str, ...]) -> str:
    """ "imaginary-cpu, measured here, …, sha256 ab…": the named entries bare, the others with their name."""
    parts = [str(known[name]) for name in first if known.get(name)]
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in known.items() if name not in first]
    return ", ".join(parts)


def provenance(prediction: Prediction, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the prediction was made of. run: its entry "prediction" tells of the file (sha256, and so on)."""
    profile, acceptance = prediction.profile, prediction.acceptance
    kept = run.get("prediction")
    items = [
        ("profile", _words(profile, first=("name",)) if profile else ""),
        ("acceptance", _words(acceptance, first=("kind",)) if acceptance else ""),
        ("draws", f"{prediction.draws}, seed {prediction.seed}"),
        ("scenario digest", prediction.digest),
        ("prediction written", prediction.created_at),
        ("prediction file", _words(kept, first=()) if isinstance(kept, Mapping) else ""),
        ("simulated in", f"{prediction.wall_s:.1f} s"),
    ]
    return [(key, value) for key, value in items if value]


def section(comparison: Comparison, prediction: Prediction, run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows of a comparison."""
    facts = provenance(prediction, run)
    at = next((k for k, (key, _) in enumerate(facts) if key == "prediction written"), len(facts) - 1)
    begun = comparison.measured_from or "not recorded"
    order = "after the prediction" if comparison.predicted_before else "not known to be after the prediction"
    facts.insert(at + 1, ("first measurement", f"{begun}, {order}"))
    closed_form = any(not math.isnan(cell.closed_form_ms) for cell in comparison.cells)
    notes = any(note_of(cell) for cell in comparison.cells)
    columns = ["TPOT", "simulated", "error, %"]
    columns += ["closed form", "its error, %"] if closed_form else []
    columns += ["TTFT", "simulated", "error, %", "pairs", "replayed"]
    columns += ["note"] if notes else []
    outside = Counter(cell.outside for cell in comparison.extrapolated)
    return {
        "c": comparison,
        "totals": _totals(comparison),
        "maps": _heat_maps(comparison),
        "facts": facts,
        "outside": [f"{n} cell{'' if n == 1 else 's'}: {text}" for text, n in outside.items()],
        "closed_form": closed_form,
        "notes": notes,
        "columns": columns,
        "full": f"{FULL_COLOUR_PCT:g}",
    }
