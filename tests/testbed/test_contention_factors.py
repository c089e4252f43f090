"""How slowdowns are reckoned from the steps of two nodes, round by round."""

from __future__ import annotations

import random

import pytest

from dsdlab.models.measures import Measures, Sample
from testbed.contention import Factor, _times

Rounds = list[dict[int, list[float]]]


def rounds(seconds: dict[int, float], noise: float, seed: int, drift: list[float] | None = None) -> Rounds:
    """Six of 25 steps of each row count. drift: by how much each is slower for whoever computes."""
    rng = random.Random(seed)
    return [
        {n: [s * slower * rng.lognormvariate(0.0, noise) for _ in range(25)] for n, s in seconds.items()}
        for slower in drift or [1.0] * 6
    ]


def test_the_factor_comes_back_though_the_machine_drifts() -> None:
    drift = [1.0, 1.4, 0.8, 1.1, 1.2, 0.9]
    alone = rounds({1: 0.02, 4: 0.022, 8: 0.025}, 0.02, 1, drift)
    beside = rounds({1: 0.023, 4: 0.0253, 8: 0.02875}, 0.02, 2, drift)
    factor = Factor.of(alone, beside)
    assert factor is not None
    assert factor.low < 1.15 < factor.high
    assert factor.high - factor.low < 0.03
    assert factor.rounds == 6
    assert factor.by_rows == pytest.approx({1: 1.15, 4: 1.15, 8: 1.15}, abs=0.03)
    assert factor.told == factor.value


def test_by_hand() -> None:
    """Two rounds of 2 and 8: the geometric mean is 4; Student's t for one degree of freedom is 12.7."""
    factor = Factor.of([{1: [1.0] * 3}] * 2, [{1: [2.0] * 3}, {1: [8.0] * 3}])
    assert factor is not None
    assert factor.value == pytest.approx(4.0)
    assert factor.high == pytest.approx(4.0 * 2.0**12.7062, rel=1e-3)
    assert factor.low == pytest.approx(4.0 / 2.0**12.7062, rel=1e-3)
    assert factor.told == 1.0  # nobody can tell


def test_row_counts_weigh_the_same() -> None:
    alone = [{1: [1.0] * 90, 8: [1.0] * 3}] * 2
    beside = [{1: [1.0] * 90, 8: [4.0] * 3}] * 2
    factor = Factor.of(alone, beside)
    assert factor is not None
    assert factor.value == pytest.approx(2.0)
    assert factor.by_rows == pytest.approx({1: 1.0, 8: 4.0})


def test_noise_is_no_slowdown_and_too_little_is_nothing() -> None:
    alone = rounds({1: 0.02}, 0.1, 1)
    factor = Factor.of(alone, rounds({1: 0.02}, 0.1, 2))
    assert factor is not None
    assert factor.told == 1.0
    few = [{1: [1.0] * 2}] * 6
    assert Factor.of(few, few) is None
    assert Factor.of(alone[:1], alone[:1]) is None
    assert Factor.of(alone, [{4: [1.0] * 9}] * 6) is None


def test_which_steps_count() -> None:
    """The middle ones that no stranger disturbed; on a core that both nodes share, all of them, waiting and
    all."""
    steps = [Sample(1, 1, 128, 1.0 + 0.01 * n, 0.5 if n == 5 else 0.001) for n in range(10)]
    measures = Measures(model="m", forwards=steps)
    assert _times(measures, False)[1] == pytest.approx([1.009, 1.019, 1.029, 1.039, 1.059, 1.069, 1.079])
    assert _times(measures, True)[1] == pytest.approx([1.01 + 0.01 * n for n in range(8)])
