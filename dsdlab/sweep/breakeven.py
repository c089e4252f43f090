"""Paired TPOT ratios against a baseline, and the RTT at which they cross 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsdlab.sweep import bootstrap
from dsdlab.sweep.bootstrap import Estimate, Floats
from dsdlab.sweep.keys import Condition, Variant, condition_of, pair_of, variant_of
from dsdlab.sweep.rows import Row

State = Literal["crosses", "always", "never"]
Pair = tuple[str, int, int]
Tpots = Mapping[tuple[Variant, Condition, float], Mapping[Pair, float]]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Up to which RTT `variant` is faster than `baseline` under `condition`.

    rtt_ms, lo_ms and hi_ms are −infinity for "slower already at the lowest RTT of the grid" and
    +infinity for "still faster at its highest"; lo and hi bound the 95 % interval and are NaN where a
    single generation leaves none.
    """

    variant: Variant
    baseline: Variant
    condition: Condition
    rtt_ms: float
    lo_ms: float
    hi_ms: float
    grid_min_ms: float
    grid_max_ms: float
    pairs: int

    @property
    def state(self) -> State:
        if np.isinf(self.rtt_ms):
            return "always" if self.rtt_ms > 0 else "never"
        return "crosses"

    def bound(self, value_ms: float) -> str:
        """One RTT for people: "61", or "<5" and ">200" beyond the ends of the grid."""
        if np.isinf(value_ms):
            return f">{self.grid_max_ms:g}" if value_ms > 0 else f"<{self.grid_min_ms:g}"
        return f"{value_ms:.0f}" if value_ms >= 10 else f"{value_ms:.1f}"

    @property
    def interval_text(self) -> str:
        """The interval, "[55, 68]"; empty where there is none or where it says nothing new."""
        if np.isnan(self.lo_ms) or (np.isinf(self.rtt_ms) and self.lo_ms == self.hi_ms == self.rtt_ms):
            return ""
        return f"[{self.bound(self.lo_ms)}, {self.bound(self.hi_ms)}]"


def tpot_by_cell(rows: Sequence[Row]) -> dict[tuple[Variant, Condition, float], dict[Pair, float]]:
    """TPOT (ms) of every usable generation by cell and pair."""
    cells: dict[tuple[Variant, Condition, float], dict[Pair, float]] = {}
    for row in rows:
        if row.usable and row.tpot_ms is not None and row.tpot_ms > 0:
            key = (variant_of(row), condition_of(row), row.rtt_ms)
            cells.setdefault(key, {})[pair_of(row)] = row.tpot_ms
    return cells


def baseline_for(
    variant: Variant, mode: str, variants: Sequence[Variant], tpots: Tpots | None = None
) -> Variant | None:
    """The baseline of that mode: the one with the variant's own window where there is one.

    Else the one with the least median TPOT in `tpots`; without those, the first.
    """
    candidates = sorted((v for v in variants if v.mode == mode), key=lambda v: v.order)
    for candidate in candidates:
        if (candidate.gamma, candidate.policy) == (variant.gamma, variant.policy):
            return candidate

    def typical_ms(candidate: Variant) -> float:
        found = [t for key, pairs in (tpots or {}).items() if key[0] == candidate for t in pairs.values()]
        return float(np.median(found)) if found else np.inf

    return min(candidates, key=typical_ms, default=None)


def paired_ratios(mine: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> dict[Pair, float]:
    """TPOT ratio mine/theirs for every pair both cells have; below 1: mine is faster."""
    return {pair: mine[pair] / theirs[pair] for pair in mine if pair in theirs}


def ratio_estimate(mine: Mapping[Pair, float], theirs: Mapping[Pair, float], label: str) -> Estimate:
    """Median paired ratio with its interval."""
    ratios = paired_ratios(mine, theirs)
    return bootstrap.of_quantile(list(ratios.values()), [pair[:2] for pair in ratios], label)


def crossing_rtt_ms(rtts_ms: Floats, ratios: Floats) -> float:
    """Where a rising ratio crosses 1, interpolated linearly; −inf: above 1 from the start; +inf: never.

    rtts_ms rises strictly; NaN ratios are left out. More RTT never helps against a stream, so the
    ratios are first made monotone (isotonic regression): noise cannot yield two crossings.
    """
    known = ~np.isnan(ratios)
    if not known.any():
        return float("nan")
    x, y = rtts_ms[known], ratios[known]
    if np.any(np.diff(y) < 0):
        from scipy.optimize import isotonic_regression  # imported late: it doubles start-up time

        y = isotonic_regression(y).x
    slower = np.flatnonzero(y >= 1.0)
    if not slower.size:
        return float("inf")
    k = int(slower[0])
    if k == 0:
        return float("-inf")
    return float(x[k - 1] + (1.0 - y[k - 1]) / (y[k] - y[k - 1]) * (x[k] - x[k - 1]))


def break_even(
    tpots: Tpots,
    variant: Variant,
    baseline: Variant,
    condition: Condition,
    n_boot: int = bootstrap.N_BOOT,
) -> BreakEven | None:
    """Measured break-even RTT; None where the two share no pair.

    Prompts are resampled for all RTTs at once, because a prompt drafts as well at one RTT as at another.
    """
    columns = {}
    for key, mine in tpots.items():
        if key[:2] == (variant, condition):
            ratios = paired_ratios(mine, tpots.get((baseline, condition, key[2]), {}))
            if ratios:
                columns[key[2]] = ratios
    if not columns:
        return None
    rtts = np.array(sorted(columns))
    pairs = sorted({pair for ratios in columns.values() for pair in ratios})
    table = np.array([[columns[rtt].get(pair, np.nan) for rtt in rtts] for pair in pairs])  # [pairs, rtts]
    value = crossing_rtt_ms(rtts, bootstrap.quantile(table, 0.5, axis=0))
    lo = hi = float("nan")
    if len(pairs) > 1:
        rng = bootstrap.generator(f"break-even {variant} {baseline} {condition}")
        indices = bootstrap.resample([pair[:2] for pair in pairs], rng, n_boot)
        curves = bootstrap.quantile(bootstrap.take(table, indices), 0.5, axis=1)  # [n_boot, rtts]
        lo, hi = bootstrap.interval(np.array([crossing_rtt_ms(rtts, curve) for curve in curves]))
    return BreakEven(variant, baseline, condition, value, lo, hi, float(rtts[0]), float(rtts[-1]), len(pairs))
