"""Tables of a grid for the terminal: a line per way to decode, a column per RTT, one table per condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich.table import Table

from dsdlab.sweep.comparison import ComparedCell, Comparison, signed_pct
from dsdlab.sweep.keys import Condition, Variant
from dsdlab.sweep.stats import Summary

__all__ = ["comparison_tables", "tpot_tables"]

T = TypeVar("T")
MOST_TABLES = 12
MOST_COLUMNS = 12

Entry = tuple[Variant, Condition, float, str]  # who, over what, at which RTT in ms, what to show


def tpot_tables(summary: Summary) -> list[Table]:
    """Median TPOT in ms of every cell."""
    entries = [(c.variant, c.condition, c.rtt_ms, f"{c.tpot_ms.value:.1f}") for c in summary.cells]
    return _tables(entries, "TPOT, ms")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Measured TPOT in ms and the simulator's signed error of every cell that has both."""

    def show(cell: ComparedCell) -> str:
        return f"{cell.tpot.measured.value:.1f} {signed_pct(cell.tpot.error_pct)}"

    entries = [(c.variant, c.condition, c.rtt_ms, show(c)) for c in comparison.cells if not c.missing]
    return _tables(entries, "measured TPOT, ms, and the simulator's error, %")


def _tables(entries: Sequence[Entry], what: str) -> list[Table]:
    out = []
    for condition in _once((e[1] for e in entries), lambda c: c.order)[:MOST_TABLES]:
        here = [e for e in entries if e[1] == condition]
        rtts = sorted({e[2] for e in here})
        shown = {(e[0], e[2]): e[3] for e in here}
        for first in range(0, len(rtts), MOST_COLUMNS):
            columns = rtts[first : first + MOST_COLUMNS]
            table = Table(title=f"{condition.label}: {what}", title_justify="left")
            table.add_column("RTT, ms")
            for rtt in columns:
                table.add_column(f"{rtt:g}", justify="right")
            for variant in _once((e[0] for e in here), lambda v: v.order):
                table.add_row(variant.label, *(shown.get((variant, rtt), "–") for rtt in columns))
            out.append(table)
    return out


def _once(values: Iterable[T], order: Callable[[T], object]) -> list[T]:
    return sorted(set(values), key=order)  # type: ignore[arg-type] # orders are tuples
