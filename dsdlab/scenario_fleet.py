"""The table [fleet] of a scenario: many drafters, several verifiers. For the simulator alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.scenario_parts import Grid, LinkPart, Part, Run

__all__ = ["FLEET_MODES", "ROUTINGS", "Fleet", "Routing", "check_fleet"]

FLEET_MODES = ("cloud-ar", "cloud-sd", "dsd-sync", *STREAMING_MODES)
ROUTINGS = ("random", "round-robin", "jsq")
Routing = Literal["random", "round-robin", "jsq"]

Drafters = Annotated[int, Field(ge=1, le=1_000_000)]
Arrivals = Annotated[float, Field(gt=0, le=1e6)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Few = Annotated[int, Field(ge=1, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]


class Fleet(Part):
    """Each array is an axis; its combinations multiply the cells of [grid].

    A session is `generations_per_session` generations (1 by default) that one verifier serves, with a pause
    of `think_s` (mean, exponential) between them.

    drafters: a closed workload: so many users with a drafter each, who begin a new session after a pause.
    arrival_per_s: an open one instead: sessions come by Poisson's law, bring a drafter and leave.
    routing: which verifier a session gets and keeps: at random, in turn, or the one with the fewest sessions.
    alpha: chances that a drafted token is the target's, one position like another (of several tasks, say), in
        place of an emulated drafter's.
    stages, stage_hop_ms: the target lies on so many devices in a row, an equal share of its time on each.
    duration_s: nobody begins a generation afterwards; those under way are finished. Without it each user has
        one session. warmup_s: what begins before counts nowhere; a tenth of `duration_s` by default.
    slots: sessions that a verifier serves at a time; more are asked to come back. All, by default.
    shared_link: all drafters behind one bottleneck, instead of a link each.
    max_tpot_ms: what 95 % of the generations must keep to, for a verifier to count as serving so many.
    """

    drafters: Annotated[list[Drafters], Field(min_length=1)] | None = None
    arrival_per_s: Annotated[list[Arrivals], Field(min_length=1)] | None = None
    verifiers: list[Few] = Field(default=[1], min_length=1)
    routing: list[Routing] = Field(default=["round-robin"], min_length=1)
    alpha: Annotated[list[Share], Field(min_length=1)] | None = None
    stages: list[Few] = Field(default=[1], min_length=1)
    stage_hop_ms: Annotated[float, Field(ge=0, le=60_000)] = 0.0
    think_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    duration_s: Seconds | None = None
    warmup_s: Annotated[float, Field(ge=0, le=1e6)] | None = None
    generations_per_session: Annotated[int, Field(ge=1, le=60_000)] | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=1 << 18)] = 64
    slots: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    shared_link: bool = False
    max_tpot_ms: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @field_validator("drafters", "arrival_per_s", "verifiers", "routing", "alpha", "stages")
    @classmethod
    def _no_repeats(cls, values: list[Any] | None) -> list[Any] | None:
        if values is not None and len(set(values)) != len(values):
            raise ValueError("every value once")
        return values


def check_fleet(fleet: Fleet | None, grid: Grid, link: LinkPart, run: Run) -> None:
    """Raises ValueError, field first, for a fleet that cannot be run or would never end."""
    if fleet is None:
        return
    closed, opened = fleet.drafters is not None, fleet.arrival_per_s is not None
    if closed == opened:
        what = "both given" if closed else "missing"
        raise ValueError(f"fleet.drafters, fleet.arrival_per_s are {what}; allowed: one of the two")
    if fleet.duration_s is None and (opened or fleet.generations_per_session is None):
        more = "" if opened else ", or fleet.generations_per_session"
        raise ValueError(f"fleet.duration_s is missing; allowed: how long the fleet runs{more}")
    if fleet.warmup_s is not None and not (fleet.duration_s or 0.0) > fleet.warmup_s:
        raise ValueError(f"fleet.warmup_s is {fleet.warmup_s:g}; allowed: less than fleet.duration_s")
    for mode in grid.mode:
        if mode not in FLEET_MODES:
            why = ", and shares nothing" if mode == "edge-sd" else ""
            raise ValueError(f"grid.mode is {mode!r} with [fleet]{why}; allowed: {', '.join(FLEET_MODES)}")
    if grid.edges != [1]:
        raise ValueError(
            f"grid.edges is {grid.edges} with [fleet]; allowed: [1], fleet.drafters says how many"
        )
    if link.reorder_pct:
        raise ValueError(f"link.reorder_pct is {link.reorder_pct:g} with [fleet]; allowed: 0")
    if link.steps:
        raise ValueError("link.steps is not empty with [fleet]; allowed: a link that stays as it is")
    if run.link == "wan":
        raise ValueError("run.link is 'wan' with [fleet]; allowed: a link that can be modelled")
