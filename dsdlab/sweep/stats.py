"""From rows to what a reader wants: cell summaries, paired ratios, acceptance, break-even, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdlab.sweep import bootstrap
from dsdlab.sweep.bootstrap import Estimate
from dsdlab.sweep.breakeven import BreakEven, baseline_for, break_even, ratio_estimate, tpot_by_cell
from dsdlab.sweep.closed_form import Inputs, closed_form_inputs
from dsdlab.sweep.exclusions import (
    Exclusion,
    counted_rows,
    describe_cell,
    excluded_line,
    exclusions_of,
    unique_rows,
)
from dsdlab.sweep.keys import Condition, Variant, condition_of, pair_of, variant_of
from dsdlab.sweep.overhead import Overhead, overhead_of
from dsdlab.sweep.regret import Regret, regret_lines, regrets_of
from dsdlab.sweep.rows import Row
from dsdlab.sweep.verdict import exact_line, verdict_sentence

if TYPE_CHECKING:
    from dsdlab.sweep.comparison import Comparison

__all__ = [
    "Acceptance",
    "BreakEven",
    "CellSummary",
    "Condition",
    "Estimate",
    "Exclusion",
    "IncompleteGridError",
    "Inputs",
    "Overhead",
    "Summary",
    "Variant",
    "cell_summary",
    "closed_form_inputs",
    "counted_rows",
    "describe_cell",
    "missing_generations",
    "summarise",
    "summary_json",
    "unique_rows",
]

BASELINES = ("cloud-ar", "cloud-sd")


class IncompleteGridError(ValueError):
    """Generations of the grid are missing; the message is one line that lists them."""


@dataclass(frozen=True, slots=True)
class CellSummary:
    """One cell: times in ms, quantiles over its usable generations (finished, and not excluded)."""

    cell: str
    variant: Variant
    condition: Condition
    rtt_ms: float
    jitter_ms: float
    loss_burst: float
    tcp: dict[str, Any]  # {"asked": …, "read_back": …}, of its first generation
    generations: int  # finished ones
    failed: int
    excluded: int  # of those that finished
    tokens: int
    tpot_ms: Estimate  # median
    tpot_p95_ms: float
    tpot_p99_ms: float
    ttft_ms: Estimate  # median
    ttft_p95_ms: float
    itl_p95_ms: float  # median over generations of each one's p95
    alpha: Estimate
    tau: float
    target_ms: float  # of the target's time a committed token, the prompt's included; median
    wasted: float  # drafts of the edge that were never committed, a committed token; median
    ratio: Estimate | None  # paired TPOT ratio against cloud-ar; None for the baseline or without one
    exact: int
    compared: int
    rtt_measured_ms: float  # median over its calibrations before generations
    reconnects: int
    stale_frames: int

    @property
    def all_exact(self) -> bool:
        """Whether every finished generation was compared and equals the target alone."""
        return self.generations > 0 and self.exact == self.compared == self.generations


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance of one variant at one temperature, pooled over RTT, rate and loss.

    per_position[i]: probability that draft i + 1 is accepted, given that all before it were.
    tested[i]: how many such drafts there were.
    """

    variant: Variant
    temperature: float
    alpha: Estimate
    tau: Estimate
    per_position: tuple[float, ...]
    tested: tuple[int, ...]
    windows: int


@dataclass(frozen=True, slots=True)
class Summary:
    """All statistics of a sweep."""

    cells: list[CellSummary]
    variants: list[Variant]
    conditions: list[Condition]
    acceptance: list[Acceptance]
    inputs: list[Inputs]
    break_evens: list[BreakEven]
    missing: list[str]
    exclusions: list[Exclusion]
    generations: int  # finished ones, excluded ones among them
    failures: int
    excluded: int
    exact: int
    compared: int
    tokens: int
    overhead: Overhead | None
    exact_line: str
    verdict: str
    comparison: Comparison | None = None
    regrets: list[Regret] = field(default_factory=list)  # of the controller

    @property
    def simulated(self) -> bool:
        """Whether these are the simulator's own numbers and nothing was measured."""
        return any(condition.simulated for condition in self.conditions)

    @property
    def notes(self) -> list[str]:
        """What a sweep says after its verdict and its exact line."""
        excluded = excluded_line(self.exclusions, self.generations)
        lines = [*regret_lines(self.regrets), excluded, "" if self.overhead is None else self.overhead.line]
        if self.comparison is not None:
            lines += [self.comparison.line, self.comparison.windows_line]
        return [line for line in lines if line]

    @property
    def measuring_share(self) -> float | None:
        """Σ generate_s / Σ wall_s; None where the rows do not say."""
        return None if self.overhead is None else self.overhead.share


def missing_generations(rows: Sequence[Row], expected: Mapping[str, int] | None = None) -> list[str]:
    """What the grid lacks, one entry per cell, "2 of 6 in CELL"; empty when it is complete.

    expected: good generations wanted per cell id. Without it every cell must have each (prompt, seed,
    rep) that any cell of its temperature has. A failed generation is a missing one, an excluded one is not:
    it was run, and `Summary.exclusions` lists it.
    """
    good: dict[str, set[tuple[str, int, int]]] = {}
    names: dict[str, str] = {}
    wanted: dict[float, set[tuple[str, int, int]]] = {}
    heat: dict[str, float] = {}
    for row in rows:
        pairs = good.setdefault(row.cell, set())
        names.setdefault(row.cell, describe_cell(row))
        heat[row.cell] = row.temperature
        wanted.setdefault(row.temperature, set()).add(pair_of(row))
        if row.status == "ok":
            pairs.add(pair_of(row))
    targets = expected if expected is not None else {cell: len(wanted[heat[cell]]) for cell in good}
    lacking = []
    for cell, count in targets.items():
        have = len(good.get(cell, ()))
        if have < count:
            lacking.append(f"{count - have} of {count} in {names.get(cell, f'cell {cell}')}")
    return lacking


def _values(rows: Sequence[Row], name: str) -> tuple[list[float], list[tuple[str, int]]]:
    """The values a measure has, and the (prompt, seed) group of each."""
    known = [(getattr(row, name), (row.prompt, row.seed)) for row in rows if getattr(row, name) is not None]
    return [float(value) for value, _ in known], [group for _, group in known]


def _quantile(rows: Sequence[Row], name: str, q: float) -> float:
    values, _ = _values(rows, name)
    return float(bootstrap.quantile(np.asarray(values), q)) if values else float("nan")


def _alpha(rows: Sequence[Row], label: str) -> Estimate:
    accepted = [float(sum(a for _, a in row.windows)) for row in rows]
    tested = [float(sum(a + (a < d) for d, a in row.windows)) for row in rows]
    return bootstrap.of_ratio(accepted, tested, [(row.prompt, row.seed) for row in rows], f"alpha {label}")


def _tau(rows: Sequence[Row], label: str) -> Estimate:
    known = [row for row in rows if row.tau is not None and row.windows]
    committed = [(row.tau or 0.0) * len(row.windows) for row in known]
    windows = [float(len(row.windows)) for row in known]
    return bootstrap.of_ratio(committed, windows, [(row.prompt, row.seed) for row in known], f"tau {label}")


def _acceptance(variant: Variant, temperature: float, rows: Sequence[Row]) -> Acceptance:
    windows = [window for row in rows for window in row.windows]
    tested, accepted = [], []
    for position in range(max((d for d, _ in windows), default=0)):
        tested.append(sum(d > position and a >= position for d, a in windows))
        accepted.append(sum(a > position for _, a in windows))
    label = f"{variant} {temperature}"
    return Acceptance(
        variant=variant,
        temperature=temperature,
        alpha=_alpha(rows, label),
        tau=_tau(rows, label),
        per_position=tuple(a / t if t else float("nan") for a, t in zip(accepted, tested, strict=True)),
        tested=tuple(tested),
        windows=len(windows),
    )


def cell_summary(rows: Sequence[Row], ratio: Estimate | None = None) -> CellSummary:
    """One cell's rows (counted ones, see `counted_rows`). ratio: its paired TPOT ratio against cloud-ar."""
    first = rows[0]
    finished = [row for row in rows if row.status == "ok"]
    good = [row for row in finished if row.usable]
    tpots, tpot_groups = _values(good, "tpot_ms")
    ttfts, ttft_groups = _values(good, "ttft_ms")
    return CellSummary(
        cell=first.cell,
        variant=variant_of(first),
        condition=condition_of(first),
        rtt_ms=first.rtt_ms,
        jitter_ms=first.jitter_ms,
        loss_burst=first.loss_burst,
        tcp=first.tcp,
        generations=len(finished),
        failed=len(rows) - len(finished),
        excluded=len(finished) - len(good),
        tokens=sum(row.tokens for row in finished),
        tpot_ms=bootstrap.of_quantile(tpots, tpot_groups, f"tpot {first.cell}"),
        tpot_p95_ms=_quantile(good, "tpot_ms", 0.95),
        tpot_p99_ms=_quantile(good, "tpot_ms", 0.99),
        ttft_ms=bootstrap.of_quantile(ttfts, ttft_groups, f"ttft {first.cell}"),
        ttft_p95_ms=_quantile(good, "ttft_ms", 0.95),
        itl_p95_ms=_quantile(good, "itl_p95_ms", 0.5),
        alpha=_alpha(good, first.cell),
        tau=_tau(good, first.cell).value,
        target_ms=_quantile(good, "target_ms_per_token", 0.5),
        wasted=_quantile(good, "wasted_per_token", 0.5),
        ratio=ratio,
        exact=sum(row.exact is True for row in finished),
        compared=sum(row.exact is not None for row in finished),
        rtt_measured_ms=_quantile(rows, "rtt_measured_ms", 0.5),
        reconnects=sum(row.reconnects for row in rows),
        stale_frames=sum(row.stale_frames for row in rows),
    )


def summarise(
    rows: Sequence[Row],
    *,
    expected: Mapping[str, int] | None = None,
    allow_incomplete: bool = False,
    n_boot: int = bootstrap.N_BOOT,
    comparison: Comparison | None = None,
) -> Summary:
    """All statistics of a sweep's rows.

    expected: good generations wanted per cell id (see `missing_generations`). comparison: the same rows held
    against their simulation (`dsdlab.sweep.compare`); the verdict then says how far off the simulator was.
    Raises ValueError for no rows at all, IncompleteGridError (one line) unless `allow_incomplete`.
    """
    if not rows:
        raise ValueError("there are no results to summarise")
    everything, rows = rows, counted_rows(rows)
    missing = missing_generations(rows, expected)
    if missing and not allow_incomplete:
        shown = "; ".join(missing[:8]) + (f"; and {len(missing) - 8} more cells" if len(missing) > 8 else "")
        raise IncompleteGridError(f"incomplete grid, generations missing: {shown}")

    finished = [row for row in rows if row.status == "ok"]
    good = [row for row in finished if row.usable]
    by_cell: dict[tuple[Variant, Condition, float], list[Row]] = {}
    by_heat: dict[tuple[Variant, float], list[Row]] = {}
    for row in rows:
        by_cell.setdefault((variant_of(row), condition_of(row), row.rtt_ms), []).append(row)
    for row in good:
        if any(drafted for drafted, _ in row.windows):
            by_heat.setdefault((variant_of(row), row.temperature), []).append(row)
    variants = sorted({key[0] for key in by_cell}, key=lambda v: v.order)
    conditions = sorted({key[1] for key in by_cell}, key=lambda c: c.order)
    tpots = tpot_by_cell(good)

    cells = []
    for key in sorted(by_cell, key=lambda k: (k[1].order, k[0].order, k[2])):
        variant, condition, rtt_ms = key
        baseline = baseline_for(variant, BASELINES[0], variants)
        ratio = None
        if baseline is not None and variant != baseline:
            theirs = tpots.get((baseline, condition, rtt_ms), {})
            ratio = ratio_estimate(tpots.get(key, {}), theirs, f"ratio {key}")
        cells.append(cell_summary(by_cell[key], ratio if ratio is not None and ratio.n else None))

    break_evens = []
    for condition in conditions:
        for mode in BASELINES:
            for variant in variants:
                baseline = baseline_for(variant, mode, variants, tpots)
                if baseline is None or variant.mode in BASELINES[: BASELINES.index(mode) + 1]:
                    continue
                found = break_even(tpots, variant, baseline, condition, n_boot)
                if found is not None:
                    break_evens.append(found)

    # a text that differed stays in the count, also where a later try replaced its generation
    kept = {id(row) for row in unique_rows(everything)}
    wrong = sum(row.status == "ok" and row.exact is False and id(row) not in kept for row in everything)
    exact = sum(row.exact is True for row in finished)
    compared = sum(row.exact is not None for row in finished) + wrong
    generations = len(finished) + wrong
    return Summary(
        cells=cells,
        variants=variants,
        conditions=conditions,
        acceptance=[
            _acceptance(*key, members)
            for key, members in sorted(by_heat.items(), key=lambda g: (g[0][0].order, g[0][1]))
        ],
        inputs=closed_form_inputs(good),
        break_evens=break_evens,
        missing=missing,
        exclusions=exclusions_of(finished),
        generations=generations,
        failures=len(rows) - len(finished),
        excluded=len(finished) - len(good),
        exact=exact,
        compared=compared,
        tokens=sum(row.tokens for row in finished),
        overhead=overhead_of(everything),
        exact_line=exact_line(exact, compared, generations, simulated=any(c.simulated for c in conditions)),
        verdict=verdict_sentence(
            break_evens,
            cells,
            conditions,
            good=len(good),
            excluded=len(finished) - len(good),
            last="" if comparison is None else comparison.clause,
        ),
        comparison=comparison,
        regrets=regrets_of(tpots),
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def summary_json(name: str, summary: Summary) -> dict[str, Any]:
    """The object `--json` prints: plain types, None where a measure does not exist."""
    from dsdlab.sweep.comparison import totals_json  # imported late: it needs this module

    cells = []
    for cell in summary.cells:
        item: dict[str, Any] = {"cell": cell.cell, **cell.variant._asdict(), **cell.condition._asdict()}
        item |= {
            "rtt_ms": cell.rtt_ms,
            "rtt_measured_ms": _number(cell.rtt_measured_ms),
            "jitter_ms": cell.jitter_ms,
            "loss_burst": cell.loss_burst,
            "tcp": cell.tcp,
            "generations": cell.generations,
            "failed": cell.failed,
            "excluded": cell.excluded,
            "tokens": cell.tokens,
            "tpot_ms": _number(cell.tpot_ms.value),
            "tpot_interval_ms": [_number(cell.tpot_ms.lo), _number(cell.tpot_ms.hi)],
            "tpot_p95_ms": _number(cell.tpot_p95_ms),
            "tpot_p99_ms": _number(cell.tpot_p99_ms),
            "ttft_ms": _number(cell.ttft_ms.value),
            "itl_p95_ms": _number(cell.itl_p95_ms),
            "alpha": _number(cell.alpha.value),
            "tau": _number(cell.tau),
            "target_ms_per_token": _number(cell.target_ms),
            "wasted_per_token": _number(cell.wasted),
            "tpot_ratio": None if cell.ratio is None else _number(cell.ratio.value),
            "exact": cell.all_exact,
        }
        cells.append(item)
    return {
        "name": name,
        "verdict": summary.verdict,
        "exact": summary.exact_line,
        "generations": summary.generations,
        "failures": summary.failures,
        "excluded": summary.excluded,
        "exclusions": [exclusion._asdict() for exclusion in summary.exclusions],
        "overhead": None if summary.overhead is None else asdict(summary.overhead),
        "missing": summary.missing,
        "regrets": [
            {
                **r.variant._asdict(),
                **r.condition._asdict(),
                "rtt_ms": r.rtt_ms,
                "best": r.best.label,
                "regret_pct": _number(r.pct),
                "of_cloud_ar": None if r.of_alone is None else _number(r.of_alone.value),
            }
            for r in summary.regrets
        ],
        "simulator": None if summary.comparison is None else totals_json(summary.comparison),
        "cells": cells,
    }
