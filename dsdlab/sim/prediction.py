"""What the simulator says of a scenario, as it is kept beside the measurements that it is judged by."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["PredictedCell", "PredictedGeneration", "Prediction"]

PREDICTION_VERSION = 1


class PredictedGeneration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One generation of the plan: its windows are the same in every draw, its times are not.

    tpot_ms, ttft_ms: one value a draw (of losses, jitter and the compute's residuals).
    """

    rep: int
    prompt: str
    seed: int
    windows: list[tuple[int, int]]  # (drafted, accepted)
    tokens: int
    finish: str
    exact: bool
    tpot_ms: list[float]
    ttft_ms: list[float]
    alpha: float | None
    tau: float | None
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]


class PredictedCell(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One cell of the grid. `cell` is the scenario's cell id, `axes` the cell itself (Cell.model_dump())."""

    cell: str
    axes: dict[str, Any]
    outside: str = ""  # what lies far outside the profile's calibrated range, for people
    error: str = ""  # why there is no prediction
    generations: list[PredictedGeneration]


class Prediction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A whole grid. Times and hashes tell that it was written before the measurements it is held against."""

    version: int = PREDICTION_VERSION
    scenario: str
    digest: str  # Scenario.digest()
    created_at: str  # ISO 8601
    draws: int
    seed: int
    profile: dict[str, str]  # name, origin, source, sha256
    acceptance: dict[str, str]  # kind (trace, bernoulli, two-state, emulated), sha256 or parameters
    wall_s: float
    cells: list[PredictedCell]
    provenance: dict[str, Any] = {}
