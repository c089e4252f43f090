"""Print what the doctor found, and prove the engine exact on this processor."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsdlab.models.base import ModelError
from dsdlab.models.zoo import ZOO, cache_dir, default_precision
from testbed.doctor import Finding, probe_host
from testbed.host import choose

_STYLE = {"ok": "green", "missing": "yellow", "info": "dim"}


def exactness(target: str) -> tuple[Finding, bool]:
    """The self-test of a target in its own precision, if it is in the cache; False: it found a difference."""
    if not (cache_dir() / "models" / target / "config.json").exists():
        return Finding("exactness", "missing", f"{target} is not in the cache", "dsdlab run 'Hello'"), True
    from dsdlab.models.loading import EngineOptions, load_engine
    from dsdlab.models.selftest import selftest
    from dsdlab.node_process import set_threads

    set_threads(None)
    precision = default_precision(target)
    result = selftest(load_engine(target, EngineOptions(precision=precision, slots=3)))
    detail = (
        f"{target} {precision}: {result.elements} logits at {result.positions} positions, alone, in windows "
        f"and in batches: {result.differing} differ"
    )
    if result.exact:
        return Finding("exactness", "ok", detail), True
    return Finding(
        "exactness", "missing", detail, "try another precision; please report this processor"
    ), False


def show(as_json: bool, selftest: bool) -> int:
    """Print the findings; the exit code: 1 if the engine is not exact here."""
    findings = probe_host()
    exact = True
    if selftest:
        try:
            finding, exact = exactness(next(iter(ZOO)))
        except ModelError as e:
            finding = Finding("exactness", "missing", str(e))
        findings.append(finding)
    choice = choose("auto", "auto")
    if as_json:
        facts = {"findings": [asdict(f) for f in findings], "choice": asdict(choice), "exact": exact}
        click.echo(json.dumps(facts))
        return 0 if exact else 1
    table = Table(show_header=False, box=None, pad_edge=False)
    for f in findings:
        how = f"\n[dim]to get it: {escape(f.how)}[/]" if f.how and f.status == "missing" else ""
        table.add_row(f"[{_STYLE[f.status]}]{f.status}[/]", f"[bold]{f.name}[/]", f"{escape(f.detail)}{how}")
    console = Console()
    console.print(table)
    console.print(f"auto is: [bold]{choice.runtime}[/] runtime, [bold]{choice.link}[/] link", highlight=False)
    for reason in choice.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)
    return 0 if exact else 1
