"""The simulator's commands: simulate, compare, calibrate, trace. No logic lives here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dsdlab.cli_errors import guarded

RESULTS = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Results folder.",
)
WIDE = 140  # characters
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def overriding(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that replace single values of a scenario."""
    for name, key in (("precision", "models.precision"), ("link", "run.link"), ("runtime", "run.runtime")):
        command = click.option(f"--{name}", help=f"Instead of the scenario's {key}.")(command)
    return click.option("--repeats", type=int, help="Instead of the scenario's run.repeats.")(command)


def feeding(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what the simulator is fed with."""
    options = (
        click.option("--profile", help="A shipped profile, or a file that `dsdlab calibrate` wrote."),
        click.option(
            "--draws", type=click.IntRange(1, 10_000), help="Instead of the scenario's simulate.draws."
        ),
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


def overrides_of(
    repeats: int | None, runtime: str | None, link: str | None, precision: str | None
) -> dict[str, Any]:
    """What the options replace, by dotted name."""
    given = {"run.repeats": repeats, "run.runtime": runtime, "run.link": link, "models.precision": precision}
    return {name: value for name, value in given.items() if value is not None}


def command_line() -> str:
    """How to repeat this."""
    return " ".join(["dsdlab", *sys.argv[1:]])


def console() -> Any:
    """Progress and remarks go to standard error; standard output is for results."""
    from rich.console import Console

    return Console(stderr=True)


def echo_table(table: Any) -> None:
    """A rich table on standard output; whole where that is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@RESULTS
@overriding
@feeding
@click.option("--trace", type=click.Path(path_type=Path), help="A trace; default: recorded once and kept.")
@click.option("--alpha", type=click.FloatRange(0, 1), help="Synthetic acceptance rate instead of a trace.")
@click.option(
    "--persist", type=click.FloatRange(1, 1e6), help="Mean run of accepted positions, with --alpha."
)
@click.option("--workers", type=click.IntRange(1, 4096), help="Processes; default: the usable cores.")
@JSON
def simulate(
    scenario: Path,
    out: Path,
    repeats: int | None,
    runtime: str | None,
    link: str | None,
    precision: str | None,
    as_json: bool,
    **feed: Any,
) -> None:
    """Predict a scenario's grid in virtual time: seconds instead of hours."""
    import asyncio

    from testbed import predicting

    result = guarded(
        lambda: asyncio.run(
            predicting.simulate(
                scenario,
                overrides=overrides_of(repeats, runtime, link, precision),
                out=out,
                feed=predicting.Feed(**feed),
                command=command_line(),
                console=console(),
            )
        )
    )
    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
        return
    for table in result.tables():
        echo_table(table)
    click.echo("\n".join(result.lines()))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prediction", type=click.Path(path_type=Path), help="Default: the one in the folder.")
@JSON
def compare(folder: Path, prediction: Path | None, as_json: bool) -> None:
    """Hold a sweep's measurements against their simulation; the report shows both."""
    from testbed import predicting

    result = guarded(lambda: predicting.compare_folder(folder, prediction))
    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
        return
    for table in result.tables():
        echo_table(table)
    click.echo("\n".join(result.lines()))


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@RESULTS
@overriding
@click.option(
    "--to", type=click.Path(path_type=Path), help="The profile's file; default: in the results folder."
)
def calibrate(
    scenario: Path,
    out: Path,
    repeats: int | None,
    runtime: str | None,
    link: str | None,
    precision: str | None,
    to: Path | None,
) -> None:
    """Measure what the scenario's models cost on its nodes, as deployed, and write a profile."""
    import asyncio

    from testbed import predicting

    path = guarded(
        lambda: asyncio.run(
            predicting.calibrate_scenario(
                scenario,
                overrides=overrides_of(repeats, runtime, link, precision),
                out=out,
                to=to,
                command=command_line(),
                console=console(),
            )
        )
    )
    click.echo(f"profile: {path}")


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@RESULTS
@overriding
@click.option(
    "--to", type=click.Path(path_type=Path), help="The trace's file; default: in the results folder."
)
def trace(
    scenario: Path,
    out: Path,
    repeats: int | None,
    runtime: str | None,
    link: str | None,
    precision: str | None,
    to: Path | None,
) -> None:
    """Record what the target says and what the drafter would propose at every position."""
    import asyncio

    from testbed import predicting

    overrides = overrides_of(repeats, runtime, link, precision)
    path = guarded(
        lambda: asyncio.run(predicting.trace_scenario(scenario, overrides, out=out, to=to, console=console()))
    )
    click.echo(f"trace: {path}")


COMMANDS = (simulate, compare, calibrate, trace)
