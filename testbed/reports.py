"""A results folder's report, written after a sweep or again later."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdlab.sim.prediction import Prediction, PredictionError, load_prediction
from dsdlab.sweep.compare import CompareError, Comparison, compare
from dsdlab.sweep.rows import Row
from dsdlab.sweep.stats import Summary, summarise, summary_json
from dsdlab.sweep.store import StoreError, read_json, read_rows

REPORT = "report.html"
PREDICTION = "prediction.json"  # written before the measurements beside it, and never again
SIMULATION = "simulation.json"  # written by every `dsdlab simulate`


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished (or refused) sweep, for the command to print."""

    name: str
    folder: Path
    summary: Summary
    report: Path

    def as_json(self) -> dict[str, Any]:
        return {
            **summary_json(self.name, self.summary),
            "folder": str(self.folder),
            "report": str(self.report),
        }


def prediction_beside(folder: Path) -> Prediction | None:
    """The prediction that a results folder holds: the one from before the measurements, else the latest
    simulation, else None. Raises PredictionError for one that cannot be read."""
    for name in (PREDICTION, SIMULATION):
        if (folder / name).is_file():
            return load_prediction(folder / name)
    return None


def held_against(folder: Path, rows: Sequence[Row]) -> tuple[Prediction | None, Comparison | None]:
    """The folder's prediction and the comparison with it; none where there is none, or none that fits, which
    standard error then tells."""
    try:
        prediction = prediction_beside(folder)
        return prediction, None if prediction is None else compare(rows, prediction)
    except (PredictionError, CompareError) as e:
        sys.stderr.write(f"report without its simulation: {e}\n")
        return None, None


def write_report(
    folder: Path,
    run: dict[str, Any],
    rows: Sequence[Row],
    prediction: Prediction | None = None,
    *,
    name: str = REPORT,
) -> Path:
    """Render a report. Raises StoreError when it cannot be written or there is nothing to report."""
    from dsdlab.report import render

    if prediction is not None:
        run = {**run, "prediction": {"sha256": prediction.sha256()}}
    try:
        return render(run, rows, folder / name, str(run.get("command", "")), prediction)
    except OSError as e:
        raise StoreError(f"cannot write {folder / name}: {e.strerror}") from None
    except ValueError as e:
        raise StoreError(f"{folder}: {e}") from None


def report(folder: Path) -> SweepResult:
    """Render the report of an existing results folder again. Raises StoreError."""
    if not (folder / "rows.jsonl").is_file():
        raise StoreError(f"{folder} holds no rows.jsonl; allowed: a folder that a sweep wrote")
    rows, problems = read_rows(folder)
    for problem in problems:
        sys.stderr.write(f"unreadable line left out: {problem}\n")
    if not rows:
        raise StoreError(f"{folder}/rows.jsonl holds no readable row")
    run = read_json(folder / "run.json") or {}
    prediction, comparison = held_against(folder, rows)
    summary = summarise(rows, allow_incomplete=True, comparison=comparison)
    name = str(run.get("name", folder.name))
    return SweepResult(name, folder, summary, write_report(folder, run, rows, prediction))
