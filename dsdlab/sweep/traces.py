"""The acceptance trace of a plan: every text once, the drafter's window at each of its positions."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from dsdlab.models.base import ModelError
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.scenario import Scenario
from dsdlab.sim.trace import Trace, TracedText, TracedWindow, TraceError, load_trace, save_trace
from dsdlab.sweep.plan import Job, sampling_json
from dsdlab.sweep.references import FILE as REFERENCES_FILE
from dsdlab.sweep.store import read_json

__all__ = ["FILE", "ensure_trace"]

FILE = "trace.json"


async def ensure_trace(
    scenario: Scenario,
    jobs: Sequence[Job],
    references: Mapping[str, Sequence[int]],
    folder: Path,
    cpus: Sequence[int],
    on_progress: Callable[[int, int], None],
) -> Trace:
    """The folder's `trace.json` with every text of `jobs`, windows as long as the grid's longest.

    Where drafts stream they are asked for one by one: there a window of one is enough.
    It records what the folder lacks, in a process of its own on `cpus`, the drafter's cores, with as many
    threads as the drafter will have; what was recorded before a failure is kept. references: the target's ids
    by key; a text that is not among them is generated. on_progress: (texts done, texts to record). Raises
    ModelError or StoreError.
    """
    path = folder / FILE
    gamma = max(max(c.gamma, c.beside, int(c.mode in STREAMING_MODES)) for c in scenario.cells())
    old = _known(path, scenario)
    before = {text.key: text for text in old.texts} if old is not None else {}
    texts: dict[str, TracedText] = {}
    if old is not None and old.gamma >= gamma:
        gamma = old.gamma
        texts = {key: t for key, t in before.items() if list(references.get(key, t.ids)) == list(t.ids)}
    missing = {job.reference: job for job in jobs if job.reference not in texts}
    if not missing and old is not None:
        return old

    ids = {key: before[key].ids for key in missing if key in before} | dict(references)
    ask = {
        "cpus": list(cpus),
        "target": scenario.models.target,
        "drafter": scenario.models.drafter,
        "precision": scenario.models.precision,
        "max_context": scenario.models.max_context,
        "gamma": gamma,
        "info": old.provenance.get("target_info") if old is not None else _target_info(folder),
        "texts": [_asked(scenario, job, ids.get(key)) for key, job in missing.items()],
    }
    facts: dict[str, Any] = {}
    recorded: dict[str, TracedText] = {}

    def take(message: dict[str, Any]) -> None:
        match message["op"]:
            case "target":
                facts["target_info"] = message["info"]
            case "drafter":
                facts["drafter_digest"] = message["digest"]
            case "text":
                recorded[message["key"]] = _text(missing[message["key"]], message)
                on_progress(len(recorded), len(missing))

    on_progress(0, len(missing))
    try:
        await _record(ask, take)
    except BaseException:
        if recorded:
            save_trace(path, _trace(scenario, gamma, texts | recorded, facts))
        raise
    trace = _trace(scenario, gamma, texts | recorded, facts)
    save_trace(path, trace)
    return trace


def _trace(scenario: Scenario, gamma: int, texts: Mapping[str, TracedText], facts: dict[str, Any]) -> Trace:
    info = facts["target_info"]
    return Trace(
        target=scenario.models.target,
        drafter=scenario.models.drafter,
        precision=scenario.models.precision,
        tokenizer=info["tokenizer"],
        vocab_size=info["vocab_size"],
        eos_ids=tuple(info["eos_ids"]),
        max_context=info["max_context"],
        gamma=gamma,
        texts=tuple(texts.values()),
        provenance={
            **facts,
            "max_context": scenario.models.max_context,  # as asked; the target's own may be shorter
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _known(path: Path, scenario: Scenario) -> Trace | None:
    """What the folder holds already; None where there is nothing of use: then all is recorded anew."""
    models = scenario.models
    try:
        trace = load_trace(path)
    except TraceError:
        return None
    ours = (trace.target, trace.drafter, trace.precision, trace.provenance.get("max_context"))
    return trace if ours == (models.target, models.drafter, models.precision, models.max_context) else None


def _target_info(folder: Path) -> dict[str, Any] | None:
    """What the references' process said of the target, so that it need not be loaded again."""
    known = read_json(folder / REFERENCES_FILE) or {}
    info: dict[str, Any] | None = known.get("facts", {}).get("target")
    return info


def _asked(scenario: Scenario, job: Job, ids: Sequence[int] | None) -> dict[str, Any]:
    return {
        "key": job.reference,
        "prompt": job.prompt.key,
        "prompt_ids": list(job.prompt_ids),
        "sampling": sampling_json(job.sampling),
        "max_new_tokens": scenario.workload.max_new_tokens,
        "stop_at_eos": scenario.workload.stop_at_eos,
        "ids": None if ids is None else list(ids),
    }


def _text(job: Job, message: dict[str, Any]) -> TracedText:
    return TracedText(
        key=job.reference,
        prompt=job.prompt.key,
        prompt_ids=job.prompt_ids,
        temperature=job.sampling.temperature,
        top_k=job.sampling.top_k,
        top_p=job.sampling.top_p,
        seed=job.sampling.seed,
        ids=tuple(message["ids"]),
        windows=msgspec.convert(message["windows"], tuple[TracedWindow, ...]),
        beyond=tuple(message["beyond"]),
    )


async def _record(ask: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> None:
    """Run the recording process and hand over each of its messages. Raises ModelError."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dsdlab.sweep.tracer"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 26,  # a line is a text with all its windows
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        process.stdin.write(json.dumps(ask).encode())
        process.stdin.close()
        while line := await process.stdout.readline():
            take(json.loads(line))
        if code := await process.wait():
            said = (await errors).decode(errors="replace").strip().splitlines()
            raise ModelError(said[-1] if said else f"the recording process ended with status {code}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
