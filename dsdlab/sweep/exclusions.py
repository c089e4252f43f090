"""Which rows count, and for what: one per generation, and only those whose link was what was asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from dsdlab.sweep.calibration import LinkMeasure, judge_loss
from dsdlab.sweep.keys import condition_of, pair_of, variant_of
from dsdlab.sweep.rows import Row

SHOWN = 3
NUMBERS = re.compile(r"\d[\d.,e]*")


class Exclusion(NamedTuple):
    """Generations of one cell that count for exactness only."""

    cell: str  # for people
    reason: str
    generations: int


def describe_cell(row: Row) -> str:
    """A row's cell for people."""
    return f"{variant_of(row).label} at {row.rtt_ms:g} ms, {condition_of(row).label}"


def _rank(row: Row) -> int:
    return 2 if row.usable else int(row.status == "ok")


def unique_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per cell and pair, in order of first sight.

    The first that is good; else the last that was excluded; else the last that failed.
    """
    best: dict[tuple[str, tuple[str, int, int]], Row] = {}
    for row in rows:
        key = (row.cell, pair_of(row))
        if key not in best or (_rank(best[key]) < 2 and _rank(row) >= _rank(best[key])):
            best[key] = row
    return list(best.values())


def measures_of(rows: Sequence[Row]) -> list[LinkMeasure]:
    """Every calibration of these rows' links."""
    found = (measure for row in rows for measure in (row.link_before, row.link_after))
    return [measure for measure in found if measure is not None]


def _loss_reason(rows: Sequence[Row]) -> str:
    measures = [] if rows[0].link == "wan" else measures_of(rows)  # a WAN may lose what it likes
    return judge_loss(rows[0].profile, measures) if measures else ""


def exclude_by_loss(rows: Sequence[Row]) -> list[Row]:
    """The same rows; those of a cell whose pooled losses contradict its profile are marked excluded."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    why = {cell: _loss_reason(members) for cell, members in cells.items()}
    return [
        msgspec.structs.replace(row, excluded="; ".join(filter(None, (row.excluded, why[row.cell]))))
        if why[row.cell]
        else row
        for row in rows
    ]


def counted_rows(rows: Sequence[Row]) -> list[Row]:
    """What all statistics start from: `unique_rows`, and cells with wrong losses excluded."""
    return exclude_by_loss(unique_rows(rows))


def exclusions_of(rows: Sequence[Row]) -> list[Exclusion]:
    """Who was excluded and why; reasons that differ only in their numbers are told by the first one's."""
    first: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row.status == "ok" and row.excluded:
            key = (describe_cell(row), NUMBERS.sub("#", row.excluded))
            first.setdefault(key, row.excluded)
            counts[key] += 1
    return [Exclusion(cell, first[cell, alike], n) for (cell, alike), n in counts.items()]


def excluded_line(exclusions: Sequence[Exclusion], generations: int) -> str:
    """ "excluded: 3 of 120 generations (link out of tolerance): …"; empty where none was."""
    if not exclusions:
        return ""
    shown = [
        f"{e.cell}: {e.reason}" + (f" (and {e.generations - 1} like it)" if e.generations > 1 else "")
        for e in exclusions[:SHOWN]
    ]
    more = len(exclusions) - SHOWN
    shown += [f"and {more} more in the report"] if more > 0 else []
    n = sum(e.generations for e in exclusions)
    return f"excluded: {n} of {generations} generations (link out of tolerance): {' | '.join(shown)}"
