"""The closed forms against their definitions, each other and a Monte-Carlo run."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim import theory

alphas = st.floats(0.0, 1.0)
gammas = st.integers(0, 32)
times = st.floats(1e-4, 1.0)


@given(alphas, gammas)
def test_expected_tokens_is_the_geometric_sum(alpha: float, gamma: int) -> None:
    by_definition = sum(alpha**i for i in range(gamma + 1))
    assert theory.expected_tokens(alpha, gamma) == pytest.approx(by_definition, rel=1e-9)


def test_expected_tokens_near_and_at_one() -> None:
    assert theory.expected_tokens(1.0, 7) == 8.0
    assert theory.expected_tokens(1.0 - 1e-13, 7) == pytest.approx(8.0, rel=1e-9)
    assert theory.expected_tokens(0.0, 7) == 1.0


def test_expected_tokens_against_monte_carlo() -> None:
    rng = np.random.default_rng(5)
    alpha, gamma, rounds = 0.7, 5, 200_000
    accepted = np.cumprod(rng.random((rounds, gamma)) < alpha, axis=1).sum(axis=1)
    committed = accepted + 1
    error = committed.std() / np.sqrt(rounds)
    assert abs(committed.mean() - theory.expected_tokens(alpha, gamma)) < 4 * error


def test_sync_tpot_against_a_walk_through_time() -> None:
    """A long synchronous session played window by window costs what the formula says."""
    rng = np.random.default_rng(6)
    alpha, gamma, t_d, t_v, rtt = 0.6, 4, 0.004, 0.06, 0.05
    up, down, rate = 30, 20, 0.1  # 0.1 Mbit/s: the bytes matter
    now, tokens = 0.0, 0
    for _ in range(50_000):
        now += gamma * t_d + rtt / 2 + up * 8 / (rate * 1e6) + t_v + down * 8 / (rate * 1e6) + rtt / 2
        rejected = np.flatnonzero(rng.random(gamma) >= alpha)
        tokens += (int(rejected[0]) if rejected.size else gamma) + 1
    expected = theory.sync_tpot_s(
        alpha, gamma, t_d, t_v, rtt, bytes_up=up, bytes_down=down, rate_up_mbit=rate, rate_down_mbit=rate
    )
    assert now / tokens == pytest.approx(float(expected), rel=0.01)


def test_the_design_table() -> None:
    """t_d = 5 ms, t_v(γ) = 50 + γ ms, α = 0.8: the design's worked example, best γ at each RTT."""
    rtt_s = np.array([0, 20, 50, 100, 150, 200, 300]) / 1e3
    gamma = theory.best_gamma(0.8, 0.005, lambda g: 0.05 + 0.001 * g, rtt_s)
    tpot_ms = 1e3 * theory.sync_tpot_s(0.8, gamma, 0.005, 0.05 + 0.001 * gamma, rtt_s)
    assert tpot_ms == pytest.approx([21.7, 26.8, 34.1, 45.7, 56.9, 67.8, 89.3], abs=0.06)
    assert list(gamma) == sorted(gamma)  # a longer wait is worth a longer window


@given(alphas, st.integers(1, 16), times, times, times, st.floats(0.0, 1e4), st.floats(0.01, 1e3))
def test_break_even_is_where_the_two_meet(
    alpha: float, gamma: int, t_d: float, t_v: float, baseline: float, size: float, rate: float
) -> None:
    wire = {"bytes_up": size, "rate_up_mbit": rate, "bytes_down": size / 2, "rate_down_mbit": rate * 3}
    rtt = float(theory.break_even_rtt_s(alpha, gamma, t_d, t_v, baseline, **wire))
    if rtt >= 0:
        assert theory.sync_tpot_s(alpha, gamma, t_d, t_v, rtt, **wire) == pytest.approx(baseline, rel=1e-6)
    else:
        assert theory.sync_tpot_s(alpha, gamma, t_d, t_v, 0.0, **wire) > baseline


@given(alphas, st.integers(1, 16), times, times, times, st.floats(0.0, 1e4), st.floats(0.01, 1e3))
def test_break_even_against_the_speculating_baselines(
    alpha: float, gamma: int, t_d: float, cloud_t_d: float, t_v: float, size: float, rate: float
) -> None:
    """The short forms are the general one with that baseline's TPOT, whatever the acceptance."""
    wire = {"bytes_up": size, "rate_up_mbit": rate, "bytes_down": size / 2, "rate_down_mbit": rate * 3}
    fused = theory.cloud_sd_tpot_s(alpha, gamma, cloud_t_d, t_v)
    assert theory.break_even_cloud_sd_rtt_s(gamma, t_d, cloud_t_d, **wire) == pytest.approx(
        float(theory.break_even_rtt_s(alpha, gamma, t_d, t_v, fused, **wire)), rel=1e-6, abs=1e-9
    )
    edge_t_v = 3.0 * t_v
    local = theory.edge_sd_tpot_s(alpha, gamma, t_d, edge_t_v)
    assert theory.break_even_edge_sd_rtt_s(t_v, edge_t_v, **wire) == pytest.approx(
        float(theory.break_even_rtt_s(alpha, gamma, t_d, t_v, local, **wire)), rel=1e-6, abs=1e-9
    )


@given(alphas, times, times, st.floats(0.0, 0.1), times)
def test_best_break_even_is_where_the_best_window_meets(
    alpha: float, t_d: float, base: float, slope: float, baseline: float
) -> None:
    def t_v(gamma: int) -> float:
        return base + slope * gamma

    rtt, gamma = theory.best_break_even_rtt_s(alpha, t_d, t_v, baseline)

    def best_tpot(at_s: float) -> float:
        best = int(theory.best_gamma(alpha, t_d, t_v, at_s))
        return float(theory.sync_tpot_s(alpha, best, t_d, t_v(best), at_s))

    if rtt >= 0.0:
        assert best_tpot(rtt) == pytest.approx(baseline, rel=1e-6)
        assert theory.sync_tpot_s(alpha, gamma, t_d, t_v(gamma), rtt) == pytest.approx(baseline, rel=1e-6)
        assert best_tpot(rtt + 0.01) > baseline
    else:
        assert best_tpot(0.0) > baseline


@given(st.floats(0.0, 0.999), times, st.floats(0.0, 10.0))
def test_continuous_gamma_lies_beside_the_best_window(alpha: float, per_token: float, fixed: float) -> None:
    here = float(theory.continuous_gamma(alpha, per_token, fixed))
    candidates = range(max(1, int(here) - 3), int(here) + 5)
    cost = {g: (fixed + g * per_token) / float(theory.expected_tokens(alpha, g)) for g in (0, *candidates)}
    near = min(cost[g] for g in (int(here), int(here) + 1) if g in cost)
    assert near <= min(cost.values()) * (1 + 1e-9)


def test_continuous_gamma_is_lamberts() -> None:
    from scipy.special import lambertw

    alpha, ratio = np.array([[0.3], [0.8], [0.99]]), np.array([2.0, 10.0, 100.0])
    slope = -np.log(alpha)
    k = 1.0 + slope * (ratio - 1.0)
    by_lambert = (-k - lambertw(-np.exp(-k), -1).real) / slope - 1.0
    got = theory.continuous_gamma(alpha, 0.01, 0.01 * ratio)
    assert got == pytest.approx(np.maximum(by_lambert, 0.0), rel=1e-9)
    assert theory.continuous_gamma(0.0, 0.01, 1.0) == 0.0
    assert theory.continuous_gamma(1.0, 0.01, 1.0) == np.inf
    assert theory.continuous_gamma(0.9, 0.01, 0.005) == 0.0


@given(st.floats(0.05, 0.95), times, times, st.floats(0.0, 0.05))
def test_the_staircase_of_best_windows(alpha: float, t_d: float, base: float, slope: float) -> None:
    def t_v(gamma: int) -> float:
        return base + slope * gamma

    edges = [float(theory.gamma_switch_rtt_s(alpha, g, t_d, t_v)) for g in range(1, 16)]
    assert all(a <= b * (1 + 1e-9) + 1e-9 for a, b in pairwise(edges))
    for gamma, edge in enumerate(edges[:8], 1):
        if 1e-3 < edge < 100.0:
            assert theory.best_gamma(alpha, t_d, t_v, edge * (1 - 1e-6)) <= gamma
            assert theory.best_gamma(alpha, t_d, t_v, edge * (1 + 1e-6)) > gamma


@given(alphas, st.integers(1, 16), times, times, st.floats(0.0, 1.0))
def test_sync_never_beats_cloud_sd_with_equal_drafters(
    alpha: float, gamma: int, t_d: float, t_v: float, rtt: float
) -> None:
    assert theory.sync_tpot_s(alpha, gamma, t_d, t_v, rtt) >= theory.cloud_sd_tpot_s(alpha, gamma, t_d, t_v)
    assert theory.edge_sd_tpot_s(alpha, gamma, t_d, t_v) == theory.cloud_sd_tpot_s(alpha, gamma, t_d, t_v)


@given(alphas, times, times, st.floats(0.0, 1.0))
def test_best_gamma_is_the_best(alpha: float, t_d: float, t_v: float, rtt: float) -> None:
    best = int(theory.best_gamma(alpha, t_d, lambda g: t_v * (1 + 0.02 * g), rtt))
    tpots = [float(theory.sync_tpot_s(alpha, g, t_d, t_v * (1 + 0.02 * g), rtt)) for g in range(1, 17)]
    assert tpots[best - 1] == min(tpots)


def test_streams_hide_delay_but_not_a_slow_link() -> None:
    assert theory.cloud_ar_tpot_s(0.05) == 0.05
    assert theory.cloud_ar_tpot_s(0.05, bytes_down=20, rate_down_mbit=100) == 0.05
    assert theory.cloud_ar_tpot_s(0.05, bytes_down=20, rate_down_mbit=0.001) == pytest.approx(0.16)
    slow = theory.cloud_sd_tpot_s(0.5, 3, 0.01, 0.05, bytes_down=100, rate_down_mbit=0.001)
    assert slow == pytest.approx(0.8 / 1.875)


def test_capacity() -> None:
    """A target shared by edge drafters verifies back to back; a fused node also drafts."""
    fused, split = 1 / (4 * 0.01 + 0.05), 1 / 0.05  # windows per second
    assert theory.capacity_ratio(4, 0.01, 0.05) == pytest.approx(split / fused)


def test_arguments_broadcast() -> None:
    rtt_s = np.linspace(0, 0.2, 5)
    alpha = np.array([[0.3], [0.9]])
    assert theory.sync_tpot_s(alpha, 4, 0.005, 0.05, rtt_s).shape == (2, 5)
    assert theory.best_gamma(alpha, 0.005, lambda _: 0.05, rtt_s).shape == (2, 5)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.expected_tokens(1.2, 4), "alpha is 1.2"),
        (lambda: theory.expected_tokens(float("nan"), 4), "alpha is nan"),
        (lambda: theory.expected_tokens(0.5, -1), "gamma is -1"),
        (lambda: theory.transfer_s(10, 0.0), "rate_mbit is 0.0"),
        (lambda: theory.transfer_s(-1, 1.0), "n_bytes is -1"),
        (lambda: theory.sync_tpot_s(0.5, 4, 0.01, 0.05, -0.1), "rtt_s is -0.1"),
        (lambda: theory.capacity_ratio(4, 0.01, 0.0), "t_v_s is 0.0"),
        (lambda: theory.best_gamma(0.5, 0.01, lambda _: 0.05, 0.0, []), "gammas is empty"),
        (lambda: theory.best_break_even_rtt_s(0.5, 0.01, lambda _: 0.05, 0.0, []), "gammas is empty"),
        (lambda: theory.continuous_gamma(0.5, 0.0, 0.1), "per_token_s is 0.0"),
        (lambda: theory.break_even_cloud_sd_rtt_s(4, -0.1, 0.1), "t_d_s is -0.1"),
        (lambda: theory.break_even_edge_sd_rtt_s(0.1, float("nan")), "edge_t_v_s is nan"),
    ],
)
def test_values_out_of_range_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
