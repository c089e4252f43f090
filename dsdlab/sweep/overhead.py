"""How much of a sweep's time measured something, and what the rest cost per generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dsdlab.sweep.rows import Row


@dataclass(frozen=True, slots=True)
class Overhead:
    """share: of the wall time of all generations, tried again or not, the part that generated; the start of
    models and nodes is not in it. between_s: median time per generation that did not, in s."""

    share: float
    between_s: float

    @property
    def line(self) -> str:
        """ "measuring 83 % of wall time; 0.91 s between generations (median)"."""
        share, between = f"{100 * self.share:.0f} %", f"{self.between_s:.2f} s"
        return f"measuring {share} of wall time; {between} between generations (median)"


def overhead_of(rows: Sequence[Row]) -> Overhead | None:
    """Of the rows that say so; None where none does (they are of an earlier version)."""
    known = [row for row in rows if row.overhead_s > 0.0]
    if not known:
        return None
    share = sum(row.generate_s for row in known) / sum(row.wall_s for row in known)
    return Overhead(share, median(row.overhead_s for row in known))
