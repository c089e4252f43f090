"""What the commands do: a sweep from scenario to report, one generation on a bed of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from dsdlab.models.loading import load_tokenizer
from dsdlab.scenario import Scenario, ScenarioError
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.plan import Job, remaining
from dsdlab.sweep.provenance import provenance
from dsdlab.sweep.references import ensure_references
from dsdlab.sweep.rows import Row
from dsdlab.sweep.runner import run_jobs
from dsdlab.sweep.stats import summarise
from dsdlab.sweep.store import Store, read_json, write_json
from testbed.clean import RUN_FOLDER
from testbed.controller import CpuSplit
from testbed.host import host_turn
from testbed.lab import make_lab
from testbed.planning import plan_sweep, results_folder
from testbed.predicting import Feed, predict_before
from testbed.progress import bar
from testbed.reports import SweepResult, held_against, write_report
from testbed.sweepbed import SweepBed, bed_of
from testbed.wan import external_verifier, remote_references


async def sweep(
    path: Path,
    *,
    overrides: dict[str, Any],
    out: Path,
    fresh: bool,
    command: str,
    console: Console,
    feed: Feed | None = None,
) -> SweepResult:
    """Run what is missing of a scenario, then write the report. Ctrl-C leaves a resumable store.

    feed: predict first, with this; None predicts nothing.
    """
    scenario, text, jobs = plan_sweep(path, overrides, console)
    if scenario.fleet is not None:
        raise ScenarioError(f"{path}: fleet is for the simulator alone; allowed: dsdlab simulate {path}")
    folder = results_folder(out, scenario)
    if fresh and folder.exists():
        aside = folder.with_name(f"{folder.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}")
        with Store(folder):  # not under the hands of a sweep that is writing to it
            folder.rename(aside)
        console.print(f"earlier results moved to {aside}", markup=False)
    with Store(folder) as store:
        for problem in store.problems:
            console.print(f"[yellow]unreadable line set aside:[/] {escape(problem)}", highlight=False)
        todo = remaining(jobs, store.rows)
        if len(todo) < len(jobs):
            console.print(f"{len(jobs) - len(todo)} of {len(jobs)} generations are already there")
        if todo:
            await _measure(scenario, path, text, jobs, todo, store, command, console, feed)
        rows = list(store.rows)
    run = read_json(folder / "run.json") or {}
    prediction, comparison = held_against(folder, rows)
    expected = Counter(job.cell_id for job in jobs)
    summary = summarise(rows, expected=expected, allow_incomplete=True, comparison=comparison)
    return SweepResult(scenario.name, folder, summary, write_report(folder, run, rows, prediction))


async def _measure(
    scenario: Scenario,
    path: Path,
    text: str,
    jobs: Sequence[Job],
    todo: Sequence[Job],
    store: Store,
    command: str,
    console: Console,
    feed: Feed | None,
) -> None:
    """References, then the bed, then every generation that is missing. With a verifier on another machine the
    bed comes first: only it can ask that verifier for the references."""
    folder = store.folder
    external = external_verifier(scenario)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(host_turn(lambda text: console.print(text, highlight=False)))
        progress = stack.enter_context(bar(console))
        task = progress.add_task("the target alone", total=None)

        def on_reference(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if external is None:
            cpus = CpuSplit.default().verifier
            references, facts = await ensure_references(scenario, jobs, folder, cpus, on_reference)
            _warn_of_arithmetic(facts.get("selftest"), console)
            _write_run(scenario, text, store, facts, command)
        progress.reset(task, total=None, description="starting nodes")
        bed = bed_of(scenario, folder / "bed", external)
        async with bed:
            if external is not None:
                if not bed.packets:
                    console.print(
                        f"no UDP packet comes back from {external}: the link is measured with pings"
                    )
                progress.reset(task, total=None, description="the target alone, on the verifier")
                references, facts = await remote_references(scenario, jobs, folder, bed, on_reference)
                _write_run(scenario, text, store, facts, command)
            _note_bed(folder, await bed.facts())
            if feed is not None:
                progress.stop()  # it draws its own
                await predict_before(scenario, path, jobs, bed, store, feed, command, console)
                progress.start()
            progress.update(task, description="sweeping", total=len(jobs), completed=len(jobs) - len(todo))
            progress.reset(task, total=len(jobs), completed=len(jobs) - len(todo), description="sweeping")
            await run_jobs(scenario, todo, references, SweepBed(bed), store, _show_row(progress, task))


def _note_bed(folder: Path, facts: dict[str, Any]) -> None:
    """Add what the bed is made of to the run's provenance."""
    path = folder / "run.json"
    write_json(path, {**(read_json(path) or {}), "bed": facts})


def _warn_of_arithmetic(test: dict[str, Any] | None, console: Console) -> None:
    if test is not None and not test["exact"]:
        console.print(
            f"[red]this processor's arithmetic is not exact:[/] {test['differing']} of "
            f"{test['elements']} logits differ; ids may too"
        )


def _show_row(progress: Progress, task: TaskID) -> Callable[[Row], None]:
    def show(row: Row) -> None:
        what = f"{row.mode} RTT {row.rtt_ms:g} ms ({row.link} link)"
        if row.excluded:
            progress.console.print(f"[yellow]excluded:[/] {what}: {escape(row.excluded)}", highlight=False)
        if row.status != "ok":
            progress.console.print(f"[yellow]{row.status}:[/] {what}: {escape(row.error)}", highlight=False)
        elif row.exact is False:
            progress.console.print(f"[red]not exact:[/] {what}, prompt {row.prompt}, seed {row.seed}")
        timing = "" if row.tpot_ms is None else f" {row.tpot_ms:.0f} ms/token"
        progress.update(task, advance=1, description=f"{what}{timing}")

    return show


def _write_run(scenario: Scenario, text: str, store: Store, facts: dict[str, Any], command: str) -> None:
    """Provenance of the run; a resumed one keeps its first and lists the others."""
    path = store.folder / "run.json"
    now = provenance(command)
    before = read_json(path) if store.rows else None
    run: dict[str, Any] = {
        "name": scenario.name,
        "title": scenario.title,
        "scenario_text": text,
        "scenario": scenario.model_dump(),
        **now,
        "models": {"target": facts.get("target", {}), "drafter": {"model_id": scenario.models.drafter}},
        "runtime": scenario.run.runtime,
        "link": scenario.run.link,
        "selftest": facts.get("selftest"),
        **({"references": facts["references"]} if "references" in facts else {}),
        "cells": [
            {"cell": scenario.cell_id(c), "generations": scenario.run.repeats, **c.model_dump()}
            for c in scenario.cells()
        ],
        "resumed": [],
    }
    if before is not None:
        run |= {k: before[k] for k in now if k in before}
        run["resumed"] = [*before.get("resumed", []), now]
    write_json(path, run)


async def run_once(options: Any, prompt: str, profile: LinkProfile, choice: dict[str, Any]) -> None:
    """One generation over a bed of its own: verifier process, link box, and the drafter in this process."""
    from dsdlab.generate import request_of, show_generation
    from dsdlab.node_process import drafter_node
    from testbed.runtimes.base import NodeSpec

    request_of([1], choice)  # refuses bad options before anything is started
    run_dir = Path(tempfile.mkdtemp(prefix=f"{RUN_FOLDER}{os.getpid()}-"))
    lab = make_lab("process", "modelled")
    runtime, link = lab.runtime, lab.links[0]
    try:
        await lab.start(run_dir)
        edge = await link.start(run_dir)
        await link.apply(profile)
        spec = NodeSpec(
            name="verifier",
            args=(
                "-m", "dsdlab", "node", "verifier", "--target", options.target,
                "--drafter", options.drafter or "none", "--precision", options.precision,
                "--device", options.device, "--max-context", str(options.max_context), "--control", "stdio",
                "--host", "{host}", "--port", "0",
            ),
            cpus=CpuSplit.default().verifier,
        )  # fmt: skip
        verifier = await runtime.start_node(spec)
        await link.set_target(verifier.endpoint(int(verifier.info["port"])))
        edge_target = choice["mode"] == "edge-sd"
        async with drafter_node(options, f"ws://{edge}/", edge_target=edge_target) as (node, _):
            tokenizer = await asyncio.to_thread(load_tokenizer, options.target)
            await show_generation(node, tokenizer, prompt, choice)
    finally:
        await asyncio.shield(lab.stop())
        shutil.rmtree(run_dir, ignore_errors=True)


__all__ = ["SweepResult", "run_once", "sweep"]
