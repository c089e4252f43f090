"""How a grid's axes combine to ways to decode: what does not concern a mode makes no cells of its own."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from dsdlab.nodes.draft_stream import ADAPTIVE
from dsdlab.nodes.request import POLICY_MODES, WINDOW_MODES
from dsdlab.policies import RUN_AHEAD
from dsdlab.scenario_parts import Grid, Mode

__all__ = ["Way", "check_ways", "ways_of"]

STATIC = "static"


class Way(NamedTuple):
    """A way to decode; the fields are those of GenerationRequest."""

    mode: Mode
    policy: str
    gamma: int
    run_ahead: int
    free_run: bool
    beside: int


def ways_of(grid: Grid) -> list[Way]:
    """Every way once, in grid order, with the default of what does not concern its mode (γ: 0)."""
    axes = itertools.product(grid.mode, grid.policy, grid.gamma, grid.run_ahead, grid.free_run, grid.beside)
    return list(dict.fromkeys(_way(*values) for values in axes))


def _way(mode: Mode, policy: str, gamma: int, run_ahead: int, free_run: bool, beside: int) -> Way:
    adaptive, free = mode == "dsd-adaptive", mode == "dsd-stream" and free_run
    if mode not in POLICY_MODES:
        policy = STATIC
    elif adaptive and policy == STATIC:
        policy = ADAPTIVE
    windowed = mode in WINDOW_MODES or (adaptive and policy != ADAPTIVE)  # another policy may begin with it
    return Way(
        mode=mode,
        policy=policy,
        gamma=gamma if windowed else 0,
        run_ahead=run_ahead if mode in ("dsd-pipelined", "dsd-stream") else RUN_AHEAD,
        free_run=free,
        beside=beside if adaptive or free else 0,
    )


def check_ways(grid: Grid) -> None:
    """Raises ValueError, field first, for what no node could serve or what nothing would use."""
    ways = ways_of(grid)
    for way in ways:
        if way.mode == "dsd-pipelined" and not 1 <= way.gamma <= way.run_ahead:
            raise ValueError(
                f"grid.gamma is {way.gamma} with mode 'dsd-pipelined' and run_ahead {way.run_ahead}; "
                "allowed: 1 to run_ahead"
            )
        if way.policy == ADAPTIVE and way.mode != "dsd-adaptive":
            raise ValueError(
                f"grid.policy is {ADAPTIVE!r} with mode {way.mode!r}; needs mode 'dsd-adaptive', "
                f"which has it in place of {STATIC!r}"
            )
    if any(grid.free_run) and "dsd-stream" not in grid.mode:
        raise ValueError(f"grid.free_run is {grid.free_run} without mode 'dsd-stream'")
    if any(grid.beside) and not any(way.beside for way in ways):
        raise ValueError(
            f"grid.beside is {grid.beside}; needs mode 'dsd-stream' with free_run, or 'dsd-adaptive'"
        )
