"""The backoff window: longer after a full acceptance, shorter after a rejection."""

from __future__ import annotations

from dsdlab.policies.base import Decision, Outcome, WindowPolicy, check_gamma

LARGEST = 16


class BackoffWindow(WindowPolicy):
    """γ grows by 2 when all drafts stood, is halved when none did, and shrinks by 1 otherwise; 1 to 16.

    The steps +2 and -1 are the "heuristic" schedule of transformers' assisted generation
    (`num_assistant_tokens_schedule`); the halving is ours, for a link on which a wrong window costs a round
    trip. gamma: the first window, and the largest if it is above 16.
    Raises PolicyError for a gamma out of range.
    """

    def __init__(self, gamma: int = 4) -> None:
        self._gamma = max(check_gamma(gamma), 1)
        self._most = max(LARGEST, gamma)

    def observe(self, outcome: Outcome) -> None:
        if not outcome.drafted:
            return
        if outcome.accepted == outcome.drafted:
            # a window that the text's end cut short says nothing about longer ones
            grown = self._gamma + 2 if outcome.drafted >= self._gamma else self._gamma
            self._gamma = min(grown, self._most)
        else:
            shrunk = self._gamma // 2 if not outcome.accepted else self._gamma - 1
            self._gamma = max(shrunk, 1)

    def decide(self) -> Decision:
        return Decision(self._gamma)
