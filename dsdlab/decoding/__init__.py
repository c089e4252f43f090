"""Lossless speculation as pure functions of arrays: warping, shared noise, verification, limits."""

from dsdlab.decoding.limits import FINISH_EOS, FINISH_LENGTH, apply_limits
from dsdlab.decoding.noise import gumbel, uniform
from dsdlab.decoding.pick import confidence, pick
from dsdlab.decoding.rejection import (
    Q_LEVELS,
    SparseQ,
    probabilities,
    residual,
    sample_rejection,
    sparsify,
    verify_rejection,
)
from dsdlab.decoding.sampling import Sampling
from dsdlab.decoding.verify import accepted_length, verify
from dsdlab.decoding.warp import log_softmax, warp

__all__ = [
    "FINISH_EOS",
    "FINISH_LENGTH",
    "Q_LEVELS",
    "Sampling",
    "SparseQ",
    "accepted_length",
    "apply_limits",
    "confidence",
    "gumbel",
    "log_softmax",
    "pick",
    "probabilities",
    "residual",
    "sample_rejection",
    "sparsify",
    "uniform",
    "verify",
    "verify_rejection",
    "warp",
]
