"""How far the controller is from the best static setting of each cell, which nobody knows beforehand.

Regret is counted on what was spent in all, as it is for bandits: the time of a cell's generations together. A
median over texts would call a setting best that is a little faster on most and far slower on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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


def _total_ratio(mine: Mapping[Pair, float], theirs: Mapping[Pair, float], label: str) -> Estimate | None:
    """Σ mine / Σ theirs over the generations that both have, with its interval; None without any."""
    shared = [pair for pair in mine if pair in theirs]
    if not shared:
        return None
    groups = [pair[:2] for pair in shared]
    found = of_ratio([mine[p] for p in shared], [theirs[p] for p in shared], groups, label)
    return replace(found, n=len(shared))


def _shared_mean(of: Mapping[Pair, float], also_in: Mapping[Pair, float]) -> float:
    shared = [ms for pair, ms in of.items() if pair in also_in]
    return sum(shared) / len(shared)


def regrets_of(tpots: Tpots) -> list[Regret]:
    """Of every cell of the controller that shares generations with a static one."""
    found = []
    for key, mine in tpots.items():
        variant, condition, rtt_ms = key
        if variant.mode != ADAPTIVE:
            continue
        rivals = {
            other: (theirs, ratio)
            for (other, where, at), theirs in tpots.items()
            if (where, at) == (condition, rtt_ms)
            and _had_by(variant, other)
            and (ratio := _total_ratio(mine, theirs, f"regret {key} {other}"))
        }
        if not rivals:
            continue
        best = max(sorted(rivals, key=lambda v: v.order), key=lambda v: rivals[v][1].value)
        theirs, ratio = rivals[best]
        alone = next((against for other, (_, against) in rivals.items() if other.mode == "cloud-ar"), None)
        mean_ms, best_ms = _shared_mean(mine, theirs), _shared_mean(theirs, mine)
        found.append(Regret(variant, condition, rtt_ms, mean_ms, best, best_ms, ratio, alone))
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
