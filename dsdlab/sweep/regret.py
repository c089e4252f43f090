"""How far the controller is from the best static setting of each cell, which nobody knows beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsdlab.sweep.bootstrap import Estimate
from dsdlab.sweep.breakeven import Tpots, paired_ratios, ratio_estimate
from dsdlab.sweep.keys import Condition, Variant

__all__ = ["Regret", "regret_lines", "regrets_of"]

ADAPTIVE = "dsd-adaptive"


class Regret(NamedTuple):
    """One cell of the controller.

    best: the static variant with the least median TPOT among those that need no more than the controller had.
    ratio, of_alone: paired TPOT ratios against it and against `cloud-ar`, the latter None where none was run.
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


def regrets_of(tpots: Tpots) -> list[Regret]:
    """Of every cell of the controller that shares generations with a static one."""
    found = []
    for key, mine in tpots.items():
        variant, condition, rtt_ms = key
        if variant.mode != ADAPTIVE:
            continue
        rivals = {
            other: theirs
            for (other, where, at), theirs in tpots.items()
            if (where, at) == (condition, rtt_ms) and _had_by(variant, other) and paired_ratios(mine, theirs)
        }
        if not rivals:
            continue
        medians = {other: float(np.median(list(theirs.values()))) for other, theirs in rivals.items()}
        best = min(sorted(medians, key=lambda v: v.order), key=medians.__getitem__)
        alone = next((theirs for other, theirs in rivals.items() if other.mode == "cloud-ar"), None)
        found.append(
            Regret(
                variant,
                condition,
                rtt_ms,
                float(np.median(list(mine.values()))),
                best,
                medians[best],
                ratio_estimate(mine, rivals[best], f"regret {key}"),
                None if alone is None else ratio_estimate(mine, alone, f"alone {key}"),
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
