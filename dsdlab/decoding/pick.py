"""The one way a token is chosen from logits, by the target and by the drafter alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsdlab.decoding.noise import counter_bits, gumbel_from_bits
from dsdlab.decoding.sampling import Sampling
from dsdlab.decoding.warp import log_softmax, warp

# A Gumbel variable passes _TAIL with probability 1 - exp(-exp(-_TAIL)) = 4.5e-5: its bits are then above
# _TAIL_BITS, which lies a little low so that no rounding can hide one.
_TAIL = 10.0
_TAIL_BITS = np.uint64(int(np.exp(-np.exp(1e-6 - _TAIL)) * 2.0**64))


def pick(
    logits: npt.ArrayLike, sampling: Sampling, position: int, ids: npt.NDArray[np.int64] | None = None
) -> int:
    """The token id decided at absolute `position`: argmax of logits, or of log p + G when sampling.

    logits: [V]; ids: token id of each entry (a reduced output vocabulary), None for 0 … V - 1.
    Ties go to the lowest index. A draft is accepted exactly if the target's pick equals it
    (arXiv 2408.07978, algorithm 2). Raises ValueError if no logit is finite.
    """
    row = np.asarray(logits)
    best = int(np.argmax(row))
    if not np.isfinite(row[best]):
        raise ValueError("logits hold no finite maximum")
    if not sampling.greedy:
        best = _pick_coupled(warp(row, sampling), sampling.seed, position, best, ids)
    return best if ids is None else int(ids[best])


def confidence(logits: npt.ArrayLike, sampling: Sampling) -> float:
    """The highest probability of a row's distribution; of the warped one when sampling. logits: [V].

    A function of the prefix alone: it does not depend on which token is drawn.
    """
    row = np.asarray(logits)
    scores = row if sampling.greedy else warp(row, sampling)
    return float(np.exp(log_softmax(scores).max()))


def _pick_coupled(
    z: npt.NDArray[np.float64], seed: int, position: int, likeliest: int, ids: npt.NDArray[np.int64] | None
) -> int:
    """argmax of z + G, taking logarithms only where an entry can win.

    The likeliest entry sets a bound; an entry further than _TAIL below the bound needs noise above
    _TAIL, which its raw bits tell without a logarithm. The result equals the full argmax.
    """
    n = z.size
    tokens = np.arange(n, dtype=np.uint64) if ids is None else ids.astype(np.uint64)
    bits = counter_bits(seed, position, tokens)
    bound = z[likeliest] + gumbel_from_bits(bits[likeliest : likeliest + 1])[0]
    able = np.flatnonzero((z >= bound - _TAIL) | (bits >= _TAIL_BITS))
    if able.size == 0:  # the likeliest drew noise above _TAIL and stands alone
        return likeliest
    scores = z[able] + gumbel_from_bits(bits[able])
    top = int(np.argmax(scores))
    return int(able[top]) if scores[top] >= bound else likeliest
