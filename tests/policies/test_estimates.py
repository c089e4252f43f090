"""What policies learn on the way comes out as it was put in."""

from __future__ import annotations

import math
import random

import pytest

from dsdlab.policies import Outcome
from dsdlab.policies.estimates import ALPHA_FIRST, Estimates, Line, Mean, Rate


def step(drafted: int = 0, accepted: int = 0, t_verify_s: float = 0.05, **more: float) -> Outcome:
    return Outcome(drafted, accepted, 0.0, t_verify_s, 0.0, math.nan, **more)  # type: ignore[arg-type]


def test_acceptance_is_the_share_that_agreed_and_forgets() -> None:
    known, draw = Estimates(), random.Random(1)
    assert known.alpha == pytest.approx(ALPHA_FIRST)
    for alpha in (0.8, 0.3):
        for _ in range(400):
            known.observe(step(compared=1, agreed=int(draw.random() < alpha)))
        assert known.alpha == pytest.approx(alpha, abs=0.15)


def test_each_drafter_learns_from_both_but_most_from_itself() -> None:
    known = Estimates()
    for _ in range(200):
        known.observe(step(compared=4, agreed=4))
    assert known.alpha_beside > 0.9  # nothing is known of it, so it is thought alike
    for _ in range(200):
        known.observe(step(drafted=4, accepted=0, beside=4, t_beside_s=0.02))
    assert known.alpha_beside < 0.2
    assert known.alpha - known.alpha_beside > 0.4
    assert known.beside_s.value == pytest.approx(0.005)


def test_never_certain() -> None:
    rate = Rate(0.5, 2.0)
    rate.add(10**6, 10**6)
    assert rate.value() < 1.0
    rate = Rate(0.5, 2.0)
    rate.add(0, 10**6)
    assert rate.value() > 0.0


def test_a_rate_forgets_over_its_memory() -> None:
    for memory in (40.0, 200.0):
        rate = Rate(memory=memory)
        for hit in (1, 0):
            for _ in range(round(memory if hit == 0 else 20 * memory)):
                rate.add(hit, 1)
        assert rate.value() == pytest.approx(math.exp(-1.0), rel=0.02)


def test_cost_line_finds_rows_and_what_drafting_beside_costs() -> None:
    line, draw = Line(), random.Random(2)
    for _ in range(300):
        drafts, overlap_s = draw.randrange(12), draw.random() * 0.05
        line.add(drafts, overlap_s, 0.050 + 0.001 * drafts + 0.3 * overlap_s)
    assert line.slope_s == pytest.approx(0.001, rel=0.2)
    assert line.burden == pytest.approx(0.3, rel=0.2)
    assert line.at_one_s == pytest.approx(0.050, rel=0.02)
    assert line.busy_s(1.0) == pytest.approx(0.050 / (1 - 0.3), rel=0.1)


def test_cost_line_of_a_constant_keeps_its_priors() -> None:
    line = Line()
    for _ in range(50):
        line.add(0, 0.0, 0.040)
    assert line.at_one_s == pytest.approx(0.040)
    assert line.burden == 0.0
    assert 0.0 <= line.slope_s < 0.002


def test_round_trip_is_the_median_of_the_last() -> None:
    known = Estimates()
    for rtt_s in (0.02, 0.02, 0.4):  # one was lost on the way
        known.observe_rtt(rtt_s)
    assert known.rtt_s == 0.02
    for _ in range(2):
        known.observe_rtt(0.15)
    assert known.rtt_s == 0.15


def test_mean_begins_with_the_first_value() -> None:
    mean = Mean(4.0)
    assert math.isnan(mean.value)
    mean.add(3.0)
    assert mean.value == 3.0
    for _ in range(100):
        mean.add(5.0)
    assert mean.value == pytest.approx(5.0, abs=1e-3)
