"""The fuzzer's command. No logic lives here."""

from __future__ import annotations

import sys
from typing import Any

import click

from dsdlab.cli_errors import UserError, guarded
from dsdlab.cli_simulator import console


@click.command()
@click.option("--runs", type=click.IntRange(1, 10_000_000), default=1000, show_default=True)
@click.option(
    "--seed", "--first", "first", type=click.IntRange(0, 2**63), default=0, show_default=True,
    help="Seed of the first run; each further run has the next one.",
)  # fmt: skip
@click.option("--mode", "modes", multiple=True, help="Only this mode; may be given several times.")
@click.option("--policy", "policies", multiple=True, help="Only this window policy; likewise.")
@click.option("--workers", type=click.IntRange(1, 4096), help="Processes; default: the usable cores.")
@click.option("-v", "--verbose", is_flag=True, help="Print each run's situation and every frame.")
def fuzz(
    runs: int,
    first: int,
    modes: tuple[str, ...],
    policies: tuple[str, ...],
    workers: int | None,
    verbose: bool,
) -> None:
    """Random simulated runs: does every mode and policy say what the target says, whatever happens?

    Each run draws modes, policies, models, costs, links and faults from its seed: loss, partitions, broken
    connections, restarted verifiers, frames twice, late or in the wrong order. A policy of your own is held
    to the same: --policy NAME.
    """
    from dsdlab.nodes.request import MODES, POLICY_MODES
    from dsdlab.sim.fuzz import repeat_command

    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--mode {mode!r}; allowed: {', '.join(MODES)}")
    if policies and modes and not set(modes) & set(POLICY_MODES):
        allowed = ", ".join(POLICY_MODES)
        raise UserError(f"--policy {policies[0]!r} decides nothing in --mode {modes[0]}; allowed: {allowed}")
    report = guarded(lambda: _run(runs, first, modes, policies, workers, verbose))
    for failure in report.failures:
        click.echo(f"seed {failure.seed}: {'; '.join(failure.wrong)}")
        click.echo(f"  repeat: {repeat_command(failure.seed, modes, policies)}")
    click.echo(
        f"{report.generations} generations, {report.tokens} tokens; given up, or nobody there to go on, and "
        f"right until then: {report.unfinished}"
    )
    click.echo(report.exact_line)
    sys.exit(1 if report.failures else 0)


def _run(
    runs: int,
    first: int,
    modes: tuple[str, ...],
    policies: tuple[str, ...],
    workers: int | None,
    verbose: bool,
) -> Any:
    from rich.progress import Progress

    from dsdlab.sim.fuzz import FuzzReport, show
    from dsdlab.sim.fuzz import fuzz as play_all

    if verbose:
        total = FuzzReport()
        for seed in range(first, first + runs):
            lines, report = show(seed, modes, policies)
            click.echo("\n".join(lines))
            total.add(report)
        return total
    with Progress(console=console(), transient=True) as progress:
        bar = progress.add_task("runs", total=runs)
        return play_all(
            first,
            runs,
            modes=modes,
            policies=policies,
            workers=workers,
            on_done=lambda done, _: progress.update(bar, completed=done),
        )
