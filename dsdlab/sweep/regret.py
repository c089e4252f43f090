"""How far the controller is from the best static setting of each cell, which nobody knows beforehand.

Regret is counted on what was spent in all, as it is for bandits: the time of a cell's generations together. A
median over texts would call a setting best that is a little faster on most and far slower on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from dsdlab.sweep.bootstrap import Estimate, of_ratio
from dsdlab.sweep.breakeven import Pair, Tpots
from dsdlab.sweep.keys import Condition, Variant

__all__ = ["Regret", "regret_lines", "regrets_of"]

ADAPTIVE = "dsd-adaptive"


class Regret(NamedTuple):
    """One cell of the controller.

    best: the static variant that took least time on the same generations, among those that need no more than
    the controller had. ratio, of_alone: the controller's time as a multiple of it and of `cloud-ar`, the
    latter None where none was run. tpot_ms, best_ms: means over the generations that both have.
    """

    variant: Variant
    condition: Condition
    rtt_ms: float
    tpot_ms: float
    best: Variant
    best_ms: float
    ratio: Estimate
    of_alone: Estimate | None

    @property
    def pct(self) -> float:
        """How much slower than the best, percent; negative: faster."""
        return 100.0 * (self.ratio.value - 1.0)


def _had_by(controller: Variant, static: Variant) -> bool:
    """Whether the controller could have done the same.

    Some modes need a drafter beside the target, which it may lack, and a target at the edge it never has.
    """
    if static.mode in (ADAPTIVE, "edge-sd"):
        return False
    return controller.beside > 0 or not (static.beside or static.mode == "cloud-sd")


class _Totals(NamedTuple):
    """TPOTs of the generations that the controller and a static variant both have, pair by pair."""

    pairs: list[Pair]
    mine: list[float]
    theirs: list[float]

    @classmethod
    def of(cls, mine: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> _Totals:
        shared = [pair for pair in mine if pair in theirs]
        return cls(shared, [mine[p] for p in shared], [theirs[p] for p in shared])

    @property
    def ratio(self) -> float:
        return sum(self.mine) / sum(self.theirs)

    def estimate(self, label: str) -> Estimate:
        """The ratio with its interval."""
        found = of_ratio(self.mine, self.theirs, [pair[:2] for pair in self.pairs], label)
        return replace(found, n=len(self.pairs))


def regrets_of(tpots: Tpots) -> list[Regret]:
    """Of every cell of the controller that shares generations with a static one."""
    found = []
    for key, mine in tpots.items():
        variant, condition, rtt_ms = key
        if variant.mode != ADAPTIVE:
            continue
        rivals = {
            other: totals
            for (other, where, at), theirs in tpots.items()
            if (where, at) == (condition, rtt_ms)
            and _had_by(variant, other)
            and (totals := _Totals.of(mine, theirs)).pairs
        }
        if not rivals:
            continue
        best = max(sorted(rivals, key=lambda v: v.order), key=lambda v: rivals[v].ratio)
        against = rivals[best]
        alone = next((totals for other, totals in rivals.items() if other.mode == "cloud-ar"), None)
        found.append(
            Regret(
                variant,
                condition,
                rtt_ms,
                fmean(against.mine),
                best,
                fmean(against.theirs),
                against.estimate(f"regret {key}"),
                None if alone is None else alone.estimate(f"alone {key}"),
            )
        )
    return sorted(found, key=lambda r: (r.condition.order, r.variant.order, r.rtt_ms))


def regret_lines(regrets: Sequence[Regret]) -> list[str]:
    """One line for each controller: its worst cell, the mean over all, and the worst against `cloud-ar`."""
    lines = []
    for variant in dict.fromkeys(r.variant for r in regrets):
        own = [r for r in regrets if r.variant == variant]
        worst = max(own, key=lambda r: r.pct)
        mean = sum(r.pct for r in own) / len(own)
        line = (
            f"{variant.label}: {worst.pct:+.1f} % against the best static setting in its worst of {len(own)} "
            f"cells ({worst.best.label} at {worst.rtt_ms:g} ms), {mean:+.1f} % on average"
        )
        slower = [100.0 * (r.of_alone.value - 1.0) for r in own if r.of_alone is not None]
        lines.append(f"{line}; {max(slower):+.1f} % against cloud-ar at worst" if slower else line)
    return [line.replace("-0.0 %", "0.0 %").replace("+0.0 %", "0.0 %") for line in lines]
