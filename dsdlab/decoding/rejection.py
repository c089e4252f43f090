"""Rejection sampling with maximal coupling, exact on a thin wire by sparse q.

Accept a draft x ~ q with probability min(1, p(x)/q(x)); on rejection draw from (p - q)₊ normalised
(Leviathan, Kalman, Matias, arXiv 2211.17192, theorem 3.5; Chen et al., arXiv 2302.01318). The drafter
must *sample from* the q it reports: truncating only the report biases the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_LEVELS = 65535


@dataclass(frozen=True, slots=True)
class SparseQ:
    """A drafter's distribution as it crosses the wire: ids [k] and weights [k] in 1/65535, summing to it."""

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]

    def dense(self, vocab_size: int) -> FloatArray:
        """Probabilities [vocab_size]."""
        q = np.zeros(vocab_size)
        q[self.ids] = self.weights / _LEVELS
        return q


def sparsify(q: npt.ArrayLike, k: int) -> SparseQ:
    """Truncate q [V] to its k likeliest ids and quantise to 16 bits, *before* anything is drawn from it.

    Rounds down and gives the remainder to the likeliest id, so the weights sum to exactly 65535.
    Raises ValueError for k < 1 or a q without mass.
    """
    values = np.asarray(q, dtype=np.float64)
    if k < 1:
        raise ValueError(f"k is {k}; allowed: 1 or more")
    order = np.argsort(-values, kind="stable")[:k]
    mass = values[order].sum()
    if not mass > 0.0:
        raise ValueError("q holds no probability mass")
    weights = np.floor(values[order] / mass * _LEVELS).astype(np.int64)
    weights[0] += _LEVELS - weights.sum()
    keep = weights > 0
    return SparseQ(order[keep].astype(np.int64), weights[keep])


def residual(p: npt.ArrayLike, q: npt.ArrayLike) -> FloatArray:
    """(p - q)₊ normalised, [V]; p itself where p = q leaves nothing (a rejection then has measure zero)."""
    target = np.asarray(p, dtype=np.float64)
    rest = np.maximum(target - np.asarray(q, dtype=np.float64), 0.0)
    total = rest.sum()
    return rest / total if total > 0.0 else target


def sample_rejection(p: FloatArray, q: FloatArray, draft: int, u_accept: float, u_residual: float) -> int:
    """The committed token for `draft` ~ q under target p, both [V], from two uniforms in [0, 1).

    The comparison is strict and in float64, so p(draft) = 0 is never accepted.
    """
    if u_accept * q[draft] < p[draft]:
        return draft
    cdf = np.cumsum(residual(p, q))
    last = np.searchsorted(cdf, cdf[-1])  # the last id with mass, should the product round up to the total
    return int(min(np.searchsorted(cdf, u_residual * cdf[-1], side="right"), last))
