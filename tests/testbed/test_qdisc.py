"""From profiles to netem's words: what is asked is what is said, and what netem cannot do is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim.profile import LinkProfile
from testbed.links.base import LinkError
from testbed.links.qdisc import FRAME_BYTES, UNLIMITED_PACKETS, netem_arguments, queue_packets
from testbed.links.uml import scratch_folder


def words(profile: LinkProfile, direction: str = "up", offset_ms: float = 0.0) -> str:
    return " ".join(netem_arguments(profile, direction, offset_ms))  # type: ignore[arg-type]


def test_split_offset_and_rate() -> None:
    profile = LinkProfile(rtt_ms=50, up_fraction=0.3, rate_up_mbit=5, jitter_ms=4)
    assert words(profile, "up", 0.05) == (
        f"limit {UNLIMITED_PACKETS} delay 14950us 1200us loss random 0% rate 5000kbit"
    )
    assert (
        words(profile, "down")
        == f"limit {UNLIMITED_PACKETS} delay 35000us 2800us loss random 0% rate 10000000kbit"
    )


def test_slow_rates_are_not_rounded() -> None:
    assert words(LinkProfile(rate_up_mbit=0.0015)).endswith(" rate 1.5kbit")
    assert words(LinkProfile(rate_up_mbit=1234.5678)).endswith(" rate 1234567.8kbit")


def test_a_box_cannot_be_faster_than_itself() -> None:
    assert " delay 0us " in words(LinkProfile(rtt_ms=0.1), "up", 0.2)


def test_loss_in_all_its_kinds() -> None:
    assert "loss random 1.5%" in words(LinkProfile(loss_pct=1.5))
    # 5 % in bursts of 4: leaves the bad state with 1/4, enters it with 0.05 · 0.25 / 0.95
    assert "loss gemodel 1.315789% 25.000000% 100% 0%" in words(LinkProfile(loss_pct=5, loss_burst=4))
    assert "loss random 100%" in words(LinkProfile(loss_pct=5, loss_burst=4, partitioned=True))


@given(st.floats(0.01, 40), st.floats(1.01, 50))
def test_the_chain_has_the_loss_and_the_bursts_that_were_asked(loss_pct: float, burst: float) -> None:
    if loss_pct / burst > 100 - loss_pct:
        return
    enter, leave = LinkProfile(loss_pct=loss_pct, loss_burst=burst).gilbert_elliott()
    assert enter / (enter + leave) == pytest.approx(loss_pct / 100)
    assert 1 / leave == pytest.approx(burst)


def test_reordering_is_explicit() -> None:
    assert "reorder" not in words(LinkProfile(rtt_ms=20, jitter_ms=10))
    assert "reorder 2%" in words(LinkProfile(rtt_ms=20, reorder_pct=2))


@given(st.floats(0.1, 1000), st.floats(0, 1000), st.integers(3028, 10**7))
def test_the_queue_holds_the_delay_line_and_the_buffer(rate: float, rtt_ms: float, buffer_bytes: int) -> None:
    profile = LinkProfile(rtt_ms=rtt_ms, rate_up_mbit=rate, buffer_bytes=buffer_bytes)
    held = rate * 1e6 / 8 * rtt_ms / 2e3 + buffer_bytes
    assert held <= queue_packets(profile, "up") * FRAME_BYTES < held + 2 * FRAME_BYTES
    assert queue_packets(profile, "down") == UNLIMITED_PACKETS


@pytest.mark.parametrize(
    ("fields", "offset_ms", "message"),
    [
        ({"rate_up_mbit": 20_000.0}, 0.0, r"rate_up_mbit: 20000 is beyond netem \(allowed: up to 10000"),
        ({"rtt_ms": 10, "reorder_pct": 1, "rate_up_mbit": 5}, 0.0, r"reorder_pct: 1 with a rate of 5 Mbit/s"),
        ({"rtt_ms": 50, "up_fraction": 0.0, "reorder_pct": 5}, 0.0, "reorder_pct: 5 without any delay up"),
        ({"rtt_ms": 0.1, "reorder_pct": 5}, 0.06, "reorder_pct: 5 without any delay up"),
        ({"rtt_ms": 10, "jitter_ms": 10}, 0.1, r"jitter_ms: 10 is more than .*allowed: up to 9\.80"),
    ],
)
def test_refusals(fields: dict[str, float], offset_ms: float, message: str) -> None:
    with pytest.raises(LinkError, match=message):
        words(LinkProfile(**fields), "up", offset_ms)  # type: ignore[arg-type]


def test_the_router_covers_nothing_that_it_needs() -> None:
    assert scratch_folder() in ("/run", "/mnt", "/media", "/srv", "/opt")
    assert scratch_folder("/run/somebody/project") != "/run"
    with pytest.raises(LinkError, match="no folder that the router could cover"):
        scratch_folder("/run/a", "/mnt/a", "/media/a", "/srv/a", "/opt/a")
