"""A prediction as rows, so that a simulation without a measurement has statistics and a report too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from dsdlab.policies import RUN_AHEAD
from dsdlab.sim.prediction import PredictedCell, PredictedGeneration, Prediction
from dsdlab.sim.profile import TcpRegime
from dsdlab.sweep.keys import SIMULATED
from dsdlab.sweep.rows import Row

if TYPE_CHECKING:
    from dsdlab.scenario import Scenario

__all__ = ["CompareError", "cell_row", "middle_ms", "prediction_rows"]

LINK = "modelled"
TCP_FIELDS = tuple(asdict(TcpRegime()))
AXES = ("mode", "policy", "gamma", "rtt_ms", "rate_mbit", "loss_pct", "temperature")


class CompareError(ValueError):
    """A prediction cannot be used; one line for the user."""


def cell_row(
    predicted: PredictedCell,
    *,
    runtime: str = SIMULATED,
    link: str = LINK,
    scenario: Scenario | None = None,
) -> Row:
    """A row that says what a predicted cell asks, and that nothing came of it.

    scenario: for what the grid's axes do not say (directions, buffer, steps of the link).
    Raises CompareError for a cell whose axes are not those of a scenario.
    """
    axes = predicted.axes
    for name in AXES:
        if name not in axes:
            raise CompareError(f"cell {predicted.cell} of the prediction has no axis {name}")
    row = Row(
        cell=predicted.cell,
        rep=0,
        status="failed",
        error=predicted.error or "not simulated",
        mode=axes["mode"],
        policy=axes["policy"],
        gamma=axes["gamma"],
        run_ahead=axes.get("run_ahead", RUN_AHEAD),
        free_run=axes.get("free_run", False),
        beside=axes.get("beside", 0),
        edges=axes.get("edges", 1),
        runtime=runtime,
        link=link,
        rtt_ms=axes["rtt_ms"],
        rate_mbit=axes["rate_mbit"],
        loss_pct=axes["loss_pct"],
        loss_burst=axes.get("loss_burst", 1.0),
        jitter_ms=axes.get("jitter_ms", 0.0),
        temperature=axes["temperature"],
        tcp={"asked": {name: axes[name] for name in TCP_FIELDS if name in axes}, "read_back": {}},
    )
    if scenario is not None:
        from dsdlab.scenario import Cell
        from dsdlab.sweep.runner import describe_steps

        row.link_asked = scenario.profile_of(Cell.model_validate(axes)).to_dict()
        row.link_steps = describe_steps(scenario.steps)
    return row


def middle_ms(draws: Sequence[float]) -> float | None:
    """The median draw; None without any."""
    known = [value for value in draws if math.isfinite(value)]
    return median(known) if known else None


def _row(asked: Row, generation: PredictedGeneration) -> Row:
    came: dict[str, Any] = {
        "status": "ok",
        "error": "",
        "rep": generation.rep,
        "prompt": generation.prompt,
        "seed": generation.seed,
        "tokens": generation.tokens,
        "tpot_ms": middle_ms(generation.tpot_ms),
        "ttft_ms": middle_ms(generation.ttft_ms),
        "alpha": generation.alpha,
        "tau": generation.tau,
        "exact": generation.exact,
        "finish": generation.finish,
        "windows": list(generation.windows),
        "drafted": generation.drafted,
        "wasted": generation.wasted,
        "target_s": generation.target_s,
        "beside_s": generation.beside_s,
        "bytes_up": dict(generation.bytes_up),
        "bytes_down": dict(generation.bytes_down),
    }
    return Row(**{name: getattr(asked, name) for name in asked.__struct_fields__} | came)


def prediction_rows(prediction: Prediction, scenario: Scenario | None = None) -> list[Row]:
    """The simulation alone, as rows: runtime "simulated", link "modelled", the median draw as each time.

    A cell without any generation becomes one failed row that tells why. scenario: see `cell_row`.
    """
    rows = []
    for cell in prediction.cells:
        asked = cell_row(cell, scenario=scenario)
        rows += [_row(asked, generation) for generation in cell.generations] or [asked]
    return rows
