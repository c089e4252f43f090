"""The model window: the closed form's best γ at what is known now."""

from __future__ import annotations

import math

from dsdlab.policies.base import Decision, Outcome, WindowPolicy, check_gamma
from dsdlab.policies.estimates import ALPHA_MOST, Estimates

LARGEST = 16
ALONE_STEPS = 32  # without a draft; then acceptance is looked at again
LOOK = 2  # by a window of so many


def best_window(alpha: float, t_d_s: float, t_v1_s: float, t_row_s: float, round_s: float, most: int) -> int:
    """γ in 0 … most with the smallest [γ t_d + round + t_v(γ)]/E(γ), where t_v(γ) = t_v1 + γ t_row.

    The smaller one on a tie. round_s: round trip, transfer and waiting for the target; all in seconds. The
    sum is that of `dsdlab.sim.theory.sync_tpot_s`, without numpy: 3 µs.
    """
    best, best_s = 0, round_s + t_v1_s
    expected, power = 1.0, 1.0
    for gamma in range(1, most + 1):
        power *= alpha
        expected += power
        tpot_s = (gamma * (t_d_s + t_row_s) + round_s + t_v1_s) / expected
        if tpot_s < best_s:
            best, best_s = gamma, tpot_s
    return best


class ModelWindow(WindowPolicy):
    """The window that the closed form calls best for the live estimates of α, t_d, t_v and the round trip.

    gamma: the first window (at least 1), until times are known; later ones may be 0 (the target decodes
    alone) to 16, or to `gamma` if that is larger. Where good drafts would pay, windows of none are broken by
    a short one now and then: without it nothing would be learned any more.
    Raises PolicyError for a gamma out of range.
    """

    def __init__(self, gamma: int = 4) -> None:
        self._first = max(check_gamma(gamma), 1)  # 0 would never learn
        self._most = max(LARGEST, gamma)
        self._known = Estimates()
        self._alone = 0  # steps since something was compared

    def observe(self, outcome: Outcome) -> None:
        self._known.observe(outcome)
        self._alone = 0 if outcome.compared else self._alone + 1

    def decide(self) -> Decision:
        known = self._known
        round_s = known.round_s.value
        if math.isnan(round_s):  # nobody waits where drafts are in flight: the link's round trip is hidden
            round_s = 0.0
        if math.isnan(known.token_s) or math.isnan(known.verify.at_one_s):
            return Decision(self._first)
        t_d_s, t_v1_s, row_s = known.token_s, known.verify.at_one_s, known.verify.slope_s
        round_s += known.queue_s.value
        gamma = best_window(known.alpha, t_d_s, t_v1_s, row_s, round_s, self._most)
        if not gamma and self._alone >= ALONE_STEPS:
            gamma = min(best_window(ALPHA_MOST, t_d_s, t_v1_s, row_s, round_s, self._most), LOOK)
        return Decision(gamma)
