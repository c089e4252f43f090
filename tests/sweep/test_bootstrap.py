"""The bootstrap: determinism, cluster structure, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sweep import bootstrap


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=20))
def test_resampling_keeps_groups_whole(groups: list[str]) -> None:
    indices = bootstrap.resample(groups, bootstrap.generator("x"), n_boot=20)
    sizes = {g: groups.count(g) for g in groups}
    for drawn in indices:
        used = [groups[i] for i in drawn if i >= 0]
        # every drawn group brings exactly as many observations as it has
        assert all(used.count(g) % sizes[g] == 0 for g in used)
        assert sum(used.count(g) // sizes[g] for g in set(used)) == len(sizes)


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_quantile_is_numpys_without_nan(values: list[float], q: float) -> None:
    array = np.array(values)
    known = array[~np.isnan(array)]
    mine = float(bootstrap.quantile(array, q))
    if known.size:
        assert mine == pytest.approx(float(np.quantile(known, q)), rel=1e-9, abs=1e-9)
    else:
        assert math.isnan(mine)


def test_quantile_along_the_first_axis() -> None:
    table = np.array([[1.0, 10.0], [2.0, np.nan], [6.0, 30.0]])
    assert bootstrap.quantile(table, 0.5, axis=0) == pytest.approx([2.0, 20.0])


def test_intervals_are_deterministic_and_label_dependent() -> None:
    values, groups = list(np.random.default_rng(1).normal(size=30)), list(range(30))
    first = bootstrap.of_quantile(values, groups, "a")
    assert first == bootstrap.of_quantile(values, groups, "a")
    assert first.lo < first.value < first.hi
    assert (first.lo, first.hi) != (
        (other := bootstrap.of_quantile(values, groups, "b", n_boot=50)).lo,
        other.hi,
    )


def test_interval_of_the_median_covers_the_truth() -> None:
    """Nominal 95 %: of 300 samples of 25 from a skewed law, 90 to 99 % must cover its median."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        sample = rng.exponential(size=25)
        found = bootstrap.of_quantile(list(sample), list(range(25)), f"trial {trial}", n_boot=400)
        covered += found.lo <= math.log(2) <= found.hi
    assert 270 <= covered <= 297


def test_correlated_repetitions_do_not_narrow_the_interval() -> None:
    """Twenty repetitions of three prompts say little more about prompts than one repetition does."""
    rng = np.random.default_rng(3)
    values = [prompt * 10.0 + rng.normal(0, 0.1) for prompt in range(3) for _ in range(20)]
    clustered = bootstrap.of_quantile(values, [k // 20 for k in range(60)], "clustered")
    assert clustered.hi - clustered.lo > 15


def test_infinite_draws_reach_the_bounds() -> None:
    draws = np.array([-np.inf] * 10 + [1.0] * 80 + [np.inf] * 10)
    assert bootstrap.interval(draws) == (-np.inf, np.inf)
    assert bootstrap.interval(np.array([np.nan]))[0] != bootstrap.interval(np.array([np.nan]))[0]


def test_ratio_of_sums() -> None:
    found = bootstrap.of_ratio([1, 9], [10, 10], ["a", "b"], "r")
    assert (found.value, found.lo, found.hi, found.n) == (0.5, 0.1, 0.9, 20)
    assert not bootstrap.of_ratio([1, 9], [10, 10], ["a", "a"], "r").has_interval
    assert math.isnan(bootstrap.of_ratio([], [], [], "r").value)
