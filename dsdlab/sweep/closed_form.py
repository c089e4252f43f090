"""Inputs of the closed forms, measured from a sweep's own generations, and the curves they give.

The inputs come from the very runs the curve is drawn beside: the comparison tests the arithmetic of
the model (does TPOT follow from costs, acceptance and round trip?), it is not a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.sim import theory
from dsdlab.sim.profile import HEADER_BYTES
from dsdlab.sim.theory_stream import best_stream_tpot_s, stream_tpot_s
from dsdlab.sweep.keys import Condition, Variant, condition_of, variant_of
from dsdlab.sweep.rows import Row

T = TypeVar("T")

LOOP_FRAMES = ("draft", "verdict", "commit")  # the frames of the steady state
LONGEST_RTT_S = 10.0  # up to which a break-even is looked for
HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the closed form of one variant needs, measured at one temperature.

    t_draft_s: per drafted token; t_verify_s: per window, t_v(γ), or t_v(1) for `cloud-ar`; both are
    medians over generations of each generation's mean, the first window (it holds the prompt) left
    out. t_v0_s, t_row_s: where drafts stream, the line t_v(k) = t_v0 + k t_row through all of its steps.
    alpha: accepted/tested over all windows. bytes_up, bytes_down: payload per window; headers come on top
    where it is sent. NaN: not measurable.
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
    t_v0_s: float = float("nan")
    t_row_s: float = float("nan")

    def expected_tau(self) -> float:
        """E(γ) at the measured α; NaN where there is no window of one length."""
        gamma = self.variant.gamma
        if self.variant.mode in STREAMING_MODES:
            return float("nan")
        if gamma == 0:
            return 1.0
        return float("nan") if np.isnan(self.alpha) else float(theory.expected_tokens(self.alpha, gamma))

    def tpot_ms(self, rtt_ms: Sequence[float], rate_mbit: float | None) -> list[float] | None:
        """The closed form at each RTT, ms per token (no loss term); None for a mode that has none here."""
        if self.variant.mode in STREAMING_MODES:
            return self._streaming_tpot_ms(rtt_ms)
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

    def _streaming_tpot_ms(self, rtt_ms: Sequence[float]) -> list[float] | None:
        """The same where drafts stream: frames are small and under way together, a rate is not in it.

        `dsd-adaptive` is the best of what its controller may choose from, as if that cost nothing to find.
        """
        v = self.variant
        costs = (self.alpha, self.t_draft_s, self.t_v0_s, self.t_row_s)
        if np.isnan(costs).any():
            return None
        if v.mode == "dsd-adaptive":
            beside, t_beside_s = v.beside, self.t_draft_s
            return [1e3 * best_stream_tpot_s(*costs, x / 1e3, beside, t_beside_s) for x in rtt_ms]
        frame = v.gamma if v.mode == "dsd-pipelined" else 1
        return [
            1e3
            * stream_tpot_s(
                *costs,
                x / 1e3,
                hold_s=0.0 if v.free_run else float("inf"),
                first=frame,
                frame=frame,
                run_ahead=v.run_ahead,
                beside=v.beside,
                t_beside_s=self.t_draft_s,  # most often both drafters are one model
            )
            for x in rtt_ms
        ]

    def break_even_ms(self, baseline_tpot_ms: float, rate_mbit: float | None) -> float | None:
        """Solved RTT at which the mode meets a baseline, ms (negative: never; infinite: beyond 10 s).

        None for modes that do not depend on the RTT.
        """
        if self.variant.mode in STREAMING_MODES:
            return self._streaming_break_even_ms(baseline_tpot_ms)
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

    def _streaming_break_even_ms(self, baseline_tpot_ms: float) -> float | None:
        """By halving: more RTT never helps."""
        low, high = 0.0, 1e3 * LONGEST_RTT_S
        ends = self._streaming_tpot_ms([low, high])
        if ends is None:
            return None
        if ends[0] >= baseline_tpot_ms:
            return -1.0
        if ends[1] < baseline_tpot_ms:
            return float("inf")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self._streaming_tpot_ms([middle])
            low, high = (middle, high) if found and found[0] < baseline_tpot_ms else (low, middle)
        return low


def after_first(per_window: Sequence[T], windows: int) -> Sequence[T]:
    """The times of all windows but the first, also where the prompt has an entry of its own in front."""
    return per_window[max(len(per_window) - (windows - 1), 0) :] if windows > 1 else per_window


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.median(known)) if known else float("nan")


def _draft_s(row: Row) -> float:
    if row.mode in STREAMING_MODES:  # drafting calls and the target's steps are each a list of their own
        return sum(row.t_draft_s) / row.drafted if row.drafted and row.t_draft_s else float("nan")
    drafted = [drafted for drafted, _ in after_first(row.windows, len(row.windows))]
    times = after_first(row.t_draft_s, len(row.windows))
    return sum(times) / sum(drafted) if sum(drafted) and times else float("nan")


def _verify_s(row: Row) -> float:
    times = after_first(row.t_verify_s, len(row.windows))
    return sum(times) / len(times) if times else float("nan")


def _verify_line(rows: Iterable[Row]) -> tuple[float, float]:
    """(t_v0, t_row) of t_v(k) = t_v0 + k t_row through all steps but the prompts', s; least squares, no fall.

    One length of window alone has no slope; NaN without any step.
    """
    drafted: list[int] = []
    times: list[float] = []
    for row in rows:
        own = after_first(row.t_verify_s, len(row.windows))
        lengths = [n for n, _ in after_first(row.windows, len(row.windows))]
        if len(own) == len(lengths):
            drafted += lengths
            times += own
    if not times:
        return float("nan"), float("nan")
    x, y = np.asarray(drafted, dtype=np.float64), np.asarray(times)
    off = x - x.mean()
    spread = float(off @ off)
    slope = max(float(off @ y) / spread, 0.0) if spread else 0.0
    return max(float(y.mean() - slope * x.mean()), 0.0), slope


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
        streams = variant.mode in STREAMING_MODES
        t_v0_s, t_row_s = _verify_line(members) if streams else (float("nan"), float("nan"))
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
                t_v0_s=t_v0_s,
                t_row_s=t_row_s,
            )
        )
    return inputs


def plain_conditions(rows: Sequence[Row]) -> set[Condition]:
    """Conditions that the closed form speaks of: one edge, one link throughout, one rate both ways."""
    plain = {condition_of(row) for row in rows}
    for row in rows:
        rates = {row.link_asked.get(f"rate_{way}_mbit", row.rate_mbit) for way in ("up", "down")}
        if row.edges != 1 or row.link_steps or rates != {row.rate_mbit}:
            plain.discard(condition_of(row))
    return plain
