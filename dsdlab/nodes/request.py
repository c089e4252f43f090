"""What one generation is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsdlab.decoding import Sampling
from dsdlab.policies.base import RUN_AHEAD, check_gamma
from dsdlab.protocol.frames import MAX_WINDOW

MODES = ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync", "dsd-pipelined", "dsd-stream", "dsd-adaptive")
WINDOW_MODES = ("cloud-sd", "edge-sd", "dsd-sync", "dsd-pipelined")
"""Modes whose window is asked for by `gamma`."""
STREAMING_MODES = ("dsd-pipelined", "dsd-stream", "dsd-adaptive")
"""Modes in which drafts are under way while the target works: on the wire they are one, `dsd-stream`."""
EDGE_DRAFTING_MODES = ("edge-sd", "dsd-sync", *STREAMING_MODES)
"""Modes that need a drafter on the edge node."""
POLICY_MODES = ("dsd-sync", "dsd-pipelined", "dsd-adaptive")
"""Modes in which a window policy decides."""
MAX_RUN_AHEAD = 4096
ACCEPTANCES = ("coupled", "rejection")
"""How a draft is judged when sampling; greedy, both are the same and the first is meant."""
SYNC_Q = "dsd-sync-q"
"""`dsd-sync` with rejection sampling, on the wire: drafts come with what they were drawn from."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompt, mode and limits of one generation.

    gamma: the window (`WINDOW_MODES`). run_ahead: tokens drafted and not yet judged (`dsd-pipelined`,
    `dsd-stream`). free_run: the target decodes alone whenever no draft waits (`dsd-stream`). beside: window
    of a drafter beside the target that fills up a free-running target's steps (`dsd-stream`, `dsd-adaptive`).
    acceptance: "coupled" by shared noise, so that the ids are the target's alone; or "rejection" (`dsd-sync`
    alone), so that their distribution is, at a price on the wire (docs/wire.md). top_q: ids that a draft's
    distribution keeps; 0: all.
    Raises ValueError, naming the field, for what no node could serve.
    """

    prompt_ids: Sequence[int]
    mode: str = "dsd-sync"
    policy: str = "static"
    gamma: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 64
    stop_at_eos: bool = True
    run_ahead: int = RUN_AHEAD
    free_run: bool = False
    beside: int = 0
    acceptance: str = "coupled"
    top_q: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty; allowed: at least one token")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(MODES)}")
        check_gamma(self.gamma)
        if self.mode == "dsd-pipelined" and not 1 <= self.gamma <= self.run_ahead:
            raise ValueError(
                f"gamma is {self.gamma}; allowed with dsd-pipelined: 1 to run_ahead ({self.run_ahead})"
            )
        if not 1 <= self.run_ahead <= MAX_RUN_AHEAD:
            raise ValueError(f"run_ahead is {self.run_ahead}; allowed: 1 to {MAX_RUN_AHEAD}")
        if not 0 <= self.beside <= MAX_WINDOW:
            raise ValueError(f"beside is {self.beside}; allowed: 0 to {MAX_WINDOW}")
        if self.beside and not (self.mode == "dsd-adaptive" or (self.mode == "dsd-stream" and self.free_run)):
            raise ValueError(
                f"beside is {self.beside} in mode {self.mode}; needs dsd-stream with free_run or dsd-adaptive"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; allowed: 1 or more")
        self._check_acceptance()

    def _check_acceptance(self) -> None:
        if self.acceptance not in ACCEPTANCES:
            raise ValueError(f"acceptance is {self.acceptance!r}; allowed: {', '.join(ACCEPTANCES)}")
        if self.acceptance == "coupled":
            if self.top_q:
                raise ValueError(f"top_q is {self.top_q} with acceptance coupled; needs rejection")
            return
        if self.mode != "dsd-sync":
            raise ValueError(f"acceptance is rejection in mode {self.mode}; needs dsd-sync")
        if self.sampling.greedy:
            raise ValueError("acceptance is rejection at temperature 0; needs a temperature above 0")
        if self.top_q < 0:
            raise ValueError(f"top_q is {self.top_q}; allowed: 0 (all) or more")
