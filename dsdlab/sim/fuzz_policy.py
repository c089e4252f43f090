"""A window policy that decides anything at any time: what every other policy may do, this one will."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsdlab.policies import FOREVER_S, Decision, Pace, WindowPolicy
from dsdlab.policies.base import check_gamma

__all__ = ["RESTLESS", "Restless"]

RESTLESS = "restless"
CHANGES = 0.25  # probability that a decision is another than the one before
HOLDS_S = (0.0, 0.0, 0.001, 0.05, 0.5, FOREVER_S, FOREVER_S)
WINDOWS = (1, 1, 2, 3, 4, 8, 32, 256)


class Restless(WindowPolicy):
    """Draws window, run-ahead, first frame and pace, now and then, and stops windows by chance.

    gamma: the first window. Raises PolicyError for one that is out of range.
    """

    def __init__(self, gamma: int, rng: random.Random) -> None:
        self._rng = rng
        self._decision = Decision(check_gamma(gamma))
        self.stops = rng.random() < 0.3
        self.ping_every_s = rng.choice([FOREVER_S, 0.1, 0.3])

    def decide(self) -> Decision:
        if self._rng.random() < CHANGES:
            self._decision = self._drawn()
        return self._decision

    def _drawn(self) -> Decision:
        rng = self._rng
        pace = None
        if rng.random() < 0.8:
            pace = Pace(
                hold_s=rng.choice(HOLDS_S),
                max_window=rng.choice(WINDOWS),
                beside=rng.choice([0, 0, 1, 3, 8]),
                drafting=rng.random() < 0.8,
            )
        return Decision(
            gamma=rng.choice([0, 0, *WINDOWS]),
            run_ahead=rng.choice([None, 1, 2, 5, 40, 300]),
            first=rng.choice([0, 0, 1, 3, 12]),
            pace=pace,
        )

    def goes_on(self, confidences: Sequence[float]) -> bool:  # noqa: ARG002 - not what drafters say
        return self._rng.random() < 0.7
