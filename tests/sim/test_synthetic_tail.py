"""Emulated confidence: it is what it says; and a synthetic drafter that stops by it in a stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, ModelError
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.models.emulated import LEVELS, EmulatedEngine, EmulatedProfile, parse_profile
from dsdlab.policies import load_window_policy
from dsdlab.sim.synthetic import SyntheticDrafter

TARGET = EmulatedEngine(EmulatedProfile(seed=1))
UNLIKELY = 1e-5  # no seed is drawn anew: a test fails always or never


def told(n: int, alpha: float, informed: float, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Of n positions: whether the drafter is right, and how sure it is."""
    drafter = EmulatedEngine(EmulatedProfile(seed=1, alpha=alpha, informed=informed))
    right = [TARGET.token(seed, i) == drafter.token(seed, i) for i in range(n)]
    return np.array(right), np.array([drafter.confidence(seed, i) for i in range(n)])


@pytest.mark.parametrize("informed", [0.5, 2.0, 3.0, 20.0])
@pytest.mark.parametrize("alpha", [0.2, 0.66, 0.9])
def test_it_is_calibrated(alpha: float, informed: float) -> None:
    """Where it says p it is right with p, in every bin; on the whole with alpha."""
    n = 40_000
    right, sure = told(n, alpha, informed)
    assert stats.binomtest(int(right.sum()), n, alpha).pvalue > UNLIKELY
    for low in np.arange(0.0, 1.0, 0.1):
        here = (sure >= low) & (sure < low + 0.1) | (low > 0.85) & (sure == 1.0)
        if here.sum() > 200:
            mean, p = right[here].mean(), sure[here].mean()
            assert abs(mean - p) < 4.5 * np.sqrt(p * (1 - p) / here.sum()) + 1e-3, low


@pytest.mark.parametrize("informed", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("alpha", [0.2, 0.66, 0.9])
def test_its_levels_are_the_beta_distributions(alpha: float, informed: float) -> None:
    engine = EmulatedEngine(EmulatedProfile(alpha=alpha, informed=informed))
    levels = np.array(engine._levels)
    assert len(levels) == LEVELS
    assert levels.min() >= 0.0
    assert levels.max() <= 1.0
    assert levels.mean() == pytest.approx(alpha, abs=1e-3)
    beta = stats.beta(informed * alpha, informed * (1 - alpha))
    assert levels.std() == pytest.approx(beta.std(), rel=0.02)
    cuts = np.linspace(0.05, 0.95, 10)
    shares = np.searchsorted(np.sort(levels), cuts) / LEVELS
    assert np.abs(shares - beta.cdf(cuts)).max() < 0.02


def test_the_smaller_the_better_it_knows() -> None:
    spread = [told(4000, 0.7, informed)[1].std() for informed in (0.5, 2.0, 10.0, 1e4)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.01


def test_positions_are_independent() -> None:
    right, sure = told(40_000, 0.7, 2.0)
    for lag in (1, 2, 5):
        assert abs(np.corrcoef(right[:-lag], right[lag:])[0, 1]) < 0.025
        assert abs(np.corrcoef(sure[:-lag], sure[lag:])[0, 1]) < 0.025
    assert np.corrcoef(sure, told(40_000, 0.7, 2.0, seed=6)[1])[0, 1] == pytest.approx(0.0, abs=0.025)
    assert np.corrcoef(right, sure)[0, 1] > 0.4


@given(st.integers(0, 2**63), st.integers(0, 999), st.floats(0.0, 1.0), st.sampled_from([0.0, 20.0, 500.0]))
def test_uninformed_is_what_it_was(seed: int, sampling_seed: int, alpha: float, persist: float) -> None:
    """No bit of a token comes from the levels: with none, every seed's text stays the same."""
    if persist and persist * (1 - alpha) < 1.0:
        persist = 0.0
    plain = EmulatedEngine(EmulatedProfile(seed=seed, alpha=alpha, persist=persist))
    zero = EmulatedEngine(EmulatedProfile(seed=seed, alpha=alpha, persist=persist, informed=0.0))
    tokens = [plain.token(sampling_seed, i) for i in range(40)]
    assert tokens == [zero.token(sampling_seed, i) for i in range(40)]
    assert {zero.confidence(sampling_seed, i) for i in range(40)} == {alpha}
    right = [EmulatedEngine(EmulatedProfile(seed=seed)).token(sampling_seed, i) for i in range(40)]
    informed = EmulatedEngine(EmulatedProfile(seed=seed, alpha=alpha, informed=2.0))
    # an informed drafter errs elsewhere, never otherwise: its right and wrong tokens are the same two
    wrong = EmulatedEngine(EmulatedProfile(seed=seed, alpha=0.0))
    for i in range(40):
        assert informed.token(sampling_seed, i) in (right[i], wrong.token(sampling_seed, i))


def test_the_uninformed_tokens_are_these() -> None:
    """Pinned beside `test_the_tokens_are_these`: by a profile's text, with the field given."""
    engine = EmulatedEngine(parse_profile("alpha=0.7,persist=8,seed=3,informed=0"))
    assert [engine.token(9, i) for i in range(8)] == [803, 658, 522, 391, 426, 74, 256, 834]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_where_there_is_nothing_to_know(alpha: float) -> None:
    right, sure = told(500, alpha, 3.0)
    assert right.all() == alpha
    assert set(sure) == {alpha}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("informed=-1", "informed is -1.0; allowed: 0 to 1e6"),
        ("informed=nan", "informed is nan; allowed: 0 to 1e6"),
        ("informed=1e7", "allowed: 0 to 1e6"),
        ("alpha=0.5,informed=2,persist=5", "informed is 2 with persist or accepts; allowed: one of them"),
    ],
)
def test_bad_values(spec: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        parse_profile(spec)
    assert "\n" not in str(error.value)


def test_it_tells_the_position_that_it_says() -> None:
    engine = EmulatedEngine(EmulatedProfile(alpha=0.6, informed=2.0), wait=lambda _: None)
    slot = engine.open()
    token, sure = engine.choose_surely(Chunk(slot, [1, 2, 3], 1), Sampling(seed=4))
    assert (token, sure) == (engine.token(4, 3), engine.confidence(4, 3))


class Side:
    """A drafter and its forwards."""

    def __init__(self, kind: type[ModelDrafter] | type[SyntheticDrafter]) -> None:
        self.forwards: list[tuple[int, int, int, int]] = []
        profile = EmulatedProfile(seed=1, alpha=0.7, informed=1.0)
        engine = EmulatedEngine(profile, max_context=64, charge=lambda *f: self.forwards.append(f))
        self.drafter: Drafter = kind(engine)
        self.slot = self.drafter.open()


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.booleans()), max_size=30),
    st.builds(Sampling, temperature=st.sampled_from([0.0, 0.8]), seed=st.integers(0, 99)),
)
def test_the_threshold_in_a_stream(steps: list[tuple[int, int, bool]], sampling: Sampling) -> None:
    """Windows that end where the drafter is unsure, tails, commits and mismatches: the same on both sides."""
    model, synthetic = Side(ModelDrafter), Side(SyntheticDrafter)
    goes_on = load_window_policy("threshold", 8).goes_on
    ids, tail = [3, 1, 4], list[int]()
    for n, commits, stops in steps:
        said = []
        for side in (model, synthetic):
            rule = goes_on if stops else None
            out = side.drafter.propose(side.slot, ids, n, sampling, tail, rule)
            said.append((out, list(side.drafter.by_model), list(side.drafter.confidences)))
        assert said[0] == said[1]
        assert model.forwards == synthetic.forwards
        assert len(said[0][2]) == (len(said[0][0]) if stops else 0)
        tail += said[0][0]
        for _ in range(commits):
            true = TARGET.token(sampling.seed, len(ids))
            ids.append(true)
            tail = tail[1:] if tail and tail[0] == true else []
