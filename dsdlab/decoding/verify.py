"""Verification of a window against the target's own choices."""

from __future__ import annotations

from collections.abc import Sequence


def accepted_length(draft: Sequence[int], target: Sequence[int]) -> int:
    """How many drafted ids stand: the longest common prefix of draft [γ] and target's picks [≥ γ]."""
    n = 0
    for d, t in zip(draft, target, strict=False):
        if d != t:
            break
        n += 1
    return n


def verify(draft: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """(accepted, next id) for draft [γ] and the target's picks [γ + 1] after each prefix of it.

    The next id is the target's correction after a rejection and its bonus token after full
    acceptance; either way it is target[accepted], so the committed text is the target's alone.
    Raises ValueError unless len(target) == len(draft) + 1.
    """
    if len(target) != len(draft) + 1:
        raise ValueError(f"a window of {len(draft)} needs {len(draft) + 1} target rows, got {len(target)}")
    accepted = accepted_length(draft, target)
    return accepted, target[accepted]
