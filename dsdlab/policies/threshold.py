"""The threshold window: draft on while the drafter is sure."""

from __future__ import annotations

from collections.abc import Sequence

from dsdlab.policies.base import Decision, WindowPolicy, check_gamma

SURE = 0.4


class ThresholdWindow(WindowPolicy):
    """Draft up to `gamma` tokens, and stop behind the first of which the drafter was not sure.

    Sure: the highest probability of its distribution there is at least 0.4. transformers' assisted generation
    has this number as the default of `assistant_confidence_threshold`, for the probability of the token that
    was drawn; but whether a token is kept must not depend on which one was drawn (else rejection sampling is
    biased), so here it is the distribution's. A position that prompt lookup filled passes: it cost nothing.
    Raises PolicyError for a gamma out of range.
    """

    stops = True

    def __init__(self, gamma: int = 8) -> None:
        self._decision = Decision(check_gamma(gamma))

    def decide(self) -> Decision:
        return self._decision

    def goes_on(self, confidences: Sequence[float]) -> bool:
        return not confidences[-1] < SURE  # NaN goes on
