"""Inputs of the closed forms, measured from a sweep's own generations, and the curves they give.

The inputs come from the very runs the curve is drawn beside: the comparison tests the arithmetic of
the model (does TPOT follow from costs, acceptance and round trip?), it is not a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dsdlab.sim import theory
from dsdlab.sim.profile import HEADER_BYTES
from dsdlab.sweep.keys import Condition, Variant, condition_of, variant_of
from dsdlab.sweep.rows import Row

T = TypeVar("T")

LOOP_FRAMES = ("draft", "verdict", "commit")  # the frames of the steady state


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the closed form of one variant needs, measured at one temperature.

    t_draft_s: per drafted token; t_verify_s: per window, t_v(γ), or t_v(1) for `cloud-ar`; both are
    medians over generations of each generation's mean, the first window (it holds the prompt) left
    out. alpha: accepted/tested over all windows. bytes_up, bytes_down: payload per window; headers come
    on top where it is sent. NaN: not measurable.
    """

    variant: Variant
    temperature: float
    alpha: float
    tau: float  # measured, to hold against E(γ)
    t_draft_s: float
    t_verify_s: float
    bytes_up: float
    bytes_down: float
    generations: int

    def expected_tau(self) -> float:
        """E(γ) at the measured α; NaN where there is no window."""
        gamma = self.variant.gamma
        if gamma == 0:
            return 1.0
        return float("nan") if np.isnan(self.alpha) else float(theory.expected_tokens(self.alpha, gamma))

    def tpot_ms(self, rtt_ms: Sequence[float], rate_mbit: float | None) -> list[float] | None:
        """The closed form at each RTT, ms per token (no loss term); None for a mode that has none here."""
        x = np.asarray(rtt_ms, dtype=np.float64) / 1e3
        mode, gamma, alpha, t_d, t_v = (
            self.variant.mode,
            self.variant.gamma,
            self.alpha,
            self.t_draft_s,
            self.t_verify_s,
        )
        down, rate = _on_the_wire(self.bytes_down, masked=False), rate_mbit
        if np.isnan(t_v) or (gamma and (np.isnan(alpha) or np.isnan(t_d))):
            return None
        if mode == "cloud-ar":
            y = np.broadcast_to(theory.cloud_ar_tpot_s(t_v, bytes_down=down, rate_down_mbit=rate), x.shape)
        elif mode == "cloud-sd":
            flat = theory.cloud_sd_tpot_s(alpha, gamma, t_d, t_v, bytes_down=down, rate_down_mbit=rate)
            y = np.broadcast_to(flat, x.shape)
        elif mode == "edge-sd":
            y = np.broadcast_to(theory.edge_sd_tpot_s(alpha, gamma, t_d, t_v), x.shape)
        elif mode == "dsd-sync":
            y = theory.sync_tpot_s(
                alpha,
                gamma,
                t_d,
                t_v,
                x,
                bytes_up=_on_the_wire(self.bytes_up, masked=True),
                bytes_down=down,
                rate_up_mbit=rate,
                rate_down_mbit=rate,
            )
        else:
            return None
        return [float(v) * 1e3 for v in y]

    def break_even_ms(self, baseline_tpot_ms: float, rate_mbit: float | None) -> float | None:
        """Solved RTT at which `dsd-sync` meets a baseline, ms (negative: never); None for other modes."""
        if self.variant.mode != "dsd-sync" or np.isnan([self.alpha, self.t_draft_s, self.t_verify_s]).any():
            return None
        return 1e3 * float(
            theory.break_even_rtt_s(
                self.alpha,
                self.variant.gamma,
                self.t_draft_s,
                self.t_verify_s,
                baseline_tpot_ms / 1e3,
                bytes_up=_on_the_wire(self.bytes_up, masked=True),
                bytes_down=_on_the_wire(self.bytes_down, masked=False),
                rate_up_mbit=rate_mbit,
                rate_down_mbit=rate_mbit,
            )
        )


def after_first(per_window: Sequence[T], windows: int) -> Sequence[T]:
    """The times of all windows but the first, also where the prompt has an entry of its own in front."""
    return per_window[max(len(per_window) - (windows - 1), 0) :] if windows > 1 else per_window


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.median(known)) if known else float("nan")


def _draft_s(row: Row) -> float:
    drafted = [drafted for drafted, _ in after_first(row.windows, len(row.windows))]
    times = after_first(row.t_draft_s, len(row.windows))
    return sum(times) / sum(drafted) if sum(drafted) and times else float("nan")


def _verify_s(row: Row) -> float:
    times = after_first(row.t_verify_s, len(row.windows))
    return sum(times) / len(times) if times else float("nan")


def _on_the_wire(payload: float, *, masked: bool) -> float:
    """Bytes of one frame with its WebSocket and TCP/IP headers; none where nothing is sent."""
    return payload + 2 + (4 if masked else 0) + HEADER_BYTES if payload else 0.0


def _loop_bytes(rows: Sequence[Row], up: bool) -> float:
    windows = sum(len(row.windows) for row in rows)
    frames = [(row.bytes_up if up else row.bytes_down).items() for row in rows]
    total = sum(n for items in frames for name, n in items if name.lower() in LOOP_FRAMES)
    return total / windows if windows else 0.0


def closed_form_inputs(rows: Sequence[Row]) -> list[Inputs]:
    """Measure t_d, t_v(γ), t_v(1), α and bytes from good generations, per variant and temperature."""
    groups: dict[tuple[Variant, float], list[Row]] = {}
    for row in rows:
        if row.usable and row.windows:
            groups.setdefault((variant_of(row), row.temperature), []).append(row)
    inputs = []
    for (variant, temperature), members in sorted(groups.items(), key=lambda g: (g[0][0].order, g[0][1])):
        windows = [window for row in members for window in row.windows]
        accepted = sum(a for _, a in windows)
        tested = sum(a + (a < d) for d, a in windows)
        weights = [len(row.windows) for row in members if row.tau is not None]
        taus = [row.tau * len(row.windows) for row in members if row.tau is not None]
        inputs.append(
            Inputs(
                variant=variant,
                temperature=temperature,
                alpha=accepted / tested if tested else float("nan"),
                tau=sum(taus) / sum(weights) if weights else float("nan"),
                t_draft_s=_median(_draft_s(row) for row in members),
                t_verify_s=_median(_verify_s(row) for row in members),
                bytes_up=_loop_bytes(members, up=True),
                bytes_down=_loop_bytes(members, up=False),
                generations=len(members),
            )
        )
    return inputs


def plain_conditions(rows: Sequence[Row]) -> set[Condition]:
    """Conditions that the closed form speaks of: one link throughout, one rate for both directions."""
    plain = {condition_of(row) for row in rows}
    for row in rows:
        rates = {row.link_asked.get(f"rate_{way}_mbit", row.rate_mbit) for way in ("up", "down")}
        if row.link_steps or rates != {row.rate_mbit}:
            plain.discard(condition_of(row))
    return plain
