"""The policy interface: observe what became of drafts, decide the next and how the target paces itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from dsdlab.protocol.frames import MAX_WINDOW

FOREVER_S = math.inf
RUN_AHEAD = 32
"""Tokens drafted and not yet judged, where nothing else is asked."""


class PolicyError(ValueError):
    """A policy is unknown or its parameters are out of range; one line for the user."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One step of the target, seen from the node that drafts: a judged window, or a token decided alone.

    `t_round_s` is NaN where nobody waited for the step (drafts that were in flight, a target running free).
    """

    drafted: int  # drafts that the step judged; 0: decided alone
    accepted: int
    t_draft_s: float  # to draft the window; 0 where drafting went on beside the network
    t_verify_s: float  # the target's compute
    t_queue_s: float  # waiting for the target
    t_round_s: float  # from the window's departure to its verdict, network and target together
    compared: int = (
        0  # tokens of the target for whose positions the drafter had its own, to the first that differs
    )
    agreed: int = 0  # how many of them were the same: agreed/compared estimates α without a judged draft
    t_beside_s: float = 0.0  # compute of the drafter beside the target for this step
    beside: int = 0  # tokens that it drafted; they are the last of `drafted`
    rtt_s: float = math.nan  # of the link, the latest that is known
    context: int = 0  # positions of the text
    now_s: float = math.nan  # on the node's clock
    t_token_s: float = math.nan  # to draft one token here, the latest that is known
    overlap_s: float = 0.0  # of the step, while this node drafted: on one machine that slows the target


class Pace(msgspec.Struct, frozen=True, gc=False):
    """How the target goes on in a streaming session (modes `dsd-pipelined`, `dsd-stream`, `dsd-adaptive`).

    hold_s: how long a target that is free waits for drafts before it decodes alone; infinite: it never does.
    max_window: drafts judged in one step. beside: a drafter beside the target fills a step up to so many.
    drafting: whether drafts are on their way. Steps without them are then done in slack only; a session
    that does not draft has the same right to the target as `cloud-ar`.
    """

    hold_s: float = FOREVER_S
    max_window: int = MAX_WINDOW
    beside: int = 0
    drafting: bool = True


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What to draft next.

    gamma: tokens a window or frame; in `dsd-sync`, 0 lets the target decode alone for one token; where
    drafts stream, 0 stops drafting. run_ahead: tokens drafted and not yet judged (streaming modes); None: as
    the request asks. first: tokens in the first frame after a mismatch; 0: as many as `gamma`. pace: of the
    target; None: as the request asks.
    """

    gamma: int
    run_ahead: int | None = None
    first: int = 0
    pace: Pace | None = None


class WindowPolicy(ABC):
    """One instance per generation. A stopping rule may depend on the prefix, never on a sampled value.

    stops: whether `goes_on` is to be asked; the drafter then reports confidences: a softmax a token.
    ping_every_s: how often to measure the round trip during a streaming generation.
    """

    stops: bool = False
    ping_every_s: float = math.inf

    def begin(self, *, beside: int, rtt_s: float | None) -> None:  # noqa: B027 - of use to few
        """Called once, before the first decision of a streaming generation.

        beside: the largest window of a drafter beside the target; 0: there is none. rtt_s: as last measured.
        """

    @abstractmethod
    def decide(self) -> Decision:
        """The next window."""

    def observe(self, outcome: Outcome) -> None:  # noqa: B027 - learning is optional
        """Learn from a step of the target."""

    def observe_rtt(self, rtt_s: float) -> None:  # noqa: B027 - of use to few
        """Learn from a round trip that was measured for `ping_every_s`."""

    def describe(self, decision: Decision) -> str:
        """A decision in words, for the report."""
        return f"window {decision.gamma}"

    def goes_on(self, confidences: Sequence[float]) -> bool:  # noqa: ARG002 - for policies that stop
        """Whether to draft another token after those drafted so far in this window.

        confidences: for each of them the highest probability of the drafter's distribution at its position
        (NaN where no model spoke). That is a function of the prefix, known before a token is drawn: which
        token was drawn must not matter, else sampling would be biased.
        """
        return True


def check_gamma(gamma: int) -> int:
    """gamma itself, or PolicyError naming what is allowed."""
    if not 0 <= gamma <= MAX_WINDOW:
        raise PolicyError(f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}")
    return gamma
