"""References from a verifier on another machine: each once, kept when the way there is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dsdlab.scenario import Scenario
from dsdlab.sweep.plan import plan_jobs
from dsdlab.sweep.references import ensure_references, references_from_afar
from dsdlab.sweep.workload import Prompt

RAW: dict[str, Any] = {
    "name": "s",
    "models": {"target": "smollm2-135m-instruct"},
    "sampling": {"temperature": [0.0, 0.8]},
    "grid": {"mode": ["cloud-ar", "dsd-sync"], "rtt_ms": [50]},
    "run": {"repeats": 4, "link": "wan", "verifier": "ws://far:1/"},
}


def test_each_text_is_asked_for_once_and_survives_a_lost_connection(tmp_path: Path) -> None:
    scenario = Scenario.model_validate(RAW)
    jobs = plan_jobs(scenario, [Prompt("p", "x"), Prompt("q", "y")], [[1], [2]])
    asked: list[dict[str, Any]] = []
    progress: list[tuple[int, int]] = []

    async def generate(job: dict[str, Any]) -> list[int]:
        if len(asked) == 2:
            asked.append({})
            raise ConnectionError("lost")
        asked.append(job)
        return [*job["prompt_ids"], job["sampling"]["seed"] % 7]

    def ask() -> tuple[dict[str, list[int]], dict[str, Any]]:
        return asyncio.run(
            references_from_afar(scenario, jobs, tmp_path, generate, lambda *n: progress.append(n))
        )

    with pytest.raises(ConnectionError):
        ask()
    references, facts = ask()
    # greedy: one a prompt; sampled: one a repetition
    assert len(references) == 2 + 4 == len([job for job in asked if job])
    assert set(references) == {job.reference for job in jobs}
    assert facts == {"references": "cloud-ar on the verifier"}
    assert progress == [(0, 6), (1, 6), (2, 6), (0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert {job["mode"] for job in asked if job} == {"cloud-ar"}
    assert {job["sampling"]["temperature"] for job in asked if job} == {0.0, 0.8}
    assert ask() == (references, facts)
    again = asyncio.run(ensure_references(scenario, jobs, tmp_path, [0], lambda *_: None))
    assert again == (references, facts), "the file has the shape that every sweep reads"
