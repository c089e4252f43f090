"""How a session samples: the few numbers that, with the prompt, determine its output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one session.

    temperature: 0 means greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the smallest set of likeliest tokens whose probability reaches it; 1 keeps all.
    seed: 64-bit seed of the shared noise (see `noise.gumbel`).

    Raises ValueError, naming the field, for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # also refuses NaN
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 (greedy) to 100")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; allowed: 0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; allowed: above 0, at most 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2^64 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
