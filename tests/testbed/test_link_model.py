"""The link model against real netem; `make bench-link-model` is the long form."""

from __future__ import annotations

import asyncio
import math
import statistics

import pytest
from needs import need_uml

from bench.link_model import LATE_MS, Point, measure, model
from dsdlab.sim.profile import LinkProfile

pytestmark = pytest.mark.netem

Z = 4.0
"""Standard deviations: each two-sided test below gives a false alarm in 1 of 15,000 runs."""


TICK_MS = 4.0
"""Of kernel timers at 250 Hz: retransmissions are due at one."""


def shares_differ(count: int, n: int, p: float) -> bool:
    """Whether `count` of `n` contradicts the probability `p`."""
    return abs(count - n * p) > Z * math.sqrt(n * p * (1.0 - p)) + 0.5


def test_round_trips_through_the_model_are_those_through_netem() -> None:
    """Loss-free ones to a millisecond; with 4 % loss both how many are late, and how late those are.

    A busy machine delays frames by milliseconds, a loss by hundreds: what counts as late lies well between.
    """
    need_uml()
    clean, lossy = Point(LinkProfile(rtt_ms=20)), Point(LinkProfile(rtt_ms=20, loss_pct=4.0), edges=4)
    asyncio.run(measure([clean, lossy], "turns", "netns", "netem-uml", 8.0, 0.002))
    expected = model(clean, "turns", 0.0)
    assert statistics.median(clean.measured) == pytest.approx(statistics.median(expected), abs=1.0)

    late_ms = 20.0 + 5 * LATE_MS
    modelled = sorted(x for x in model(lossy, "turns", 0.0) if x > late_ms)
    late = [x for x in lossy.measured if x > late_ms]
    n = len(lossy.measured)
    assert n > 200
    p = len(modelled) / len(model(lossy, "turns", 0.0))
    assert p == pytest.approx(1 - 0.96**2, abs=0.02)  # a frame or its answer is lost
    assert not shares_differ(len(late), n, p), f"{len(late)} of {n} late, expected {p:.3f}"
    for q in (0.25, 0.5, 0.75):
        mark_ms = modelled[int(q * len(modelled))]
        above = sum(x > mark_ms for x in late)
        # retransmissions bunch at the timeout: a tick of the kernel's timer moves a third of them past a mark
        most, least = (sum(x > mark_ms + by for x in modelled) / len(modelled) for by in (-TICK_MS, TICK_MS))
        few = above < len(late) * least and shares_differ(above, len(late), least)
        many = above > len(late) * most and shares_differ(above, len(late), most)
        assert not few and not many, (
            f"{above} of {len(late)} above {mark_ms:.0f} ms, expected {least:.2f} to {most:.2f}"
        )
