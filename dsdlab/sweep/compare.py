"""A sweep held against its simulation and the closed form: signed errors of every cell.

Measured and predicted medians are over the same generations. The closed form is fed with costs and acceptance
of the very runs that it is held against (see `dsdlab.sweep.closed_form`); the simulator has not seen them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.sim.prediction import PredictedCell, PredictedGeneration, Prediction
from dsdlab.sweep import bootstrap
from dsdlab.sweep.bootstrap import Estimate
from dsdlab.sweep.breakeven import Pair, Tpots
from dsdlab.sweep.closed_form import Inputs, closed_form_inputs, plain_conditions
from dsdlab.sweep.comparison import (
    Compared,
    ComparedCell,
    Comparison,
    WindowsDiffer,
    comparison_json,
)
from dsdlab.sweep.exclusions import counted_rows, describe_cell
from dsdlab.sweep.keys import Condition, Variant, condition_of, pair_of, variant_of
from dsdlab.sweep.rows import Row
from dsdlab.sweep.simulated import CompareError, cell_row, middle_ms, prediction_rows
from dsdlab.sweep.stats import cell_summary

__all__ = ["CompareError", "Comparison", "compare", "comparison_json", "prediction_rows"]

SHOWN = 5
NOTHING = Estimate(math.nan, math.nan, math.nan, 0)

Key = tuple[int, str, int]  # rep, prompt, seed


def compare(rows: Sequence[Row], prediction: Prediction) -> Comparison:
    """Hold measured rows against what the simulator predicted of the same cells and generations.

    Only usable rows enter times; windows are compared of every generation that finished.
    Raises CompareError (one line) for a prediction that is empty, has no draws or is of another scenario, and
    for rows that are a simulation themselves.
    """
    _check(rows, prediction)
    counted = counted_rows(rows)
    measured: dict[str, list[Row]] = {}
    for row in counted:
        measured.setdefault(row.cell, []).append(row)
    predicted = {cell.cell: cell for cell in prediction.cells}
    if not measured.keys() & predicted.keys():
        raise CompareError(
            f"the prediction is of another scenario: none of the {len(measured)} measured cells is among the "
            f"{len(predicted)} that it has of {prediction.scenario} (digest {prediction.digest})"
        )
    inputs = {(i.variant, i.temperature): i for i in closed_form_inputs(counted)}
    plain = plain_conditions(counted)
    cells, differing = [], []
    for cell, members in measured.items():
        other = predicted.get(cell)
        done = _cell(members, other, inputs, plain)
        if other is not None:
            same, differ = _windows(members, other)
            done = replace(done, windows_same=same, windows_compared=same + len(differ))
            differing += differ
        cells.append(done)
    cells += [_unmeasured(other, counted[0]) for cell, other in predicted.items() if cell not in measured]
    begun = [_instant(row.started_at) for row in rows]
    made = _instant(prediction.created_at)
    return Comparison(
        scenario=prediction.scenario,
        cells=sorted(cells, key=lambda c: (c.condition.order, c.variant.order, c.rtt_ms)),
        windows_differ=differing[:SHOWN],
        draws=prediction.draws,
        predicted_at=prediction.created_at,
        measured_from=min((r.started_at for r in rows if r.started_at), key=_sort_key, default=""),
        predicted_before=made is not None and all(at is not None and made < at for at in begun),
        digest=prediction.digest,
        profile=dict(prediction.profile),
        acceptance=dict(prediction.acceptance),
        tpots=_tpots(counted, predicted),
    )


def _check(rows: Sequence[Row], prediction: Prediction) -> None:
    if not rows:
        raise CompareError("there are no results to compare a prediction with")
    if any(condition_of(row).simulated for row in rows):
        raise CompareError("these results are simulated themselves; needs the measured rows of a sweep")
    name = f"the prediction of {prediction.scenario}"
    if not prediction.cells:
        raise CompareError(f"{name} is empty: it has no cell")
    if prediction.draws < 1:
        raise CompareError(f"{name} has {prediction.draws} draws; allowed: 1 or more")
    generations = [g for cell in prediction.cells for g in cell.generations]
    if not generations:
        why = next((f": {cell.error}" for cell in prediction.cells if cell.error), "")
        raise CompareError(
            f"{name} is empty: none of its {len(prediction.cells)} cells has a generation{why}"
        )
    if not any(g.tpot_ms or g.ttft_ms for g in generations):
        raise CompareError(f"{name} has no draws: none of its {len(generations)} generations has a time")


def _instant(text: str) -> datetime | None:
    """A moment with its zone (UTC where none is said); None where there is none to read."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _sort_key(text: str) -> tuple[datetime, str]:
    return _instant(text) or datetime.max.replace(tzinfo=UTC), text


def _draws(generations: Iterable[Sequence[float]]) -> Estimate:
    """Per draw the median over generations; over the draws the median, and their 2.5 and 97.5 % quantiles.

    Where draws were lost (they took too long), as many are used as every generation has.
    """
    table = [list(values) for values in generations]
    width = min(map(len, table), default=0)
    if not width:
        return NOTHING
    medians = np.median(np.array([values[:width] for values in table], dtype=np.float64), axis=0)  # [draws]
    low, high = np.quantile(medians, (0.025, 0.975)) if width > 1 else (math.nan, math.nan)
    return Estimate(float(np.median(medians)), float(low), float(high), len(table))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _measure(
    members: Sequence[Row],
    generations: Mapping[Key, PredictedGeneration],
    name: Literal["tpot_ms", "ttft_ms"],
    whole: Estimate,
) -> Compared:
    """Both medians over the generations that both sides have; without any, what was measured (`whole`)."""
    both: list[tuple[Row, float, list[float]]] = []
    known = 0
    for row in members:
        value = getattr(row, name)
        known += value is not None
        generation = generations.get(_key(row))
        if value is not None and generation is not None and (draws := _finite(getattr(generation, name))):
            both.append((row, float(value), draws))
    if not both:
        return Compared(whole, NOTHING)
    measured = whole
    if len(both) < known:
        groups = [(row.prompt, row.seed) for row, _, _ in both]
        label = f"{name.removesuffix('_ms')} {members[0].cell}"
        measured = bootstrap.of_quantile([value for _, value, _ in both], groups, label)
    return Compared(measured, _draws(draws for _, _, draws in both))


def _key(item: Row | PredictedGeneration) -> Key:
    return item.rep, item.prompt, item.seed


def _cell(
    members: Sequence[Row],
    other: PredictedCell | None,
    inputs: Mapping[tuple[Variant, float], Inputs],
    plain: set[Condition],
) -> ComparedCell:
    first = members[0]
    variant, condition = variant_of(first), condition_of(first)
    summary = cell_summary(members)
    usable = [row for row in members if row.usable]
    generations = {} if other is None else {_key(g): g for g in other.generations}
    shared = sum(_key(row) in generations for row in usable)
    own = inputs.get((variant, condition.temperature)) if condition in plain else None
    curve = own.tpot_ms([first.rtt_ms], first.rate_mbit) if own is not None else None
    missing = ""
    if other is None or not other.generations:
        missing = "not simulated"
    elif not usable:
        missing = "not measured"
    elif not shared:
        missing = "no generation in common"
    return ComparedCell(
        cell=first.cell,
        variant=variant,
        condition=condition,
        rtt_ms=first.rtt_ms,
        summary=summary,
        generations=shared,
        tpot=_measure(usable, generations, "tpot_ms", summary.tpot_ms),
        ttft=_measure(usable, generations, "ttft_ms", summary.ttft_ms),
        closed_form_ms=curve[0] if curve else math.nan,
        lossy=_lossy(first),
        outside=other.outside if other is not None else "",
        missing=missing,
        problem=other.error if other is not None else "",
        windows_same=0,
        windows_compared=0,
    )


def _lossy(row: Row) -> bool:
    """Whether packets were to be lost at any time of a generation."""
    return row.loss_pct > 0 or any(word in row.link_steps for word in ("loss", "partition"))


def _unmeasured(other: PredictedCell, like: Row) -> ComparedCell:
    """A predicted cell of which nothing was measured, on the runtime and link of the rest."""
    row = cell_row(other, runtime=like.runtime, link=like.link)
    generations = other.generations
    return ComparedCell(
        cell=other.cell,
        variant=variant_of(row),
        condition=condition_of(row),
        rtt_ms=row.rtt_ms,
        summary=None,
        generations=0,
        tpot=Compared(NOTHING, _draws(d for g in generations if (d := _finite(g.tpot_ms)))),
        ttft=Compared(NOTHING, _draws(d for g in generations if (d := _finite(g.ttft_ms)))),
        closed_form_ms=math.nan,
        lossy=_lossy(row),
        outside=other.outside,
        missing="not measured" if generations else "neither measured nor simulated",
        problem=other.error,
        windows_same=0,
        windows_compared=0,
    )


def _tpots(rows: Sequence[Row], predicted: Mapping[str, PredictedCell]) -> Tpots:
    """The simulated TPOT of every generation that has a measured one."""
    found: dict[tuple[Variant, Condition, float], dict[Pair, float]] = {}
    generations = {(cell.cell, _key(g)): g for cell in predicted.values() for g in cell.generations}
    for row in rows:
        generation = generations.get((row.cell, _key(row)))
        if row.usable and row.tpot_ms is not None and generation is not None:
            middle = middle_ms(generation.tpot_ms)
            if middle is not None:
                place = (variant_of(row), condition_of(row), row.rtt_ms)
                found.setdefault(place, {})[pair_of(row)] = middle
    return found


def _windows(members: Sequence[Row], other: PredictedCell) -> tuple[int, list[WindowsDiffer]]:
    """How many finished generations have the predicted windows, and where the others first differ.

    Where drafts stream, a window is what has come in time: no two runs have the same, and none is compared.
    """
    generations = {_key(g): g for g in other.generations}
    same, differ = 0, []
    for row in members:
        generation = generations.get(_key(row))
        if row.status != "ok" or generation is None or row.mode in STREAMING_MODES:
            continue
        mine = [(drafted, accepted) for drafted, accepted in row.windows]
        theirs = [(drafted, accepted) for drafted, accepted in generation.windows]
        if mine == theirs:
            same += 1
            continue
        at = next((k for k, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if at is None:
            at = min(len(mine), len(theirs))
        differ.append(
            WindowsDiffer(
                cell=describe_cell(row),
                rep=row.rep,
                prompt=row.prompt,
                window=at + 1,
                measured=mine[at] if at < len(mine) else None,
                predicted=theirs[at] if at < len(theirs) else None,
            )
        )
    return same, differ
