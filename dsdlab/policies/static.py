"""The static window: always the same γ."""

from __future__ import annotations

from dsdlab.policies.base import Decision, WindowPolicy, check_gamma


class StaticWindow(WindowPolicy):
    """Draft `gamma` tokens every time. Raises PolicyError for a gamma out of range."""

    def __init__(self, gamma: int = 4) -> None:
        self._decision = Decision(check_gamma(gamma))

    def decide(self) -> Decision:
        return self._decision
