"""A stop-and-wait session as a window policy sees it, without models, nodes or a clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from dsdlab.policies import Outcome, WindowPolicy

Accepts = Callable[[int], float]
"""The probability that a position of a window (0: its first) is accepted, given that those before were."""


@dataclass(frozen=True)
class Costs:
    """Seconds: of a drafted token, of the target's step and of each row more, of the link."""

    draft_s: float = 0.005
    verify_s: float = 0.050
    row_s: float = 0.001
    rtt_s: float = 0.060

    def round_s(self, gamma: int) -> float:
        return self.rtt_s + self.verify_s + gamma * self.row_s

    def window_s(self, gamma: int) -> float:
        return gamma * self.draft_s + self.round_s(gamma)


def judged(gamma: int, accepted: int, costs: Costs = Costs(), context: int = 0) -> Outcome:
    """What `dsd-sync` tells its policy of a window."""
    return Outcome(
        gamma,
        accepted,
        gamma * costs.draft_s,
        costs.verify_s + gamma * costs.row_s,
        0.0,
        costs.round_s(gamma),
        min(accepted + 1, gamma),
        accepted,
        rtt_s=costs.rtt_s,
        context=context,
        t_token_s=costs.draft_s if gamma else math.nan,
    )


class Session:
    """A text that goes on: each call of `go` plays so many windows more."""

    def __init__(self, policy: WindowPolicy, costs: Costs, seed: int = 0) -> None:
        self.policy, self.costs = policy, costs
        self._rng = random.Random(seed)
        self.context = 0

    def go(self, accepts: float | Accepts, windows: int) -> list[tuple[int, int]]:
        """(drafted, accepted) of each."""
        chance = accepts if callable(accepts) else lambda _: accepts
        out = []
        for _ in range(windows):
            gamma = self.policy.decide().gamma
            accepted = next((k for k in range(gamma) if self._rng.random() >= chance(k)), gamma)
            self.policy.observe(judged(gamma, accepted, self.costs, self.context))
            self.context += accepted + 1
            out.append((gamma, accepted))
        return out


def tpot_s(windows: list[tuple[int, int]], costs: Costs) -> float:
    """Seconds a token of what was played."""
    return sum(costs.window_s(g) for g, _ in windows) / sum(a + 1 for _, a in windows)


def expected_tpot_s(gamma: int, accepts: Accepts, costs: Costs) -> float:
    """Seconds a token of windows of γ, exactly."""
    tokens = chance = 1.0
    for k in range(gamma):
        chance *= accepts(k)
        tokens += chance
    return costs.window_s(gamma) / tokens
