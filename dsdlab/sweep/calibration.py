"""Is the link what the cell asked for? Measures of a link, and the judgement on them. Pure.

A cell's link is measured over the nodes' own path before and after each generation. RTT and rate are judged
at once. Losses are rare, so they are pooled over all of a cell's measurements and judged by an exact binomial
interval; its level is high because a sweep makes many such tests and every false alarm throws away data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from dsdlab.sim.profile import LinkProfile, TcpRegime

__all__ = [
    "LOSS_LEVEL",
    "PING_WIRE_BYTES",
    "PROBE_WIRE_BYTES",
    "DirectionMeasure",
    "LinkMeasure",
    "binomial_interval",
    "burst_interval",
    "expected_rtt_ms",
    "judge",
    "judge_drift",
    "judge_loss",
    "judge_tcp",
]

RTT_TOLERANCE_MS, RTT_TOLERANCE = 0.5, 0.02
FRAMES_ALLOWANCE_MS = 1.0  # frames pass through the event loops of both nodes; packets do not
RATE_TOLERANCE = 0.05
DRIFT_TOLERANCE_MS, DRIFT_TOLERANCE = 1.0, 0.1
LOSS_LEVEL = 0.999
PROBE_WIRE_BYTES = 106
"""A probe on the wire: 14 (Ethernet) + 20 (IPv4) + 8 (UDP) + 64."""
PING_WIRE_BYTES = 86, 82
"""A Ping and its Pong on the wire: 66 of headers, 6 and 2 of WebSocket (client frames are masked), 14."""


class DirectionMeasure(msgspec.Struct, kw_only=True):
    """One direction of a link, as probes saw it."""

    sent: int = 0
    lost: int = 0
    bursts: list[int] = msgspec.field(default_factory=list)  # lengths of runs of lost probes
    reordered: int = 0  # probes that arrived behind a later one
    delay_p50_ms: float | None = None  # one way; None without a common clock
    rate_mbit: float | None = None  # of a train of full packets, on the wire; None: not measured


class LinkMeasure(msgspec.Struct, kw_only=True):
    """One calibration of a link, over the nodes' own path."""

    instrument: str  # "packets": UDP beside the nodes' connection; "frames": pings on the connection itself
    rtt_p50_ms: float
    rtt_p99_ms: float
    n: int  # round trips that came back
    up: DirectionMeasure = msgspec.field(default_factory=DirectionMeasure)
    down: DirectionMeasure = msgspec.field(default_factory=DirectionMeasure)
    wall_s: float = 0.0


def expected_rtt_ms(profile: LinkProfile, instrument: str) -> float:
    """Round trip of a probe on an idle link: the profile's, and the probe's own time at the bottlenecks."""
    sizes = (PROBE_WIRE_BYTES, PROBE_WIRE_BYTES) if instrument == "packets" else PING_WIRE_BYTES
    ways = zip(sizes, (profile.rate_up_mbit, profile.rate_down_mbit), strict=True)
    return profile.rtt_ms + sum(n * 8.0 / (rate * 1e3) for n, rate in ways if rate is not None)


def binomial_interval(lost: int, sent: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper–Pearson interval of a probability (Biometrika 26, 1934), from `lost` of `sent`."""
    if sent == 0:
        return 0.0, 1.0
    from scipy.special import betaincinv  # imported late: rows import this module, and the start counts

    tail = (1.0 - level) / 2.0
    low = 0.0 if lost == 0 else float(betaincinv(lost, sent - lost + 1, tail))
    high = 1.0 if lost == sent else float(betaincinv(lost + 1, sent - lost, 1.0 - tail))
    return low, high


def burst_interval(bursts: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean length of loss bursts: each packet of a burst ends it with one probability."""
    if not bursts:
        return 1.0, float("inf")
    low, high = binomial_interval(len(bursts), sum(bursts), level)
    return 1.0 / high, float("inf") if low == 0.0 else 1.0 / low


def judge(profile: LinkProfile, measure: LinkMeasure) -> str:
    """Why a measurement contradicts the profile in RTT or rate; empty where it does not."""
    reasons = []
    asked = expected_rtt_ms(profile, measure.instrument)
    allowed = max(RTT_TOLERANCE_MS, RTT_TOLERANCE * profile.rtt_ms)
    if measure.instrument != "packets":
        allowed += FRAMES_ALLOWANCE_MS
    if measure.n:  # the median of n uniform jitters wanders by about their half-width over the root of n
        allowed += 2.0 * profile.jitter_ms / measure.n**0.5
    if profile.partitioned:
        if measure.n:
            reasons.append(f"{measure.n} probes got through a partition")
    elif not measure.n:
        reasons.append("no probe came back")
    elif not abs(measure.rtt_p50_ms - asked) <= allowed:
        reasons.append(f"RTT is {measure.rtt_p50_ms:.2f} ms, asked {asked:.2f} ± {allowed:.2f}")
    for name, way, rate in (
        ("up", measure.up, profile.rate_up_mbit),
        ("down", measure.down, profile.rate_down_mbit),
    ):
        if rate is None or way.rate_mbit is None:
            continue
        if not abs(way.rate_mbit - rate) <= RATE_TOLERANCE * rate:
            reasons.append(
                f"rate {name} is {way.rate_mbit:.3g} Mbit/s, asked {rate:g} ± {RATE_TOLERANCE:.0%}"
            )
    return "; ".join(reasons)


def judge_drift(before: LinkMeasure, after: LinkMeasure) -> str:
    """Why a link that nobody shapes is not what it was before; empty where it is.

    Of such a link nothing is asked but that it holds still while a generation uses it: its RTT may move by
    a millisecond or a tenth, whichever is more. A measure against itself says whether anything came back.
    """
    if not after.n:
        return "no probe came back"
    if not before.n:
        return ""  # nothing to compare with; `before` has its own reason
    allowed = max(DRIFT_TOLERANCE_MS, DRIFT_TOLERANCE * before.rtt_p50_ms)
    if abs(after.rtt_p50_ms - before.rtt_p50_ms) <= allowed:
        return ""
    return f"RTT is {after.rtt_p50_ms:.2f} ms, was {before.rtt_p50_ms:.2f} ± {allowed:.2f}"


def judge_tcp(asked: TcpRegime, read_back: Mapping[str, Any]) -> str:
    """Where the TCP of a connection's two ends is not what was asked; empty where it is, or was not read."""
    wrong = []
    for end in ("edge", "verifier"):
        state = read_back.get(end) or {}
        if state.get("nodelay", asked.nodelay) != asked.nodelay:
            wrong.append(f"nodelay of the {end} is {state['nodelay']}, asked {asked.nodelay}")
        congestion = state.get("congestion", asked.congestion)
        if asked.congestion not in ("auto", congestion):
            wrong.append(f"congestion control of the {end} is {congestion}, asked {asked.congestion}")
    if read_back.get("slow_start_after_idle", asked.slow_start_after_idle) != asked.slow_start_after_idle:
        wrong.append(f"slow start after idle is {read_back['slow_start_after_idle']}")
    if on := read_back.get("offloads_on"):
        wrong.append(f"offloads are on: {', '.join(on)}")
    return "; ".join(wrong)


def judge_loss(profile: LinkProfile, measures: Iterable[LinkMeasure], level: float = LOSS_LEVEL) -> str:
    """Why the pooled losses of a cell contradict its profile; empty where they do not.

    Bursts make losses depend on each other: the counts are then thinned by the mean burst length.
    """
    sent = lost = 0
    for measure in measures:
        if measure.instrument == "packets":
            sent += measure.up.sent + measure.down.sent
            lost += measure.up.lost + measure.down.lost
    if not sent or profile.partitioned:
        return ""
    thin = 1.0 if profile.loss_burst == 1.0 else 2.0 * profile.loss_burst
    low, high = binomial_interval(round(lost / thin), max(1, round(sent / thin)), level)
    if low <= profile.loss_pct / 100.0 <= high:
        return ""
    return (
        f"loss is {lost} of {sent} probes ({100 * lost / sent:.3g} %), asked {profile.loss_pct:g} %, "
        f"interval {100 * low:.3g} to {100 * high:.3g} %"
    )
