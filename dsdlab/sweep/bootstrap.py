"""Percentile bootstrap over prompts and repetitions.

Generations of one prompt resemble each other, so prompts are resampled first and repetitions within
each drawn prompt second. The same seed and label always give the same interval.
Source: Davison & Hinkley, "Bootstrap Methods and their Application" (1997), sections 3.8 and 5.3.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

N_BOOT = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of `n` observations with its interval; lo and hi are NaN where n < 2."""

    value: float
    lo: float
    hi: float
    n: int

    @property
    def has_interval(self) -> bool:
        return not (np.isnan(self.lo) or np.isnan(self.hi))


def generator(label: str, seed: int = 0) -> np.random.Generator:
    """The random stream of one estimate: it depends on the label, not on the order of evaluation."""
    return np.random.default_rng([seed, zlib.crc32(label.encode())])


def resample(groups: Sequence[Hashable], rng: np.random.Generator, n_boot: int = N_BOOT) -> Ints:
    """Indices of `n_boot` resampled data sets, [n_boot, slots]; -1 marks an unused slot.

    groups: the group (prompt) of each observation; must not be empty.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    sizes = np.array([len(m) for m in members.values()])
    widest = int(sizes.max())
    table = np.full((len(sizes), widest), -1, dtype=np.int64)
    for row, indices in enumerate(members.values()):
        table[row, : len(indices)] = indices
    drawn = rng.integers(len(sizes), size=(n_boot, len(sizes)))  # groups, [n_boot, groups]
    within = (rng.random((*drawn.shape, widest)) * sizes[drawn][..., None]).astype(np.int64)
    picked = table[drawn[..., None], within]  # [n_boot, groups, widest]
    picked[np.arange(widest) >= sizes[drawn][..., None]] = -1
    return np.asarray(picked.reshape(n_boot, -1), dtype=np.int64)


def take(values: Floats, indices: Ints) -> Floats:
    """values[indices], NaN in unused slots; values [n] or [n, k] → [..., slots] or [..., slots, k]."""
    taken = values[indices].astype(np.float64)
    taken[indices < 0] = np.nan
    return taken


def quantile(values: Floats, q: float, axis: int = -1) -> Floats:
    """Linear-interpolation quantile that ignores NaN, along one axis; NaN where nothing is left."""
    ordered = np.sort(np.moveaxis(values, axis, -1), axis=-1)  # NaN last
    count = np.sum(~np.isnan(ordered), axis=-1)
    place = np.maximum(count - 1, 0) * q
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0))
    below = np.take_along_axis(ordered, low[..., None], axis=-1)[..., 0]
    above = np.take_along_axis(ordered, high[..., None], axis=-1)[..., 0]
    return np.asarray(below + (above - below) * (place - low), dtype=np.float64)


def interval(draws: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The central interval of bootstrap draws; order statistics, so ±infinity is allowed; NaN is ignored."""
    ordered = np.sort(draws[~np.isnan(draws)])
    if not ordered.size:
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    last = ordered.size - 1
    return float(ordered[round(tail * last)]), float(ordered[round((1.0 - tail) * last)])


def of_quantile(
    values: Sequence[float], groups: Sequence[Hashable], label: str, q: float = 0.5, n_boot: int = N_BOOT
) -> Estimate:
    """The q-quantile of the values (the median by default) with its interval."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    value = float(quantile(array, q))
    if array.size < 2:
        return Estimate(value, float("nan"), float("nan"), int(array.size))
    draws = quantile(take(array, resample(groups, generator(label), n_boot)), q)
    return Estimate(value, *interval(draws), int(array.size))


def of_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[Hashable],
    label: str,
    n_boot: int = N_BOOT,
) -> Estimate:
    """Σ numerators / Σ denominators with its interval; only whole groups are resampled.

    `n` is the sum of the denominators. The interval is NaN with fewer than two groups.
    """
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    above, below = np.zeros(len(order)), np.zeros(len(order))
    for group, top, bottom in zip(groups, numerators, denominators, strict=True):
        above[order[group]] += top
        below[order[group]] += bottom
    total = float(below.sum())
    if total == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    value = float(above.sum()) / total
    if len(order) < 2:
        return Estimate(value, float("nan"), float("nan"), round(total))
    drawn = generator(label).integers(len(order), size=(n_boot, len(order)))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    return Estimate(value, *interval(draws), round(total))
