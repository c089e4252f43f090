"""`dsdlab train-awc`: the network of the `awc` window policy, trained in the simulator."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsdlab.cli_errors import guarded

__all__ = ["train_awc"]


@click.command("train-awc")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML; default: the shipped weights' recipe.",
)
@click.option("--seed", type=click.IntRange(0), help="Instead of the recipe's.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("awc_weights.json"),
    show_default=True,
    help="Weights, recipe and held-out results.",
)
def train_awc(recipe: Path | None, seed: int | None, out: Path) -> None:
    """Train the awc policy's network in the simulator (about a quarter of an hour on one core)."""
    guarded(lambda: _train(recipe, seed, out))


def _train(path: Path | None, seed: int | None, out: Path) -> None:
    from dsdlab.sim.awc_training import Recipe, train  # numpy and the nodes: not for --help
    from dsdlab.sweep.store import write_bytes

    recipe = Recipe()
    if path is not None:
        try:
            recipe = msgspec.toml.decode(path.read_bytes(), type=Recipe)
        except OSError as e:
            raise click.UsageError(f"{path}: {e.strerror}") from None
        except ValueError as e:  # msgspec's errors are ValueErrors too
            raise click.UsageError(f"{path}: {' '.join(str(e).split())}") from None
    if seed is not None:
        recipe = msgspec.structs.replace(recipe, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}

        def on_progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

        weights = train(recipe, on_progress)
    write_bytes(out, msgspec.json.encode(weights) + b"\n")
    found = weights.provenance["held_out"]
    click.echo(
        f"{out}: in {found['situations']:.0f} situations not seen, a token takes {found['awc']:.1%} more "
        f"than with the best window of each (95 % of them: under {found['awc_p95']:.1%}); with γ = 4 always "
        f"{found['static_4']:.1%}, with the best single window ({found['best_static_gamma']:.0f}) "
        f"{found['best_static']:.1%}"
    )
