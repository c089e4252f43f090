"""What a scenario may say of its edge nodes: how many generate at once, and whether they are weaker."""

from __future__ import annotations

from dsdlab.scenario_parts import Grid, Models, Run

__all__ = ["check_edges"]

EMULATED = "emulated:"


def check_edges(grid: Grid, run: Run, models: Models) -> None:
    """Raises ValueError, field first, for repetitions that edges cannot share, or edges of another model."""
    for edges in grid.edges:
        if run.repeats % edges:
            raise ValueError(
                f"run.repeats is {run.repeats} with grid.edges {edges}; allowed: a multiple of it, for each "
                "edge's generation is a repetition"
            )
    for field in ("edge_target", "edge_drafter"):
        value = getattr(models, field)
        if value is not None and not (value.startswith(EMULATED) and models.target.startswith(EMULATED)):
            raise ValueError(
                f"models.{field} is {value!r} with models.target {models.target!r}; allowed: "
                f"{EMULATED}… for both"
            )
