"""What two nodes on one machine cost each other: the target's steps while the edge drafts, and the reverse.

Each node, as deployed (in its process, on its cores, with its threads), does steps without a rest: alone, and
while the other one does. Several rounds, in each of which the order is drawn, so that a machine whose speed
drifts drifts for all alike. A factor is the geometric mean over rounds and row counts of beside/alone, each a
median of steps; it is 1 where its interval holds 1.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

import msgspec

from dsdlab.models.measures import Measures, Sample
from dsdlab.sim.costs import Contention
from testbed.controller import Testbed

__all__ = ["Factor", "measure_contention"]

ROUNDS = 8
EACH_S = 0.8  # of a node's steps, alone or beside
WARM = 0.1  # of the steps, at either end: for warming up, and for who begins or ends first
LEAST_STEPS = 3  # of a row count in a round, or it does not count
PATIENCE_S = 120.0
CONFIDENCE = 0.95

Times = Mapping[int, Sequence[float]]
"""Seconds of single steps, by rows."""


class Factor(msgspec.Struct, frozen=True):
    """How many times longer steps take beside than alone. low, high: the interval in which it lies with a
    probability of 95 %, for rounds that differ by chance. by_rows: the same of single row counts."""

    value: float
    low: float
    high: float
    rounds: int
    by_rows: dict[int, float]

    @classmethod
    def of(cls, alone: Sequence[Times], beside: Sequence[Times]) -> Factor | None:
        """Of steps round by round; None of fewer than two rounds.

        The interval is Student's for the mean of the rounds' logarithms.
        """
        from scipy.stats import t  # half a second that few need

        rounds: list[dict[int, float]] = []  # logarithms of beside/alone, by rows
        for one, other in zip(alone, beside, strict=True):
            rows = {n for n in one if min(len(one[n]), len(other.get(n, ()))) >= LEAST_STEPS}
            if rows:
                rounds.append({n: math.log(median(other[n]) / median(one[n])) for n in rows})
        if len(rounds) < 2:
            return None
        means = [fmean(r.values()) for r in rounds]
        value = fmean(means)
        half = float(t.ppf((1 + CONFIDENCE) / 2, len(means) - 1)) * stdev(means) / math.sqrt(len(means))
        by_rows = {
            n: math.exp(fmean(r[n] for r in rounds if n in r)) for n in sorted({n for r in rounds for n in r})
        }
        return cls(math.exp(value), math.exp(value - half), math.exp(value + half), len(means), by_rows)

    @property
    def told(self) -> float:
        """For the simulator: 1 where slower and no slower cannot be told apart."""
        return self.value if self.low > 1.0 else 1.0


async def measure_contention(bed: Testbed, seed: int = 0) -> tuple[Contention, dict[str, Any]]:
    """The factors, and what was measured, for provenance; nothing where the drafter is no model.

    Takes some twenty seconds, during which no session may be under way. Raises what a bed raises.
    """
    rng = random.Random(seed)
    same_core = bool(set(bed.cpus.verifier) & set(bed.cpus.drafter))
    alone: dict[str, list[Measures]] = {"target": [], "drafter": []}
    beside: dict[str, list[Measures]] = {"target": [], "drafter": []}
    for _ in range(ROUNDS):
        for phase in rng.sample((("target",), ("drafter",), ("target", "drafter")), 3):
            found = await asyncio.gather(*(_steps(bed, model) for model in phase))
            into = alone if len(phase) == 1 else beside
            for model, measures in zip(phase, found, strict=True):
                if measures is None:
                    return Contention(), {}
                into[model].append(measures)
    factors: dict[str, float] = {}
    told: dict[str, Any] = {}
    for model in ("target", "drafter"):
        one, other = ([_times(m, same_core) for m in kept[model]] for kept in (alone, beside))
        factor = Factor.of(one, other)
        if factor is None:
            continue
        factors[model] = max(factor.told, 1.0)
        told[model] = {
            "factor": factor.value,
            "interval": [factor.low, factor.high],
            "rounds": factor.rounds,
            "by_rows": {str(n): value for n, value in factor.by_rows.items()},
            "alone_p50_s": {str(n): median(s for r in one for s in r.get(n, ())) for n in factor.by_rows},
            "disturbed": fmean(m.disturbed for m in alone[model] + beside[model]),
        }
    return Contention(**factors), told


async def _steps(bed: Testbed, model: str) -> Measures | None:
    node = bed.verifier if model == "target" else bed.edge(0)
    ask = {"op": "calibrate", "steps_of": model, "steps_s": EACH_S}
    answer = await node.request(ask, EACH_S + PATIENCE_S)
    return msgspec.convert(answer["measures"], dict[str, Measures]).get(model)


def _times(measures: Measures, same_core: bool) -> dict[int, list[float]]:
    """By rows the seconds of the steps in the middle. Those during which strangers had the core are left out,
    except where the other node has the same core: then waiting is just what is asked about."""
    steps: Sequence[Sample] = measures.forwards
    cut = math.ceil(WARM * len(steps))
    out: dict[int, list[float]] = {}
    for step in steps[cut : len(steps) - cut]:
        if same_core or not step.disturbed:
            out.setdefault(step.tokens, []).append(step.seconds if same_core else step.own_s)
    return out
