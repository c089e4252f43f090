"""The output law is the target's: by enumeration, by chi-square; and wrong schemes are caught."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from exactness import FloatArray, Model, Prefix, Step, fits, largest_error, output_law, tables

from dsdlab.decoding import (
    Sampling,
    gumbel,
    log_softmax,
    pick,
    residual,
    sample_rejection,
    sparsify,
    verify,
    warp,
)

V = 4
DRAWS = 100_000
IDS = np.arange(6)


def sparse(model: Model, k: int) -> Model:
    return lambda prefix: sparsify(model(prefix), k).dense(V)


def draw(p: FloatArray, u: float) -> int:
    return int(np.searchsorted(np.cumsum(p), u * p.sum(), side="right"))


def resample_from_p(p: FloatArray, q: FloatArray, draft: int, u_accept: float, u_residual: float) -> int:
    """Wrong: a rejected draft is replaced by a draw from p instead of (p − q)₊."""
    if u_accept * q[draft] < p[draft]:
        return draft
    return draw(p, u_residual)


def always_accept(p: FloatArray, q: FloatArray, draft: int, u_accept: float, u_residual: float) -> int:  # noqa: ARG001
    """Wrong: what is drafted stands."""
    return draft


# enumeration -------------------------------------------------------------------------------------


def enumeration_error(step: Step, q_of: Model, reported: Model, p_of: Model, gamma: int) -> float:
    length = 3
    law = output_law(p_of, q_of, reported, step, gamma, length)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    return largest_error(law, p_of, V, length)


@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
@pytest.mark.parametrize("k", [2, V])
@pytest.mark.parametrize("zeros", [False, True])
def test_rejection_with_sparse_q_has_the_targets_law(gamma: int, k: int, zeros: bool) -> None:
    """Shows 5: exhaustive enumeration of three positions, any window, q truncated before it is drawn from."""
    p_of, q_of = tables(1, V, 1.2, zeros), sparse(tables(2, V, 1.2, False), k)
    assert enumeration_error(sample_rejection, q_of, q_of, p_of, gamma) < 1e-12


def test_rejection_where_drafter_and_target_agree() -> None:
    """p = q: no residual, every draft stands."""
    q_of = sparse(tables(3, V, 1.0, False), V)
    assert enumeration_error(sample_rejection, q_of, q_of, q_of, 2) < 1e-12


@pytest.mark.parametrize("wrong", [resample_from_p, always_accept])
def test_enumeration_catches_wrong_couplings(wrong: Step) -> None:
    p_of, q_of = tables(1, V, 1.2, False), sparse(tables(2, V, 1.2, False), 3)
    assert enumeration_error(wrong, q_of, q_of, p_of, 2) > 1e-3


def test_enumeration_catches_a_report_truncated_after_drawing() -> None:
    """Drafts from the whole q, while the verifier is told its two likeliest ids."""
    p_of, q_of = tables(1, V, 1.2, False), tables(2, V, 1.2, False)
    assert enumeration_error(sample_rejection, q_of, sparse(q_of, 2), p_of, 2) > 1e-3


def logits_of(prefix: Prefix) -> np.ndarray:
    return np.random.default_rng([7, *prefix]).normal(0, 1.5, 3).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        *(Sampling(1.0, seed=s) for s in range(8)),
        Sampling(0.7, 2, 0.9, 5),
        Sampling(2.0, 0, 0.8, 6),
    ],
    ids=str,
)
def test_coupling_commits_the_same_text_for_every_draft(sampling: Sampling) -> None:
    """Shows 5: after every prefix of the target's own text, every draft of every length up to 4.

    By induction the committed text is the target's alone whatever is drafted, whenever.
    """
    alone: Prefix = ()
    for position in range(12):
        alone = (*alone, pick(logits_of(alone), sampling, position))
    for n in range(7):
        committed = alone[:n]
        for length in range(5):
            for draft in itertools.product(range(3), repeat=length):
                picks = [pick(logits_of(committed + draft[:i]), sampling, n + i) for i in range(length + 1)]
                accepted, next_id = verify(draft, picks)
                new = (*draft[:accepted], next_id)
                assert alone[n : n + len(new)] == new


# chi-square --------------------------------------------------------------------------------------

P_LOGITS = np.array([1.2, 0.3, -0.4, 0.9, -1.5, 0.1])
Q_LOGITS = np.array([0.4, 1.1, -0.2, 0.2, -0.9, -0.6])


def total_variation(p: FloatArray, q: FloatArray) -> float:
    return float(0.5 * np.abs(p - q).sum())


@pytest.fixture(scope="module")
def coupled() -> tuple[np.ndarray, np.ndarray]:
    """The target's pick at 100,000 (seed, position) pairs, and the drafter's there.

    The drafter's is the full argmax, which `pick` equals (test_pick), at a fraction of the price.
    """
    target, drafter = [], []
    for seed in range(DRAWS // 1000):
        sampling = Sampling(1.0, seed=seed)
        target += [pick(P_LOGITS, sampling, position) for position in range(1000)]
        drafter += [argmax(Q_LOGITS, seed, position) for position in range(1000)]
    return np.array(target), np.array(drafter)


def argmax(logits: np.ndarray, seed: int, position: int) -> int:
    return int((logits + gumbel(seed, position, IDS)).argmax())


def counts(tokens: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(tokens, minlength=n)


def test_picks_have_the_law_of_p_and_q(coupled: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = np.exp(log_softmax(P_LOGITS)), np.exp(log_softmax(Q_LOGITS))
    assert fits(counts(coupled[0], 6), p)
    assert fits(counts(coupled[1], 6), q)
    assert not fits(counts(coupled[0], 6), q)  # the test can tell them apart


def test_picks_at_neighbouring_positions_are_independent(coupled: tuple[np.ndarray, np.ndarray]) -> None:
    p = np.exp(log_softmax(P_LOGITS))
    pairs = np.zeros((6, 6), dtype=np.int64)
    tokens, _ = coupled
    np.add.at(pairs, (tokens[0::2], tokens[1::2]), 1)
    assert fits(pairs.ravel(), np.outer(p, p).ravel())


def test_warped_picks_have_the_warped_law() -> None:
    """Temperature, top-k and top-p together; removed tokens never appear."""
    base = Sampling(1.4, 5, 0.9)
    warped = warp(P_LOGITS, base)
    p = np.exp(log_softmax(warped))
    assert 0 < (p == 0).sum() < 5
    tokens = [pick(P_LOGITS, Sampling(1.4, 5, 0.9, seed), 0) for seed in range(DRAWS // 5)]
    assert fits(counts(np.array(tokens), 6), p)


def test_acceptance_of_the_coupling_lies_within_its_bounds(coupled: tuple[np.ndarray, np.ndarray]) -> None:
    """(1 − TV)/(1 + TV) ≤ acceptance ≤ 1 − TV (arXiv 2408.07978), with five binomial deviations."""
    p, q = np.exp(log_softmax(P_LOGITS)), np.exp(log_softmax(Q_LOGITS))
    tv = total_variation(p, q)
    assert 0.1 < tv < 0.5
    rate = float((coupled[0] == coupled[1]).mean())
    slack = 5 * np.sqrt(0.25 / DRAWS)
    assert (1 - tv) / (1 + tv) - slack <= rate <= 1 - tv + slack
    assert not (1 - tv) / (1 + tv) - slack <= float((p * q).sum()) <= 1 - tv + slack  # independent noise


@pytest.mark.parametrize("seed", range(6))
def test_acceptance_bounds_hold_for_random_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = [2, 3, 8, 20, 50, 300][seed]
    logits = rng.normal(0, rng.uniform(0.2, 3), (2, n))
    p, q = np.exp(log_softmax(logits))
    draws = DRAWS if n <= 20 else 20_000
    noise = gumbel(seed, 0, np.arange(draws * n)).reshape(draws, n)  # distinct ids: fresh noise for each draw
    agree = (logits[0] + noise).argmax(axis=1) == (logits[1] + noise).argmax(axis=1)
    tv = total_variation(p, q)
    slack = 5 * np.sqrt(0.25 / draws)
    assert (1 - tv) / (1 + tv) - slack <= agree.mean() <= 1 - tv + slack


def test_chi_square_catches_a_coupling_that_resamples(coupled: tuple[np.ndarray, np.ndarray]) -> None:
    """Wrong: on disagreement draw from p with fresh noise, instead of keeping the shared pick."""
    p = np.exp(log_softmax(P_LOGITS))
    fresh = np.roll(coupled[0], 1)
    wrong = np.where(coupled[0] == coupled[1], coupled[0], fresh)
    assert fits(counts(coupled[0], 6), p)
    assert not fits(counts(wrong, 6), p)


def rejection_counts(step: Step, q: FloatArray, reported: FloatArray, p: FloatArray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drafts = rng.choice(len(q), DRAWS, p=q)
    u = rng.random((DRAWS, 2))
    tokens = [step(p, reported, int(d), a, r) for d, (a, r) in zip(drafts, u, strict=True)]
    return counts(np.array(tokens), len(p))


def test_rejection_draws_have_the_law_of_p() -> None:
    p, full_q = np.exp(log_softmax(P_LOGITS)), np.exp(log_softmax(Q_LOGITS))
    q = sparsify(full_q, 3).dense(6)
    assert fits(rejection_counts(sample_rejection, q, q, p, 1), p)
    assert not fits(rejection_counts(resample_from_p, q, q, p, 1), p)
    assert not fits(rejection_counts(always_accept, q, q, p, 1), p)
    assert not fits(rejection_counts(sample_rejection, full_q, q, p, 1), p)  # truncated report only


def test_rejection_accepts_with_maximal_probability() -> None:
    """α = 1 − TV(p, q), integrated by the enumeration's own judge."""
    from exactness import step_law

    p, q = np.exp(log_softmax(P_LOGITS)), sparsify(np.exp(log_softmax(Q_LOGITS)), 4).dense(6)
    alpha = sum(q[d] * step_law(sample_rejection, p, q, int(d))[0] for d in np.flatnonzero(q))
    assert alpha == pytest.approx(1 - total_variation(p, q), abs=1e-12)


def test_residual() -> None:
    rest = residual([0.5, 0.3, 0.2], [0.1, 0.5, 0.4])
    np.testing.assert_allclose(rest, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(residual([0.5, 0.5], [0.5, 0.5]), [0.5, 0.5])
