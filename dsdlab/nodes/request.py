"""What one generation is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsdlab.decoding import Sampling
from dsdlab.policies.base import check_gamma

MODES = ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync")
DRAFTING_MODES = ("cloud-sd", "edge-sd", "dsd-sync")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompt, mode and limits of one generation.

    Raises ValueError, naming the field, for what no node could serve.
    """

    prompt_ids: Sequence[int]
    mode: str = "dsd-sync"
    policy: str = "static"
    gamma: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 64
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty; allowed: at least one token")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(MODES)}")
        check_gamma(self.gamma)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; allowed: 1 or more")
