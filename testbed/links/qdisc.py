"""From a `LinkProfile` to the arguments of `tc qdisc … netem`. Pure.

One netem qdisc per direction holds delay, jitter, loss, reordering, rate and queue. It always names a rate,
for two reasons: packets then leave in order whatever the jitter (netem orders by departure time only where
there is no rate), and a change keeps whatever it does not name, so a rate that is left out would stay.
Source: tc-netem(8), and net/sched/sch_netem.c, netem_enqueue and netem_change.
"""

from __future__ import annotations

import math

from dsdlab.sim.profile import Direction, LinkProfile
from testbed.links.base import LinkError

__all__ = ["FRAME_BYTES", "UNLIMITED_PACKETS", "netem_arguments", "queue_packets"]

FRAME_BYTES = 1514
"""A full frame as a qdisc counts it: 1500 and the Ethernet header."""
UNLIMITED_MBIT = 10_000.0
UNLIMITED_PACKETS = 100_000


def queue_packets(profile: LinkProfile, direction: Direction) -> int:
    """netem's `limit`: packets in its delay line and its queue together, counted as full frames.

    What the link holds at its rate during its longest delay, plus the buffer. A flow of small packets fills
    it with fewer bytes.
    """
    rate = profile.rate_mbit(direction)
    if rate is None or profile.buffer_bytes is None:
        return UNLIMITED_PACKETS
    longest_s = profile.delay_s(direction) + profile.jitter_ms / 1e3 * profile.fraction(direction)
    return max(2, math.ceil((rate * 1e6 / 8.0 * longest_s + profile.buffer_bytes) / FRAME_BYTES))


def netem_arguments(profile: LinkProfile, direction: Direction, offset_ms: float = 0.0) -> list[str]:
    """Words after `netem` for one direction.

    offset_ms: what the box takes for itself in this direction, taken off the delay that is asked.

    Raises LinkError for a profile that netem cannot make or would make into something else.
    """
    rate = profile.rate_mbit(direction)
    if rate is not None and rate > UNLIMITED_MBIT:
        field = f"rate_{direction}_mbit"
        raise LinkError(f"{field}: {rate:g} is beyond netem (allowed: up to {UNLIMITED_MBIT:g}, or none)")
    if profile.reorder_pct > 0.0 and rate is not None:
        raise LinkError(
            f"reorder_pct: {profile.reorder_pct:g} with a rate of {rate:g} Mbit/s: what overtakes would "
            "not pass netem's bottleneck (allowed: one of the two)"
        )
    delay_ms = max(0.0, 1e3 * profile.delay_s(direction) - offset_ms)
    jitter_ms = profile.jitter_ms * profile.fraction(direction)
    if jitter_ms > delay_ms:
        most_ms = delay_ms / profile.fraction(direction)
        raise LinkError(
            f"jitter_ms: {profile.jitter_ms:g} is more than rtt_ms {profile.rtt_ms:g} less the "
            f"{offset_ms:.2f} ms that the box itself takes {direction} (allowed: up to {most_ms:.2f})"
        )
    if profile.reorder_pct > 0.0 and round(1e3 * delay_ms) == 0:
        raise LinkError(
            f"reorder_pct: {profile.reorder_pct:g} without any delay {direction} (rtt_ms {profile.rtt_ms:g}, "
            f"of which the box itself takes {offset_ms:.2f}): there is nothing to overtake"
        )
    words = ["limit", str(queue_packets(profile, direction)), "delay", f"{1e3 * delay_ms:.0f}us"]
    if jitter_ms:
        words.append(f"{1e3 * jitter_ms:.0f}us")
    words += _loss(profile)
    if profile.reorder_pct:
        words += ["reorder", f"{profile.reorder_pct:g}%"]
    return [*words, "rate", f"{(UNLIMITED_MBIT if rate is None else rate) * 1e3:.10g}kbit"]


def _loss(profile: LinkProfile) -> list[str]:
    if profile.partitioned:
        return ["loss", "random", "100%"]
    if profile.loss_burst > 1.0:
        enter, leave = profile.gilbert_elliott()
        # gemodel p r 1-h 1-k: everything is lost in the bad state, nothing in the good one
        return ["loss", "gemodel", f"{100 * enter:.6f}%", f"{100 * leave:.6f}%", "100%", "0%"]
    return ["loss", "random", f"{profile.loss_pct:g}%"]
