"""Judges of a sampling scheme: is its output law the target's? Used on right schemes and on wrong ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]
Prefix = tuple[int, ...]
Model = Callable[[Prefix], FloatArray]
"""Probabilities [V] of the next token after a prefix."""
Step = Callable[[FloatArray, FloatArray, int, float, float], int]
"""(p, reported q, draft, u_accept, u_residual) → committed token; accepted if it is the draft."""

_PROBES = [(i + 0.5) / 8 for i in range(8)]
_TOP = 1.0 - 2.0**-53


def _edge(low: float, high: float, same_as_low: Callable[[float], bool]) -> float:
    """The place in (low, high] where a step function leaves its value at `low`, to the last bit."""
    for _ in range(56):
        middle = (low + high) / 2
        if same_as_low(middle):
            low = middle
        else:
            high = middle
    return high


def residual_law(step: Step, p: FloatArray, q: FloatArray, draft: int, u_accept: float) -> FloatArray:
    """The law [V] of the committed token over a uniform u_residual, by walking its steps."""
    law = np.zeros(len(p))
    at = 0.0
    while True:
        token = step(p, q, draft, u_accept, at)
        if step(p, q, draft, u_accept, _TOP) == token:
            law[token] += 1.0 - at
            return law
        end = _edge(at, _TOP, lambda u, token=token: step(p, q, draft, u_accept, u) == token)
        law[token] += end - at
        at = end


def step_law(step: Step, p: FloatArray, q: FloatArray, draft: int) -> tuple[float, FloatArray]:
    """(probability that `draft` stands, law [V] of the token when it does not), integrated exactly."""
    laws = [residual_law(step, p, q, draft, u) for u in (0.0, _TOP)]
    if np.array_equal(laws[0], laws[1]):
        accept, rejected = laws[0][draft], laws[0].copy()
    else:  # one edge in u_accept: below it the draft stands
        at_zero = [step(p, q, draft, 0.0, u) for u in _PROBES]
        edge = _edge(0.0, _TOP, lambda u: [step(p, q, draft, u, probe) for probe in _PROBES] == at_zero)
        accept = edge * laws[0][draft] + (1.0 - edge) * laws[1][draft]
        rejected = edge * laws[0] + (1.0 - edge) * laws[1]
    rejected[draft] = 0.0
    return accept, rejected


def output_law(
    p_of: Model, q_of: Model, reported: Model, step: Step, gamma: int, length: int
) -> dict[Prefix, float]:
    """The exact joint law of the first `length` committed tokens: windows of γ drafts, bonus from p.

    Drafts are drawn from q_of, the verifier is told `reported`. Every branch is followed; nothing is
    sampled.
    """
    law: dict[Prefix, float] = {}
    steps: dict[tuple[Prefix, int], tuple[float, FloatArray]] = {}

    def commit(prefix: Prefix, probability: float, left: int) -> None:
        if probability == 0.0:
            return
        if len(prefix) == length:
            law[prefix] = law.get(prefix, 0.0) + probability
            return
        p = p_of(prefix)
        if left == 0:
            for token in np.flatnonzero(p):
                commit((*prefix, int(token)), probability * p[token], gamma)
            return
        q, told = q_of(prefix), reported(prefix)
        for draft in np.flatnonzero(q):
            key = (prefix, int(draft))
            if key not in steps:
                steps[key] = step_law(step, p, told, int(draft))
            accept, rejected = steps[key]
            commit((*prefix, int(draft)), probability * q[draft] * accept, left - 1)
            for token in np.flatnonzero(rejected):
                commit((*prefix, int(token)), probability * q[draft] * rejected[token], gamma)

    commit((), 1.0, gamma)
    return law


def largest_error(law: dict[Prefix, float], p_of: Model, vocab_size: int, length: int) -> float:
    """max |law(x) − Π p(xᵢ | x₁ … xᵢ₋₁)| over every sequence x of `length` tokens."""
    worst = 0.0
    for x in itertools.product(range(vocab_size), repeat=length):
        expected = 1.0
        for i, token in enumerate(x):
            expected *= p_of(x[:i])[token]
        worst = max(worst, abs(law.get(x, 0.0) - expected))
    return worst


def fits(counts: npt.NDArray[np.int64], p: FloatArray, level: float = 1e-4) -> bool:
    """Chi-square: could these counts [V] be draws from p [V]? False at a p-value below `level`."""
    if counts[p == 0.0].any():
        return False
    expected = p[p > 0.0] * counts.sum()
    assert expected.min() > 5, "too few draws for a chi-square"
    return bool(stats.chisquare(counts[p > 0.0], expected).pvalue > level)


def tables(seed: int, vocab_size: int, sharpness: float, zeros: bool) -> Model:
    """A random next-token distribution for every prefix; with `zeros` some tokens are impossible."""

    def model(prefix: Prefix) -> FloatArray:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        p = np.exp(rng.normal(0, sharpness, vocab_size))
        if zeros:
            p[rng.integers(vocab_size)] = 0.0
        out: FloatArray = p / p.sum()
        return out

    return model
