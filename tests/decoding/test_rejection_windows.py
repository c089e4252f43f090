"""Whole windows by rejection sampling, with the random numbers that nodes use: the law is the target's.

`test_exact_sampling` integrates a step over uniform numbers; here it is the keys of those numbers that are on
trial, at a fixed level and for fixed seeds, with keys and reports that are wrong and must be caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from exactness import FloatArray, Prefix, fits

from dsdlab.decoding import (
    Sampling,
    SparseQ,
    log_softmax,
    pick,
    probabilities,
    rejection,
    sparsify,
    uniform,
    verify_rejection,
    warp,
)

V, LENGTH, GAMMA, SEEDS = 3, 3, 2, 5000
HEAT = 0.8
Report = Callable[[FloatArray], SparseQ]


def logits(kind: int, prefix: Prefix) -> np.ndarray:
    return np.random.default_rng([kind, *prefix]).normal(0, 0.6, V).astype(np.float32)


P_ROWS = {x: logits(1, x) for n in range(LENGTH + GAMMA + 1) for x in itertools.product(range(V), repeat=n)}
Q_ROWS = {x: probabilities(logits(2, x), Sampling(HEAT), V) for x in P_ROWS}


def honest(q: FloatArray) -> SparseQ:
    return sparsify(q, 2)


def whole(q: FloatArray) -> SparseQ:
    return sparsify(q, V)


def counts(drawn: Report, reported: Report) -> np.ndarray:
    """How often each text of LENGTH tokens came: windows of GAMMA, one after the other, over SEEDS seeds."""
    out = np.zeros((V,) * LENGTH, dtype=np.int64)
    sources = {x: drawn(q) for x, q in Q_ROWS.items()}
    reports = {x: reported(q) for x, q in Q_ROWS.items()}
    for seed in range(SEEDS):
        sampling, text = Sampling(HEAT, seed=seed), Prefix()
        while len(text) < LENGTH:
            draft: Prefix = ()
            for i in range(GAMMA):
                draft = (*draft, sources[text + draft].draw(seed, len(text) + i))
            prefixes = [text + draft[:i] for i in range(GAMMA + 1)]
            rows = [P_ROWS[x] for x in prefixes]
            accepted, next_id = verify_rejection(
                draft, [reports[x] for x in prefixes[:-1]], rows, sampling, len(text), V
            )
            text = (*text, *draft[:accepted], next_id)
        out[text[:LENGTH]] += 1
    return out.ravel()


def law() -> FloatArray:
    p = {x: np.exp(log_softmax(warp(row, Sampling(HEAT)))) for x, row in P_ROWS.items()}
    texts = itertools.product(range(V), repeat=LENGTH)
    return np.array([np.prod([p[x[:i]][token] for i, token in enumerate(x)]) for x in texts])


@pytest.mark.parametrize("report", [honest, whole])
def test_windows_have_the_targets_law(report: Report) -> None:
    assert fits(counts(report, report), law())


def test_a_report_truncated_after_drawing_is_caught() -> None:
    assert not fits(counts(whole, honest), law())


def test_one_number_for_two_draws_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafted a token must not also decide whether it stands."""
    monkeypatch.setattr(rejection, "_ACCEPT", rejection._DRAFT)
    assert not fits(counts(whole, whole), law())


def test_more_drafts_stand_than_with_shared_noise() -> None:
    """α = 1 − TV is as good as it gets; the coupling by shared noise lies below."""
    p, q = (np.exp(log_softmax(warp(logits(kind, (0,)), Sampling(HEAT)))) for kind in (1, 2))
    drawn, drafted, n = whole(q), 0, 4000
    for seed in range(n):
        token = drawn.draw(seed, 5)
        rows = [logits(1, (0,)), logits(1, (0, 0))]
        drafted += verify_rejection([token], [drawn], rows, Sampling(HEAT, seed=seed), 5, V)[0]
    best = float(np.minimum(p, q).sum())
    shared = sum(
        pick(logits(1, (0,)), Sampling(HEAT, seed=s), 5) == pick(logits(2, (0,)), Sampling(HEAT, seed=s), 5)
        for s in range(n)
    )
    slack = 4 * np.sqrt(0.25 / n)
    assert drafted / n == pytest.approx(best, abs=slack)
    assert shared < drafted - 0.01 * n


def test_lengths_must_agree() -> None:
    rows = [logits(1, ()), logits(1, (0,))]
    with pytest.raises(ValueError, match="a window of 1 has 0 distributions and 2 rows"):
        verify_rejection([0], [], rows, Sampling(HEAT), 0, V)


def test_an_empty_window_is_the_targets_own_pick() -> None:
    sampling = Sampling(HEAT, seed=3)
    expected = pick(logits(1, ()), sampling, 9)
    assert verify_rejection([], [], [logits(1, ())], sampling, 9, V) == (0, expected)


def test_reduced_and_padded_vocabularies() -> None:
    """Ids of a reduced output; those that the other side does not know have no probability."""
    row = np.array([1.0, 0.5, -1.0])
    p = probabilities(row, Sampling(1.0), 6, np.array([4, 0, 9]))
    assert np.flatnonzero(p).tolist() == [0, 4]
    assert p.sum() == pytest.approx(1.0)
    assert p[4] / p[0] == pytest.approx(np.exp(0.5))
    with pytest.raises(ValueError, match="no token id is below the vocabulary's size of 6"):
        probabilities(row, Sampling(1.0), 6, np.array([6, 7, 8]))


def test_uniform_numbers_have_keys_of_their_own() -> None:
    found = {uniform(seed, position, draw) for seed in range(9) for position in range(9) for draw in range(3)}
    assert len(found) == 9 * 9 * 3
    assert all(0.0 < u < 1.0 for u in found)
    assert uniform(1, 2, 0) == uniform(1, 2, 0)
