"""The one sentence a reader takes home, and the exactness count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsdlab.sweep.breakeven import BreakEven
from dsdlab.sweep.keys import Condition, Variant

if TYPE_CHECKING:
    from dsdlab.sweep.stats import CellSummary


def exact_line(exact: int, compared: int, generations: int, *, simulated: bool = False) -> str:
    """ "exact: N of N generations", saying how many had no reference to be compared with."""
    line = f"exact: {exact} of {generations} {'simulated ' if simulated else ''}generations"
    return line if compared == generations else f"{line} ({generations - compared} not compared)"


def _best_per_mode(found: Sequence[BreakEven], cells: Sequence[CellSummary]) -> list[BreakEven]:
    """For each mode the window that tolerates most, of equal ones the fastest.

    Distributed modes come first, and of those the one that tolerates most.
    """

    def rank(item: BreakEven) -> tuple[float, float]:
        ratios = [
            cell.ratio.value
            for cell in cells
            if cell.ratio is not None and (cell.variant, cell.condition) == (item.variant, item.condition)
        ]
        return item.rtt_ms, -sum(ratios) / len(ratios) if ratios else float("-inf")

    best: dict[str, BreakEven] = {}
    for item in found:
        mode = item.variant.mode
        if mode not in best or rank(item) > rank(best[mode]):
            best[mode] = item

    def place(item: BreakEven) -> tuple[bool, float, int]:
        return not item.variant.mode.startswith("dsd-"), -item.rtt_ms, -item.variant.order[0]

    return sorted(best.values(), key=place)


def _reach(item: BreakEven, grid: bool) -> str:
    """Up to where it wins; `grid` spells out which RTTs were tried."""
    interval = f" {item.interval_text}" if item.interval_text else ""
    if item.state == "crosses":
        return f"up to {item.bound(item.rtt_ms)} ms RTT{interval}"
    tried = ""
    if grid:
        span = f"{item.grid_min_ms:g}–{item.grid_max_ms:g}" if item.grid_min_ms < item.grid_max_ms else ""
        tried = f" ({span or f'{item.grid_min_ms:g}'} ms)"
    return f"at {'every' if item.state == 'always' else 'no'} RTT tried{tried}{interval}"


def best_of(tried: Sequence[Variant]) -> str:
    """ "best of 3 windows", or settings where they differ in more; empty for a single one."""
    if len(tried) < 2:
        return ""
    alike = len({variant._replace(gamma=0) for variant in tried}) == 1
    return f"best of {len(tried)} {'windows' if alike else 'settings'}"


def setting(condition: Condition) -> str:
    """What the verdict holds for: "modelled link, process runtime; greedy, unlimited rate, no loss"."""
    if condition.simulated:
        return f"simulated, not measured; {condition.label}"
    runtime = "modelled nodes" if condition.runtime == "modelled" else f"{condition.runtime} runtime"
    return f"{condition.link} link, {runtime}; {condition.label}"


def verdict_sentence(
    break_evens: Sequence[BreakEven],
    cells: Sequence[CellSummary],
    conditions: Sequence[Condition],
    *,
    good: int,
    excluded: int = 0,
    last: str = "",
) -> str:
    """The verdict for the least constrained condition that has `cloud-ar` to be held against.

    good: generations that may enter statistics; excluded: those that finished but may not. last: a clause
    to end with.
    """
    sentence = _sentence(break_evens, cells, conditions, good, excluded)
    return f"{sentence.removesuffix('.')}; {last}." if last else sentence


def _sentence(
    break_evens: Sequence[BreakEven],
    cells: Sequence[CellSummary],
    conditions: Sequence[Condition],
    good: int,
    excluded: int,
) -> str:
    simulated = any(c.simulated for c in conditions)
    name = "simulation" if simulated else "sweep"
    if not good and excluded:
        return "The link of every generation was out of tolerance; there is nothing to conclude."
    if not good:
        return f"No generation of this {name} succeeded; there is nothing to conclude."
    streaming = [b for b in break_evens if b.baseline.mode == "cloud-ar"]
    if not streaming:
        modes = ", ".join(dict.fromkeys(cell.variant.mode for cell in cells))
        did = "simulated" if simulated else "measured"
        return f"Nothing in this {name} can be compared with streaming (cloud-ar); it {did} {modes}."
    condition = next(c for c in conditions if any(b.condition == c for b in streaming))
    here = [b for b in streaming if b.condition == condition]
    best = _best_per_mode(here, cells)
    tried = {b.variant.mode: [o.variant for o in here if o.variant.mode == b.variant.mode] for b in best}
    clauses: list[str] = []
    grids: set[tuple[float, float]] = set()
    for item in best:
        name = item.variant.label_with(best_of(tried[item.variant.mode]))
        verb = "" if clauses else "beats streaming from the target "
        grid = (item.grid_min_ms, item.grid_max_ms)
        clauses.append(f"{name} {verb}{_reach(item, grid not in grids)}")
        if item.state != "crosses":
            grids.add(grid)
    others = len({b.condition for b in streaming}) - 1
    more = f"; {others} more condition{'s' if others > 1 else ''} below" if others else ""
    opening = "In simulation" if condition.simulated else "With this pair"
    return f"{opening}, {'; '.join(clauses)} ({setting(condition)}{more})."
