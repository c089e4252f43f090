"""A results folder's report, written after a sweep or again later."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdlab.sweep.rows import Row
from dsdlab.sweep.stats import Summary, summarise, summary_json
from dsdlab.sweep.store import StoreError, read_json, read_rows

REPORT = "report.html"


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


def write_report(folder: Path, run: dict[str, Any], rows: Sequence[Row]) -> Path:
    """Render `report.html`. Raises StoreError when it cannot be written or there is nothing to report."""
    from dsdlab.report import render

    try:
        return render(run, rows, folder / REPORT, str(run.get("command", "")))
    except OSError as e:
        raise StoreError(f"cannot write {folder / REPORT}: {e.strerror}") from None
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
    summary = summarise(rows, allow_incomplete=True)
    return SweepResult(str(run.get("name", folder.name)), folder, summary, write_report(folder, run, rows))
