"""A whole grid, predicted: every cell of a scenario simulated, over all cores or on a cluster."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from dsdlab.scenario import Scenario
from dsdlab.sim.grid import OnDone, run_tasks
from dsdlab.sim.prediction import Prediction
from dsdlab.sim.simulate import EMULATED, Pair, simulate_cell
from dsdlab.sweep.plan import Job

__all__ = ["by_cell", "predict"]


def by_cell(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each cell, in the order in which cells first come."""
    cells: dict[str, list[Job]] = {}
    for job in jobs:
        cells.setdefault(job.cell_id, []).append(job)
    return list(cells.values())


def predict(
    scenario: Scenario,
    jobs: Sequence[Job],
    pair: Pair,
    *,
    draws: int,
    engine: str = "local",
    workers: int | None = None,
    on_done: OnDone | None = None,
    provenance: dict[str, Any] | None = None,
) -> Prediction:
    """Simulate every generation of the plan in `draws` draws. Raises GridFailed, UnfitProfile, TraceError."""
    began_s = time.monotonic()
    cells = run_tasks(
        simulate_cell,
        (scenario, pair, draws),
        by_cell(jobs),
        engine=engine,
        workers=workers,
        on_done=on_done,
    )
    return Prediction(
        scenario=scenario.name,
        digest=scenario.digest(),
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        draws=draws,
        seed=scenario.run.seed,
        profile=_profile_of(pair),
        acceptance=_acceptance_of(pair),
        wall_s=time.monotonic() - began_s,
        cells=cells,
        provenance=provenance or {},
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def _profile_of(pair: Pair) -> dict[str, str]:
    profile = pair.profile
    if profile is None:
        return {"name": "emulated", "origin": "the scenario", "source": f"{pair.target}; {pair.drafter}"}
    return {
        "name": profile.name,
        "origin": profile.origin,
        "source": profile.source,
        "sha256": _sha256(profile),
    }


def _acceptance_of(pair: Pair) -> dict[str, str]:
    if pair.alpha is not None:
        if pair.persist is None:
            return {"kind": "bernoulli", "alpha": f"{pair.alpha:g}"}
        return {"kind": "two-state", "alpha": f"{pair.alpha:g}", "persist": f"{pair.persist:g}"}
    if pair.trace is not None:
        return {"kind": "trace", "sha256": _sha256(pair.trace)}
    assert pair.target.startswith(EMULATED)
    return {"kind": "emulated", "drafter": pair.drafter}
