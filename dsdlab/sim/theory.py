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


def _checked(name: str, value: Real, low: float, high: float = np.inf) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not bool(np.all((array >= low) & (array <= high))):  # NaN fails too
        allowed = f"{low:g} or more" if high == np.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
    return array


def expected_tokens(alpha: Real, gamma: Real) -> Array:
    """E(γ) = (1 − α^(γ+1))/(1 − α): tokens committed per verification, the bonus token included.

    alpha in [0, 1], gamma ≥ 0; at α = 1 it is γ + 1. Source: Leviathan et al., eq. 1.
    """
    a = _checked("alpha", alpha, 0.0, 1.0)
    n = _checked("gamma", gamma, 0.0) + 1.0
    # expm1/log1p keep the quotient right as α → 1, where both 1 − α^n and 1 − α vanish
    gap = 1.0 - a
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = -np.expm1(n * np.log1p(-gap)) / gap
    return np.asarray(np.where(gap == 0.0, n, ratio), dtype=np.float64)


def transfer_s(n_bytes: Real, rate_mbit: Real | None) -> Array:
    """Serialisation time of `n_bytes` at `rate_mbit`, s; 0 where the rate is unlimited."""
    size = _checked("n_bytes", n_bytes, 0.0)
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
    return np.maximum(_checked("t_v1_s", t_v1_s, 0.0), transfer_s(bytes_down, rate_down_mbit))


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
    window_s = _checked("gamma", gamma, 0.0) * _checked("t_d_s", t_d_s, 0.0) + _checked("t_v_s", t_v_s, 0.0)
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
        _checked("gamma", gamma, 0.0) * _checked("t_d_s", t_d_s, 0.0)
        + _checked("rtt_s", rtt_s, 0.0)
        + transfer_s(bytes_up, rate_up_mbit)
        + transfer_s(bytes_down, rate_down_mbit)
        + _checked("t_v_s", t_v_s, 0.0)
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
    saved_s = _checked("baseline_tpot_s", baseline_tpot_s, 0.0) - at_zero_s  # per token
    return np.asarray(saved_s * expected_tokens(alpha, gamma), dtype=np.float64)


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


def capacity_ratio(gamma: Real, t_d_s: Real, t_v_s: Real) -> Array:
    """Sessions one target serves with drafters at the edge, over the same with the drafter beside it.

    1 + γ t_d/t_v(γ): a fused drafter occupies the target's node while it drafts; an edge drafter does not.
    """
    drafting_s = _checked("gamma", gamma, 0.0) * _checked("t_d_s", t_d_s, 0.0)
    t_v = np.asarray(t_v_s, dtype=np.float64)
    if not bool(np.all(t_v > 0.0)):
        raise ValueError(f"t_v_s is {t_v_s}; allowed: above 0")
    return np.asarray(1.0 + drafting_s / t_v, dtype=np.float64)
