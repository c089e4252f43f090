"""The probe: what it says of a path, told apart from what happens at the ends."""

from __future__ import annotations

import socket

import msgspec
import pytest

from dsdlab import probe
from dsdlab.probe import ProbeError, Reflector, measure
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.calibration import LinkMeasure, judge
from testbed.probing import probe_plan


def test_loopback_is_quick_whole_and_in_order() -> None:
    reflector = Reflector("127.0.0.1", 0, "secret")
    try:
        found = measure(
            "127.0.0.1", reflector.port, "secret", n=300, gap_s=0.0005, train_up=50, train_down=50
        )
        measured = msgspec.convert(found, LinkMeasure)
        assert measured.n == measured.up.sent == measured.down.sent == 300
        assert measured.up.lost == measured.down.lost == measured.up.reordered == measured.down.reordered == 0
        assert 0 < measured.rtt_p50_ms < 1.0  # the reflector's own time is not in it
        assert measured.up.delay_p50_ms is not None
        assert measured.down.delay_p50_ms is not None
        assert measured.up.rate_mbit is not None
        assert measured.up.rate_mbit > 50
        assert measured.down.rate_mbit is not None
        assert judge(LinkProfile(), measured) == ""
        assert "RTT is" in judge(LinkProfile(rtt_ms=5), measured)
        assert "rate up is" in judge(LinkProfile(rate_up_mbit=10), measured)
    finally:
        reflector.close()
        reflector.close()


def test_a_train_one_way_gives_that_ways_rate() -> None:
    """An answer that is late must not pass for the one about the train."""
    reflector = Reflector("127.0.0.1", 0)
    try:
        found = measure("127.0.0.1", reflector.port, n=20, gap_s=0.0005, train_up=50)
        assert found["up"]["rate_mbit"] > 50
        assert found["down"]["rate_mbit"] is None
        found = measure("127.0.0.1", reflector.port, n=20, gap_s=0.0005, train_down=50)
        assert found["up"]["rate_mbit"] is None
        assert found["down"]["rate_mbit"] > 50
    finally:
        reflector.close()


def test_what_the_last_question_overtook_is_not_lost() -> None:
    reflector = Reflector("127.0.0.1", 0)
    prober = probe._Prober("127.0.0.1", reflector.port, "")
    try:
        prober.probes(4, 0.0005, 0.0, 0.0)
        prober.report = 0, 0, {0, 1}
        assert probe._summary(prober, 4, 0.0)["up"]["lost"] == 0
    finally:
        prober.close()
        reflector.close()


def test_strangers_get_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ASK_FOR_S", 0.3)
    reflector = Reflector("127.0.0.1", 0, "secret")
    try:
        with pytest.raises(ProbeError, match=r"no probe to UDP 127\.0\.0\.1:\d+ came back"):
            measure("127.0.0.1", reflector.port, "other", n=3)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:  # nor does rubbish end it
            sock.sendto(b"", ("127.0.0.1", reflector.port))
            sock.sendto(b"rubbish" * 9, ("127.0.0.1", reflector.port))
        assert measure("127.0.0.1", reflector.port, "secret", n=3)["n"] == 3
    finally:
        reflector.close()


def test_bad_questions() -> None:
    for options in ({"n": 0}, {"n": 10_001}, {"train_up": 1}, {"train_down": 1000}):
        with pytest.raises(ProbeError, match=r"allowed: 1 to 10000; 0, 2 to 400"):
            measure("127.0.0.1", 9, **options)
    taken = Reflector("127.0.0.1", 0)
    try:
        with pytest.raises(ProbeError, match=r"cannot bind UDP .*in use"):
            Reflector("127.0.0.1", taken.port)
    finally:
        taken.close()


def test_bursts_and_overtaking_are_counted() -> None:
    way = probe._way([True, False, False, True, False], [], 0, 0, 0)
    assert (way["sent"], way["lost"], way["bursts"]) == (5, 3, [2, 1])
    assert probe._overtaken([1, 2, 5, 3, 4, 6]) == 2


def test_plans_suit_their_links() -> None:
    plain = probe_plan(LinkProfile(rtt_ms=50))
    assert plain["train_up"] == plain["train_down"] == 0
    assert probe_plan(LinkProfile(loss_pct=1))["n"] > plain["n"]
    slow = probe_plan(LinkProfile(rate_up_mbit=0.1))
    # a probe takes 8.5 ms at 0.1 Mbit/s: they must not queue behind each other
    assert slow["gap_s"] > 2 * 106 * 8 / 0.1e6
    assert slow["n"] * slow["gap_s"] < 2
    assert 2 <= slow["train_up"] <= 400
    assert slow["train_down"] == 0
    # packets keep their order: probes closer than the delay varies would find each other's delays
    assert probe_plan(LinkProfile(rtt_ms=100, jitter_ms=60))["gap_s"] >= 0.06
    assert probe_plan(LinkProfile(), 7)["n"] == 7
