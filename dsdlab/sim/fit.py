"""From single measurements to the forms of `dsdlab.sim.costs`.

The straight line is a non-negative least-squares fit (Lawson and Hanson, "Solving Least Squares Problems",
1974) of relative errors, reweighted until outliers have no say (iteratively reweighted least squares with
Tukey's biweight; Holland and Welsch, 1977). What is left at each row count becomes `by_rows`, by medians. A
forward during which other work had the core counts only where there is no other of its size, and then without
the time that it waited. All of them, and all outliers, are in the residuals, whose mean is that of all
measurements: a simulated run is as late on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from dsdlab.models.measures import Drawn, Measures, Rested, Sample
from dsdlab.sim.costs import ForwardCost, Goodness

__all__ = ["UnfitMeasures", "fit_forward", "fit_measures"]

Array = npt.NDArray[np.float64]

LEAST_SAMPLES = 8
RESIDUALS = 64
ROUNDS = 30
BIWEIGHT = 4.685  # 95 % as efficient as least squares where errors are normal
MAX_FADE = 0.95


class UnfitMeasures(ValueError):
    """Measurements from which nothing can be fitted; one line for the user."""


def fit_measures(measures: Measures) -> ForwardCost:
    """All that was measured of a model as one form. Raises UnfitMeasures."""
    cost = fit_forward(measures.forwards, measures.model)
    cost = msgspec.structs.replace(cost, per_drawn_s=_per_drawn_s(measures.drawn))
    return _with_rests(cost, measures.rested)


def fit_forward(samples: Sequence[Sample], what: str = "measurements") -> ForwardCost:
    """The form of a model that has just run. Raises UnfitMeasures for times that are none, or too few."""
    _check(samples, what)
    known = _undisturbed(samples)
    columns = _columns(known)  # [N, 5]
    times = np.array([s.seconds for s in known])  # [N]
    coefficients = _robust_line(columns, times)
    knots = _by_rows(known, times - columns @ coefficients)
    base_s, per_token_s, per_token2_s, per_session_s, per_context_s = map(float, coefficients)
    cost = ForwardCost(
        base_s=base_s,
        per_token_s=per_token_s,
        per_token2_s=per_token2_s,
        per_session_s=per_session_s,
        per_context_s=per_context_s,
        by_rows=knots,
        tokens=_range(s.tokens for s in samples),
        batch=_range(s.batch for s in samples),
        context=_range(s.context // s.batch for s in samples),
    )
    every = np.array([s.seconds for s in samples])
    fitted = np.array([cost.cost_s(s.tokens, s.batch, s.context) for s in samples])
    if not (fitted > 0.0).all():
        raise UnfitMeasures(
            f"{what}: the fit gives a forward no time at all; measured times scatter too much"
        )
    counted = np.array([cost.cost_s(s.tokens, s.batch, s.context) for s in known])
    errors = np.abs(counted / times - 1.0)
    goodness = Goodness(
        n=len(samples),
        r2=_r2(times, counted),
        r2_line=_r2(times, columns @ coefficients),
        error_p50=float(np.quantile(errors, 0.5)),
        error_p95=float(np.quantile(errors, 0.95)),
    )
    return msgspec.structs.replace(cost, residuals=_shares(every / fitted), fit=goodness)


def _check(samples: Sequence[Sample], what: str) -> None:
    if len(samples) < LEAST_SAMPLES:
        raise UnfitMeasures(f"{what}: {len(samples)} measurements; needed: {LEAST_SAMPLES} or more")
    for s in samples:
        if not 0.0 < s.seconds < 3600.0:  # NaN fails too
            raise UnfitMeasures(
                f"{what}: a forward of {s.tokens} rows took {s.seconds!r} s; allowed: above 0 and below 3600"
            )
        if s.tokens < 1 or not 1 <= s.batch <= s.tokens or s.context < 0:
            raise UnfitMeasures(
                f"{what}: {s.tokens} rows of {s.batch} sessions at {s.context}; "
                "allowed: rows ≥ sessions ≥ 1, positions ≥ 0"
            )


def _undisturbed(samples: Sequence[Sample]) -> list[Sample]:
    """Those of each size during which nothing else had the core; where there are none, all of that size,
    without the time that they waited for it."""
    quiet = {(s.tokens, s.batch) for s in samples if not s.disturbed}
    out = []
    for s in samples:
        if not s.disturbed:
            out.append(s)
        elif (s.tokens, s.batch) not in quiet:
            out.append(Sample(s.tokens, s.batch, s.context, s.own_s))
    return out


def _columns(samples: Sequence[Sample]) -> Array:
    """[N, 5], one for each coefficient of the line."""
    sizes = np.array([(s.tokens, s.batch, s.context) for s in samples], dtype=np.float64)
    n, batch, context = sizes.T
    return np.stack([np.ones_like(n), n, n * n, batch - 1.0, context], axis=1)


def _robust_line(columns: Array, times: Array) -> Array:
    """Non-negative coefficients [5] that make most relative errors small, whatever the others are."""
    scale = columns.max(axis=0)
    scale[scale == 0.0] = 1.0  # what never varied gets no coefficient
    relative = columns / scale / times[:, None]  # errors are relative: the right side is 1
    weights = _weights(_against_medians(columns, times))
    solution: Array = np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        found, _ = nnls(relative * root[:, None], root)
        moved = np.abs(found - solution).max()
        solution = found
        if moved <= 1e-9 * np.abs(found).max():
            break
        weights = _weights(relative @ solution - 1.0)
    coefficients: Array = solution / scale
    return coefficients


def _against_medians(columns: Array, times: Array) -> Array:
    """Relative distance of each measurement to the median of those with its rows and sessions."""
    keys = [(float(row[1]), float(row[3])) for row in columns]
    groups: dict[tuple[float, float], list[float]] = {}
    for key, seconds in zip(keys, times, strict=True):
        groups.setdefault(key, []).append(float(seconds))
    middles = {key: median(group) for key, group in groups.items()}
    return np.array([s / middles[key] - 1.0 for key, s in zip(keys, times, strict=True)])


def _weights(errors: Array) -> Array:
    """Tukey's biweight of relative errors [N]; the scale is their median absolute size."""
    scale = max(1.4826 * float(np.median(np.abs(errors))), 1e-6)
    u = np.clip(errors / (BIWEIGHT * scale), -1.0, 1.0)
    weights: Array = np.asarray(np.square(1.0 - u * u), dtype=np.float64)
    return weights


def _by_rows(samples: Sequence[Sample], remainder: Array) -> tuple[tuple[int, float], ...]:
    """The median remainder of one session's forwards at each row count."""
    found: dict[int, list[float]] = {}
    for s, extra_s in zip(samples, remainder, strict=True):
        if s.batch == 1:
            found.setdefault(s.tokens, []).append(float(extra_s))
    return tuple((n, median(found[n])) for n in sorted(found))


def _range(values: Iterable[int]) -> tuple[int, int]:
    known = list(values)
    return min(known), max(known)


def _r2(times: Array, fitted: Array) -> float:
    """Explained share of the variance, errors relative to what was measured (weights 1/t²)."""
    weights = times**-2.0
    mean = float((weights * times).sum() / weights.sum())
    total = float((weights * (times - mean) ** 2).sum())
    left = float((weights * (times - fitted) ** 2).sum())
    return 1.0 - left / total if total > 0.0 else 0.0


def _shares(ratios: Array) -> tuple[float, ...]:
    """Means of equal shares of the sorted ratios; a ratio on a border counts in both, in parts."""
    shares = min(RESIDUALS, ratios.size)
    sums = np.concatenate([[0.0], np.cumsum(np.sort(ratios))])
    borders = np.linspace(0.0, ratios.size, shares + 1)
    parts = np.diff(np.interp(borders, np.arange(ratios.size + 1), sums))
    return tuple(float(part) * shares / ratios.size for part in parts)


def _per_drawn_s(drawn: Sequence[Drawn]) -> float:
    """What drawing a row's token takes beyond choosing it greedily."""
    return max(0.0, median((d.drawn_s - d.greedy_s) / d.rows for d in drawn)) if drawn else 0.0


def _with_rests(cost: ForwardCost, rested: Sequence[Rested]) -> ForwardCost:
    """The extras after another model and after idle times, and how they fade over the next forwards."""
    rests: dict[float | None, list[Rested]] = {}
    for rest in rested:
        rests.setdefault(rest.idle_s, []).append(rest)
    extras = {idle_s: _extras(cost, rests[idle_s]) for idle_s in rests}
    other = extras.pop(None, [])
    times = sorted(idle_s for idle_s, found in extras.items() if idle_s is not None and found)
    idle = _rising([(extras[idle_s][0], len(rests[idle_s])) for idle_s in times])
    rows = [found for found in (other, *extras.values()) if len(found) > 1]
    return msgspec.structs.replace(
        cost,
        first_s=max(0.0, other[0]) if other else 0.0,
        after_idle=tuple((idle_s, max(0.0, extra_s)) for idle_s, extra_s in zip(times, idle, strict=True)),
        fade=_fade([fmean(column) for column in zip(*rows, strict=False)]),
    )


def _rising(values: Sequence[tuple[float, int]]) -> list[float]:
    """The nearest values that never fall (a longer rest warms nothing), by pooling adjacent violators
    (Ayer et al., 1955). values: (value, weight)."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, how many
    for value, weight in values:
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [mean for mean, _, many in pools for _ in range(many)]


def _extras(cost: ForwardCost, rested: Sequence[Rested]) -> list[float]:
    """Median extra of each forward in a row, seconds."""
    length = min((len(rest.forwards) for rest in rested), default=0)
    out = []
    for at in range(length):
        known = _undisturbed([rest.forwards[at] for rest in rested])
        out.append(median(f.seconds - cost.cost_s(f.tokens, f.batch, f.context) for f in known))
    return out


def _fade(extras: Sequence[float]) -> float:
    """The fade that gives all forwards of a row together the extra that they had together."""
    if not extras or extras[0] <= 0.0:
        return 0.0
    wanted = sum(extras) / extras[0]
    low, high = 0.0, MAX_FADE
    if wanted <= 1.0:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2.0
        if math.fsum(middle**k for k in range(len(extras))) < wanted:
            low = middle
        else:
            high = middle
    return low
