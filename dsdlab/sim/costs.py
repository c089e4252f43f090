"""What computing costs: the forms that calibration fits and the simulator spends.

A forward over a ragged batch takes

    base_s + per_token_s · n + per_token2_s · n² + per_session_s · (batch − 1) + per_context_s · Σ context
    + by_rows(n) + per_drawn_s · (rows whose token is drawn)

for n = Σ rows of all sessions. Kernels work in blocks, so that the straight line is systematically off at
small n: `by_rows` is that remainder, interpolated between the row counts that were measured, and zero beyond
them. A prompt is a forward like any other, with many rows. Source of the straight line: Agrawal et al.,
"Vidur" (MLSys 2024).

That is a model that has just run. One that has rested finds its weights gone from the caches, and the core it
runs on asleep: its first forwards take longer, by an extra that fades from one to the next (`Warmth`).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import msgspec

__all__ = ["ForwardCost", "Goodness", "NodeCosts", "SystemProfile", "UnfitProfile", "Warmth"]

PROFILE_VERSION = 1
FAR_OUTSIDE = 1.5
"""A cost is extrapolated when asked for more than this many times the largest calibrated size."""


class UnfitProfile(ValueError):
    """A profile cannot serve: another version, other models, impossible numbers. One line for the user."""


class Goodness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well a form fits what was measured while nothing else had the core. Errors are relative,
    |fitted/measured − 1|; R² is of such errors too (weights 1/t²)."""

    n: int  # measurements, all of them
    r2: float
    r2_line: float  # of the straight line alone, without `by_rows`
    error_p50: float
    error_p95: float


class ForwardCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cost of one model's forward on one node, in seconds.

    per_drawn_s: for each row whose token is drawn (temperature above 0), beyond the greedy choice.
    residuals: sorted, of measured/fitted (1.0 is a perfect fit), to be drawn from uniformly: each is the mean
    of an equal share of the measurements, so that their mean is that of all; empty: none.
    first_s: the extra of the first forward after another model ran on the node.
    after_idle: (seconds, extra) of the first forward after the node was idle for so long; interpolated,
    nothing at 0, constant past the last. fade: the fraction of an extra that is left at the next forward.
    tokens, batch, context: smallest and largest value measured.
    stages, hop_s: a model partitioned over `stages` devices in a row takes the time above in all, each stage
    an equal share, plus `hop_s` between two of them; different sessions can be in different stages.
    """

    base_s: float
    per_token_s: float = 0.0
    per_token2_s: float = 0.0
    per_session_s: float = 0.0
    per_context_s: float = 0.0
    by_rows: tuple[tuple[int, float], ...] = ()
    per_drawn_s: float = 0.0
    first_s: float = 0.0
    after_idle: tuple[tuple[float, float], ...] = ()
    fade: float = 0.0
    residuals: tuple[float, ...] = ()
    tokens: tuple[int, int] = (1, 1 << 20)
    batch: tuple[int, int] = (1, 1 << 20)
    context: tuple[int, int] = (0, 1 << 20)
    stages: int = 1
    hop_s: float = 0.0
    fit: Goodness | None = None

    def cost_s(self, tokens: int, batch: int, context: int, drawn: int = 0) -> float:
        """Seconds for `tokens` rows in all, of `batch` sessions that hold `context` positions in all before.
        drawn: rows whose token is drawn."""
        line = (
            self.base_s
            + self.per_token_s * tokens
            + self.per_token2_s * tokens * tokens
            + self.per_session_s * (batch - 1)
            + self.per_context_s * context
            + self.per_drawn_s * drawn
        )
        return line + self.row_term_s(tokens)

    def row_term_s(self, tokens: int) -> float:
        """`by_rows` at a row count."""
        knots = self.by_rows
        if not knots or not knots[0][0] <= tokens <= knots[-1][0]:
            return 0.0
        at = bisect_right(knots, (tokens, float("inf"))) - 1
        if knots[at][0] == tokens:
            return knots[at][1]
        (x0, y0), (x1, y1) = knots[at], knots[at + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def rested_s(self, idle_s: float, other_ran: bool) -> float:
        """The extra of a first forward: the node was idle for `idle_s` before it, or another model ran."""
        extra_s = self.first_s if other_ran else 0.0
        x0 = y0 = 0.0
        for x1, y1 in self.after_idle:
            if idle_s < x1:
                return max(extra_s, y0 + (y1 - y0) * (idle_s - x0) / (x1 - x0))
            x0, y0 = x1, y1
        return max(extra_s, y0)

    def outside(self, tokens: int, batch: int, context: int) -> str:
        """What lies far outside the calibrated range, for people; empty where nothing does. `context` is the
        longest of any one session."""
        asked = (
            ("rows", tokens, self.tokens),
            ("batch", batch, self.batch),
            ("context", context, self.context),
        )
        far = [f"{name} {n} (calibrated to {r[1]})" for name, n, r in asked if n > FAR_OUTSIDE * r[1]]
        return ", ".join(far)

    def check(self, where: str) -> None:
        """Raises UnfitProfile for numbers that no machine has."""
        for name in (
            "base_s",
            "per_token_s",
            "per_token2_s",
            "per_session_s",
            "per_context_s",
            "per_drawn_s",
            "first_s",
            "hop_s",
        ):
            value = getattr(self, name)
            if not 0.0 <= value < 3600.0:  # NaN fails too
                raise UnfitProfile(f"{where}.{name} is {value!r}; allowed: 0 to 3600 seconds")
        if not 0.0 <= self.fade < 1.0:
            raise UnfitProfile(f"{where}.fade is {self.fade!r}; allowed: 0 to less than 1")
        if any(not (0.0 < x < 3600.0 and 0.0 <= y < 3600.0) for x, y in self.after_idle):
            raise UnfitProfile(f"{where}.after_idle holds a time that is none; allowed: up to 3600 seconds")
        if any(a[0] >= b[0] for a, b in pairwise(self.after_idle)):
            raise UnfitProfile(f"{where}.after_idle is not in rising order of idle time")
        for name in ("tokens", "batch", "context"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise UnfitProfile(f"{where}.{name} is {low} to {high}; allowed: 0 or more, rising")
        if self.stages < 1:
            raise UnfitProfile(f"{where}.stages is {self.stages}; allowed: 1 or more")
        if any(not 0.0 < r < 1000.0 for r in self.residuals):
            raise UnfitProfile(f"{where}.residuals are no ratios; allowed: above 0 and below 1000")
        if any(a[0] >= b[0] for a, b in pairwise(self.by_rows)):
            raise UnfitProfile(f"{where}.by_rows is not in rising order of rows")
        for n, extra_s in self.by_rows:
            if not 0.0 <= self.cost_s(n, 1, 0) < 3600.0:
                raise UnfitProfile(
                    f"{where}.by_rows has {extra_s!r} s at {n} rows, and a forward of them takes "
                    f"{self.cost_s(n, 1, 0)!r} s; allowed: 0 to 3600 in all"
                )


class Warmth:
    """How warm one model is on its node: hands out the extra of each of its forwards in turn."""

    __slots__ = ("_cost", "_left_s")

    def __init__(self, cost: ForwardCost) -> None:
        self._cost = cost
        self._left_s = 0.0

    def extra_s(self, idle_s: float, other_ran: bool) -> float:
        """Of the forward that now begins, after the node was idle for `idle_s`, or another model ran on it
        since this one's last forward."""
        cost = self._cost
        self._left_s = max(cost.rested_s(idle_s, other_ran), self._left_s * cost.fade)
        return self._left_s


class NodeCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node: its models and what the node itself adds.

    hop_s: from asking the compute thread to the answer, beyond the compute, and what else a node does between
    two steps of its model. send_s, recv_s: from a frame's sending to its bytes leaving, and from their
    arrival to the node's having it.
    """

    target: ForwardCost | None = None
    drafter: ForwardCost | None = None
    hop_s: float = 0.0
    send_s: float = 0.0
    recv_s: float = 0.0

    def check(self, where: str) -> None:
        """Raises UnfitProfile for numbers that no machine has."""
        for name in ("hop_s", "send_s", "recv_s"):
            value = getattr(self, name)
            if not 0.0 <= value < 3600.0:
                raise UnfitProfile(f"{where}.{name} is {value!r}; allowed: 0 to 3600 seconds")
        for model in ("target", "drafter"):
            cost: ForwardCost | None = getattr(self, model)
            if cost is not None:
                cost.check(f"{where}.{model}")


class Contention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times longer computing takes on one node while the other computes: 1 on two machines.

    target: a forward of the target while the edge drafts. drafter: one of the edge's drafter while the target
    computes. Raises ValueError, naming the field.
    """

    target: float = 1.0
    drafter: float = 1.0

    def __post_init__(self) -> None:
        for name in ("target", "drafter"):
            if not 1.0 <= getattr(self, name) < 100.0:  # NaN fails too
                raise ValueError(f"contention.{name} is {getattr(self, name)}; allowed: 1 to 100")

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return self.target > 1.0 or self.drafter > 1.0


class SystemProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pair of models on an edge and a cloud node: what `dsdlab calibrate` writes and the simulator reads.

    origin: "measured here" (by `dsdlab calibrate`), "measured" (by this project, on a machine that `source`
    names) or "published". source: how it was measured, or the publication.
    """

    version: int = PROFILE_VERSION
    name: str
    origin: str
    source: str
    target: str = ""  # model names as scenarios use them; "" fits any
    drafter: str = ""
    precision: str = ""
    edge: NodeCosts
    cloud: NodeCosts
    contention: Contention = Contention()
    provenance: dict[str, object] = {}
