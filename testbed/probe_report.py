"""The path to a verifier that somebody started elsewhere, measured once and told to people."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from dsdlab.address import ws_address
from dsdlab.probe import ProbeError, measure
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.calibration import DirectionMeasure, LinkMeasure, binomial_interval, burst_interval
from testbed.links.base import Endpoint
from testbed.links.wan import tcp_problem
from testbed.probing import probe_plan

__all__ = ["PathReport", "is_local", "probe"]

FIRST_LOOK, FIRST_GAP_S = 8, 0.02  # is anybody there, and about how far away
TCP_ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class PathReport:
    """One measurement of a path.

    gap_ms: between two probes. one_clock: both ends are this machine, so that one-way delays are delays.
    """

    verifier: Endpoint
    measure: LinkMeasure
    gap_ms: float
    one_clock: bool

    def as_json(self) -> dict[str, Any]:
        """The measure as rows have it, with its intervals."""
        found: dict[str, Any] = msgspec.to_builtins(self.measure)
        for name, way in self._ways:
            found[name]["loss_pct"] = 100 * way.lost / way.sent if way.sent else None
            found[name]["loss_pct_interval"] = [100 * p for p in binomial_interval(way.lost, way.sent)]
        return {
            "verifier": f"ws://{self.verifier}/",
            "gap_ms": self.gap_ms,
            "one_clock": self.one_clock,
            **found,
        }

    def lines(self) -> list[str]:
        """For people."""
        m = self.measure
        out = [f"ws://{self.verifier}/: {m.up.sent} probes, {self.gap_ms:g} ms apart, in {m.wall_s:.1f} s"]
        if m.n:
            out.append(f"RTT         p50 {m.rtt_p50_ms:.2f} ms, p99 {m.rtt_p99_ms:.2f} ms ({m.n} came back)")
        else:
            out.append("RTT         unknown: no probe came back, only the verifier's count of them")
        if m.up.delay_p50_ms is not None and m.down.delay_p50_ms is not None:
            note = "" if self.one_clock else " (two clocks: only the sum is a delay)"
            out.append(
                f"one way     up {m.up.delay_p50_ms:.2f} ms, down {m.down.delay_p50_ms:.2f} ms, p50{note}"
            )
        out.append(self._both("lost", _loss))
        if m.up.bursts or m.down.bursts:
            out.append(self._both("burst", _burst))
        out.append(self._both("reordered", lambda way: str(way.reordered)))
        if m.up.rate_mbit is not None or m.down.rate_mbit is not None:
            out.append(self._both("rate", _rate))
        return out

    @property
    def _ways(self) -> tuple[tuple[str, DirectionMeasure], tuple[str, DirectionMeasure]]:
        return ("up", self.measure.up), ("down", self.measure.down)

    def _both(self, what: str, text: Callable[[DirectionMeasure], str]) -> str:
        return f"{what:12}" + "; ".join(f"{name} {text(way)}" for name, way in self._ways)


def _loss(way: DirectionMeasure) -> str:
    if not way.sent:
        return "unknown: none was sent"
    low, high = binomial_interval(way.lost, way.sent)
    share = 100 * way.lost / way.sent
    return f"{share:.3g} % [{100 * low:.2g}, {100 * high:.2g}], {way.lost} of {way.sent}"


def _burst(way: DirectionMeasure) -> str:
    if not way.bursts:
        return "none"
    low, high = burst_interval(way.bursts)
    return f"{sum(way.bursts) / len(way.bursts):.3g} packets on average [{low:.2g}, {high:.2g}]"


def _rate(way: DirectionMeasure) -> str:
    if way.rate_mbit is None:
        return "unknown: the train was lost"
    return f"{way.rate_mbit:,.0f} Mbit/s" if way.rate_mbit >= 1000 else f"{way.rate_mbit:.3g} Mbit/s"


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine's own: only then can something be bound to it."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return True
    return False


def probe(url: str, token: str, n: int, gap_s: float, rate_mbit: float | None = None) -> PathReport:
    """Measure the path to the verifier at ws://HOST:PORT/.

    n: probes; gap_s: between two; rate_mbit: about what to expect of a train each way, None for no train.
    Blocking. Raises ProbeError with one line.
    """
    try:
        host, port = ws_address(url)
    except ValueError as e:
        raise ProbeError(str(e)) from None
    try:
        socket.getaddrinfo(host, port, socket.AF_INET)
    except OSError:
        raise ProbeError(f"{url}: host name {host!r} not found (IPv4)") from None
    verifier = Endpoint(host, port)
    try:
        look = measure(host, port, token, n=FIRST_LOOK, gap_s=FIRST_GAP_S)
    except ProbeError as e:
        raise ProbeError(f"{e}: {_why(verifier)}") from None
    rtt_ms = look["rtt_p99_ms"]
    plan = probe_plan(LinkProfile(rtt_ms=rtt_ms, rate_up_mbit=rate_mbit, rate_down_mbit=rate_mbit))
    plan |= {"n": n, "gap_s": gap_s, "late_s": rtt_ms / 1e3}
    found = msgspec.convert(measure(host, port, token, **plan), LinkMeasure)
    return PathReport(verifier, found, gap_s * 1e3, is_local(host))


def _why(verifier: Endpoint) -> str:
    """What may keep probes from coming back, in the light of what TCP says of the same port."""
    if problem := asyncio.run(tcp_problem(verifier, TCP_ANSWER_S)):
        return f"no verifier takes calls there either (TCP: {problem})"
    return "a verifier takes calls there, but a firewall closes its UDP port, or its token is another one"
