"""Shared noise: the same everywhere, uniform, independent over seed, position and id."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsdlab.decoding import gumbel
from dsdlab.decoding.noise import counter_bits, gumbel_from_bits, uniform_from_bits

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**20 - 1)
_MASK = 2**64 - 1

# (seed, position, id): bits. Computed once by the plain-integer oracle below; every machine must agree.
KNOWN = {
    (0, 0, 0): 0x6191440B0CE8EC61,
    (0, 0, 1): 0x26895B4A2F537070,
    (1, 0, 0): 0x62AA4C73D6F0B373,
    (0, 1, 0): 0x26B0FDC7ADE0716E,
    (7, 123, 49151): 0xFECBA2FC8A8EBC59,
    (2**64 - 1, 2**20 - 1, 2**24 - 1): 0x2856EEBB0E114582,
}
GUMBEL_3_17 = [
    0.5772473124159719,
    -0.8706668336909493,
    1.1019316605629599,
    1.6246289729873606,
]  # ids 0 … 3 at seed 3, position 17


def mix(x: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def oracle_bits(seed: int, position: int, token: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = mix((seed + golden) & _MASK)
    key = mix(key ^ mix((position * golden + 1) & _MASK))
    return mix((((token + 1) * golden) & _MASK) ^ key)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.uint64)


@pytest.mark.parametrize("key", KNOWN)
def test_known_bits(key: tuple[int, int, int]) -> None:
    seed, position, token = key
    assert int(counter_bits(seed, position, ids(token))[0]) == KNOWN[key]


@given(SEEDS, POSITIONS, st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=8))
def test_bits_equal_integer_arithmetic(seed: int, position: int, tokens: list[int]) -> None:
    got = counter_bits(seed, position, ids(*tokens)).tolist()
    assert got == [oracle_bits(seed, position, t) for t in tokens]


def test_known_gumbel_values() -> None:
    """To the last bits: a machine whose logarithm is off by more would pick other tokens at near-ties."""
    expected = [-np.log(-np.log((oracle_bits(3, 17, t) // 4096 + 0.5) / 2**52)) for t in range(4)]
    np.testing.assert_allclose(gumbel(3, 17, range(4)), expected, rtol=1e-14)
    np.testing.assert_allclose(gumbel(3, 17, range(4)), GUMBEL_3_17, rtol=1e-14)


@given(SEEDS, POSITIONS, st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=40))
def test_an_id_has_its_noise_whatever_else_is_asked_for(seed: int, position: int, tokens: list[int]) -> None:
    together = gumbel(seed, position, tokens)
    assert [gumbel(seed, position, [t])[0] for t in tokens] == together.tolist()


def test_shape_follows_the_ids() -> None:
    assert gumbel(1, 2, 3).shape == ()
    assert gumbel(1, 2, [[3, 4], [5, 6]]).shape == (2, 2)
    assert gumbel(1, 2, 3) == gumbel(1, 2, [[3]])[0, 0]


def test_the_interval_is_open() -> None:
    extremes = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1], dtype=np.uint64)
    u = uniform_from_bits(extremes)
    assert (u > 0).all() and (u < 1).all()
    assert np.isfinite(gumbel_from_bits(extremes)).all()


def streams() -> dict[str, np.ndarray]:
    """200,000 uniforms walking along each of the three keys."""
    n = 200_000
    along_ids = uniform_from_bits(counter_bits(5, 9, np.arange(n, dtype=np.uint64)))
    along_positions = uniform_from_bits(np.array([oracle_bits(5, p, 9) for p in range(n)], dtype=np.uint64))
    along_seeds = uniform_from_bits(np.array([oracle_bits(s, 5, 9) for s in range(n)], dtype=np.uint64))
    return {"id": along_ids, "position": along_positions, "seed": along_seeds}


def test_uniform_and_uncorrelated_along_every_key() -> None:
    all_streams = streams()
    for name, u in all_streams.items():
        assert stats.kstest(u, "uniform").pvalue > 1e-4, name
        for lag in (1, 2, 3, 64):
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4.5 / np.sqrt(u.size), (name, lag)
        pairs, _, _ = np.histogram2d(u[0::2], u[1::2], bins=16, range=((0, 1), (0, 1)))
        assert stats.chisquare(pairs.ravel()).pvalue > 1e-4, name
    for a, b in (("id", "position"), ("id", "seed"), ("position", "seed")):
        r = np.corrcoef(all_streams[a], all_streams[b])[0, 1]
        assert abs(r) < 4.5 / np.sqrt(200_000), (a, b)


def test_every_bit_is_fair_and_every_key_bit_matters() -> None:
    """Flipping one bit of seed, position or id flips each output bit with probability one half."""
    rng = np.random.default_rng(0)
    flips = np.zeros(64)
    n = 0
    for _ in range(60):
        seed, position, token = (int(rng.integers(0, 2**b)) for b in (63, 20, 24))
        base = oracle_bits(seed, position, token)
        others = [oracle_bits(seed ^ (1 << b), position, token) for b in range(64)]
        others += [oracle_bits(seed, position ^ (1 << b), token) for b in range(20)]
        others += [oracle_bits(seed, position, token ^ (1 << b)) for b in range(24)]
        for other in others:
            flips += [((base ^ other) >> b) & 1 for b in range(64)]
            n += 1
    assert (np.abs(flips / n - 0.5) < 5 * 0.5 / np.sqrt(n)).all()


def test_gumbel_moments() -> None:
    g = gumbel(11, 3, np.arange(400_000))
    assert abs(g.mean() - np.euler_gamma) < 4.5 * np.pi / np.sqrt(6 * g.size)
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-4
