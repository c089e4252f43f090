"""The pick: the full argmax of log p + G, whatever shortcut finds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdlab.decoding import Sampling, gumbel, log_softmax, pick, warp

LOGIT = st.one_of(st.floats(-40, 40, width=32), st.sampled_from([0.0, 2.0, 7.5, -math.inf]))
LOGITS = st.lists(LOGIT, min_size=1, max_size=40).filter(lambda z: max(z) > -math.inf)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.3, 0.8, 1.0, 1.7, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
POSITIONS = st.integers(0, 2**20 - 1)


def full_argmax(logits: np.ndarray, sampling: Sampling, position: int, ids: np.ndarray | None = None) -> int:
    """argmax of log p + G over every entry: the definition."""
    tokens = np.arange(logits.size) if ids is None else ids
    log_p = log_softmax(warp(logits, sampling))
    scores = log_p if sampling.greedy else log_p + gumbel(sampling.seed, position, tokens)
    return int(tokens[int(np.argmax(scores))])


@settings(max_examples=400)
@given(LOGITS, SAMPLINGS, POSITIONS)
def test_equals_the_full_argmax(logits: list[float], sampling: Sampling, position: int) -> None:
    row = np.array(logits, dtype=np.float32)
    assert pick(row, sampling, position) == full_argmax(row, sampling, position)


@given(st.lists(st.tuples(LOGIT, st.integers(0, 50_000)), min_size=1, max_size=40), SAMPLINGS, POSITIONS)
def test_reduced_vocabulary_keys_noise_by_token_id(
    entries: list[tuple[float, int]], sampling: Sampling, position: int
) -> None:
    row = np.array([z for z, _ in entries], dtype=np.float32)
    row[0] = 3.0
    ids = np.array([i for _, i in entries], dtype=np.int64)
    assert pick(row, sampling, position, ids) == full_argmax(row, sampling, position, ids)


@given(SAMPLINGS, POSITIONS)
def test_a_reduced_row_agrees_with_the_full_one(sampling: Sampling, position: int) -> None:
    """What a drafter with a small head is for: where the left-out ids have no mass, it says the same."""
    rng = np.random.default_rng(position)
    ids = np.sort(rng.choice(500, 60, replace=False))
    small = rng.normal(0, 3, 60).astype(np.float32)
    full = np.full(500, -np.inf, dtype=np.float32)
    full[ids] = small
    assert pick(small, sampling, position, ids) == pick(full, sampling, position)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_equals_the_full_argmax_on_a_large_vocabulary(temperature: float) -> None:
    """Flat and peaked rows of real size; the shortcut's rare branches are reached too."""
    rng = np.random.default_rng(1)
    for position in range(150):
        row = rng.normal(0, rng.choice([0.01, 1.0, 4.0]), 20_000).astype(np.float32)
        sampling = Sampling(temperature, seed=position)
        assert pick(row, sampling, position) == full_argmax(row, sampling, position)


def test_the_likeliest_with_noise_beyond_the_tail() -> None:
    """Noise above the shortcut's bound at the likeliest entry: nobody else can win."""
    noise = gumbel(5, 5, np.arange(400_000))
    loud = int(np.argmax(noise))
    assert noise[loud] > 10.0
    ids = np.array([loud, 1, 2, 3])
    row = np.array([1.0, 0.9, 0.5, -np.inf], dtype=np.float32)
    sampling = Sampling(1.0, seed=5)
    assert pick(row, sampling, 5, ids) == loud == full_argmax(row, sampling, 5, ids)


def test_an_unlikely_token_with_noise_beyond_the_tail_wins() -> None:
    """An entry further than the bound below the likeliest wins by its raw bits alone."""
    noise = gumbel(5, 5, np.arange(400_000))
    loud, quiet = int(np.argmax(noise)), int(np.argmin(noise))
    gap = noise[loud] - noise[quiet] - 0.01
    assert gap > 12.0
    ids = np.array([quiet, loud])
    sampling = Sampling(1.0, seed=5)
    for below, winner in ((gap, loud), (gap + 0.02, quiet)):
        row = np.array([0.0, -below], dtype=np.float64)
        assert pick(row, sampling, 5, ids) == winner == full_argmax(row, sampling, 5, ids)


@given(LOGITS, st.integers(0, 2**64 - 1), POSITIONS)
def test_greedy_is_the_first_maximum(logits: list[float], seed: int, position: int) -> None:
    assert pick(logits, Sampling(seed=seed), position) == logits.index(max(logits))


def test_ties_without_noise_go_to_the_lowest_index() -> None:
    assert pick([1.0, 5.0, 5.0], Sampling(), 0) == 1
    assert pick([1.0, 5.0, 5.0], Sampling(), 0, np.array([9, 8, 7])) == 8


@pytest.mark.parametrize("row", [[math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf]])
def test_no_finite_maximum_is_an_error(row: list[float]) -> None:
    for sampling in (Sampling(), Sampling(0.8, seed=1)):
        with pytest.raises(ValueError, match="no finite maximum"):
            pick(row, sampling, 0)
