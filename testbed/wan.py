"""A sweep whose verifier stands on another machine: where it is, and what its target says alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsdlab.address import ws_address
from dsdlab.scenario import Scenario
from dsdlab.sweep.plan import Job
from dsdlab.sweep.references import References, references_from_afar
from testbed.controller import Testbed
from testbed.links.base import Endpoint
from testbed.runtimes.base import RuntimeFailed

__all__ = ["external_verifier", "remote_references"]

EMULATED = "emulated"


def external_verifier(scenario: Scenario) -> Endpoint | None:
    """Where the scenario's verifier was started by hand; None where the testbed starts it."""
    return None if scenario.run.verifier is None else Endpoint(*ws_address(scenario.run.verifier))


async def remote_references(
    scenario: Scenario,
    jobs: Sequence[Job],
    folder: Path,
    bed: Testbed,
    on_progress: Callable[[int, int], None],
) -> tuple[References, dict[str, Any]]:
    """References by key and facts for run.json, from `cloud-ar` through a started bed.

    Raises RuntimeFailed when the verifier's target is of another kind, and what `Testbed.generate` raises.
    """
    served = str(bed.edge().info["info"]["target"])
    # a real target is asked for by name in the handshake, but all emulated ones have the same name: none
    if scenario.models.target.startswith(f"{EMULATED}:") and served != EMULATED:
        raise RuntimeFailed(
            f"verifier ws://{bed.external}/ serves target {served!r}; asked: {scenario.models.target!r}"
        )

    async def alone(job: dict[str, Any]) -> list[int]:
        record = await bed.generate(job, scenario.run.timeout_s)
        return [int(token) for token in record["ids"]]

    references, facts = await references_from_afar(scenario, jobs, folder, alone, on_progress)
    return references, {**facts, "target": {"model_id": served}}
