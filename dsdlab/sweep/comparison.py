"""What a comparison of a sweep with its simulation says: errors of cells, totals, one line, one object.

An error is predicted/measured − 1, in percent: positive where the prediction is too slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.sweep.bootstrap import Estimate
from dsdlab.sweep.breakeven import BreakEven, Tpots, break_even
from dsdlab.sweep.keys import Condition, Variant
from dsdlab.sweep.stats import CellSummary

Kind = Literal["tpot", "ttft", "closed_form"]

TPOT_BAR_PCT, TPOT_WORST_BAR_PCT, TTFT_BAR_PCT = 5.0, 10.0, 10.0
"""What dsdlab promises of its simulator: mean |error| of TPOT, worst loss-free cell, mean |error| of TTFT."""
STREAMING_BAR_PCT = 7.0
"""And mean |error| of TPOT over the modes whose drafts stream."""


def error_pct(predicted: float, measured: float) -> float:
    """predicted/measured − 1 in percent; NaN where either is unknown."""
    return 100.0 * (predicted / measured - 1.0) if measured else math.nan


def signed_pct(value: float) -> str:
    """For people: "+3.1", "−0.4", "0.0"; a dash for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


@dataclass(frozen=True, slots=True)
class Compared:
    """One time of one cell, ms.

    measured: median with its 95 % interval over generations. predicted: median over draws of each draw's
    median, with the draws' 2.5 and 97.5 % quantiles (NaN for a single draw).
    """

    measured: Estimate
    predicted: Estimate

    @property
    def error_pct(self) -> float:
        return error_pct(self.predicted.value, self.measured.value)


@dataclass(frozen=True, slots=True)
class ComparedCell:
    """One cell of the grid on both sides.

    summary: of what was measured; None where nothing was. generations: how many usable ones both sides have.
    closed_form_ms: NaN where there is none. outside: what lies far outside the profile's calibrated range.
    missing: which side lacks the cell; problem: what the simulator could not do. windows_same of
    windows_compared generations have the same (drafted, accepted) in every window.
    """

    cell: str
    variant: Variant
    condition: Condition
    rtt_ms: float
    summary: CellSummary | None
    generations: int
    tpot: Compared
    ttft: Compared
    closed_form_ms: float
    lossy: bool
    outside: str
    missing: str
    problem: str
    windows_same: int
    windows_compared: int

    @property
    def closed_form_error_pct(self) -> float:
        return error_pct(self.closed_form_ms, self.tpot.measured.value)

    def error_of(self, kind: Kind) -> float:
        """The signed error of one kind, percent; NaN where there is none."""
        if kind == "closed_form":
            return self.closed_form_error_pct
        return self.tpot.error_pct if kind == "tpot" else self.ttft.error_pct

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.variant.label} at {self.rtt_ms:g} ms, {self.condition.label}"


class Total(NamedTuple):
    """Mean absolute and mean signed error over the cells that have one, percent; NaN over none."""

    mape_pct: float
    bias_pct: float
    cells: int


class WindowsDiffer(NamedTuple):
    """A generation whose windows the simulator did not repeat; `window` counts from 1, None: has no such."""

    cell: str  # for people
    rep: int
    prompt: str
    window: int
    measured: tuple[int, int] | None  # (drafted, accepted)
    predicted: tuple[int, int] | None

    @property
    def line(self) -> str:
        """One line for people."""

        def words(window: tuple[int, int] | None) -> str:
            return "none" if window is None else f"{window[1]} of {window[0]} accepted"

        return (
            f"{self.cell}, prompt {self.prompt}, repetition {self.rep}: window {self.window} measured "
            f"{words(self.measured)}, simulated {words(self.predicted)}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A sweep against its prediction. Times as they were written, ISO 8601; "" where not recorded.

    predicted_before: whether the prediction was made before every one of the measurements.
    tpots: the median draw of every generation that was measured too, ms.
    """

    scenario: str
    cells: list[ComparedCell]
    windows_differ: list[WindowsDiffer]  # the first few
    draws: int
    predicted_at: str
    measured_from: str
    predicted_before: bool
    digest: str
    profile: Mapping[str, str]
    acceptance: Mapping[str, str]
    tpots: Tpots

    def break_even(self, measured: BreakEven) -> BreakEven | None:
        """The simulator's break-even RTT of the same pair, without an interval; None where it has none."""
        found = break_even(self.tpots, measured.variant, measured.baseline, measured.condition, n_boot=1)
        return None if found is None else replace(found, lo_ms=math.nan, hi_ms=math.nan)

    def total(self, kind: Kind, *, loss_free: bool = False, streaming: bool = False) -> Total:
        """Errors of all cells, of those without loss, or of those whose mode lets drafts stream."""
        cells = [
            cell
            for cell in self.cells
            if not (loss_free and cell.lossy) and (not streaming or cell.variant.mode in STREAMING_MODES)
        ]
        errors = [e for cell in cells if not math.isnan(e := cell.error_of(kind))]
        if not errors:
            return Total(math.nan, math.nan, 0)
        n = len(errors)
        return Total(sum(map(abs, errors)) / n, sum(errors) / n, n)

    @property
    def worst_loss_free(self) -> ComparedCell | None:
        """The loss-free cell whose TPOT was predicted worst; None where there is none."""
        known = [c for c in self.cells if not c.lossy and not math.isnan(c.tpot.error_pct)]
        return max(known, key=lambda c: abs(c.tpot.error_pct), default=None)

    @property
    def windows_same(self) -> int:
        return sum(cell.windows_same for cell in self.cells)

    @property
    def windows_compared(self) -> int:
        return sum(cell.windows_compared for cell in self.cells)

    @property
    def windows_line(self) -> str:
        """ "replay: 96 of 96 generations have the same accepted count in every window"."""
        same, n = self.windows_same, self.windows_compared
        if not n:
            return "replay: nothing to compare, for windows follow from times where drafts stream"
        return f"replay: {same} of {n} generations have the same accepted count in every window"

    @property
    def extrapolated(self) -> list[ComparedCell]:
        return [cell for cell in self.cells if cell.outside]

    @property
    def missing(self) -> list[ComparedCell]:
        return [cell for cell in self.cells if cell.missing]

    @property
    def clause(self) -> str:
        """What the verdict ends with: "the simulator was 3.1 % off (…)"; "" where no cell has an error."""
        total = self.total("tpot")
        if not total.cells:
            return ""
        over = f"TPOT, mean over {total.cells} cell{'' if total.cells == 1 else 's'}"
        before = ", predicted before the measurements" if self.predicted_before else ""
        return f"the simulator was {total.mape_pct:.1f} % off ({over}{before})"

    @property
    def line(self) -> str:
        """One line for people: all errors."""
        total, bias = self.total("tpot"), ""
        if not total.cells:
            return "simulator against measurement: no cell has both"
        bias = f", mean signed {signed_pct(total.bias_pct)} %"
        parts = [f"TPOT {total.mape_pct:.1f} % off over {total.cells} cells{bias}"]
        free, worst = self.total("tpot", loss_free=True), self.worst_loss_free
        if worst is not None:
            where = f"{signed_pct(worst.tpot.error_pct)} % ({worst.variant.label} at {worst.rtt_ms:g} ms)"
            parts.append(f"{free.mape_pct:.1f} % over {free.cells} without loss, worst {where}")
        ttft, formula = self.total("ttft"), self.total("closed_form")
        parts += [f"TTFT {ttft.mape_pct:.1f} %"] if ttft.cells else []
        parts += [f"closed form {formula.mape_pct:.1f} % over {formula.cells}"] if formula.cells else []
        return f"simulator against measurement: {'; '.join(parts)}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _total_json(total: Total) -> dict[str, Any]:
    return {
        "mape_pct": _number(total.mape_pct),
        "bias_pct": _number(total.bias_pct),
        "cells": total.cells,
    }


def totals_json(comparison: Comparison) -> dict[str, Any]:
    """Errors over all cells, replay and provenance as plain types; None where a measure does not exist."""
    worst = comparison.worst_loss_free
    return {
        "line": comparison.line,
        "tpot": _total_json(comparison.total("tpot")),
        "tpot_loss_free": _total_json(comparison.total("tpot", loss_free=True)),
        "worst_loss_free": None
        if worst is None
        else {"cell": worst.cell, "label": worst.label, "tpot_error_pct": _number(worst.tpot.error_pct)},
        "ttft": _total_json(comparison.total("ttft")),
        "tpot_streaming": _total_json(comparison.total("tpot", streaming=True)),
        "closed_form": _total_json(comparison.total("closed_form")),
        "closed_form_loss_free": _total_json(comparison.total("closed_form", loss_free=True)),
        "windows": {
            "line": comparison.windows_line,
            "same": comparison.windows_same,
            "compared": comparison.windows_compared,
            "first_different": [item.line for item in comparison.windows_differ],
        },
        "draws": comparison.draws,
        "predicted_at": comparison.predicted_at,
        "measured_from": comparison.measured_from,
        "predicted_before": comparison.predicted_before,
        "digest": comparison.digest,
        "profile": dict(comparison.profile),
        "acceptance": dict(comparison.acceptance),
    }


def _compared_json(name: str, compared: Compared) -> dict[str, Any]:
    return {
        f"{name}_ms": _number(compared.measured.value),
        f"{name}_interval_ms": [_number(compared.measured.lo), _number(compared.measured.hi)],
        f"predicted_{name}_ms": _number(compared.predicted.value),
        f"predicted_{name}_band_ms": [_number(compared.predicted.lo), _number(compared.predicted.hi)],
        f"{name}_error_pct": _number(compared.error_pct),
    }


def comparison_json(name: str, comparison: Comparison) -> dict[str, Any]:
    """The object that `--json` prints: plain types, None where a measure does not exist."""
    cells = []
    for cell in comparison.cells:
        own = cell.summary
        item: dict[str, Any] = {
            "cell": cell.cell,
            **cell.variant._asdict(),
            **cell.condition._asdict(),
            "rtt_ms": cell.rtt_ms,
            "generations": 0 if own is None else own.generations,
            "compared": cell.generations,
            "tokens": 0 if own is None else own.tokens,
            "alpha": None if own is None else _number(own.alpha.value),
            "tau": None if own is None else _number(own.tau),
            "exact": own is not None and own.all_exact,
            **_compared_json("tpot", cell.tpot),
            **_compared_json("ttft", cell.ttft),
            "closed_form_tpot_ms": _number(cell.closed_form_ms),
            "closed_form_error_pct": _number(cell.closed_form_error_pct),
            "lossy": cell.lossy,
            "outside": cell.outside,
            "missing": cell.missing,
            "problem": cell.problem,
            "windows_same": cell.windows_same,
            "windows_compared": cell.windows_compared,
        }
        cells.append(item)
    return {"name": name, **totals_json(comparison), "cells": cells}
