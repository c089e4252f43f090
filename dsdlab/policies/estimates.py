"""What a policy learns on the way: acceptance, the target's cost line, the drafter's pace, the round trip.

Every estimate is a mean that forgets, so that a change is noticed within some ten steps. All are cheap: a few
microseconds a step, whatever the length of the text.
"""

from __future__ import annotations

import math
from collections import deque

from dsdlab.policies.base import Outcome

ALPHA_FIRST, ALPHA_WEIGHT = 0.6, 8.0  # what is believed before anything was compared, and as how many tokens
ALPHA_MEMORY = 40.0  # tokens
ALPHA_SHARED = 30.0  # tokens as which the acceptance of both drafters together counts for each
ALPHA_LEAST, ALPHA_MOST = 0.02, 0.98
COST_MEMORY = 24.0  # steps
ROW_SHARE = 0.02  # what another row adds to a step, before rows have varied
PRIOR_STEPS = 4.0
LEAST_S = 1e-6  # of a step: no clock of a frame tells less
TOKEN_MEMORY = 16.0  # drafting calls
ROUND_TRIPS = 3  # whose median counts: a lost packet delays one


class Rate:
    """How often something is so: a share of trials that forgets. The prior counts as `weight` trials.

    memory: trials after which one counts for a third.
    """

    __slots__ = ("_hits", "_keep", "_trials")

    def __init__(self, first: float = 0.0, weight: float = 0.0, memory: float = ALPHA_MEMORY) -> None:
        self._hits, self._trials = first * weight, weight
        self._keep = 1.0 - 1.0 / memory

    def add(self, hits: int, trials: int) -> None:
        keep = self._keep**trials
        self._hits = self._hits * keep + hits
        self._trials = self._trials * keep + trials

    def value(self, like: float = 0.0, weight: float = 0.0) -> float:
        """The share, were it `like` in `weight` trials more. Never 0 or 1: nothing would be tried again."""
        share = (self._hits + like * weight) / (self._trials + weight)
        return min(max(share, ALPHA_LEAST), ALPHA_MOST)


class Mean:
    """A mean that forgets; NaN before the first value."""

    __slots__ = ("_most", "_n", "value")

    def __init__(self, memory: float) -> None:
        self.value = math.nan
        self._n, self._most = 0.0, memory

    def add(self, x: float) -> None:
        self._n = min(self._n + 1.0, self._most)
        self.value = x if self._n == 1.0 else self.value + (x - self.value) / self._n


class Line:
    """Seconds of a step: y = at_one + slope · drafts + burden · overlap, least squares that forget.

    overlap: seconds of the step during which this node drafted. On one machine they share memory bandwidth;
    on two, `burden` comes out as 0. Until drafts and overlaps have varied, slope and burden stay near their
    priors: `ROW_SHARE` of the time of one row, and 0.
    """

    __slots__ = ("_keep", "_oo", "_row_s", "_so", "_sw", "_sx", "_sy", "_xo", "_xx", "_yo", "_yx", "at_one_s",
                 "burden", "slope_s")  # fmt: skip

    def __init__(self) -> None:
        self._keep = 1.0 - 1.0 / COST_MEMORY
        self._sw = self._sx = self._so = self._sy = 0.0
        self._xx = self._xo = self._oo = self._yx = self._yo = 0.0
        self._row_s = 0.0  # prior slope
        self.at_one_s = self.slope_s = math.nan
        self.burden = 0.0

    def add(self, drafts: int, overlap_s: float, t_s: float) -> None:
        t_s = max(t_s, LEAST_S)
        x, o, keep = float(drafts), overlap_s, self._keep
        if self._sw == 0.0:
            self._row_s = ROW_SHARE * t_s
        self._sw = w = self._sw * keep + 1.0
        self._sx = sx = self._sx * keep + x
        self._so = so = self._so * keep + o
        self._sy = sy = self._sy * keep + t_s
        self._xx = self._xx * keep + x * x
        self._xo = self._xo * keep + x * o
        self._oo = self._oo * keep + o * o
        self._yx = self._yx * keep + t_s * x
        self._yo = self._yo * keep + t_s * o
        mean_y = sy / w
        # centred sums; a prior counts like so many steps that are off the mean by one draft, or by a sixth
        # of a step's overlap
        a = self._xx - sx * sx / w + PRIOR_STEPS
        b = self._xo - sx * so / w
        d = self._oo - so * so / w + PRIOR_STEPS * (mean_y / 6) ** 2
        p = self._yx - sx * mean_y + PRIOR_STEPS * self._row_s
        q = self._yo - so * mean_y
        det = a * d - b * b
        slope = min(max((p * d - q * b) / det, 0.0), mean_y)
        burden = min(max((q - slope * b) / d, 0.0), 1.0)
        self.slope_s, self.burden = slope, burden
        self.at_one_s = max(mean_y - (slope * sx + burden * so) / w, 0.25 * mean_y)

    def busy_s(self, share: float) -> float:
        """Seconds of a step of one row during so large a share of which this node drafts."""
        return self.at_one_s / max(1.0 - self.burden * share, 0.1)


class Estimates:
    """All of it, fed by Outcomes and round trips. Times are NaN until they are known."""

    __slots__ = (
        "_beside_began", "_both", "_here", "_there", "_trips", "beside_s", "busy_share", "compared",
        "queue_s", "round_s", "rtt_s", "token_s", "verify",
    )  # fmt: skip

    def __init__(self) -> None:
        self._both = Rate(ALPHA_FIRST, ALPHA_WEIGHT)
        self._here, self._there = Rate(), Rate()
        self.compared = 0  # tokens in all: how much is behind `alpha`
        self.verify = Line()
        self._beside_began = False
        self.beside_s = Mean(TOKEN_MEMORY)  # a token of the drafter beside the target
        self.busy_share = Mean(COST_MEMORY)  # of a step, while this node drafted
        self.queue_s = Mean(COST_MEMORY)
        self.round_s = Mean(COST_MEMORY)  # of a window that somebody waited for, without the target's time
        self.token_s = math.nan  # a token of the drafter here
        self.rtt_s = math.nan
        self._trips: deque[float] = deque(maxlen=ROUND_TRIPS)

    @property
    def alpha(self) -> float:
        """Acceptance of the drafter here. Most often both drafters are one model: each learns from both."""
        return self._here.value(self._both.value(), ALPHA_SHARED)

    @property
    def alpha_beside(self) -> float:
        """Acceptance of the drafter beside the target."""
        return self._there.value(self._both.value(), ALPHA_SHARED)

    def observe(self, outcome: Outcome) -> None:
        """Learn from a step of the target."""
        if outcome.compared:
            self.compared += outcome.compared
            self._here.add(outcome.agreed, outcome.compared)
            self._both.add(outcome.agreed, outcome.compared)
        if outcome.beside == outcome.drafted > 0:
            judged = min(outcome.accepted + 1, outcome.drafted)
            self._there.add(outcome.accepted, judged)
            self._both.add(outcome.accepted, judged)
        if outcome.beside:
            if self._beside_began:
                self.beside_s.add(outcome.t_beside_s / outcome.beside)
            self._beside_began = True  # the first time it reads the prompt as well
        self.verify.add(outcome.drafted, outcome.overlap_s, outcome.t_verify_s)
        if outcome.drafted > outcome.beside or outcome.overlap_s > 0.0:
            self.busy_share.add(outcome.overlap_s / max(outcome.t_verify_s, 1e-6))
        self.queue_s.add(outcome.t_queue_s)
        if outcome.t_token_s > 0.0:  # NaN is not
            self.token_s = outcome.t_token_s
        if outcome.t_round_s >= 0.0:
            self.round_s.add(max(outcome.t_round_s - outcome.t_verify_s - outcome.t_queue_s, 0.0))

    def observe_rtt(self, rtt_s: float) -> None:
        """Learn from a measured round trip."""
        self._trips.append(rtt_s)
        self.rtt_s = sorted(self._trips)[len(self._trips) // 2]
