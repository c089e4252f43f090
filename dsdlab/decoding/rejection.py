"""Rejection sampling with maximal coupling, exact on a thin wire by sparse q.

Accept a draft x ~ q with probability min(1, p(x)/q(x)); on rejection draw from (p - q)₊ normalised
(Leviathan, Kalman, Matias, arXiv 2211.17192, theorem 3.5; Chen et al., arXiv 2302.01318). The drafter
must *sample from* the q it reports: truncating only the report biases the output.

The random numbers of a position are keyed by seed and position, as the shared noise is, so that a frame that
is repeated, or sent again after a lost connection, is judged the same way. What a window drew beyond a
rejection never enters the text, so a later window may draw with the same numbers there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsdlab.decoding.noise import uniform
from dsdlab.decoding.pick import pick
from dsdlab.decoding.sampling import Sampling
from dsdlab.decoding.warp import log_softmax, warp

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Q_LEVELS = 65535
_DRAFT, _ACCEPT, _RESIDUAL = range(3)  # a position's draws


@dataclass(frozen=True, slots=True)
class SparseQ:
    """A drafter's distribution as it crosses the wire: ids [k] and weights [k] in 1/65535, summing to it."""

    ids: IntArray
    weights: IntArray

    def dense(self, vocab_size: int) -> FloatArray:
        """Probabilities [vocab_size]."""
        q = np.zeros(vocab_size)
        q[self.ids] = self.weights / Q_LEVELS
        return q

    def draw(self, seed: int, position: int) -> int:
        """The token id drafted at absolute `position`."""
        at = uniform(seed, position, _DRAFT) * Q_LEVELS
        return int(self.ids[np.searchsorted(np.cumsum(self.weights), at, side="right")])


def sparsify(q: npt.ArrayLike, k: int) -> SparseQ:
    """Truncate q [V] to its k likeliest ids and quantise to 16 bits, *before* anything is drawn from it.

    Rounds down and gives the remainder to the likeliest id, so the weights sum to exactly 65535.
    Raises ValueError for k < 1 or a q without mass.
    """
    values = np.asarray(q, dtype=np.float64)
    if k < 1:
        raise ValueError(f"k is {k}; allowed: 1 or more")
    near = np.flatnonzero(~(values <= 0.0))  # not a number stays, to be refused
    if k < near.size:  # nothing below the k-th largest can be kept
        near = near[values[near] >= np.partition(values[near], -k)[-k]]
        near = near[np.argsort(-values[near], kind="stable")][:k]
    mass = values[near].sum()
    order = near[~(values[near] < mass / (2 * Q_LEVELS))]  # the rest would round down to nothing
    if not mass > 0.0:
        raise ValueError("q holds no probability mass")
    if not order.size:  # flat over more ids than there are levels: the likeliest takes them all
        order = near[[values[near].argmax()]]
    order = order[np.argsort(-values[order], kind="stable")]
    weights = np.floor(values[order] / mass * Q_LEVELS).astype(np.int64)
    weights[0] += Q_LEVELS - weights.sum()
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


def probabilities(
    logits: npt.ArrayLike, sampling: Sampling, vocab_size: int, ids: IntArray | None = None
) -> FloatArray:
    """The warped distribution of logits [n_out] over the vocabulary: [vocab_size], an id beyond it left out.

    ids: token id of each entry (a reduced output vocabulary), None for 0 … n_out - 1. Raises ValueError where
    no id is left.
    """
    row = np.asarray(logits)
    tokens = np.arange(row.size) if ids is None else ids
    known = tokens < vocab_size
    if not known.any():
        raise ValueError(f"no token id is below the vocabulary's size of {vocab_size}")
    out = np.zeros(vocab_size)
    out[tokens[known]] = np.exp(log_softmax(warp(row[known], sampling)))
    return out


def verify_rejection(
    draft: Sequence[int],
    reported: Sequence[SparseQ],
    rows: Sequence[npt.ArrayLike],
    sampling: Sampling,
    base: int,
    vocab_size: int,
    ids: IntArray | None = None,
) -> tuple[int, int]:
    """(accepted, next id) for draft [γ], drawn by `SparseQ.draw` from reported [γ], at absolute `base`.

    rows: the target's logits [γ + 1] after each prefix of the draft; `ids` as in `probabilities`. The next id
    is drawn from (p - q)₊ after a rejection; after full acceptance it is the bonus token, the target's own
    pick. What is committed has the law of the target alone (arXiv 2211.17192, appendix A.1). Raises
    ValueError for other lengths.
    """
    if not len(rows) - 1 == len(reported) == len(draft):
        raise ValueError(f"a window of {len(draft)} has {len(reported)} distributions and {len(rows)} rows")
    for n, (token, q) in enumerate(zip(draft, reported, strict=True)):
        p = probabilities(rows[n], sampling, vocab_size, ids)
        u_accept, u_residual = (uniform(sampling.seed, base + n, draw) for draw in (_ACCEPT, _RESIDUAL))
        decided = sample_rejection(p, q.dense(vocab_size), token, u_accept, u_residual)
        if decided != token:
            return n, decided
    return len(draft), pick(rows[-1], sampling, base + len(draft), ids)
