"""The UCB window: when to stop drafting, as a bandit that learns each position's acceptance.

Which window takes the least expected time per expected token is an optimal stopping problem with a ratio
for its reward; the best window grows with the round trip, but only as its logarithm (Sun et al.,
"Delay-adaptive speculation control for low-latency edge-cloud LLM inference", arXiv 2606.20591). Their
UCB-SpecStop has an arm for every γ, tries each once, and then takes the least of S_N/S_A - β sqrt(n ln
t)/S_A: the time over the tokens of an arm's n rounds, less a radius (as its abstract and a public program
of that name have it; BanditSpec, arXiv 2505.15141, has such arms for whole configurations). A text may be
over before 16 arms are known.

Here the ratio is theirs, the arms are not: a judged window tells about every position up to its first
rejection, so all windows are learned from each one (semi-bandit feedback). Position k's probability to be
accepted, given that all before it were, enters with its upper confidence bound

    ᾱ_k = min(1, α̂_k + c sqrt(ln N / (2 n_k))),   n_k: verdicts on position k, N: windows, c: CURIOSITY

(Auer, Cesa-Bianchi, Fischer, "Finite-time analysis of the multiarmed bandit problem", 2002, with Hoeffding's
constant), times are estimates of what was measured, and the window is the γ with the least time per token,

    (γ t_d + round + t_v(γ)) / (1 + Σ_k Π_{i≤k} ᾱ_i).

Positions that were seldom reached look good, so they are tried; what they turn out to be decides. Before its
first verdict a position is believed to be like the one before it: were each thought good in itself, a chain
of them, none ever reached, would promise much where nothing is accepted.

What is known is forgotten, so N counts no more windows than are remembered (Garivier and Moulines, "On
upper-confidence bound policies for switching bandit problems", 2011).
"""

from __future__ import annotations

import math

from dsdlab.policies.base import Decision, Outcome, WindowPolicy, check_gamma
from dsdlab.policies.estimates import Estimates

LARGEST = 16
KEEP = 0.98  # of what is known, each window: acceptance changes along a text
FIRST_WEIGHT = 4.0  # verdicts as which the position before counts for each; for the first, the whole text
CURIOSITY = 0.05  # share of the confidence radius that counts: a text is too short to explore at 1


class UcbWindow(WindowPolicy):
    """Learns when to stop. gamma: the first window (at least 1), and the largest if it is above 16.

    Raises PolicyError for a gamma out of range.
    """

    def __init__(self, gamma: int = 4) -> None:
        self._first = max(check_gamma(gamma), 1)  # 0 would never learn
        most = max(LARGEST, gamma)
        self._stood = [0.0] * most  # by position in the window: verdicts that accepted it
        self._judged = [0.0] * most
        self._windows = 0.0  # remembered
        self._known = Estimates()

    def observe(self, outcome: Outcome) -> None:
        self._known.observe(outcome)
        if not outcome.drafted:
            return
        self._windows = self._windows * KEEP + 1.0
        stood, judged = self._stood, self._judged
        for k in range(len(judged)):
            stood[k] *= KEEP
            judged[k] *= KEEP
        for k in range(min(outcome.accepted + 1, outcome.drafted, len(judged))):
            judged[k] += 1.0
            stood[k] += k < outcome.accepted

    def decide(self) -> Decision:
        known = self._known
        if not self._windows or math.isnan(known.token_s) or math.isnan(known.verify.at_one_s):
            return Decision(self._first)
        round_s = known.round_s.value
        wait_s = (0.0 if math.isnan(round_s) else round_s) + known.queue_s.value + known.verify.at_one_s
        each_s = known.token_s + known.verify.slope_s
        log_n = math.log(self._windows + 1.0)
        best, best_s = 0, wait_s
        expected = chance = 1.0
        alpha = known.alpha
        for k, judged in enumerate(self._judged):
            n = judged + FIRST_WEIGHT
            alpha = (self._stood[k] + alpha * FIRST_WEIGHT) / n
            chance *= min(1.0, alpha + CURIOSITY * math.sqrt(log_n / (2.0 * n)))
            expected += chance
            tpot_s = (wait_s + (k + 1) * each_s) / expected
            if tpot_s < best_s:
                best, best_s = k + 1, tpot_s
        return Decision(max(best, 1))  # 0 would end learning
