"""Profiles, and how steps change them during a generation."""

from __future__ import annotations

from typing import Any

import pytest

from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_burst": 4.0}, r"loss_burst: 4\.0 without loss"),
        ({"loss_pct": 50.0, "loss_burst": 0.5}, r"loss_burst: 0\.5 is out of range"),
        ({"reorder_pct": 1.0}, r"reorder_pct: 1\.0 without delay"),
        ({"partitioned": 1}, r"partitioned: 1 is neither true nor false"),
        ({"rtt_ms": float("nan")}, r"rtt_ms: nan is out of range"),
    ],
)
def test_impossible_links_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinkProfile(**fields)


def test_steps_begin_end_and_lie_over_each_other() -> None:
    base = LinkProfile(rtt_ms=20)
    steps = (
        LinkStep(at_s=1, changes={"rtt_ms": 150.0}),
        LinkStep(at_s=2, for_s=3, changes={"partitioned": True}),
        LinkStep(at_s=4, for_s=1, changes={"rate_up_mbit": 5.0, "rate_down_mbit": 5.0, "loss_pct": 2.0}),
    )
    timeline = LinkStep.timeline(base, steps)
    assert [(at_s, p.rtt_ms, p.partitioned, p.loss_pct) for at_s, p, _ in timeline] == [
        (1, 150, False, 0),
        (2, 150, True, 0),
        (4, 150, True, 2),
        (5, 150, False, 0),  # both end
    ]
    assert [what for _, _, what in timeline] == [
        "RTT 150 ms",
        "partition",
        "loss 2 %, rate 5 Mbit/s",
        "end of partition; end of loss 2 %, rate 5 Mbit/s",
    ]
    assert timeline[2][1].rate_up_mbit == 5
    assert timeline[3][1].rate_up_mbit is None
    assert LinkStep.timeline(base, ()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"at_s": -1, "changes": {"rtt_ms": 1}}, "at_s: -1 is out of range"),
        ({"at_s": 0, "for_s": 0, "changes": {"rtt_ms": 1}}, "for_s: 0 is out of range"),
        ({"at_s": 0, "changes": {}}, "a step changes nothing"),
        ({"at_s": 0, "changes": {"up_fraction": 1}}, r"a step changes up_fraction \(allowed: rtt_ms"),
    ],
)
def test_bad_steps(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinkStep(**fields)


def test_a_step_that_makes_an_impossible_link() -> None:
    with pytest.raises(ValueError, match="jitter_ms"):
        LinkStep.timeline(LinkProfile(rtt_ms=20), (LinkStep(at_s=1, changes={"jitter_ms": 30.0}),))


def test_regimes_say_what_differs() -> None:
    assert TcpRegime().label == ""
    regime = TcpRegime(congestion="bbr", slow_start_after_idle=False, rto_min_ms=20, nodelay=False)
    assert regime.label == "bbr, no slow start after idle, RTO floor 20 ms, Nagle"
