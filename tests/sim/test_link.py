"""The link: which packets get through and when; closed form, invariants, statistics."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdlab.sim.clock import EventQueue
from dsdlab.sim.connection import Connection
from dsdlab.sim.link import LinkDirection
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


# (gap before the write in seconds, bytes, up)
writes = st.lists(
    st.tuples(st.floats(0.0, 0.3), st.integers(1, 20_000), st.booleans()), min_size=1, max_size=40
)
# (after how long, the profile from then on)
steps = st.lists(st.tuples(st.floats(0.0, 2.0), profiles(), st.booleans()), max_size=4)
Arrivals = dict[str, list[tuple[float, int]]]


def play(
    profile: LinkProfile,
    sends: list[tuple[float, int, bool]],
    changes: list[tuple[float, LinkProfile, bool]],
    seed: int,
) -> tuple[Arrivals, tuple[LinkDirection, LinkDirection]]:
    """What arrives of writes in both directions, (when, number of the write), while the link changes."""
    queue = EventQueue()
    up, down = LinkDirection(profile, "up", seed), LinkDirection(profile, "down", seed)
    got: Arrivals = {"up": [], "down": []}

    def never() -> None:
        raise AssertionError("TCP gave up")

    connection = Connection(
        queue, up, down,
        lambda when_s, item: got["up"].append((when_s, item)),
        lambda when_s, item: got["down"].append((when_s, item)), never,
    )  # fmt: skip

    def write(item: int, n_bytes: int, upwards: bool) -> None:
        (connection.up if upwards else connection.down).send(queue.time(), n_bytes, item)

    def apply(to: LinkProfile, partitioned: bool) -> None:
        values = to.to_dict() | {"partitioned": partitioned}
        up.apply(LinkProfile.from_dict(values))
        down.apply(LinkProfile.from_dict(values))

    now_s = 0.0
    for item, (gap_s, n_bytes, upwards) in enumerate(sends):
        now_s += gap_s
        queue.call_at(now_s, write, item, n_bytes, upwards)
    now_s = 0.0
    for gap_s, to, partitioned in changes:
        now_s += gap_s
        queue.call_at(now_s, apply, to, partitioned)
    queue.call_at(now_s + 5.0, apply, LinkProfile(rtt_ms=10), False)  # at last everything gets through
    queue.run_until(1000.0)
    assert queue.next_s == math.inf  # and nothing is left to do
    return got, (up, down)


@BIG
@given(profiles(), writes, steps, st.integers(0, 9))
def test_everything_arrives_once_in_order_and_never_too_early(
    profile: LinkProfile,
    sends: list[tuple[float, int, bool]],
    changes: list[tuple[float, LinkProfile, bool]],
    seed: int,
) -> None:
    got, links = play(profile, sends, changes, seed)
    sent_s = list(itertools.accumulate(gap_s for gap_s, _, _ in sends))
    ever = [profile, *(to for _, to, _ in changes), LinkProfile(rtt_ms=10)]
    for link in links:
        way = link.direction
        mine = [item for item, (_, _, upwards) in enumerate(sends) if upwards == (way == "up")]
        assert [item for _, item in got[way]] == mine  # conservation and order
        times = [when_s for when_s, _ in got[way]]
        assert times == sorted(times)
        least_s = min(p.delay_s(way) - p.jitter_ms / 1e3 * p.fraction(way) for p in ever)
        for when_s, item in got[way]:  # never faster than light, nor than the bottleneck ever was
            rates = [p.rate_mbit(way) for p in ever]
            serialise_s = min(0.0 if r is None else wire_bytes(sends[item][1]) * 8 / (r * 1e6) for r in rates)
            assert when_s >= sent_s[item] + least_s + serialise_s - 1e-9
        stats = link.stats
        assert stats.n_bytes == sum(sends[item][1] for item in mine)
        assert stats.segments >= bool(mine)
        repairs = stats.fast_retransmits + stats.probes + stats.timeouts
        assert bool(stats.lost) <= bool(repairs)


@BIG
@given(profiles(), writes, steps, st.integers(0, 5))
def test_same_seed_same_arrivals(
    profile: LinkProfile,
    sends: list[tuple[float, int, bool]],
    changes: list[tuple[float, LinkProfile, bool]],
    seed: int,
) -> None:
    assert play(profile, sends, changes, seed)[0] == play(profile, sends, changes, seed)[0]


@BIG
@given(profiles(lossy=False), writes)
def test_loss_free_closed_form(profile: LinkProfile, sends: list[tuple[float, int, bool]]) -> None:
    """Lindley's recursion: a write starts when it is sent or when the one before has left the bottleneck."""
    link = LinkDirection(profile, "up", 3)
    now_s, free_s = 0.0, 0.0
    for gap_s, n_bytes, _ in sends:
        now_s += gap_s
        headers = HEADER_BYTES * max(1, math.ceil(n_bytes / MSS_BYTES))
        rate = profile.rate_up_mbit
        free_s = max(now_s, free_s) + (0.0 if rate is None else (n_bytes + headers) * 8 / (rate * 1e6))
        want_s = free_s + profile.rtt_ms / 1e3 * profile.up_fraction
        assert link.cross(now_s, wire_bytes(n_bytes)) == pytest.approx(want_s, abs=1e-9)


def test_other_seeds_and_directions_lose_other_packets() -> None:
    profile = LinkProfile(rtt_ms=20, loss_pct=10)
    ways: list[tuple[Direction, int]] = [("up", 1), ("up", 2), ("down", 1)]
    links = [LinkDirection(profile, way, seed) for way, seed in ways]
    patterns = {tuple(link.loses() for _ in range(400)) for link in links}
    assert len(patterns) == 3
    assert all(15 <= sum(p) <= 75 for p in patterns)


@pytest.mark.parametrize("loss_pct", [0.1, 1.0, 5.0])
def test_loss_statistics(loss_pct: float) -> None:
    """Lost packets lie inside four standard deviations of the binomial."""
    link = LinkDirection(LinkProfile(rtt_ms=5, loss_pct=loss_pct), "down", 7)
    n, p = 20_000, loss_pct / 100
    assert abs(sum(link.loses() for _ in range(n)) - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize("burst", [1.0, 4.0])
def test_losses_come_as_often_and_in_bursts_as_long_as_asked(burst: float) -> None:
    link = LinkDirection(LinkProfile(loss_pct=5.0, loss_burst=burst), "up", seed=3)
    lost = [link.loses() for _ in range(200_000)]
    assert sum(lost) / len(lost) == pytest.approx(0.05, rel=0.05)
    runs = [len(list(run)) for bad, run in itertools.groupby(lost) if bad]
    assert sum(runs) / len(runs) == pytest.approx(max(burst, 1 / 0.95), rel=0.05)


def test_jitter_is_uniform_about_the_delay() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=100, jitter_ms=20, up_fraction=0.25), "up", 2)
    delays = [link.cross(t := 1.0 * i, 100) - t for i in range(5000)]
    assert min(delays) == pytest.approx(0.020, abs=1e-4)
    assert max(delays) == pytest.approx(0.030, abs=1e-4)
    assert sum(delays) / 5000 == pytest.approx(0.025, abs=2e-4)


def test_what_jitters_never_overtakes() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=100, jitter_ms=100), "up", 2)
    times = [link.cross(0.001 * i, 100) for i in range(1000)]
    assert times == sorted(times)


def test_profile_changes_keep_order_and_packets_under_way() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=200), "up")
    assert link.cross(0.0, 100) == pytest.approx(0.100)
    link.apply(LinkProfile(rtt_ms=2))
    assert link.cross(0.001, 100) == pytest.approx(0.100)  # behind what is under way
    assert link.cross(0.2, 100) == pytest.approx(0.201)


def test_a_partition_loses_everything_while_it_lasts() -> None:
    link = LinkDirection(LinkProfile(rtt_ms=2), "up")
    assert [link.loses() for _ in range(3)] == [False] * 3
    link.apply(LinkProfile(rtt_ms=2, partitioned=True))
    assert [link.loses() for _ in range(3)] == [True] * 3
    link.apply(LinkProfile(rtt_ms=2))
    assert not link.loses()


def test_buffer_room() -> None:
    link = LinkDirection(LinkProfile(rate_up_mbit=1.0, buffer_bytes=10_000), "up")
    assert link.room_s(0.0) == 0.0
    link.cross(0.0, wire_bytes(10 * MSS_BYTES))
    assert link.backlog_bytes(0.0) == pytest.approx(wire_bytes(10 * MSS_BYTES))
    wait_s = link.room_s(0.0)
    assert link.backlog_bytes(wait_s) == pytest.approx(10_000 - MSS_BYTES - HEADER_BYTES)
    assert LinkDirection(LinkProfile(rate_up_mbit=1.0), "up").room_s(0.0) == 0.0


def test_what_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"reorder_pct: the modelled link has none \(allowed: a netem link\)"
    ):
        LinkDirection(LinkProfile(rtt_ms=1.0, reorder_pct=1.0), "up")
    with pytest.raises(ValueError, match="sideways"):
        LinkDirection(LinkProfile(), "sideways")  # type: ignore[arg-type]


def test_segments() -> None:
    assert [segments_of(n) for n in (0, 1, MSS_BYTES, MSS_BYTES + 1)] == [1, 1, 1, 2]


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


def test_profile_round_trip() -> None:
    profile = LinkProfile(rtt_ms=20, rate_down_mbit=5, jitter_ms=1)
    assert LinkProfile.from_dict(profile.to_dict()) == profile
    assert profile.transfer_s("down", 200) == pytest.approx(0.010 + 266 * 8 / 5e6)
