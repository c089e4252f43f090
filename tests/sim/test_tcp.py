"""The modelled TCP: each mechanism alone, with chosen packets lost, against arithmetic from its sources."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim.clock import EventQueue
from dsdlab.sim.link import LinkDirection
from dsdlab.sim.profile import MSS_BYTES, Direction, LinkProfile
from dsdlab.sim.tcp import TcpEnd, tcp_pair
from dsdlab.sim.tcp_timing import TICK_S, AckPolicy, RttEstimator, expiry_s

LOSSY = LinkProfile(rtt_ms=40, loss_pct=1)


class Fated(LinkDirection):
    """A link that loses the packets whose numbers (from 0, acknowledgements included) are given."""

    __slots__ = ("lost", "packet")

    def __init__(self, profile: LinkProfile, direction: Direction, lost: Iterable[int] = ()) -> None:
        super().__init__(profile, direction)
        self.lost, self.packet = frozenset(lost), -1

    def loses(self) -> bool:
        self.packet += 1
        return self.profile.partitioned or self.packet in self.lost


class Wire:
    """A connection in an event queue, and what came out of it: (when, item) each way."""

    def __init__(
        self,
        profile: LinkProfile = LOSSY,
        up: Iterable[int] = (),
        down: Iterable[int] = (),
        nodelay: bool = True,
    ) -> None:
        self.queue = EventQueue()
        self.up, self.down = Fated(profile, "up", up), Fated(profile, "down", down)
        self.client, self.server = tcp_pair(
            self.queue, self.up, self.down, rtt_s=profile.rtt_ms / 1e3, nodelay=nodelay
        )
        self.at_server: list[tuple[float, int]] = []
        self.at_client: list[tuple[float, int]] = []
        self.answer: Callable[[int], object] = lambda _: None
        self.server.receiver.deliver = self._arrived
        self.client.receiver.deliver = lambda item: self.at_client.append((self.queue.time(), item))

    def _arrived(self, item: int) -> None:
        self.at_server.append((self.queue.time(), item))
        self.answer(item)

    def send(self, at_s: float, item: int, n_bytes: int = 200, end: TcpEnd | None = None) -> None:
        self.queue.call_at(at_s, (end or self.client).write, n_bytes, item)

    def run(self, until_s: float = 300.0) -> list[float]:
        """When the client's items came to the server."""
        self.queue.run_until(until_s)
        return [when_s for when_s, _ in self.at_server]


def fires(set_s: float, delay_s: float) -> float:
    """When a timer fires that was set at `set_s`."""
    return expiry_s(set_s, delay_s)


# clockwork ------------------------------------------------------------------------------------------


@given(st.floats(0.0, 100.0), st.floats(0.0, 130.0))
def test_a_kernel_timer_is_late_by_up_to_a_step_of_its_wheel(now_s: float, delay_s: float) -> None:
    ticks = max(1, math.ceil(delay_s / TICK_S - 1e-9))
    step = next(8**k for k in range(9) if ticks < 63 * 8**k)
    late_s = expiry_s(now_s, delay_s) - now_s - delay_s
    assert -1e-6 <= late_s <= (step + 1) * TICK_S + 1e-6


def test_first_retransmission_timeouts() -> None:
    """RFC 6298 section 2 with Linux's floor: SRTT + max(200 ms, 4 · RTT/2), and then it shrinks."""
    for rtt_s, first_s in ((0.001, 0.204), (0.040, 0.240), (0.200, 0.600)):
        rtt = RttEstimator(0.2)
        rtt.sample(rtt_s, 1, 1)
        assert rtt.rto_s == pytest.approx(first_s)
        for position in range(2, 200):
            rtt.sample(rtt_s, position, position)
        assert rtt.rto_s == pytest.approx(rtt_s + 0.2, abs=TICK_S)
    assert rtt.least_s == 0.2


def test_one_late_round_trip_raises_the_timeout_at_once() -> None:
    rtt = RttEstimator(0.2)
    for position in range(100):
        rtt.sample(0.040, position, position)
    before_s = rtt.rto_s
    rtt.sample(0.540, 100, 100)  # SRTT + 0.5/8, four-fold deviation + (0.5 - its quarter)
    assert rtt.rto_s == pytest.approx(before_s + 0.5 / 8 + 0.3, abs=0.01)


def test_when_an_acknowledgement_waits() -> None:
    """An end that answers at once delays; one that is slow, or missed once, does not."""
    acks = AckPolicy(0.0, interactive=True)
    acks.received(0.1, 100, 0.24)
    assert (acks.pending, acks.at_once, acks.delay_s(0.04)) == (True, False, 0.04)
    acks.received(0.11, 100, 0.24)
    assert acks.at_once  # two small segments
    acks.sent()
    assert not acks.pending
    acks.received(0.2, 100, 0.24)
    acks.missed(0.24)
    acks.sent()
    acks.received(0.3, 100, 0.24)
    assert acks.at_once
    acks.sent()
    acks.sent_data(0.31)  # it answers again
    acks.received(0.4, 100, 0.24)
    assert not acks.at_once


# repairs --------------------------------------------------------------------------------------------


def test_alone_in_flight_waits_for_the_retransmission_timer() -> None:
    wire = Wire(up=[0])
    wire.send(1.0, 1)
    assert wire.run() == pytest.approx([fires(1.0, 0.240) + 0.020])  # SRTT + 200 ms, then one way
    assert (wire.up.stats.probes, wire.up.stats.timeouts, wire.up.stats.lost) == (1, 0, 1)
    quick = Wire(LinkProfile(rtt_ms=40, loss_pct=1, rto_min_ms=20), up=[0])
    quick.send(1.0, 1)
    # the first sample's deviation still counts: 40 + 80 ms, but a probe is due after 2 · 40 + 20
    assert quick.run() == pytest.approx([fires(1.0, 0.100) + 0.020])


def test_tail_loss_is_probed_after_two_round_trips() -> None:
    wire = Wire(up=[1])
    wire.send(1.0, 1)
    wire.send(1.005, 2)
    # the first is acknowledged after 40 ms (the server might have answered); that leaves one in flight, whose
    # probe would come after the RTO: SRTT, raised by an eighth of what was late, + 200 ms, in whole ticks
    heard_s = fires(1.020, 0.040) + 0.020
    assert wire.run() == pytest.approx([1.020, fires(heard_s, 0.248) + 0.020])
    both = Wire(up=[0, 1])
    both.send(1.0, 1)
    both.send(1.0, 2)
    # nothing is heard: after 2 · SRTT + 2 ms the last one goes again, and tells of the first by RACK
    probe_s = fires(1.0, 0.082)
    assert both.run() == pytest.approx([probe_s + 0.040 + 0.020] * 2)
    assert (both.up.stats.probes, both.up.stats.fast_retransmits) == (1, 1)


def test_what_follows_repairs() -> None:
    """RACK: lost once something sent a quarter of the least round trip later has got through."""
    wire = Wire(up=[0])
    wire.send(1.0, 1)
    wire.send(1.015, 2)  # more than 10 ms later: lost as soon as its acknowledgement is back
    assert wire.run() == pytest.approx([1.055 + 0.020] * 2)  # head-of-line blocking
    soon = Wire(up=[0])
    soon.send(1.0, 1)
    soon.send(1.004, 2)  # sooner: what is left of the 10 ms, and 2 ms
    assert soon.run() == pytest.approx([fires(1.044, 0.008) + 0.020] * 2)
    three = Wire(up=[0])
    for k in range(4):
        three.send(1.0 + 0.001 * k, k)  # the third acknowledgement ends the patience
    assert three.run() == pytest.approx([1.043 + 0.020] * 4)
    assert three.up.stats.fast_retransmits == 1


def test_a_delayed_acknowledgement_makes_the_sender_patient() -> None:
    """It tells of the first segment in the same packet that tells, selectively, of the third: the round trip
    that the loss of the second is judged by is then the first one's, delay included."""
    wire = Wire(up=[1])
    for k in range(3):
        wire.send(1.0 + 0.015 * k, k)
    heard_s = 1.030 + 0.040
    patience_s = (heard_s - 1.0) + 0.010 - (heard_s - 1.015)
    again_s = fires(heard_s, patience_s + 0.002)
    assert wire.run() == pytest.approx([1.020, again_s + 0.020, again_s + 0.020])


def test_lost_retransmissions_back_off() -> None:
    """The probe comes at one RTO, the timer one RTO after it, and then twice as late each time."""
    for losses in range(1, 7):
        wire = Wire(up=range(losses))
        wire.send(1.0, 1)
        at_s = fires(1.0, 0.240)
        for k in range(losses - 1):
            at_s = fires(at_s, 0.240 * 2**k)
        assert wire.run() == pytest.approx([at_s + 0.020]), losses
        assert wire.up.stats.timeouts == losses - 1


@pytest.mark.parametrize("length_s", [0.1, 1.0, 5.0, 60.0])
def test_a_partition_ends_with_the_next_retransmission(length_s: float) -> None:
    wire = Wire()
    apply = [link.apply for link in (wire.up, wire.down)]
    for f in apply:
        wire.queue.call_at(1.0, f, LinkProfile(rtt_ms=40, loss_pct=1, partitioned=True))
        wire.queue.call_at(1.0 + length_s, f, LOSSY)
    wire.send(1.0, 1)
    at_s, k = fires(1.0, 0.240), 0
    while at_s < 1.0 + length_s:
        at_s, k = fires(at_s, 0.240 * 2**k), k + 1
    assert wire.run() == pytest.approx([at_s + 0.020])
    assert at_s <= 1.0 + 2.1 * length_s + 0.5


def test_what_was_written_during_a_partition_comes_together() -> None:
    """Small segments are sent again as one, as far as a full one holds them; what was written once the window
    had fallen to one segment follows a round trip later, in one segment too."""
    wire = Wire()
    for link in (wire.up, wire.down):
        wire.queue.call_at(1.0, link.apply, LinkProfile(rtt_ms=40, loss_pct=1, partitioned=True))
        wire.queue.call_at(3.0, link.apply, LOSSY)
    for k in range(10):
        wire.send(1.0 + 0.1 * k, k, 100)
    times = wire.run()
    first_s, last_s = sorted(set(times))
    assert last_s == pytest.approx(
        first_s + 0.040 + 0.044, abs=0.002 + TICK_S
    )  # and a delayed acknowledgement
    assert 2 <= times.count(first_s) <= 4
    assert [item for _, item in wire.at_server] == list(range(10))


def test_a_lost_acknowledgement_costs_the_receiver_nothing() -> None:
    wire = Wire(down=[0])
    for k in range(5):
        wire.send(1.0 + k, k)
    assert wire.run() == pytest.approx([1.020 + k for k in range(5)])
    assert wire.up.stats.probes == 1  # in vain
    assert wire.up.stats.lost == 0


def test_an_answer_carries_the_acknowledgement() -> None:
    """An interactive server's answers acknowledge; no bare packet goes down while it is quick."""
    wire = Wire()
    wire.answer = lambda item: wire.queue.call_at(wire.queue.time() + 0.005, wire.server.write, 50, item)
    for k in range(20):
        wire.send(1.0 + 0.060 * k, k)
    wire.run(2.18)
    assert wire.down.stats.acks == 0
    assert [when_s for when_s, _ in wire.at_client] == pytest.approx([1.045 + 0.060 * k for k in range(19)])
    slow = Wire()
    slow.answer = lambda item: slow.queue.call_at(slow.queue.time() + 0.060, slow.server.write, 50, item)
    for k in range(20):
        slow.send(1.0 + 0.120 * k, k)
    slow.run()
    assert slow.down.stats.acks == 20  # it misses the first delay, and acknowledges at once from then on


def test_a_connection_is_given_up_in_the_end() -> None:
    wire = Wire(LinkProfile(rtt_ms=40, partitioned=True))
    gone: list[float] = []

    def broken() -> None:
        gone.append(wire.queue.time())
        wire.client.close()

    wire.client.broken = broken
    wire.send(1.0, 1)
    assert wire.run(5000.0) == []
    assert len(gone) == 1
    assert 900 < gone[0] < 1100  # tcp_retries2 of 15: "924.6 seconds", ip-sysctl.rst


def test_a_big_write_takes_round_trips_until_the_window_is_open() -> None:
    """Slow start from ten segments: 10, 20, 40 … a round trip."""
    wire = Wire(LinkProfile(rtt_ms=100))
    wire.send(1.0, 1, 10 * MSS_BYTES)
    assert wire.run() == pytest.approx([1.050])
    for n, trips in ((11, 1), (30, 1), (31, 2), (70, 2), (71, 3)):
        more = Wire(LinkProfile(rtt_ms=100))
        more.send(1.0, 1, n * MSS_BYTES)
        assert more.run() == pytest.approx([1.050 + 0.100 * trips], abs=0.001), n


@pytest.mark.parametrize("rate_mbit", [1.0, 10.0])
def test_throughput_is_the_rate(rate_mbit: float) -> None:
    wire = Wire(LinkProfile(rtt_ms=20, rate_up_mbit=rate_mbit))
    n_bytes = 1000 * MSS_BYTES
    wire.send(1.0, 1, n_bytes)
    want_s = n_bytes * (1514 / 1448) * 8 / (rate_mbit * 1e6)
    assert wire.run()[0] - 1.0 == pytest.approx(want_s, rel=0.05, abs=0.05)


def test_nagle_holds_back_a_second_small_segment() -> None:
    plain, nagle = Wire(), Wire(nodelay=False)
    for wire in (plain, nagle):
        wire.send(1.0, 1)
        wire.send(1.001, 2)
        wire.send(1.002, 3)
    assert plain.run() == pytest.approx([1.020, 1.021, 1.022])
    first_s, second_s, third_s = nagle.run()
    assert first_s == pytest.approx(1.020)
    # the interactive server delays its acknowledgement by 40 ms; then both go in one segment
    assert second_s == third_s == pytest.approx(fires(1.020, 0.040) + 0.040)
