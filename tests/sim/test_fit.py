"""The fit: known costs come back out of noisy times, outliers and all; impossible times are refused."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdlab.models.measures import Drawn, Measures, Rested, Sample
from dsdlab.sim.costs import ForwardCost
from dsdlab.sim.fit import UnfitMeasures, fit_forward, fit_measures

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24)
PROMPTS = (32, 64, 128, 256, 512)


def samples_of(cost: ForwardCost, noise: float, outliers: float, seed: int, repeats: int = 9) -> list[Sample]:
    """What a calibration of a model that costs `cost` would bring: with relative noise, and a share of
    outliers that take up to four times as long."""
    rng = random.Random(seed)
    sizes = [(n, 1, 128) for n in ROWS] + [(n, 1, c) for n in (1, 3, 5) for c in (32, 384)]
    sizes += [(b * n, b, 150 * b) for b in (2, 4) for n in (1, 5)] + [(n, 1, 0) for n in PROMPTS]
    out = []
    for _ in range(repeats):
        for tokens, batch, context in sizes:
            context += rng.randrange(64) if context else 0
            late = rng.uniform(1.0, 4.0) if rng.random() < outliers else 1.0
            seconds = cost.cost_s(tokens, batch, context) * rng.gauss(1.0, noise) * late
            out.append(Sample(tokens, batch, context, seconds))
    return out


@settings(max_examples=25, deadline=None)
@given(
    base_ms=st.floats(1.0, 60.0),
    row_us=st.floats(50.0, 3000.0),
    row2_ns=st.floats(0.0, 1000.0),
    session_us=st.floats(100.0, 2000.0),
    position_us=st.floats(0.0, 20.0),
    seed=st.integers(0, 999),
)
def test_known_costs_come_back(
    base_ms: float, row_us: float, row2_ns: float, session_us: float, position_us: float, seed: int
) -> None:
    truth = ForwardCost(
        base_s=base_ms / 1e3,
        per_token_s=row_us / 1e6,
        per_token2_s=row2_ns / 1e9,
        per_session_s=session_us / 1e6,
        per_context_s=position_us / 1e6,
    )
    fit = fit_forward(samples_of(truth, noise=0.005, outliers=0.1, seed=seed))
    for tokens, batch, context in [
        (1, 1, 40),
        (1, 1, 400),
        (5, 1, 128),
        (20, 4, 640),
        (128, 1, 0),
        (512, 1, 0),
    ]:
        assert fit.cost_s(tokens, batch, context) == pytest.approx(
            truth.cost_s(tokens, batch, context), rel=0.02
        )
    assert fit.fit is not None
    assert fit.fit.error_p50 < 0.01
    assert fit.tokens == (1, 512)
    assert fit.batch == (1, 4)


def test_coefficients_are_exact_without_noise() -> None:
    truth = ForwardCost(
        base_s=0.02, per_token_s=4e-4, per_token2_s=3e-7, per_session_s=8e-4, per_context_s=5e-6
    )
    fit = fit_forward(samples_of(truth, noise=0.0, outliers=0.0, seed=1))
    for name in ("base_s", "per_token_s", "per_token2_s", "per_session_s", "per_context_s"):
        assert getattr(fit, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert fit.fit is not None
    assert fit.fit.r2 == pytest.approx(1.0)
    assert fit.residuals == pytest.approx([1.0] * 64)


def test_steps_of_kernels_become_the_remainder() -> None:
    steps = tuple((n, 0.004 * math.ceil(n / 8)) for n in range(1, 25))
    truth = ForwardCost(base_s=0.02, per_token_s=1e-4, by_rows=steps)
    samples = [s for s in samples_of(truth, noise=0.003, outliers=0.05, seed=2) if s.batch == 1]
    fit = fit_forward(samples)
    for n in (1, 8, 9, 16, 17, 24):
        assert fit.cost_s(n, 1, 128) == pytest.approx(truth.cost_s(n, 1, 128), rel=0.01)
    assert fit.fit is not None
    assert fit.fit.r2 > fit.fit.r2_line


def test_outliers_stay_in_the_residuals() -> None:
    """The form is of the usual forward; drawn residuals make a run as late on average as it was measured."""
    truth = ForwardCost(base_s=0.02, per_token_s=1e-3, per_session_s=1e-3)
    samples = samples_of(truth, noise=0.01, outliers=0.1, seed=3)
    fit = fit_forward(samples)
    ratios = [s.seconds / fit.cost_s(s.tokens, s.batch, s.context) for s in samples]
    assert np.median(ratios) == pytest.approx(1.0, abs=0.005)
    assert fmean(ratios) > 1.1
    assert fmean(fit.residuals) == pytest.approx(fmean(ratios), rel=1e-9)
    assert all(b - a > -1e-9 for a, b in pairwise(fit.residuals))
    assert len(fit.residuals) == 64


def test_what_other_work_disturbs_does_not_count() -> None:
    """Most forwards take twice as long because another process had the core, and the kernel says so."""
    truth = ForwardCost(base_s=0.02, per_token_s=1e-3, per_session_s=1e-3, per_context_s=5e-6)
    rng = random.Random(9)
    samples = [
        Sample(s.tokens, s.batch, s.context, 2 * s.seconds, s.seconds) if rng.random() < 0.7 else s
        for s in samples_of(truth, noise=0.005, outliers=0.0, seed=9, repeats=12)
    ]
    fit = fit_forward(samples)
    for tokens, batch, context in [(1, 1, 128), (5, 1, 128), (20, 4, 640), (512, 1, 0)]:
        assert fit.cost_s(tokens, batch, context) == pytest.approx(
            truth.cost_s(tokens, batch, context), rel=0.01
        )
    assert fmean(fit.residuals) == pytest.approx(1.7, rel=0.05)  # they are not forgotten
    samples = [
        Sample(s.tokens, s.batch, s.context, s.seconds * 1.5, s.seconds * 0.5)
        for s in samples_of(truth, noise=0.005, outliers=0.0, seed=9)
    ]
    assert fit_forward(samples).cost_s(5, 1, 128) == pytest.approx(truth.cost_s(5, 1, 128), rel=0.01)


def test_nothing_is_negative() -> None:
    """Times that fall with the context get no coefficient for it, not a negative one."""
    samples = [Sample(n, 1, c, 0.02 + 1e-3 * n - 1e-6 * c) for n in ROWS for c in (32, 128, 384)]
    fit = fit_forward(samples)
    assert fit.per_context_s == 0.0
    fit.check("cloud.target")


def test_rests_are_told_apart_and_fade() -> None:
    truth = ForwardCost(base_s=0.002, per_token_s=1e-4)
    fade = 0.6

    def after(idle_s: float | None, extra_s: float) -> Rested:
        return Rested(
            idle_s,
            [Sample(1, 1, 128, truth.cost_s(1, 1, 128) + extra_s * fade**k) for k in range(6)],
        )

    measures = Measures(
        model="m",
        forwards=samples_of(truth, noise=0.0, outliers=0.0, seed=4),
        rested=[after(None, 1e-3), after(0.02, 5e-4), after(0.1, 2e-3), after(0.05, 4e-4), after(None, 1e-3)],
        drawn=[Drawn(1, 0.0020, 0.0022), Drawn(5, 0.0024, 0.0034), Drawn(5, 0.0024, 0.1)],
    )
    cost = fit_measures(measures)
    assert cost.first_s == pytest.approx(1e-3, rel=1e-3)
    assert cost.fade == pytest.approx(fade, abs=0.01)
    times, extras = zip(*cost.after_idle, strict=True)
    assert times == (0.02, 0.05, 0.1)
    assert extras == pytest.approx((4.5e-4, 4.5e-4, 2e-3), rel=1e-2)  # a longer rest warms nothing
    assert cost.per_drawn_s == pytest.approx(2e-4)
    cost.check("edge.drafter")


def test_a_model_that_never_rests_has_no_extras() -> None:
    truth = ForwardCost(base_s=0.002)
    cost = fit_measures(Measures(model="m", forwards=samples_of(truth, noise=0.0, outliers=0.0, seed=5)))
    assert (cost.first_s, cost.after_idle, cost.fade, cost.per_drawn_s) == (0.0, (), 0.0, 0.0)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (Sample(1, 1, 0, float("nan")), "a forward of 1 rows took nan s; allowed: above 0"),
        (Sample(2, 1, 0, -0.1), "took -0.1 s"),
        (Sample(2, 1, 0, 0.0), "took 0.0 s"),
        (Sample(1, 2, 0, 0.1), "1 rows of 2 sessions"),
        (Sample(1, 1, -1, 0.1), "at -1; allowed"),
    ],
)
def test_impossible_times_are_refused(bad: Sample, word: str) -> None:
    samples = samples_of(ForwardCost(base_s=0.01), noise=0.0, outliers=0.0, seed=6)
    with pytest.raises(UnfitMeasures, match=f"^some model: .*{word}"):
        fit_forward([*samples, bad], "some model")


def test_too_few_are_refused() -> None:
    with pytest.raises(UnfitMeasures, match="m: 3 measurements; needed: 8 or more"):
        fit_measures(Measures(model="m", forwards=[Sample(1, 1, 0, 0.1)] * 3))
