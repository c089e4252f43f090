"""The window-policy interface: observe what became of a window, decide the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from dsdlab.protocol.frames import MAX_WINDOW


class PolicyError(ValueError):
    """A policy is unknown or its parameters are out of range; one line for the user."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One judged window, seen from the node that drafts."""

    drafted: int
    accepted: int
    t_draft_s: float  # to draft the window
    t_verify_s: float  # the target's compute
    t_queue_s: float  # waiting for the target
    t_round_s: float  # from the window's departure to its verdict, network and target together


class Decision(msgspec.Struct, frozen=True, gc=False):
    """gamma: tokens to draft next; 0 lets the target decode alone for one token."""

    gamma: int


class WindowPolicy(ABC):
    """One instance per generation. A stopping rule may depend on the prefix, never on a sampled value."""

    @abstractmethod
    def decide(self) -> Decision:
        """The next window."""

    def observe(self, outcome: Outcome) -> None:  # noqa: B027 - learning is optional
        """Learn from a judged window."""


def check_gamma(gamma: int) -> int:
    """gamma itself, or PolicyError naming what is allowed."""
    if not 0 <= gamma <= MAX_WINDOW:
        raise PolicyError(f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}")
    return gamma
