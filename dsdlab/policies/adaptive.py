"""The adaptive controller: all modes are settings of one streaming session, and it picks the best as it goes.

Each *plan* is a way to go on: the target alone (`cloud-ar`), with the drafter beside it (`cloud-sd`), drafts
that stream while the target waits for them (`dsd-stream`; with a larger first frame nearly `dsd-sync`), or
while it runs free, alone or with the drafter beside it. The closed form of a stream
(`dsdlab.sim.theory_stream`) says what a token costs under each at the present estimates. The cheapest is
taken, and left only for one that is clearly better. One plan is priced a decision: a decision stays cheap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dsdlab.policies.base import FOREVER_S, Decision, Outcome, Pace, WindowPolicy, check_gamma
from dsdlab.policies.estimates import ALPHA_MOST, Estimates
from dsdlab.sim.theory_stream import stream_tpot_s

SWITCH = 0.97  # another plan must promise a token in this share of the time
WORTH = 0.97  # drafting must promise so much against none: on one machine it slows the target a little
UNLIKELY = 0.01  # drafts that come to be judged more seldom are not worth drafting
QUIET_TOKENS = 64  # after so many without any draft, acceptance is looked at again
PROBE_TOKENS = 8
HOPE = 0.2  # by how much acceptance could be better than it seems
ENOUGH_TOKENS = 16  # must have been compared before drafting ends
ALIKE = 1.4  # settings that differ by less stay as they are
HOLD_SHARE, HOLD_MORE_S = 1.25, 0.010  # how much longer than expected a target waits for drafts
FIRSTS = (1, 2, 3, 4, 6, 8, 12)
WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
FIRST_BESIDE = 4
FIRST_WINDOW = 8  # drafts judged in a step until it is known what they cost: lookup may have any number
BESIDES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


class Plan(NamedTuple):
    """A way to go on. first: tokens of the first frame; 0: nothing is drafted here. beside: window of the
    drafter beside the target. waits: whether the target waits for drafts."""

    first: int
    beside: int
    waits: bool

    @property
    def words(self) -> str:
        if not self.first:
            return f"cloud-sd, window {self.beside}" if self.beside else "cloud-ar"
        if self.waits:
            return f"stream, first frame {self.first}"
        return f"stream, free run{f' with window {self.beside} beside' if self.beside else ''}"


class Facts(NamedTuple):
    """The estimates by which one round of plans is compared; times in seconds."""

    alpha: float
    alpha_beside: float
    token_s: float
    one_s: float  # a step of one row while nobody drafts
    busy_s: float  # and while this node does
    row_s: float
    rtt_s: float
    beside_s: float
    run_ahead: int
    window: int


ALONE = Plan(0, 0, False)
FREE = Plan(1, 0, False)


class AdaptiveController(WindowPolicy):
    """Picks among all modes within one session.

    gamma: window of the drafter beside the target until more is known, where one stands there; 0: four.
    Raises PolicyError for a gamma out of range.
    """

    ping_every_s = 0.1

    def __init__(self, gamma: int = 4) -> None:
        self._gamma = check_gamma(gamma)
        self._known = Estimates()
        self._plans = [ALONE, FREE]
        self._costs: dict[Plan, float] = {}  # seconds a token, of the round under way
        self._facts: Facts | None = None
        self._plan = FREE
        self._cost_s = math.inf  # a token under the plan
        self._decision = Decision(1, pace=Pace(0.0, FIRST_WINDOW))
        self._context = 0
        self._quiet_since = 0  # context at which drafting ended
        self._probe_until = 0  # context, while acceptance is looked at again

    def begin(self, *, beside: int, rtt_s: float | None) -> None:
        besides = [b for b in BESIDES if b <= beside]
        if beside and beside not in besides:
            besides.append(beside)
        self._plans = [ALONE, FREE]
        self._plans += [Plan(first, 0, True) for first in FIRSTS]
        self._plans += [Plan(first, b, False) for first in (0, 1) for b in besides]
        if rtt_s is not None:
            self._known.observe_rtt(rtt_s)
        if beside:
            self._plan = Plan(1, min(beside, self._gamma or FIRST_BESIDE), False)
            self._decision = Decision(1, pace=Pace(0.0, FIRST_WINDOW, self._plan.beside))

    def observe_rtt(self, rtt_s: float) -> None:
        self._known.observe_rtt(rtt_s)

    def observe(self, outcome: Outcome) -> None:
        self._context = outcome.context
        self._known.observe(outcome)

    def decide(self) -> Decision:
        if self._facts is None:
            self._facts = self._look()
            if self._facts is None:
                return self._decision
        costs, plans = self._costs, self._plans
        plan = plans[len(costs)]
        costs[plan] = cost_of(plan, self._facts)
        if len(costs) == len(plans):
            self._choose(self._facts)
            self._facts = None
            costs.clear()
        return self._decision

    def _look(self) -> Facts | None:
        """What a round goes by; None while something is not known yet."""
        known, line = self._known, self._known.verify
        if math.isnan(known.token_s) or math.isnan(line.at_one_s) or math.isnan(known.rtt_s):
            return None
        share = known.busy_share.value
        queue_s = known.queue_s.value
        alpha, beside_s = known.alpha, known.beside_s.value
        one_s = line.at_one_s + queue_s
        token_s = min(self._cost_s, one_s)
        return Facts(
            alpha=alpha,
            alpha_beside=known.alpha_beside,
            token_s=known.token_s,
            one_s=one_s,
            busy_s=queue_s + line.busy_s(0.0 if math.isnan(share) else share),
            row_s=line.slope_s,
            rtt_s=known.rtt_s,
            beside_s=known.token_s if math.isnan(beside_s) else beside_s,
            run_ahead=_run_ahead(alpha),
            window=_largest_window(alpha, line.slope_s / token_s),
        )

    def _choose(self, facts: Facts) -> None:
        """Take the best plan of a full round."""
        costs, context, present = self._costs, self._context, self._plan
        quiet = min((p for p in costs if not p.first), key=costs.__getitem__)
        drafting = min((p for p in costs if p.first), key=costs.__getitem__)
        unsure = self._known.compared < ENOUGH_TOKENS if present.first else False
        stale = not present.first and context >= self._quiet_since + QUIET_TOKENS
        if (unsure or stale) and not self._could_pay(drafting, facts, costs[quiet]):
            unsure, self._quiet_since = False, context  # whatever acceptance is
        elif stale:
            self._probe_until = context + PROBE_TOKENS
        needed = WORTH if present.first else SWITCH * WORTH  # more to begin with it than to go on
        probing = unsure or context < self._probe_until
        best = drafting if probing or costs[drafting] < needed * costs[quiet] else quiet
        if bool(best.first) == bool(present.first) and costs[best] > SWITCH * costs[present]:
            best = present
        if present.first and not best.first:
            self._quiet_since = context
        settings = settings_of(best, facts)
        if best != present or not _alike(settings, self._decision):
            self._decision = settings
        self._plan, self._cost_s = best, costs[best]

    @staticmethod
    def _could_pay(plan: Plan, facts: Facts, quiet_s: float) -> bool:
        """Whether drafting would be worth it with far better drafts than there seem to be."""
        alpha = min(facts.alpha + HOPE, ALPHA_MOST)
        hoped = facts._replace(alpha=alpha, run_ahead=_run_ahead(alpha), window=WINDOWS[-1])
        return cost_of(plan, hoped) < WORTH * quiet_s

    def describe(self, decision: Decision) -> str:
        pace = decision.pace
        if not decision.gamma or pace is None or decision.run_ahead is None:
            return self._plan.words
        return f"{self._plan.words}, run-ahead {decision.run_ahead}, at most {pace.max_window} a step"


def cost_of(plan: Plan, facts: Facts) -> float:
    """Seconds a token under a plan, by the closed forms."""
    if plan.first:
        return stream_tpot_s(
            facts.alpha,
            facts.token_s,
            facts.busy_s,
            facts.row_s,
            facts.rtt_s,
            hold_s=FOREVER_S if plan.waits else 0.0,
            first=plan.first,
            run_ahead=facts.run_ahead,
            max_window=facts.window,
            beside=plan.beside,
            t_beside_s=facts.beside_s,
        )
    if not plan.beside:
        return facts.one_s
    alpha = facts.alpha_beside
    expected = (1.0 - alpha ** (plan.beside + 1)) / (1.0 - alpha)
    return (facts.one_s + plan.beside * (facts.beside_s + facts.row_s)) / expected


def settings_of(plan: Plan, facts: Facts) -> Decision:
    """What a plan means for drafter and target."""
    if not plan.first:
        return Decision(0, pace=Pace(0.0, beside=plan.beside, drafting=False))
    hold_s = 0.0
    if plan.waits:
        hold_s = HOLD_SHARE * (facts.rtt_s + (plan.first + 1) * facts.token_s) + HOLD_MORE_S
    return Decision(1, facts.run_ahead, plan.first, Pace(hold_s, facts.window, plan.beside))


def _alike(new: Decision, old: Decision) -> bool:
    """Whether two settings of one plan differ too little for the target to be told."""
    if new.pace is None or old.pace is None or new.run_ahead is None or old.run_ahead is None:
        return new == old
    pairs = (
        (new.run_ahead, old.run_ahead),
        (new.pace.max_window, old.pace.max_window),
        (new.pace.hold_s, old.pace.hold_s),
    )
    return all(a <= ALIKE * b and b <= ALIKE * a for a, b in pairs)


def _run_ahead(alpha: float) -> int:
    """Drafts worth making before the first is judged."""
    return max(4, math.ceil(math.log(UNLIKELY) / math.log(alpha)))


def _largest_window(alpha: float, row_share: float) -> int:
    """Drafts worth judging in a step: the k-th helps with α^k, and costs `row_share` of a token's time."""
    if not 0.0 < row_share < 1.0:
        return WINDOWS[0] if row_share >= 1.0 else WINDOWS[-1]
    worth = math.log(row_share) / math.log(alpha)
    return next((w for w in WINDOWS if w >= worth), WINDOWS[-1])
