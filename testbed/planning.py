"""From a scenario's file to what is to be run: every generation in order, and where its results go."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from dsdlab.models.loading import load_tokenizer
from dsdlab.nodes.request import POLICY_MODES
from dsdlab.policies import RUN_AHEAD
from dsdlab.scenario import Cell, Scenario, ScenarioError, load_scenario
from dsdlab.sim.profile import LinkStep
from dsdlab.sweep.plan import Job, content_digest, estimate_s, plan_jobs
from dsdlab.sweep.runner import describe_steps
from dsdlab.sweep.workload import encode_prompt, load_prompts
from testbed.host import choose
from testbed.links.base import LinkError
from testbed.links.netem import DIRECTIONS
from testbed.links.qdisc import netem_arguments


def plan_sweep(
    path: Path, overrides: dict[str, Any], console: Console, *, what: str = "runs use"
) -> tuple[Scenario, str, list[Job]]:
    """Scenario, its text and every generation in order. Raises ScenarioError or ModelError.

    what: how to say which runtime and link "auto" stands for.
    """
    scenario, text = load_scenario(path, overrides)
    choice = choose(scenario.run.runtime, scenario.run.link)
    if "auto" in (scenario.run.runtime, scenario.run.link):
        scenario = scenario.resolved(choice.runtime, choice.link)
        why = f" ({'; '.join(choice.reasons)})" if choice.reasons else ""
        console.print(
            f"{what}: {choice.runtime} runtime, {choice.link} link{why}", highlight=False, markup=False
        )
    _check_links(scenario)
    prompts = load_prompts(scenario.workload, path)
    if not scenario.models.target.startswith("emulated:"):
        target, drafter = escape(scenario.models.target), escape(scenario.models.drafter)
        console.print(f"target [bold]{target}[/], drafter {drafter}")
    scenario = scenario.pinned(content_digest(scenario, prompts))
    tokenizer = load_tokenizer(scenario.models.target)
    ids = [encode_prompt(p, tokenizer) for p in prompts]
    limit = scenario.models.max_context - scenario.workload.max_new_tokens
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > limit:
            raise ScenarioError(
                f"prompt {prompt.key} is {len(tokens)} tokens; with {scenario.workload.max_new_tokens} new "
                f"ones the context of {scenario.models.max_context} allows {max(limit, 0)}"
            )
    return scenario, text, plan_jobs(scenario, prompts, ids)


def _check_links(scenario: Scenario) -> None:
    """Raises ScenarioError where a link cannot be had, before anything is started."""
    link_token(scenario)
    if not scenario.run.link.startswith("netem"):
        return
    for cell in scenario.cells():
        base = scenario.profile_of(cell)
        for profile in (base, *(p for _, p, _ in LinkStep.timeline(base, scenario.steps))):
            try:
                for way in DIRECTIONS:
                    netem_arguments(profile, way)
            except LinkError as e:
                raise ScenarioError(f"link {scenario.run.link}: {e}") from None


def show_plan(scenario: Scenario, jobs: Sequence[Job], folder: Path, console: Console) -> None:
    """What --dry-run prints: every cell, and how long it may take."""
    from rich.table import Table

    cells = scenario.cells()
    axes: dict[str, Callable[[Cell], str]] = {
        "cell": scenario.cell_id,
        "mode": lambda c: c.mode,
        "γ": lambda c: str(c.gamma or "–"),
        "RTT ms": lambda c: f"{c.rtt_ms:g}",
        "rate Mbit/s": lambda c: "unlimited" if c.rate_mbit is None else f"{c.rate_mbit:g}",
        "loss %": lambda c: f"{c.loss_pct:g}",
        "temperature": lambda c: f"{c.temperature:g}",
    }
    if any(c.mode in POLICY_MODES and c.policy != "static" for c in cells):
        axes["policy"] = lambda c: c.policy if c.mode in POLICY_MODES else "–"
    if any(c.run_ahead != RUN_AHEAD for c in cells):
        axes["run-ahead"] = lambda c: str(c.run_ahead)
    if any(c.free_run for c in cells):
        axes["free run"] = lambda c: "yes" if c.free_run else "–"
    if any(c.beside for c in cells):
        axes["beside"] = lambda c: str(c.beside or "–")
    if any(c.edges != 1 for c in cells):
        axes["edges"] = lambda c: str(c.edges)
    if any(c.loss_burst != 1.0 for c in cells):
        axes["burst"] = lambda c: f"{c.loss_burst:g}"
    if any(c.jitter_ms for c in cells):
        axes["jitter ms"] = lambda c: f"{c.jitter_ms:g}"
    if any(c.tcp.label for c in cells):
        axes["TCP"] = lambda c: c.tcp.label or "default"
    if scenario.run.link == "wan":  # nobody knows, and nobody asks
        del axes["rate Mbit/s"], axes["loss %"]
    columns = {name: [show(cell) for cell in cells] for name, show in axes.items()}
    same = {name: c[0] for name, c in columns.items() if len(c) > 1 and len(set(c)) == 1}
    table = Table(title=f"{scenario.name}: {len(cells)} cells × {scenario.run.repeats} repeats")
    shown = [name for name in columns if name not in same]
    for name in shown:
        words = name in ("cell", "mode", "policy", "TCP")
        width = max(map(len, columns[name])) if name in ("cell", "mode") else None
        table.add_column(name, justify="left" if words else "right", min_width=width)
    for row in zip(*(columns[name] for name in shown), strict=True):
        table.add_row(*row)
    console.print(table)
    if same:
        console.print(f"in every cell: {', '.join(f'{k} {v}' for k, v in same.items())}", highlight=False)
    if scenario.steps:
        console.print(f"during every generation: {describe_steps(scenario.steps)}", highlight=False)
    seconds = estimate_s(jobs, scenario.workload.max_new_tokens)
    where = f"runtime {scenario.run.runtime}, link {scenario.run.link}"
    console.print(
        f"{len(jobs)} generations, about {seconds / 60:.0f} min; {where}; results to {folder}", markup=False
    )


def results_folder(out: Path, scenario: Scenario) -> Path:
    """Where a scenario's results go: named by what determines them, so that a changed one starts anew."""
    return out / f"{scenario.name}-{scenario.digest()}"


def link_token(scenario: Scenario) -> str | None:
    """The secret of a verifier that was started by hand; None where the testbed makes one up."""
    return None if scenario.run.verifier is None else scenario.read_token(os.environ.get("DSDLAB_TOKEN", ""))
