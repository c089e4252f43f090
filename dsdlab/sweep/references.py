"""The target alone for every prompt and seed of a plan, kept beside the rows."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsdlab.models.base import ModelError
from dsdlab.scenario import Scenario
from dsdlab.sweep.plan import Job, sampling_json
from dsdlab.sweep.store import read_json, write_json

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
    path = folder / "references.json"
    known = read_json(path) or {}
    references: References = dict(known.get("references", {}))
    facts: dict[str, Any] = dict(known.get("facts", {}))
    missing = {j.reference: j for j in jobs if j.reference not in references}
    if not missing:
        return references, facts
    models, workload = scenario.models, scenario.workload
    ask = {
        "cpus": list(cpus),
        "target": models.target,
        "precision": models.precision,
        "max_context": models.max_context,
        "selftest": "selftest" not in facts and not models.target.startswith("emulated:"),
        "jobs": [
            {
                "key": key,
                "prompt_ids": list(job.prompt_ids),
                "sampling": sampling_json(job.sampling),
                "max_new_tokens": workload.max_new_tokens,
                "stop_at_eos": workload.stop_at_eos,
            }
            for key, job in missing.items()
        ],
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
    write_json(path, {"references": references, "facts": facts})
    return references, facts
