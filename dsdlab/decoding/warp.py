"""Warping: the same temperature, top-k and top-p for the target's p and the drafter's q."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsdlab.decoding.sampling import Sampling

FloatArray = npt.NDArray[np.float64]


def log_softmax(z: npt.ArrayLike) -> FloatArray:
    """Log-probabilities of scores z [..., V], in float64; -inf stays -inf."""
    values = np.asarray(z, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    out: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def warp(logits: npt.ArrayLike, sampling: Sampling) -> FloatArray:
    """Scores [V] of the warped distribution: (logits - max) / temperature with removed tokens at -inf.

    Ties are kept or removed by token order, never by chance; the likeliest token always survives.
    Greedy sampling is the limit of temperature 0: only the first maximum survives.
    """
    z = np.asarray(logits, dtype=np.float64)
    out: FloatArray
    if sampling.greedy:
        out = np.full_like(z, -np.inf)
        out[np.argmax(z)] = 0.0
        return out
    cut = 0 < sampling.top_k < z.size
    if cut or sampling.top_p < 1.0:
        order = np.argsort(-z, kind="stable")  # by the logits themselves: dividing may round two into a tie
    with np.errstate(over="ignore"):  # the tiniest temperatures: all but the maxima go to -inf
        z = (z - z.max()) / sampling.temperature
    if cut:
        z[order[sampling.top_k :]] = -np.inf
    if sampling.top_p < 1.0:
        p = np.exp(log_softmax(z[order]))
        before = np.cumsum(p) - p  # probability of everything likelier than this token
        drop = before >= sampling.top_p
        drop[0] = False
        z[order[drop]] = -np.inf
    out = z
    return out
