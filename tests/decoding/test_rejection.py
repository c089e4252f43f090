"""Sparse q: what is drawn from is what is reported; and the edges of rejection sampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.decoding import residual, sample_rejection, sparsify

WEIGHTS = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 1e-12])), min_size=1, max_size=30
).filter(lambda q: sum(q) > 1e-9)
DISTRIBUTION = WEIGHTS.map(lambda q: np.array(q) / sum(q))
_TOP = 1.0 - 2.0**-53


@given(DISTRIBUTION, st.integers(1, 40))
def test_sparse_q_is_a_distribution_on_the_likeliest(q: np.ndarray, k: int) -> None:
    sparse = sparsify(q, k)
    assert sparse.weights.sum() == 65535
    assert (sparse.weights > 0).all()
    assert len(sparse.ids) == len(set(sparse.ids.tolist())) <= k
    left_out = np.setdiff1d(np.arange(q.size), sparse.ids)
    if len(sparse.ids) == k and left_out.size:
        assert q[sparse.ids].min() >= q[left_out].max()
    dense = sparse.dense(q.size)
    assert dense.sum() == pytest.approx(1.0, abs=1e-12)
    kept = q[sparse.ids] / q[np.argsort(-q, kind="stable")[:k]].sum()
    assert np.abs(dense[sparse.ids] - kept)[1:].max(initial=0) <= 1 / 65535 + 1e-12  # rounding alone
    assert dense[sparse.ids[0]] >= kept[0] - 1e-12  # which gets the remainder


@pytest.mark.parametrize("k", [0, -1])
def test_bad_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; allowed: 1 or more"):
        sparsify([0.5, 0.5], k)


@pytest.mark.parametrize("q", [[0.0, 0.0], [np.nan, 1.0]])
def test_no_mass(q: list[float]) -> None:
    with pytest.raises(ValueError, match="no probability mass"):
        sparsify(q, 2)


@given(DISTRIBUTION, st.data())
def test_a_token_without_target_mass_never_appears(p: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.001, 1), min_size=p.size, max_size=p.size))
    q = np.array(weights) / sum(weights)
    draft = data.draw(st.integers(0, p.size - 1))
    for u_accept in (0.0, 0.3, _TOP):
        for u_residual in (0.0, 5e-324, 0.5, _TOP):
            assert p[sample_rejection(p, q, draft, u_accept, u_residual)] > 0


def test_the_comparison_is_strict() -> None:
    """u = 0 accepts nothing that p gives no mass; u·q = p is a rejection."""
    p, q = np.array([0.0, 1.0]), np.array([0.5, 0.5])
    assert sample_rejection(p, q, 0, 0.0, 0.0) == 1
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    assert sample_rejection(p, q, 0, 0.5, 0.0) == 1
    assert sample_rejection(p, q, 0, np.nextafter(0.5, 0), 0.0) == 0


def test_equal_distributions_always_accept() -> None:
    p = np.array([0.1, 0.2, 0.7])
    assert [sample_rejection(p, p, d, _TOP, 0.5) for d in range(3)] == [0, 1, 2]


@given(DISTRIBUTION, st.data())
def test_residual_is_a_distribution(p: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(
        st.lists(st.floats(0, 1), min_size=p.size, max_size=p.size).filter(lambda q: sum(q) > 1e-9)
    )
    q = np.array(weights) / sum(weights)
    rest = residual(p, q)
    assert rest.sum() == pytest.approx(1.0, abs=1e-9)
    assert (rest >= 0).all()
    if np.abs(p - q).max() > 1e-9:
        assert (rest[p <= q] == 0).all()
