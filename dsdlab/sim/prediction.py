"""What the simulator says of a scenario, as it is kept beside the measurements that it is judged by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

__all__ = [
    "PredictedCell",
    "PredictedGeneration",
    "Prediction",
    "PredictionError",
    "encode_prediction",
    "load_prediction",
]

PREDICTION_VERSION = 1


class PredictionError(ValueError):
    """A prediction cannot be read; one line for the user."""


class PredictedGeneration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One generation of the plan: its windows are the same in every draw, its times are not. In modes whose
    windows follow from times, they and what is counted of drafts are the first draw's.

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
    drafted: int | None = None  # these as in GenerationRecord
    wasted: int | None = None
    target_s: float | None = None
    beside_s: float = 0.0


class PredictedCell(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One cell of the grid. `cell` is the scenario's cell id, `axes` the cell itself (Cell.model_dump())."""

    cell: str
    axes: dict[str, Any]
    outside: str = ""  # what lies far outside the profile's calibrated range, for people
    error: str = ""  # why there is no prediction, or what some draws suffered
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

    def sha256(self) -> str:
        """Of the bytes that `encode_prediction` gives."""
        return hashlib.sha256(encode_prediction(self)).hexdigest()


def encode_prediction(prediction: Prediction) -> bytes:
    """A prediction as the bytes of its file; the same for the same prediction."""
    return msgspec.json.encode(prediction)


def load_prediction(path: Path) -> Prediction:
    """Read a prediction. Raises PredictionError for what is none, or one of another version."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise PredictionError(f"{path}: {e.strerror}") from None
    try:
        version = msgspec.json.decode(data).get("version")
        if version != PREDICTION_VERSION:
            raise PredictionError(
                f"{path} is a prediction of version {version}; allowed: {PREDICTION_VERSION} (simulate again)"
            )
        return msgspec.json.decode(data, type=Prediction)
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError) as e:
        raise PredictionError(f"{path} is no prediction: {e}") from None
