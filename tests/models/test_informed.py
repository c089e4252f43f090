"""The informed emulated drafter: its confidence is its chance at each position, and alpha on the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk
from dsdlab.models.drafters import ModelDrafter
from dsdlab.models.emulated import LEVELS, EmulatedEngine, EmulatedProfile
from dsdlab.policies import load_window_policy

N = 40_000
UNLIKELY = 1e-4  # p-value below which a process is not what it is said to be; the seeds are fixed
TARGET = EmulatedEngine(EmulatedProfile())


def told(alpha: float, informed: float, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, whether the target says the same) of each of N positions."""
    engine = EmulatedEngine(EmulatedProfile(alpha=alpha, informed=informed))
    confidence = np.array([engine.confidence(seed, p) for p in range(N)])
    agrees = np.array([engine.token(seed, p) == TARGET.token(seed, p) for p in range(N)])
    return confidence, agrees


CASES = [(alpha, informed) for alpha in (0.2, 0.66, 0.9) for informed in (0.5, 3.0, 50.0)]


@pytest.mark.parametrize(("alpha", "informed"), CASES)
def test_confidence_is_the_chance_of_acceptance(alpha: float, informed: float) -> None:
    """Calibrated: in each tenth of the confidences so many agree as they say."""
    confidence, agrees = told(alpha, informed)
    for part in np.array_split(np.argsort(confidence, kind="stable"), 10):
        said, hits = float(confidence[part].sum()), int(agrees[part].sum())
        spread = np.sqrt((confidence[part] * (1 - confidence[part])).sum())
        assert abs(hits - said) <= 4 * spread + 1


@pytest.mark.parametrize(("alpha", "informed"), CASES)
def test_confidences_are_beta_and_alpha_on_average(alpha: float, informed: float) -> None:
    confidence, agrees = told(alpha, informed)
    variance = alpha * (1 - alpha) / (informed + 1)
    assert confidence.mean() == pytest.approx(alpha, abs=4 * np.sqrt(variance / N) + 1e-9)
    assert confidence.var() == pytest.approx(variance, rel=0.05)
    assert abs(int(agrees.sum()) - alpha * N) <= 4 * np.sqrt(N * alpha * (1 - alpha))
    quantiles = stats.beta(informed * alpha, informed * (1 - alpha)).ppf([0.1, 0.25, 0.5, 0.75, 0.9])
    assert np.quantile(confidence, [0.1, 0.25, 0.5, 0.75, 0.9]) == pytest.approx(quantiles, abs=0.03)
    assert len(set(confidence.tolist())) <= LEVELS


@pytest.mark.parametrize("informed", [0.5, 3.0])
def test_positions_are_independent(informed: float) -> None:
    """Neither what is known nor what comes of it hangs on the position before."""
    confidence, agrees = told(0.66, informed)
    for values in (confidence, agrees.astype(float)):
        correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
        assert 2 * stats.norm.sf(abs(correlation) * np.sqrt(N)) > UNLIKELY


@given(st.integers(0, 99), st.integers(0, 5000), st.floats(0.1, 100.0))
def test_a_function_of_seeds_and_position(seed: int, position: int, informed: float) -> None:
    """In whatever order, engine and way it is asked."""
    profile = EmulatedProfile(alpha=0.7, informed=informed, seed=3)
    one, other = EmulatedEngine(profile), EmulatedEngine(profile, max_context=8192, wait=lambda _: None)
    one.confidence(seed, position + 1)
    slot = other.open()
    other.choose([Chunk(slot, [1] * position, 0)], [Sampling()])
    asked = other.choose_surely(Chunk(slot, [1], 1), Sampling(seed=seed))
    assert asked == (one.token(seed, position + 1), one.confidence(seed, position + 1))


@pytest.mark.parametrize(("alpha", "informed"), [(0.3, 0.0), (0.0, 2.0), (1.0, 2.0)])
def test_who_has_nothing_to_know_tells_alpha(alpha: float, informed: float) -> None:
    confidence, agrees = told(alpha, informed)
    assert set(confidence.tolist()) == {alpha}
    if informed:
        assert set(agrees.tolist()) == {alpha == 1.0}


def test_the_tokens_are_these() -> None:
    """Pinned: results of emulated scenarios can be compared across versions only while they stay."""
    knows = EmulatedEngine(EmulatedProfile(alpha=0.7, informed=1.0, seed=3))
    target = EmulatedEngine(EmulatedProfile(seed=3))
    assert [knows.token(9, i) for i in range(8)] == [803, 659, 521, 391, 426, 74, 255, 834]
    assert [knows.token(9, i) == target.token(9, i) for i in range(8)] == [
        True,
        False,
        True,
        True,
        True,
        False,
        True,
        False,
    ]
    assert [round(knows.confidence(9, i), 3) for i in range(8)] == pytest.approx(
        [0.932, 0.13, 1.0, 0.967, 0.974, 0.006, 1.0, 0.006]
    )


def played(policy_name: str, informed: float, tokens: int = 4000) -> tuple[int, int]:
    """Drafts and windows that a text takes with windows of at most 8."""
    profile = EmulatedProfile(alpha=0.6, informed=informed)
    engine = EmulatedEngine(profile, max_context=tokens + 16, wait=lambda _: None)
    drafter, policy = ModelDrafter(engine), load_window_policy(policy_name, 8)
    slot, sampling, ids = drafter.open(), Sampling(), [1]
    drafted = windows = 0
    while len(ids) < tokens:
        asked = policy.goes_on if policy.stops else None
        said = drafter.propose(slot, ids, policy.decide().gamma, sampling, (), asked)
        drafted, windows = drafted + len(said), windows + 1
        for draft in [*said, -1]:
            ids.append(TARGET.token(sampling.seed, len(ids)))
            if draft != ids[-1]:
                break
    return drafted, windows


def test_who_knows_its_chances_wastes_less() -> None:
    """The threshold window drafts far less for few more round trips; with nothing to go by it never stops."""
    always, always_windows = played("static", informed=1.0)
    sure, sure_windows = played("threshold", informed=1.0)
    assert sure < 0.6 * always
    assert sure_windows < 1.15 * always_windows
    assert played("threshold", informed=0.0) == played("static", informed=0.0)
