"""The link model against its closed form, its invariants and the statistics of its losses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdlab.sim.link import Delivery, LinkDirection
from dsdlab.sim.profile import (
    HEADER_BYTES,
    MSS_BYTES,
    Direction,
    LinkProfile,
    segments_of,
    wire_bytes,
)

BIG = settings(max_examples=60, deadline=None)


@st.composite
def profiles(draw: st.DrawFn, lossy: bool = True) -> LinkProfile:
    rtt_ms = draw(st.floats(0.0, 400.0))
    rate = st.none() | st.floats(0.05, 100.0)
    return LinkProfile(
        rtt_ms=rtt_ms,
        up_fraction=draw(st.floats(0.0, 1.0)),
        rate_up_mbit=draw(rate),
        rate_down_mbit=draw(rate),
        loss_pct=draw(st.sampled_from([0.0, 1.0, 10.0, 50.0])) if lossy else 0.0,
        jitter_ms=draw(st.floats(0.0, 1.0)) * rtt_ms if lossy else 0.0,
        buffer_bytes=draw(st.none() | st.integers(4000, 10**6)),
    )


# (gap before the write in seconds, bytes)
writes = st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(0, 20_000)), min_size=1, max_size=40)
directions = st.sampled_from(["up", "down"])


@BIG
@given(profiles(), directions, writes, st.integers(0, 9))
def test_order_causality_and_conservation(
    profile: LinkProfile, direction: Direction, sends: list[tuple[float, int]], seed: int
) -> None:
    link = LinkDirection(profile, direction, seed)
    flow = link.open_flow()
    now_s, total, last_s = 0.0, 0, -math.inf
    deliveries: list[tuple[float, int, Delivery, float]] = []
    least_s = link.delay_s - link.jitter_s
    for gap_s, n_bytes in sends:
        now_s += gap_s
        delivery = flow.transmit(now_s, n_bytes)
        total += n_bytes
        deliveries.append((now_s, n_bytes, delivery, delivery.arrival_s))
        arrivals = [d.arrival_s for _, _, d, _ in deliveries]
        assert arrivals == sorted(arrivals)
    for sent_s, n_bytes, delivery, first_s in deliveries:
        serialise_s = wire_bytes(n_bytes) * link.s_per_byte
        assert delivery.arrival_s >= sent_s + serialise_s + least_s - 1e-9  # never faster than light
        assert delivery.arrival_s <= first_s  # what follows can only help
        assert delivery.arrival_s >= last_s
        last_s = delivery.arrival_s
    stats = link.stats
    assert stats.n_bytes == total
    assert stats.segments == sum(segments_of(n) for _, n in sends)
    assert stats.lost == stats.fast_retransmits + stats.probes + stats.timeouts
    assert min(stats.fast_retransmits, stats.probes, stats.timeouts) >= 0


@BIG
@given(profiles(lossy=False), directions, writes)
def test_loss_free_closed_form(
    profile: LinkProfile, direction: Direction, sends: list[tuple[float, int]]
) -> None:
    """Lindley's recursion: a write starts when it is sent or when the one before has left the bottleneck."""
    link = LinkDirection(profile, direction, 3)
    rate = profile.rate_mbit(direction)
    now_s, free_s = 0.0, 0.0
    for gap_s, n_bytes in sends:
        now_s += gap_s
        headers = HEADER_BYTES * max(1, math.ceil(n_bytes / MSS_BYTES))
        free_s = max(now_s, free_s) + (0.0 if rate is None else (n_bytes + headers) * 8 / (rate * 1e6))
        share = profile.up_fraction if direction == "up" else 1 - profile.up_fraction
        assert link.send(now_s, n_bytes) == pytest.approx(free_s + profile.rtt_ms / 1e3 * share, abs=1e-9)


@BIG
@given(profiles(), directions, writes)
def test_segment_by_segment_is_the_whole_write(
    profile: LinkProfile, direction: Direction, sends: list[tuple[float, int]]
) -> None:
    whole, pieces = LinkDirection(profile, direction, 5), LinkDirection(profile, direction, 5)
    one, many = whole.open_flow(), pieces.open_flow()
    now_s = 0.0
    for gap_s, n_bytes in sends:
        now_s += gap_s
        arrival_s, left = one.send(now_s, n_bytes), n_bytes
        while left > MSS_BYTES:
            many.segment(now_s, MSS_BYTES)
            left -= MSS_BYTES
        assert many.segment(now_s, left).arrival_s == pytest.approx(arrival_s, abs=1e-9)


@BIG
@given(profiles(), directions, writes, st.integers(0, 5))
def test_same_seed_same_arrivals(
    profile: LinkProfile, direction: Direction, sends: list[tuple[float, int]], seed: int
) -> None:
    def arrivals() -> list[float]:
        link, now_s, out = LinkDirection(profile, direction, seed), 0.0, []
        for gap_s, n_bytes in sends:
            now_s += gap_s
            out.append(link.send(now_s, n_bytes))
        return out

    assert arrivals() == arrivals()


def test_other_seeds_directions_and_flows_lose_other_segments() -> None:
    profile = LinkProfile(rtt_ms=20, loss_pct=10)

    def lost(link: LinkDirection) -> tuple[bool, ...]:
        flow = link.open_flow()
        return tuple(flow.send(10.0 * i, 100) > 10.0 * i + 0.011 for i in range(400))

    first = LinkDirection(profile, "up", 1)
    patterns = {
        lost(first),
        lost(first),  # its second flow
        lost(LinkDirection(profile, "up", 2)),
        lost(LinkDirection(profile, "down", 1)),
    }
    assert len(patterns) == 4
    assert all(15 <= sum(p) <= 75 for p in patterns)


@pytest.mark.parametrize("rate_mbit", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("loss_pct", [0.0, 2.0])
def test_throughput_is_the_rate(rate_mbit: float, loss_pct: float) -> None:
    """Bulk data fills the bottleneck; a lost segment takes it twice, so goodput falls by the loss."""
    link = LinkDirection(LinkProfile(rtt_ms=20, rate_up_mbit=rate_mbit, loss_pct=loss_pct), "up", 1)
    n_bytes = 4_000 * MSS_BYTES
    link.send(0.0, n_bytes)
    assert link.busy_until_s == pytest.approx(
        wire_bytes(n_bytes) * 8 / (rate_mbit * 1e6) * (1 + loss_pct / 100), rel=0.01
    )


def test_flows_share_the_bottleneck_and_keep_their_own_order() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=10, rate_up_mbit=1.0), "up")
    a, b = link.open_flow(), link.open_flow()
    took_s = wire_bytes(1000) * 8 / 1e6
    assert a.send(0.0, 1000) == pytest.approx(took_s + 0.005)
    assert b.send(0.0, 1000) == pytest.approx(2 * took_s + 0.005)
    slow = LinkDirection(LinkProfile(rtt_ms=100, loss_pct=50), "up", 1)
    flows = [slow.open_flow() for _ in range(40)]
    late = [f.send(0.0, 100) > 0.051 for f in flows]
    assert 8 <= sum(late) <= 32  # one flow's loss does not hold up another


def _first_loss(profile: LinkProfile, before: int = 0) -> tuple[LinkDirection, int]:
    """A link whose flow 0 loses exactly its segment number `before`, once, and none of the next 50."""
    for seed in range(100_000):
        link = LinkDirection(profile, "up", seed)
        draws = link.open_flow()._rng
        fate = [draws.random() * 100 < profile.loss_pct for _ in range(before + 52)]
        if sum(fate) == 1 and fate[before]:
            return LinkDirection(profile, "up", seed), seed
    raise AssertionError("no such seed")


LOSSY = LinkProfile(rtt_ms=40, loss_pct=1)


def test_alone_in_flight_waits_for_the_retransmission_timer() -> None:
    link, _ = _first_loss(LOSSY)
    assert link.send(0.0, 200) == pytest.approx(0.240 + 0.020)  # RTT + 200 ms, then one way
    assert link.stats.timeouts == 1
    quick, _ = _first_loss(dataclasses.replace(LOSSY, rto_min_ms=20))
    assert quick.send(0.0, 200) == pytest.approx(0.060 + 0.020)


def test_tail_loss_is_probed_after_two_round_trips() -> None:
    link, _ = _first_loss(LOSSY, before=1)
    flow = link.open_flow()
    flow.send(0.0, 200)
    assert flow.send(0.005, 200) == pytest.approx(0.005 + 0.080 + 0.020)
    assert link.stats.probes == 1


def test_three_followers_retransmit_fast() -> None:
    link, _ = _first_loss(LOSSY)
    moved: list[float] = []
    flow = link.open_flow()
    lost = flow.transmit(0.0, 200)
    lost.on_earlier = lambda d: moved.append(d.arrival_s)
    first = flow.transmit(0.010, 200)
    # One follower: its acknowledgement (10 + 40 ms) and a quarter of an RTT, then one way.
    assert lost.arrival_s == pytest.approx(0.050 + 0.010 + 0.020)
    assert first.arrival_s == lost.arrival_s  # head-of-line blocking
    flow.transmit(0.012, 200)
    flow.transmit(0.014, 200)  # the third acknowledgement comes at 54 ms, before 60 ms
    assert lost.arrival_s == first.arrival_s == pytest.approx(0.054 + 0.020)
    assert moved == pytest.approx([0.080, 0.074])
    assert flow.send(0.1, 200) == pytest.approx(0.120)  # and then it is forgotten
    assert link.stats.to_dict() == {
        "n_bytes": 1000, "segments": 5, "lost": 1, "fast_retransmits": 1, "probes": 0, "timeouts": 0,
    }  # fmt: skip


def test_a_follower_too_late_to_help_changes_nothing() -> None:
    link, _ = _first_loss(LOSSY)
    flow = link.open_flow()
    lost = flow.transmit(0.0, 200)
    flow.transmit(0.239, 200)
    assert lost.arrival_s == pytest.approx(0.260)


def test_lost_retransmissions_back_off() -> None:
    """With every second transmission lost, alone: 1, 2, 3 … losses arrive at RTO·(1, 2, 4, …) + one way."""
    profile = LinkProfile(rtt_ms=40, loss_pct=50)
    link = LinkDirection(profile, "up", 11)
    late_s = [link.send(t := 1e4 * i, 100) - t - 0.020 for i in range(4000)]
    shares = {k: sum(abs(x - 0.240 * k) < 1e-6 for x in late_s) / 4000 for k in (0, 1, 2, 4, 8, 16)}
    for n, k in enumerate((0, 1, 2, 4, 8, 16)):
        assert shares[k] == pytest.approx(0.5 ** (n + 1), abs=4 * math.sqrt(0.25 / 4000))
    assert sum(shares.values()) > 0.97


@pytest.mark.parametrize("loss_pct", [0.1, 1.0, 5.0])
def test_loss_statistics(loss_pct: float) -> None:
    """Lost transmissions lie inside four standard deviations of the binomial."""
    link = LinkDirection(LinkProfile(rtt_ms=5, loss_pct=loss_pct), "down", 7)
    n = 20_000
    late = sum(link.send(t := 5.0 * i, 200) > t + 0.003 for i in range(n))
    p = loss_pct / 100
    assert abs(late - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_jitter_is_uniform_about_the_delay() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=100, jitter_ms=20, up_fraction=0.25), "up", 2)
    delays = [link.send(t := 1.0 * i, 100) - t for i in range(5000)]
    assert min(delays) == pytest.approx(0.020, abs=1e-4)
    assert max(delays) == pytest.approx(0.030, abs=1e-4)
    assert sum(delays) / 5000 == pytest.approx(0.025, abs=2e-4)


def test_profile_changes_keep_order_and_bytes_in_flight() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=200), "up")
    assert link.send(0.0, 100) == pytest.approx(0.100)
    link.apply(LinkProfile(rtt_ms=2))
    assert link.send(0.001, 100) == pytest.approx(0.100)  # behind what is in flight
    assert link.send(0.2, 100) == pytest.approx(0.201)


def test_buffer_room() -> None:
    link = LinkDirection(LinkProfile(rate_up_mbit=1.0, buffer_bytes=10_000), "up")
    assert link.room_s(0.0) == 0.0
    link.send(0.0, 10 * MSS_BYTES)
    assert link.backlog_bytes(0.0) == pytest.approx(wire_bytes(10 * MSS_BYTES))
    wait_s = link.room_s(0.0)
    assert link.backlog_bytes(wait_s) == pytest.approx(10_000 - MSS_BYTES - HEADER_BYTES)
    assert LinkDirection(LinkProfile(rate_up_mbit=1.0), "up").room_s(0.0) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rtt_ms": -1}, ["rtt_ms", "-1", "0 to 60000"]),
        ({"rtt_ms": math.nan}, ["rtt_ms", "nan", "0 to 60000"]),
        ({"rtt_ms": "20"}, ["rtt_ms", "'20'", "number"]),
        ({"rtt_ms": True}, ["rtt_ms", "True", "number"]),
        ({"up_fraction": 1.5}, ["up_fraction", "1.5", "0 to 1"]),
        ({"rate_up_mbit": 0}, ["rate_up_mbit", "0", "0.001 to", "none"]),
        ({"loss_pct": 51}, ["loss_pct", "51", "0 to 50"]),
        ({"loss_pct": None}, ["loss_pct", "None", "0 to 50"]),
        ({"rtt_ms": 10, "jitter_ms": 11}, ["jitter_ms", "11", "rtt_ms"]),
        ({"buffer_bytes": 100}, ["buffer_bytes", "100", "3028"]),
        ({"buffer_bytes": 4000.5}, ["buffer_bytes", "4000.5", "whole"]),
        ({"delay": 3}, ["delay", "unknown", "rtt_ms"]),
    ],
)
def test_bad_profiles_say_what_is_wrong(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        LinkProfile.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_profile_round_trip_and_bad_calls() -> None:
    profile = LinkProfile(rtt_ms=20, rate_down_mbit=5, jitter_ms=1)
    assert LinkProfile.from_dict(profile.to_dict()) == profile
    assert profile.transfer_s("down", 200) == pytest.approx(0.010 + 266 * 8 / 5e6)
    link = LinkDirection(profile, "up")
    link.send(1.0, 10)
    with pytest.raises(ValueError, match="may not go back"):
        link.send(0.5, 10)
    with pytest.raises(ValueError, match="0 or more"):
        link.send(2.0, -1)
    with pytest.raises(ValueError, match="sideways"):
        LinkDirection(profile, "sideways")  # type: ignore[arg-type]


@pytest.mark.parametrize("burst", [1.0, 4.0])
def test_losses_come_as_often_and_in_bursts_as_long_as_asked(burst: float) -> None:
    link = LinkDirection(LinkProfile(loss_pct=5.0, loss_burst=burst), "up", seed=3)
    rng = random.Random(5)
    lost = [link.loses(rng) for _ in range(200_000)]
    assert sum(lost) / len(lost) == pytest.approx(0.05, rel=0.05)
    runs = [len(list(run)) for bad, run in itertools.groupby(lost) if bad]
    assert sum(runs) / len(runs) == pytest.approx(max(burst, 1 / 0.95), rel=0.05)


@pytest.mark.parametrize("fields", [{"rtt_ms": 1.0, "reorder_pct": 1.0}, {"partitioned": True}])
def test_what_the_model_does_not_know_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"the modelled link has none \(allowed: a netem link\)"):
        LinkDirection(LinkProfile(**fields), "up")  # type: ignore[arg-type]
