"""Warping: temperature, top-k and top-p, the same for p and q."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsdlab.decoding import Sampling, log_softmax, warp

FINITE = st.floats(-60, 60, width=32)
LOGIT = st.one_of(FINITE, st.sampled_from([0.0, 1.0, -math.inf]))  # many ties, some removed tokens
LOGITS = st.lists(LOGIT, min_size=1, max_size=24).filter(lambda z: max(z) > -math.inf)
TEMPERATURES = st.floats(0.05, 20)
TOP_K = st.integers(0, 30)
TOP_P = st.floats(1e-6, 1.0)


def probabilities(z: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(z))


def oracle(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[int]:
    """Which tokens survive, by the definition: sort by (−logit, index), cut at k, then at the mass top_p."""
    best = max(logits)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    weight = {i: math.exp((logits[i] - best) / temperature) for i in order}
    total = math.fsum(weight.values())
    kept: list[int] = []
    mass = 0.0
    for i in order:
        if kept and mass >= top_p * total * (1 + 1e-9):
            break
        if mass >= top_p * total * (1 - 1e-9) and kept:
            return []  # too near the edge for floating point to have one answer
        kept.append(i)
        mass += weight[i]
    return sorted(i for i in kept if weight[i] > 0.0)


@given(LOGITS, TEMPERATURES, TOP_K, TOP_P)
@example([0.0, 1.0, 4e-20], 1.0, 0, 0.75)  # the smallest differences count
def test_survivors_are_those_of_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    z = warp(np.array(logits, dtype=np.float32), Sampling(temperature, top_k, top_p))
    expected = oracle(logits, temperature, top_k, top_p)
    if expected and top_p < 1.0:
        assert np.flatnonzero(probabilities(z) > 0).tolist() == expected


@given(LOGITS, TEMPERATURES, TOP_K, st.floats(1e-300, 1.0))
def test_the_likeliest_token_always_survives(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    z = warp(logits, Sampling(temperature, top_k, top_p))
    assert np.argmax(z) == np.argmax(logits)
    assert np.isfinite(z.max())
    assert not np.isnan(z).any()


def test_top_p_below_every_probability_keeps_one() -> None:
    """A uniform row: each token has 1/50, top-p 0.001 still leaves the first."""
    z = warp(np.zeros(50), Sampling(1.0, 0, 0.001))
    assert np.flatnonzero(np.isfinite(z)).tolist() == [0]


@given(LOGITS, TEMPERATURES, TOP_K, TOP_P)
def test_survivors_keep_their_ratios(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    z = warp(logits, Sampling(temperature, top_k, top_p))
    kept = np.flatnonzero(np.isfinite(z))
    plain = np.array(logits, dtype=np.float64) / temperature
    np.testing.assert_allclose(z[kept] - z[kept[0]], plain[kept] - plain[kept[0]], rtol=1e-12, atol=1e-12)


@given(LOGITS, TEMPERATURES, st.integers(1, 30))
def test_top_k_keeps_at_most_k(logits: list[float], temperature: float, top_k: int) -> None:
    finite = np.isfinite(warp(logits, Sampling(temperature, top_k))).sum()
    assert finite == min(top_k, np.isfinite(logits).sum())


@given(LOGITS, FINITE, TEMPERATURES, TOP_K, TOP_P)
def test_a_constant_changes_nothing(
    logits: list[float], shift: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Whole numbers shift without rounding, so the distributions are equal to the bit."""
    z = np.round(np.array(logits, dtype=np.float64))
    sampling = Sampling(temperature, top_k, top_p)
    np.testing.assert_array_equal(warp(z, sampling), warp(z + round(shift), sampling))


@given(LOGITS, TEMPERATURES, TOP_K, TOP_P)
def test_same_for_p_and_q(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    """Target and drafter call the same function: equal logits give equal bits, inputs stay untouched."""
    sampling = Sampling(temperature, top_k, top_p)
    row = np.array(logits, dtype=np.float32)
    before = row.copy()
    np.testing.assert_array_equal(warp(row, sampling), warp(row.astype(np.float64), sampling))
    np.testing.assert_array_equal(row, before)


@given(LOGITS)
@example([1.0, 1.0])
def test_greedy_is_the_limit_of_temperature_zero(logits: list[float]) -> None:
    z = warp(logits, Sampling())
    assert np.flatnonzero(np.isfinite(z)).tolist() == [int(np.argmax(logits))]


def test_off_means_off() -> None:
    row = np.random.default_rng(0).normal(0, 4, 1000)
    np.testing.assert_allclose(
        probabilities(warp(row, Sampling(1.0, 0, 1.0))), probabilities(row), rtol=1e-12
    )
    assert np.isfinite(warp(row, Sampling(1.0, 1000, 1.0))).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
def test_the_tiniest_temperatures_are_greedy(temperature: float) -> None:
    row = np.array([1.0, 3.0, 2.0, -np.inf], dtype=np.float32)
    z = warp(row, Sampling(temperature, 0, 0.9))
    assert np.argmax(z) == 1
    assert probabilities(z).tolist() == [0.0, 1.0, 0.0, 0.0]


@given(st.lists(st.lists(LOGIT, min_size=5, max_size=5), min_size=1, max_size=4))
def test_log_softmax(rows: list[list[float]]) -> None:
    z = np.array(rows)
    z[:, 0] = 0.0  # one finite score in each row
    out = log_softmax(z)
    np.testing.assert_allclose(np.exp(out).sum(axis=-1), 1.0, rtol=1e-12)
    assert (np.isneginf(out) == np.isneginf(z)).all()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, "0 (greedy) to 100"),
        ("temperature", math.nan, "0 (greedy) to 100"),
        ("temperature", math.inf, "0 (greedy) to 100"),
        ("top_k", -1, "0 (off) or more"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.01, "above 0, at most 1"),
        ("top_p", math.nan, "above 0, at most 1"),
        ("seed", -1, "0 to 2^64 - 1"),
        ("seed", 2**64, "0 to 2^64 - 1"),
    ],
)
def test_bad_sampling_is_one_line(field: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        Sampling(**{field: value})
    assert str(value) in str(error.value)
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)
