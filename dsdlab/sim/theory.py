"""Closed forms of speculative decoding over a link, as pure functions of numbers or numpy arrays.

Every argument may be a scalar or an array; arguments broadcast against each other. Times are in
seconds, rates in Mbit/s (None or infinity: unlimited), sizes in bytes. A drafted token is accepted
independently with probability `alpha`; a window is `gamma` drafted tokens and ends in one correction
or bonus token.

Sources: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding"
(ICML 2023), eq. 1 for E(γ) and theorem 3.8 for the single-node time; the round trip and the transfer
terms are this project's own (one Draft up and one Verdict down per window, both wholly exposed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Real = float | int | npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
Array = npt.NDArray[np.float64]


def checked(name: str, value: Real, low: float, high: float = np.inf) -> Array:
    """`value` as an array. Raises ValueError, naming it, unless all of it lies in [low, high]."""
    array = np.asarray(value, dtype=np.float64)
    if not bool(np.all((array >= low) & (array <= high))):  # NaN fails too
        allowed = f"{low:g} or more" if high == np.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
    return array


def expected_tokens(alpha: Real, gamma: Real) -> Array:
    """E(γ) = (1 − α^(γ+1))/(1 − α): tokens committed per verification, the bonus token included.

    alpha in [0, 1], gamma ≥ 0; at α = 1 it is γ + 1. Source: Leviathan et al., eq. 1.
    """
    a = checked("alpha", alpha, 0.0, 1.0)
    n = checked("gamma", gamma, 0.0) + 1.0
    # expm1/log1p keep the quotient right as α → 1, where both 1 − α^n and 1 − α vanish
    gap = 1.0 - a
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = -np.expm1(n * np.log1p(-gap)) / gap
    return np.asarray(np.where(gap == 0.0, n, ratio), dtype=np.float64)


def transfer_s(n_bytes: Real, rate_mbit: Real | None) -> Array:
    """Serialisation time of `n_bytes` at `rate_mbit`, s; 0 where the rate is unlimited."""
    size = checked("n_bytes", n_bytes, 0.0)
    if rate_mbit is None:
        return np.zeros_like(size)
    rate = np.asarray(rate_mbit, dtype=np.float64)
    if not bool(np.all(rate > 0.0)):
        raise ValueError(f"rate_mbit is {rate_mbit}; allowed: above 0, or None for unlimited")
    return size * 8.0 / (rate * 1e6)


def cloud_ar_tpot_s(t_v1_s: Real, *, bytes_down: Real = 0.0, rate_down_mbit: Real | None = None) -> Array:
    """TPOT of the target decoding alone and streaming, s per token.

    t_v1_s: target forward of one row. A stream hides the delay of the link, not its rate: with
    `bytes_down` per token the slower of target and link sets the pace.
    """
    return np.maximum(checked("t_v1_s", t_v1_s, 0.0), transfer_s(bytes_down, rate_down_mbit))


def cloud_sd_tpot_s(
    alpha: Real,
    gamma: Real,
    t_d_s: Real,
    t_v_s: Real,
    *,
    bytes_down: Real = 0.0,
    rate_down_mbit: Real | None = None,
) -> Array:
    """TPOT of speculative decoding inside one node that streams, s per token.

    t_d_s: one drafted token; t_v_s: t_v(γ), the target's forward over the window; bytes_down: per
    window. Source: Leviathan et al., theorem 3.8, with t_v(γ) measured instead of constant.
    """
    window_s = checked("gamma", gamma, 0.0) * checked("t_d_s", t_d_s, 0.0) + checked("t_v_s", t_v_s, 0.0)
    return np.maximum(window_s, transfer_s(bytes_down, rate_down_mbit)) / expected_tokens(alpha, gamma)


def edge_sd_tpot_s(alpha: Real, gamma: Real, t_d_s: Real, t_v_s: Real) -> Array:
    """TPOT of speculative decoding on the edge node, at that node's own t_d and t_v(γ), s per token."""
    return cloud_sd_tpot_s(alpha, gamma, t_d_s, t_v_s)


def sync_tpot_s(
    alpha: Real,
    gamma: Real,
    t_d_s: Real,
    t_v_s: Real,
    rtt_s: Real,
    *,
    bytes_up: Real = 0.0,
    bytes_down: Real = 0.0,
    rate_up_mbit: Real | None = None,
    rate_down_mbit: Real | None = None,
) -> Array:
    """TPOT of `dsd-sync`: [γ t_d + RTT + B_up/R_up + B_dn/R_dn + t_v(γ)]/E(γ), s per token.

    t_d_s: one drafted token at the edge; t_v_s: t_v(γ); bytes_up, bytes_down: per window.
    """
    window_s = (
        checked("gamma", gamma, 0.0) * checked("t_d_s", t_d_s, 0.0)
        + checked("rtt_s", rtt_s, 0.0)
        + transfer_s(bytes_up, rate_up_mbit)
        + transfer_s(bytes_down, rate_down_mbit)
        + checked("t_v_s", t_v_s, 0.0)
    )
    return np.asarray(window_s / expected_tokens(alpha, gamma), dtype=np.float64)


def break_even_rtt_s(
    alpha: Real,
    gamma: Real,
    t_d_s: Real,
    t_v_s: Real,
    baseline_tpot_s: Real,
    *,
    bytes_up: Real = 0.0,
    bytes_down: Real = 0.0,
    rate_up_mbit: Real | None = None,
    rate_down_mbit: Real | None = None,
) -> Array:
    """RTT at which `dsd-sync` is exactly as fast as a baseline that does not depend on RTT, s.

    RTT* = E(γ)·TPOT_baseline − γ t_d − t_v(γ) − transfer; against `cloud-ar` the baseline is t_v(1).
    Negative: `dsd-sync` loses even without a network.
    """
    at_zero_s = sync_tpot_s(
        alpha,
        gamma,
        t_d_s,
        t_v_s,
        0.0,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        rate_up_mbit=rate_up_mbit,
        rate_down_mbit=rate_down_mbit,
    )
    saved_s = checked("baseline_tpot_s", baseline_tpot_s, 0.0) - at_zero_s  # per token
    return np.asarray(saved_s * expected_tokens(alpha, gamma), dtype=np.float64)


def break_even_cloud_sd_rtt_s(
    gamma: Real,
    t_d_s: Real,
    cloud_t_d_s: Real,
    *,
    bytes_up: Real = 0.0,
    bytes_down: Real = 0.0,
    rate_up_mbit: Real | None = None,
    rate_down_mbit: Real | None = None,
) -> Array:
    """RTT at which `dsd-sync` is as fast as `cloud-sd` with the same target, window and acceptance, s.

    RTT* = γ (t_d_cloud − t_d_edge) − transfer, whatever α is. Negative, so never, where the edge drafts no
    faster than the cloud; against another window or acceptance give `cloud_sd_tpot_s` to `break_even_rtt_s`.
    """
    saved_s = checked("cloud_t_d_s", cloud_t_d_s, 0.0) - checked("t_d_s", t_d_s, 0.0)
    up_s, down_s = transfer_s(bytes_up, rate_up_mbit), transfer_s(bytes_down, rate_down_mbit)
    return np.asarray(checked("gamma", gamma, 0.0) * saved_s - up_s - down_s, dtype=np.float64)


def break_even_edge_sd_rtt_s(
    t_v_s: Real,
    edge_t_v_s: Real,
    *,
    bytes_up: Real = 0.0,
    bytes_down: Real = 0.0,
    rate_up_mbit: Real | None = None,
    rate_down_mbit: Real | None = None,
) -> Array:
    """RTT at which `dsd-sync` is as fast as `edge-sd` with the same drafter, window and acceptance, s.

    RTT* = t_v_edge(γ) − t_v_cloud(γ) − transfer: what the cloud's target is faster may be spent on the way to
    it, whatever α and the drafter are.
    """
    saved_s = checked("edge_t_v_s", edge_t_v_s, 0.0) - checked("t_v_s", t_v_s, 0.0)
    up_s, down_s = transfer_s(bytes_up, rate_up_mbit), transfer_s(bytes_down, rate_down_mbit)
    return np.asarray(saved_s - up_s - down_s, dtype=np.float64)


def best_gamma(
    alpha: Real,
    t_d_s: Real,
    t_v_s: Callable[[int], float],
    rtt_s: Real,
    gammas: Sequence[int] = tuple(range(1, 17)),
) -> npt.NDArray[np.int64]:
    """γ*: the window with the smallest `dsd-sync` TPOT among `gammas`; the smaller one on a tie.

    t_v_s: the measured line γ ↦ t_v(γ), s. alpha, t_d_s and rtt_s broadcast; the answer has their shape.
    """
    if not gammas:
        raise ValueError("gammas is empty; allowed: at least one window")
    order = sorted(gammas)
    a, d, r = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (alpha, t_d_s, rtt_s)))
    tpot = np.stack([sync_tpot_s(a, g, d, t_v_s(g), r) for g in order])  # [gammas, ...]
    return np.asarray(np.take(order, np.argmin(tpot, axis=0)), dtype=np.int64)


def continuous_gamma(alpha: Real, per_token_s: Real, fixed_s: Real) -> Array:
    """γ* as a real number, for a window that takes fixed_s + γ · per_token_s in all.

    per_token_s: t_d and the slope of t_v(γ); fixed_s: RTT, transfer and t_v(0); for `cloud-sd` without the
    first two. Setting the derivative of the time per token to zero gives, with L = −ln α, z = L (γ + 1) and
    k = 1 + L (fixed_s/per_token_s − 1), z = ln(k + z); its root is −k − W₋₁(−e^(−k)), W being Lambert's
    function (Corless et al., "On the Lambert W function", 1996). Time per token falls before it and rises
    after it, so that the best whole window is one of its two neighbours. 0 where drafting does not pay at
    all; infinity at α = 1.
    """
    a = checked("alpha", alpha, 0.0, 1.0)
    ratio = checked("fixed_s", fixed_s, 0.0) / _positive("per_token_s", per_token_s)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = -np.log(a)  # L
        k = 1.0 + slope * (ratio - 1.0)
        z = 2.0 * np.log(np.maximum(k, 1.0)) + 2.0  # right of the root, where Newton's steps fall towards it
        for _ in range(64):  # at k = 1 two roots meet and each step halves the rest
            z = z - (z - np.log(k + z)) * (k + z) / (k + z - 1.0)
        out = z / slope - 1.0
    out = np.where((ratio <= 1.0) | (a == 0.0), 0.0, np.where(a == 1.0, np.inf, out))
    return np.asarray(np.maximum(out, 0.0), dtype=np.float64)


def gamma_switch_rtt_s(alpha: Real, gamma: int, t_d_s: Real, t_v_s: Callable[[int], float]) -> Array:
    """RTT from which the window γ + 1 is worth more than γ under `dsd-sync`, s; negative: from the start.

    γ* as a function of RTT is a staircase; with a straight t_v(γ) these are its edges, in rising order.
    Solves [c(γ+1) + RTT]/E(γ+1) = [c(γ) + RTT]/E(γ), where c is drafting and verifying; E(γ+1) − E(γ) =
    α^(γ+1).
    """
    e0, e1 = expected_tokens(alpha, gamma), expected_tokens(alpha, gamma + 1)
    d = checked("t_d_s", t_d_s, 0.0)
    c0, c1 = gamma * d + t_v_s(gamma), (gamma + 1) * d + t_v_s(gamma + 1)
    with np.errstate(divide="ignore"):
        return np.asarray((e0 * c1 - e1 * c0) / checked("alpha", alpha, 0.0, 1.0) ** (gamma + 1))


def best_break_even_rtt_s(
    alpha: float,
    t_d_s: float,
    t_v_s: Callable[[int], float],
    baseline_tpot_s: float,
    gammas: Sequence[int] = tuple(range(1, 17)),
) -> tuple[float, int]:
    """(RTT* in s, γ) of `dsd-sync` at its best window against a baseline that does not depend on RTT.

    At each RTT the best window's TPOT is the least of straight lines that rise with RTT; the least meets the
    baseline where the last of them does.
    """
    if not gammas:
        raise ValueError("gammas is empty; allowed: at least one window")
    return max((float(break_even_rtt_s(alpha, g, t_d_s, t_v_s(g), baseline_tpot_s)), g) for g in gammas)


def _positive(name: str, value: Real) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not bool(np.all(array > 0.0)):
        raise ValueError(f"{name} is {value}; allowed: above 0")
    return array


def capacity_ratio(gamma: Real, t_d_s: Real, t_v_s: Real) -> Array:
    """Sessions one target serves with drafters at the edge, over the same with the drafter beside it.

    1 + γ t_d/t_v(γ): a fused drafter occupies the target's node while it drafts; an edge drafter does not.
    """
    drafting_s = checked("gamma", gamma, 0.0) * checked("t_d_s", t_d_s, 0.0)
    return np.asarray(1.0 + drafting_s / _positive("t_v_s", t_v_s), dtype=np.float64)
