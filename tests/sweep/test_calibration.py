"""What counts as the link that was asked for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import (
    PING_WIRE_BYTES,
    DirectionMeasure,
    LinkMeasure,
    binomial_interval,
    burst_interval,
    expected_rtt_ms,
    judge,
    judge_drift,
    judge_loss,
    judge_tcp,
)


def measure(rtt_ms: float, instrument: str = "packets", n: int = 20, **ways: DirectionMeasure) -> LinkMeasure:
    return LinkMeasure(instrument=instrument, rtt_p50_ms=rtt_ms, rtt_p99_ms=rtt_ms, n=n, **ways)


@pytest.mark.parametrize(
    ("asked_ms", "instrument", "good", "bad"),
    [
        (10.0, "packets", (9.51, 10.49), (9.4, 10.6)),  # half a millisecond
        (200.0, "packets", (196.1, 203.9), (195.9, 204.1)),  # two per cent
        (10.0, "frames", (8.6, 11.4), (8.4, 11.6)),  # a millisecond more for two event loops
    ],
)
def test_rtt(asked_ms: float, instrument: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    profile = LinkProfile(rtt_ms=asked_ms)
    assert [judge(profile, measure(v, instrument)) for v in good] == ["", ""]
    for value in bad:
        assert judge(profile, measure(value, instrument)).startswith(f"RTT is {value:.2f} ms, asked")


def test_a_slow_link_takes_time_to_send_the_probe() -> None:
    slow = LinkProfile(rtt_ms=20, rate_up_mbit=0.1, rate_down_mbit=None)
    assert expected_rtt_ms(slow, "packets") == pytest.approx(20 + 8.48)
    assert expected_rtt_ms(slow, "frames") == pytest.approx(20 + PING_WIRE_BYTES[0] * 8 / 100)
    assert judge(slow, measure(26.9, "frames")) == ""
    assert "asked 26.88" in judge(slow, measure(20.0, "frames"))


def test_the_size_of_a_ping_on_the_wire() -> None:
    from dsdlab.protocol.codec import encode
    from dsdlab.protocol.frames import Ping, Pong

    for nonce in (1000, 60_000):
        sizes = len(encode(Ping(nonce, 12345.678))), len(encode(Pong(nonce, 12345.678)))
        assert (66 + 6 + sizes[0], 66 + 2 + sizes[1]) == PING_WIRE_BYTES


def test_rates_and_partitions() -> None:
    profile = LinkProfile(rtt_ms=10, rate_up_mbit=10, rate_down_mbit=50)
    ways = {"up": DirectionMeasure(rate_mbit=9.4), "down": DirectionMeasure(rate_mbit=51)}
    found = judge(profile, measure(10.1, **ways))
    assert found == "rate up is 9.4 Mbit/s, asked 10 ± 5%"
    gone = LinkProfile(rtt_ms=10, partitioned=True)
    assert judge(gone, measure(0.0, n=0)) == ""
    assert judge(gone, measure(10.0, n=2)) == "2 probes got through a partition"
    assert judge(LinkProfile(rtt_ms=10), measure(0.0, n=0)) == "no probe came back"


@given(st.integers(1, 2000), st.floats(0, 1))
def test_the_interval_holds_the_share_and_its_own_mirror(sent: int, share: float) -> None:
    lost = round(share * sent)
    low, high = binomial_interval(lost, sent)
    assert 0.0 <= low <= lost / sent <= high <= 1.0
    mirrored = binomial_interval(sent - lost, sent)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)
    wider = binomial_interval(lost, sent, 0.999)
    assert wider[0] <= low and high <= wider[1]


def test_intervals_by_the_book() -> None:
    """0 of n is the rule of three; 3 of 100 from any table of Clopper–Pearson intervals."""
    assert binomial_interval(0, 100)[1] == pytest.approx(0.0362, abs=1e-4)
    assert binomial_interval(3, 100) == pytest.approx((0.00623, 0.08518), abs=1e-5)
    assert binomial_interval(0, 0) == (0.0, 1.0)
    low, high = burst_interval([4, 4, 4, 4, 4, 4])
    assert low < 4 < high
    assert burst_interval([]) == (1.0, float("inf"))


def lossy(lost: int, sent: int, instrument: str = "packets") -> LinkMeasure:
    return measure(10.0, instrument, up=DirectionMeasure(sent=sent, lost=lost))


def test_losses_are_pooled() -> None:
    profile = LinkProfile(rtt_ms=10, loss_pct=1)
    assert judge_loss(profile, [lossy(4, 100)]) == "", "one measurement proves nothing"
    assert judge_loss(profile, [lossy(4, 100)] * 20).startswith("loss is 80 of 2000 probes (4 %), asked 1 %")
    assert judge_loss(profile, [lossy(0, 1000)] * 2) != "", "none lost is wrong too"
    assert judge_loss(LinkProfile(rtt_ms=10), [lossy(1, 5000)]) != "", (
        "nothing may be lost where none is asked"
    )
    assert judge_loss(profile, [lossy(80, 2000, "frames")]) == "", "frames do not see losses"


@pytest.mark.parametrize("burst", [1.0, 4.0])
def test_false_alarms_are_rare(burst: float) -> None:
    """300 cells whose losses are what was asked: about 0.3 false alarms are expected at level 0.999."""
    rng = random.Random(7)
    profile = LinkProfile(rtt_ms=10, loss_pct=2, loss_burst=burst)
    enter, leave = profile.gilbert_elliott() if burst > 1 else (0.02, 1.0)
    alarms = 0
    for _ in range(300):
        lost, bad = 0, False
        for _ in range(3000):
            bad = rng.random() >= leave if bad and burst > 1 else rng.random() < enter
            lost += bad
        alarms += judge_loss(profile, [lossy(lost, 3000)]) != ""
    assert alarms <= 3


@pytest.mark.parametrize(
    ("before_ms", "after_ms", "says"),
    [
        (0.2, 1.1, ""),  # a millisecond
        (0.2, 1.3, "RTT is 1.30 ms, was 0.20 ± 1.00"),
        (80.0, 87.9, ""),  # a tenth
        (80.0, 72.1, ""),
        (80.0, 88.1, "RTT is 88.10 ms, was 80.00 ± 8.00"),
        (80.0, 71.9, "RTT is 71.90 ms, was 80.00 ± 8.00"),
    ],
)
def test_a_wan_may_be_anything_but_has_to_hold_still(before_ms: float, after_ms: float, says: str) -> None:
    assert judge_drift(measure(before_ms), measure(after_ms)) == says


def test_a_wan_that_carries_nothing() -> None:
    nothing = measure(0.0, n=0)
    assert judge_drift(nothing, nothing) == judge_drift(measure(9.0), nothing) == "no probe came back"
    assert judge_drift(nothing, measure(9.0)) == "", "before has said so already"


def test_tcp_must_be_what_was_asked() -> None:
    asked = TcpRegime(congestion="bbr", nodelay=False)
    good = {"nodelay": False, "congestion": "bbr", "rto_ms": 204.0}
    assert judge_tcp(asked, {}) == ""  # where nothing can be read
    assert (
        judge_tcp(asked, {"edge": good, "verifier": good, "slow_start_after_idle": True, "offloads_on": []})
        == ""
    )
    assert judge_tcp(TcpRegime(), {"edge": {"nodelay": True, "congestion": "reno"}}) == ""
    assert judge_tcp(asked, {"edge": good, "verifier": good | {"congestion": "cubic"}}) == (
        "congestion control of the verifier is cubic, asked bbr"
    )
    assert judge_tcp(asked, {"edge": good | {"nodelay": True}}) == "nodelay of the edge is True, asked False"
    assert judge_tcp(asked, {"slow_start_after_idle": False}) == "slow start after idle is False"
    assert judge_tcp(asked, {"offloads_on": ["tcp-segmentation-offload"]}).startswith("offloads are on: tcp")
