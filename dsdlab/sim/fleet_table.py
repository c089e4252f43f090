"""Fleets for people: a table, and one line about capacity for each kind of fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dsdlab.sim.fleet_grid import FleetRow, fleet_json

__all__ = ["FleetReport", "capacity_lines", "fleet_table"]

AXES = {
    "mode": "mode", "policy": "policy", "gamma": "γ", "run_ahead": "run-ahead", "free_run": "free run",
    "beside": "beside", "rtt_ms": "RTT ms", "rate_mbit": "Mbit/s",
    "loss_pct": "loss %", "jitter_ms": "jitter ms", "drafters": "drafters", "arrival_per_s": "sessions/s",
    "alpha": "α", "verifiers": "verifiers", "routing": "routing", "stages": "stages",
}  # fmt: skip
HEADS = [  # of what became of a fleet
    "tokens/s",
    "closed form",
    "TPOT p50",
    "p95 ms",
    "TTFT p50",
    "p95 ms",
    "busy %",
    "queue",
    "wait ms",
    "wasted %",
]
ALWAYS = ("mode", "gamma", "drafters", "arrival_per_s")


def fleet_table(rows: Sequence[FleetRow]) -> Table:
    """The rows for people: the axes that vary, then what became of each fleet."""
    shown = [
        name
        for name in AXES
        if len({getattr(row, name) for row in rows}) > 1
        or (name in ALWAYS and any(getattr(row, name) is not None for row in rows))
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        table.add_column(AXES[name], justify="left" if name in ("mode", "policy", "routing") else "right")
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        r = row.result
        table.add_row(
            *(_axis(getattr(row, name)) for name in shown),
            f"{r.goodput_tps:.1f}",
            _one(row.bound_tps),
            *(_one(v) for v in (r.tpot_ms.p50, r.tpot_ms.p95, r.ttft_ms.p50, r.ttft_ms.p95)),
            _each([f"{100 * u:.0f}" for u in r.utilisation]),
            _each([f"{q:.2f}" for q in r.queue_mean]),
            _each([f"{w:.1f}" for w in r.wait_ms]),
            f"{100 * r.wasted / r.drafted:.0f}" if r.drafted else "–",
        )
    return table


def _axis(value: float | str | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else value if isinstance(value, str) else f"{value:g}"


def _one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _each(values: list[str]) -> str:
    """A number per verifier: all of a few, the range of many."""
    if len(set(values)) == 1:
        return values[0]
    return " ".join(values) if len(values) <= 4 else f"{min(values, key=float)}–{max(values, key=float)}"


def capacity_lines(rows: Sequence[FleetRow], max_tpot_ms: float) -> list[str]:
    """For each kind of fleet, how many drafters (or sessions a second) it served with TPOT p95 within a
    bound."""
    kinds: dict[tuple[object, ...], list[FleetRow]] = {}
    names = [name for name in AXES if name not in ("drafters", "arrival_per_s")]
    for row in rows:
        kinds.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    varying = [name for name in names if len({getattr(row, name) for row in rows}) > 1 or name == "mode"]
    lines = []
    for members in kinds.values():
        first = members[0]
        what = ", ".join(
            f"{AXES[n]} {_axis(getattr(first, n))}"
            if n not in ("mode", "policy", "routing")
            else getattr(first, n)
            for n in varying
        )
        good = [
            m for m in members if m.result.tpot_ms.p95 is not None and m.result.tpot_ms.p95 <= max_tpot_ms
        ]
        if not good:
            lines.append(f"{what}: no fleet of this grid kept to {max_tpot_ms:g} ms per token")
            continue
        best = max(good, key=lambda m: (m.drafters or 0, m.arrival_per_s or 0.0))
        load = (
            f"{best.drafters} drafter{'s' * (best.drafters > 1)}"
            if best.drafters is not None
            else f"{best.arrival_per_s:g} sessions/s"
        )
        speed = f"{best.result.goodput_tps:.0f} tokens/s"
        lines.append(f"{what}: {load} within {max_tpot_ms:g} ms per token ({speed})")
    return lines


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What a command says of a scenario's fleets. max_tpot_ms: as in the scenario's [fleet]."""

    rows: Sequence[FleetRow]
    max_tpot_ms: float | None = None

    def tables(self) -> list[Table]:
        return [fleet_table(self.rows)]

    def lines(self) -> list[str]:
        """Capacity at the pace asked for, and whether every generation was the target's."""
        said = [] if self.max_tpot_ms is None else capacity_lines(self.rows, self.max_tpot_ms)
        every = sum(row.result.generations for row in self.rows)
        inexact = sum(row.result.inexact for row in self.rows)
        refused = sum(row.result.refused for row in self.rows)
        said.append(f"{every} generations counted, {inexact} differ from the target alone, {refused} refused")
        return said

    def as_json(self) -> dict[str, Any]:
        return fleet_json(self.rows)
