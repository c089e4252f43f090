"""The command line: options in, one clear line out when something is wrong. No logic lives here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dsdlab import __version__
from dsdlab.cli_errors import UserError, guarded
from dsdlab.cli_fuzz import fuzz
from dsdlab.cli_simulator import COMMANDS, command_line, console, feeding, overrides_of
from dsdlab.cli_training import train_awc

DEFAULT_TARGET = "smollm2-135m-instruct"
DEFAULT_DRAFTER = "lookup+smollm2-drafter"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsdlab")
def main() -> None:
    """A laboratory for distributed speculative decoding."""


# node ---------------------------------------------------------------------------------------------


@main.group()
def node() -> None:
    """Run one node by hand, or under the testbed's control."""


def _node_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--target", default=DEFAULT_TARGET, show_default=True, help="Target model."),
        click.option("--drafter", default=DEFAULT_DRAFTER, show_default=True, help="Drafter, or none."),
        click.option("--precision", help="bf16, fp32, int8, int4 or gguf.  [default: the target's own]"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--threads", type=click.IntRange(1, 1024), help="Compute threads; default: the cores."),
        click.option("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Sessions."),
        click.option(
            "--max-context", type=click.IntRange(16, 1 << 20), default=2048, show_default=True,
            help="Positions per session.",
        ),
        click.option("--token-file", type=click.Path(path_type=Path), help="Shared token; or $DSDLAB_TOKEN."),
        click.option("--control", type=click.Choice(["none", "stdio"]), default="none", hidden=True),
    ):  # fmt: skip
        command = option(command)
    return command


def _decoding(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to decode; what they mean is for the node to judge."""
    for option in reversed((
        click.option("--mode", default="dsd-sync", show_default=True),
        click.option("--policy", default="static", show_default=True, help="Window policy."),
        click.option("--gamma", type=click.IntRange(0, 256), default=4, show_default=True, help="Window."),
        click.option(
            "--run-ahead", type=click.IntRange(1, 4096), default=32, show_default=True,
            help="Drafts in flight (dsd-pipelined, dsd-stream).",
        ),
        click.option(
            "--free-run/--no-free-run", default=False, show_default=True,
            help="Let the target decode alone while no draft waits (dsd-stream).",
        ),
        click.option(
            "--beside", type=click.IntRange(0, 256), default=0, show_default=True,
            help="Window of a drafter at the target (dsd-stream with --free-run, dsd-adaptive).",
        ),
    )):  # fmt: skip
        command = option(command)
    return command


def _options(kw: dict[str, Any]) -> Any:
    from dsdlab.models.zoo import default_precision
    from dsdlab.node_process import NodeOptions

    return NodeOptions(
        target=kw["target"],
        drafter=None if kw["drafter"] == "none" else kw["drafter"],
        precision=kw["precision"] or default_precision(kw["target"]),
        device=kw["device"],
        threads=kw["threads"],
        slots=kw["slots"],
        max_context=kw["max_context"],
        token=_token(kw["token_file"]),
    )


def _token(path: Path | None) -> str:
    """The shared secret: of the file, else of the environment; empty where there is none."""
    if path is None:
        return os.environ.get("DSDLAB_TOKEN", "")
    token = read_text(path).strip()
    if not token:
        raise UserError(f"token file {path} is empty")
    return token


def read_text(path: Path) -> str:
    """A UTF-8 text file; anything else is the user's to mend."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: byte {e.start} is 0x{e.object[e.start]:02x}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )


@node.command("verifier")
@_node_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any free.")
def node_verifier(host: str, port: int, **kw: Any) -> None:
    """Hold the target model and serve sessions."""
    from dsdlab.node_process import run, run_verifier

    _log_to_stderr()
    guarded(lambda: run(run_verifier(_options(kw), host, port, kw["control"] == "stdio")))


@node.command("drafter")
@_node_options
@click.option("--connect", "url", required=True, metavar="URL", help="The verifier: ws://HOST:PORT/")
@click.option("--edge-target", is_flag=True, help="Also load the target here (mode edge-sd).")
@click.option("--prompt", help="Generate once from this text, then end.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="The same, from a UTF-8 file.")
@_decoding
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def node_drafter(
    url: str, edge_target: bool, prompt: str | None, prompt_file: Path | None, **kw: Any
) -> None:
    """Draft at the edge; with a prompt, generate once and print the text."""
    from dsdlab.node_process import run, run_drafter

    if kw["control"] == "stdio":
        _log_to_stderr()
        guarded(lambda: run(run_drafter(_options(kw), url, True, edge_target)))
        return
    if (prompt is None) == (prompt_file is None):
        raise UserError("a prompt is needed: --prompt TEXT or --prompt-file FILE, one of them")
    text = prompt if prompt_file is None else read_text(prompt_file)
    from dsdlab.generate import stream_to_terminal

    guarded(lambda: run(stream_to_terminal(_options(kw), url, text or "", edge_target, kw)))


# sweep --------------------------------------------------------------------------------------------


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--repeats", type=int, help="Instead of the scenario's run.repeats.")
@click.option("--runtime", help="Instead of the scenario's run.runtime.")
@click.option("--link", help="Instead of the scenario's run.link.")
@click.option("--precision", help="Instead of the scenario's models.precision.")
@click.option("--fresh", is_flag=True, help="Move earlier results of this scenario aside and start anew.")
@click.option("--dry-run", is_flag=True, help="Print cells and a time estimate; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--allow-incomplete", is_flag=True, help="Exit 0 although generations failed.")
@click.option("--predict", is_flag=True, help="Calibrate, simulate and write the prediction down first.")
@feeding
def sweep(
    scenario: Path,
    out: Path,
    repeats: int | None,
    runtime: str | None,
    link: str | None,
    precision: str | None,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    allow_incomplete: bool,
    predict: bool,
    **feed: Any,
) -> None:
    """Run a scenario's grid and write an HTML report; what is already there is kept."""
    import asyncio

    from testbed import app, planning, predicting

    overrides = overrides_of(repeats, runtime, link, precision)
    screen = console()
    if dry_run:
        plan, _, jobs = guarded(lambda: planning.plan_sweep(scenario, overrides, screen))
        planning.show_plan(plan, jobs, planning.results_folder(out, plan), screen)
        return
    result = guarded(
        lambda: asyncio.run(
            app.sweep(
                scenario,
                overrides=overrides,
                out=out,
                fresh=fresh,
                command=command_line(),
                console=screen,
                feed=predicting.Feed(**feed) if predict else None,
            )
        )
    )
    _print_result(result, as_json)
    summary = result.summary
    if summary.missing and not allow_incomplete:
        click.echo(f"dsdlab: incomplete: {'; '.join(summary.missing[:4])}; run it again to retry", err=True)
        sys.exit(1)
    if summary.exact < summary.compared:
        sys.exit(1)


def _print_result(result: Any, as_json: bool) -> None:
    import json

    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
        return
    click.echo(result.summary.verdict)
    click.echo("\n".join([result.summary.exact_line, *result.summary.notes]))
    click.echo(f"report: {result.report}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def report(folder: Path, as_json: bool) -> None:
    """Write the report of a results folder again."""
    from testbed import reports

    _print_result(guarded(lambda: reports.report(folder)), as_json)


@main.command()
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="The prompt, from a UTF-8 file.")
@_decoding
@click.option("--rtt-ms", type=float, default=0.0, show_default=True, help="Round trip of the modelled link.")
@click.option("--rate-mbit", type=float, help="Rate of the modelled link; default: unlimited.")
@click.option("--loss-pct", type=float, default=0.0, show_default=True)
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_node_options
def run(prompt: str | None, prompt_file: Path | None, **kw: Any) -> None:
    """One generation over a modelled link, streamed; accepted drafts are green."""
    from dsdlab.node_process import run as run_loop
    from dsdlab.sim.profile import LinkProfile
    from testbed import app

    if (prompt is None) == (prompt_file is None):
        raise UserError("a prompt is needed: as an argument or --prompt-file FILE, one of them")
    text = prompt if prompt_file is None else read_text(prompt_file)
    if not (text or "").strip():
        raise UserError("the prompt is empty; allowed: any text with at least one visible character")
    try:
        rate = kw["rate_mbit"]
        profile = LinkProfile(
            rtt_ms=kw["rtt_ms"], rate_up_mbit=rate, rate_down_mbit=rate, loss_pct=kw["loss_pct"]
        )
    except ValueError as e:
        raise UserError(str(e)) from None
    guarded(lambda: run_loop(app.run_once(_options(kw), text or "", profile, kw)))


@main.command()
@click.argument("url", metavar="ws://HOST:PORT/")
@click.option("--token-file", type=click.Path(path_type=Path), help="The verifier's token; or $DSDLAB_TOKEN.")
@click.option("--n", type=click.IntRange(1, 10_000), default=500, show_default=True, help="Probes.")
@click.option(
    "--gap-ms", type=click.FloatRange(0.1, 1000), default=5.0, show_default=True, help="Between two."
)
@click.option("--rate-mbit", type=click.FloatRange(0.001, 100_000), help="Also measure rates of about this.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def probe(
    url: str, token_file: Path | None, n: int, gap_ms: float, rate_mbit: float | None, as_json: bool
) -> None:
    """Measure the path to a verifier with UDP packets: RTT, losses each way, reordering, rate."""
    import json

    from testbed import probe_report

    found = guarded(lambda: probe_report.probe(url, _token(token_file), n, gap_ms / 1e3, rate_mbit))
    click.echo(json.dumps(found.as_json()) if as_json else "\n".join(found.lines()))


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML; default: how the shipped one was made."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/distill"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on in a folder that is not empty.")
@click.option("--only", default="", help="This part alone: text, then a shape (several side by side).")
@click.argument("prompts", nargs=-1, type=click.Path())
def distill(config: Path | None, out: Path, resume: bool, only: str, prompts: tuple[str, ...]) -> None:
    """Train a drafter for a target; PROMPTS are JSONL files beside the built-in and self-written ones."""

    def action() -> Any:
        from dsdlab.models.base import ModelError
        from dsdlab.models.distill import main as distillation

        path = config or Path(distillation.__file__).with_name("default.toml")
        try:
            return distillation.run(path, out, resume, prompts, only=only)
        except ValueError as e:
            raise ModelError(str(e)) from None

    result = guarded(action)
    if only:
        click.echo(f"{only}: done; the rest: the same command with --resume and without --only")
    else:
        click.echo(f"best shape: {result['chosen']}; weights: {result['file']}")


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def clean(results: Path) -> None:
    """Take away what a killed sweep may have left on this host; results stay."""
    from testbed.clean import clean as take_away

    removed = guarded(lambda: take_away(results))
    click.echo("\n".join(f"removed {thing}" for thing in removed) or "nothing to clean")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option(
    "--selftest/--no-selftest", default=True, help="Prove the engine's exactness on this processor."
)
def doctor(as_json: bool, selftest: bool) -> None:
    """What this host can do, and how to get the rest."""
    from testbed import doctor_report

    sys.exit(guarded(lambda: doctor_report.show(as_json, selftest)))


for command in (*COMMANDS, fuzz, train_awc):
    main.add_command(command)

if __name__ == "__main__":
    main()
