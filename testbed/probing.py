"""How to measure a link of a given profile: how many probes, how far apart, how long a train. Pure."""

from __future__ import annotations

from typing import Any

from dsdlab.probe import MAX_PROBES, TRAIN_BYTES
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.calibration import PROBE_WIRE_BYTES

__all__ = ["probe_plan"]

FEW, MANY = 40, 100  # probes on a link without loss, and with
GAP_S = 0.004
LOSSY_GAP_S = 0.002
PROBING_S = 1.0
TRAIN_S = 0.15  # a train takes about so long …
TRAIN_PACKETS = (8, 200)  # … within these bounds
TRAIN_WIRE_BYTES = TRAIN_BYTES + 42


def probe_plan(profile: LinkProfile, n: int | None = None) -> dict[str, Any]:
    """Arguments of `dsdlab.probe.measure` that suit a link.

    n: probes; by default few, since a cell's losses are judged over all of its measurements together. Probes
    leave the bottleneck idle for twice the time that they take it, so that they do not queue; and where the
    delay varies they are so far apart that no late one holds up the next, as packets keep their order.
    """
    rates = [rate for rate in (profile.rate_up_mbit, profile.rate_down_mbit) if rate is not None]
    gap_s = LOSSY_GAP_S if profile.loss_pct else GAP_S
    spread_ms = 2.0 * profile.jitter_ms * max(profile.fraction("up"), profile.fraction("down"))
    gap_s = max(gap_s, spread_ms / 1e3)
    if rates:
        gap_s = max(gap_s, 3 * PROBE_WIRE_BYTES * 8 / (min(rates) * 1e6))
    if n is None:
        n = max(FEW // 2, min(MANY if profile.loss_pct else FEW, int(PROBING_S / gap_s)))
    trains = {
        way: _train(rate) for way, rate in (("up", profile.rate_up_mbit), ("down", profile.rate_down_mbit))
    }
    slowest_s = max(
        (packets * TRAIN_WIRE_BYTES * 8 / (rate * 1e6) for packets, rate in trains.values()), default=0.0
    )
    return {
        "n": min(n, MAX_PROBES),
        "gap_s": gap_s,
        "rtt_s": (profile.rtt_ms + profile.jitter_ms) / 1e3,
        "train_up": trains["up"][0],
        "train_down": trains["down"][0],
        "train_s": slowest_s,
        "late_s": 1.5 * profile.rtt_ms / 1e3 if profile.reorder_pct else 0.0,
    }


def _train(rate_mbit: float | None) -> tuple[int, float]:
    """(packets, rate in Mbit/s) of a train; none where the rate is unlimited."""
    if rate_mbit is None:
        return 0, 1.0
    least, most = TRAIN_PACKETS
    return max(least, min(most, int(rate_mbit * 1e6 * TRAIN_S / 8 / TRAIN_WIRE_BYTES))), rate_mbit
