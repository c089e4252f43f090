"""From a scenario to the ordered list of generations: randomised blocks, paired prompts and seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdlab.decoding import Sampling
from dsdlab.models.base import ModelError
from dsdlab.models.drafters import LOOKUP_FIRST
from dsdlab.models.zoo import DRAFTERS
from dsdlab.scenario import Cell, Scenario
from dsdlab.sweep.rows import Row
from dsdlab.sweep.workload import Prompt


@dataclass(frozen=True, slots=True)
class Job:
    """One generation to run."""

    cell_id: str
    cell: Cell
    rep: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    reference: str  # key of the reference that its ids must equal

    @property
    def key(self) -> tuple[str, int]:
        return self.cell_id, self.rep

    @property
    def batch(self) -> tuple[str, int]:
        """The same for jobs that run at once, each on an edge of its own."""
        return self.cell_id, self.rep // self.cell.edges


def sampling_json(sampling: Sampling) -> dict[str, Any]:
    """A sampling as control lines and references carry it."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }


def plan_jobs(
    scenario: Scenario, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]
) -> list[Job]:
    """Every generation of the sweep in running order.

    Each repetition is a block that covers the whole grid in its own random order (seeded), so that a
    slow drift of the machine falls on all cells alike. Repetition r uses prompt r mod n and seed r in
    every cell. A cell of several edges has as many repetitions at once, in the block of the first.
    """
    cells = [(scenario.cell_id(c), c) for c in scenario.cells()]
    shuffle = random.Random(scenario.run.seed)
    jobs: list[Job] = []
    for rep in range(scenario.run.repeats):
        order = cells.copy()
        shuffle.shuffle(order)
        for cell_id, cell in order:
            for one in range(rep, rep + cell.edges) if rep % cell.edges == 0 else ():
                at = one % len(prompts)
                sampling = scenario.sampling_of(cell, one)
                ids = tuple(prompt_ids[at])
                key = reference_key(scenario, ids, sampling)
                jobs.append(Job(cell_id, cell, one, prompts[at], ids, sampling, key))
    return jobs


def batches_of(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that run at once together, in order."""
    return [list(batch) for _, batch in itertools.groupby(jobs, key=lambda job: job.batch)]


def reference_key(scenario: Scenario, ids: Sequence[int], sampling: Sampling) -> str:
    """What determines the target's text: model, precision, prompt, sampling, limits."""
    # greedy text does not depend on the seed of a real model; an emulated text depends on it always
    emulated = scenario.models.target.startswith("emulated:")
    parts = sampling_json(sampling) if emulated or not sampling.greedy else {"temperature": 0.0}
    work = [
        scenario.models.target,
        scenario.models.precision,
        list(ids),
        parts,
        scenario.workload.max_new_tokens,
        scenario.workload.stop_at_eos,
    ]
    return hashlib.sha256(json.dumps(work).encode()).hexdigest()[:16]


def content_digest(scenario: Scenario, prompts: Sequence[Prompt]) -> str:
    """A hash of what a scenario names but does not contain: its prompts, and drafters' weights files.

    Raises ModelError for a weights file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps([[p.key, p.text] for p in prompts]).encode())
    for drafter in filter(None, (scenario.models.drafter, scenario.models.edge_drafter)):
        name = drafter.removeprefix(LOOKUP_FIRST)
        path = DRAFTERS.get(name, Path(name))
        try:
            if path.is_file():
                with path.open("rb") as f:
                    digest.update(hashlib.file_digest(f, "sha256").digest())
        except OSError as e:
            raise ModelError(f"model file {path}: {e.strerror}") from None
    return digest.hexdigest()[:16]


def remaining(jobs: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """Jobs without a good row, and those that ran at once with one; a failed, timed-out or excluded one is
    tried again."""
    done: Collection[tuple[str, int]] = {(r.cell, r.rep) for r in rows if r.usable}
    missing = {job.batch for job in jobs if job.key not in done}
    return [job for job in jobs if job.batch in missing]


def estimate_s(jobs: Sequence[Job], max_new_tokens: int) -> float:
    """A rough running time, for --dry-run: a 50 ms target step and two tokens a window.

    Windows in flight hide about half of the round trip.
    """
    total = 0.0
    for job in jobs:
        rtt_s = job.cell.rtt_ms / 1e3
        tokens = max_new_tokens
        if job.cell.mode == "dsd-sync":
            total += tokens / 2 * (0.065 + rtt_s)
        elif job.cell.mode in ("dsd-pipelined", "dsd-stream") and not job.cell.free_run:
            total += tokens / 2 * (0.05 + rtt_s / 2)
        elif job.cell.mode == "cloud-ar" or job.cell.free_run or job.cell.mode == "dsd-adaptive":
            total += tokens * 0.05
        else:
            total += tokens / 2 * 0.065
        total += 0.2 + 8 * rtt_s  # prefill, opening, pings before and after
    return total
