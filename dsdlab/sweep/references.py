"""The target alone for every prompt and seed of a plan, kept beside the rows."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from dsdlab.models.base import ModelError
from dsdlab.scenario import Scenario
from dsdlab.sweep.plan import Job, sampling_json
from dsdlab.sweep.store import read_json, write_json

FILE = "references.json"
References = dict[str, list[int]]


async def ensure_references(
    scenario: Scenario,
    jobs: Sequence[Job],
    folder: Path,
    cpus: Sequence[int],
    on_progress: Callable[[int, int], None],
) -> tuple[References, dict[str, Any]]:
    """References by key, and {"info": model, "selftest": result}; computes what the folder lacks.

    The work runs in a process of its own on `cpus`, the verifier's cores, with as many threads as the
    verifier will have, and is over before any node starts. Raises ModelError.
    """
    references, facts, missing = _known(folder, jobs)
    if not missing:
        return references, facts
    models = scenario.models
    ask = {
        "cpus": list(cpus),
        "target": models.target,
        "precision": models.precision,
        "max_context": models.max_context,
        "selftest": "selftest" not in facts and not models.target.startswith("emulated:"),
        "jobs": [{"key": key, **_asked(scenario, job)} for key, job in missing.items()],
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dsdlab.sweep.reference"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        errors = asyncio.create_task(process.stderr.read())
        process.stdin.write(json.dumps(ask).encode())
        process.stdin.close()
        n_done = 0
        on_progress(0, len(missing))
        while line := await process.stdout.readline():
            message = json.loads(line)
            match message.pop("op"):
                case "reference":
                    references[message["key"]] = message["ids"]
                    n_done += 1
                    on_progress(n_done, len(missing))
                case "model":
                    facts["target"] = message["info"]
                case "selftest":
                    facts["selftest"] = message
        code = await process.wait()
        if code:
            said = (await errors).decode(errors="replace").strip().splitlines()
            raise ModelError(said[-1] if said else f"the reference process ended with status {code}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    _keep(folder, references, facts)
    return references, facts


async def references_from_afar(
    scenario: Scenario,
    jobs: Sequence[Job],
    folder: Path,
    generate: Callable[[dict[str, Any]], Awaitable[list[int]]],
    on_progress: Callable[[int, int], None],
) -> tuple[References, dict[str, Any]]:
    """The same where the target is on another machine: it decodes alone there, and streams.

    Another processor may round differently, so that only the verifier itself can say what its target says.
    `generate` takes a "generate" line of mode `cloud-ar` and gives its ids; what it raises passes, and the
    references so far are kept.
    """
    references, facts, missing = _known(folder, jobs)
    if not missing:
        return references, facts
    facts["references"] = "cloud-ar on the verifier"
    on_progress(0, len(missing))
    try:
        for done, (key, job) in enumerate(missing.items(), 1):
            ask = {"mode": "cloud-ar", "policy": "static", "gamma": 0, **_asked(scenario, job)}
            references[key] = await generate(ask)
            on_progress(done, len(missing))
    finally:
        _keep(folder, references, facts)
    return references, facts


def _known(folder: Path, jobs: Sequence[Job]) -> tuple[References, dict[str, Any], dict[str, Job]]:
    """References and facts of the folder, and by key a job for each reference that it lacks."""
    known = read_json(folder / FILE) or {}
    references: References = dict(known.get("references", {}))
    missing = {j.reference: j for j in jobs if j.reference not in references}
    return references, dict(known.get("facts", {})), missing


def _keep(folder: Path, references: References, facts: dict[str, Any]) -> None:
    write_json(folder / FILE, {"references": references, "facts": facts})


def _asked(scenario: Scenario, job: Job) -> dict[str, Any]:
    return {
        "prompt_ids": list(job.prompt_ids),
        "sampling": sampling_json(job.sampling),
        "max_new_tokens": scenario.workload.max_new_tokens,
        "stop_at_eos": scenario.workload.stop_at_eos,
    }
