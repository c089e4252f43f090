"""Shared noise: a counter-based generator keyed by (seed, position, token id).

Both ends compute the same noise from three integers, so coupled sampling needs no noise on the wire
and a retry, another window or another batch changes nothing (Daliri, Musco, Suresh,
arXiv 2408.07978, section 3: "drafter-invariant" speculative decoding by Gumbel coupling).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UIntArray = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1
_DRAWS = 1 << 32  # counters of single draws begin here, above every token id


def _mix_int(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on one 64-bit integer."""
    x = ((x ^ (x >> 30)) * int(_MIX_1)) & _MASK
    x = ((x ^ (x >> 27)) * int(_MIX_2)) & _MASK
    return x ^ (x >> 31)


def counter_bits(seed: int, position: int, ids: UIntArray) -> UIntArray:
    """64 pseudo-random bits for each token id: uint64 [len(ids)].

    The stream key mixes seed and position one after the other; the counter is the token id.
    """
    key = _mix_int((seed + int(_GOLDEN)) & _MASK)
    key = _mix_int((key ^ _mix_int((position * int(_GOLDEN) + 1) & _MASK)) & _MASK)
    x = (ids + np.uint64(1)) * _GOLDEN  # [n], wraps modulo 2^64
    x ^= np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x


def uniform_from_bits(bits: UIntArray) -> FloatArray:
    """Uniform in the open interval (0, 1) from the upper 52 bits; float64 like `bits`.

    With 53 bits the half would be rounded away in the upper half, and the last value would be 1.
    """
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel_from_bits(bits: UIntArray) -> FloatArray:
    """Standard Gumbel noise -log(-log u); float64 like `bits`."""
    noise: FloatArray = -np.log(-np.log(uniform_from_bits(bits)))
    return noise


def gumbel(seed: int, position: int, ids: npt.ArrayLike) -> FloatArray:
    """Gumbel noise G(seed, position, id) for each token id; float64, shape of `ids`."""
    tokens = np.asarray(ids, dtype=np.uint64)
    return gumbel_from_bits(counter_bits(seed, position, tokens.ravel())).reshape(tokens.shape)


def uniform(seed: int, position: int, draw: int) -> float:
    """A uniform number in (0, 1) of its own for each (seed, position, draw); draw: 0 … 2^32 - 1.

    Keyed as the shared noise is, and independent of it: the noise's counters are token ids.
    """
    return float(uniform_from_bits(counter_bits(seed, position, np.array([_DRAWS + draw], np.uint64)))[0])
