"""Recording what a trace holds: the real drafter's window at every position of the real target's text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, Engine
from dsdlab.models.drafters import Drafter
from dsdlab.sim.trace import TracedWindow

__all__ = ["reach_beyond", "record_beyond", "record_windows"]


def record_windows(
    drafter: Drafter, prompt_ids: Sequence[int], ids: Sequence[int], sampling: Sampling, gamma: int
) -> tuple[TracedWindow, ...]:
    """The window of at most `gamma` tokens after each proper, non-empty beginning of the text `ids`.

    One session, base after base: each asks the drafter just what a node asks at that base. That the windows
    are those of any other run, which skips bases and has other γ, rests on two properties of drafters that
    tests/models/test_tracing.py checks: what they say depends on the committed text alone, and a shorter
    window is the beginning of a longer one. Raises ModelError.
    """
    out = []
    slot = drafter.open()
    try:
        text = list(prompt_ids)
        for token in ids[:-1]:
            text.append(token)
            draft = drafter.propose(slot, text, gamma, sampling)
            out.append(TracedWindow(len(text), tuple(draft), tuple(drafter.by_model)))
    finally:
        drafter.close(slot)
    return tuple(out)


def reach_beyond(
    windows: Sequence[TracedWindow],
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    eos_ids: Collection[int],
    max_context: int,
) -> int:
    """How many tokens after the end of sequence a verdict may have to judge; 0 for most texts.

    A window that foresees the end of the text may go on behind it, and the target then judges that part too.
    """
    if ids[-1] not in eos_ids:
        return 0
    whole = [*prompt_ids, *ids]
    reach = 0
    for w in windows:
        ending = whole[w.base :]
        if list(w.ids[: len(ending)]) == ending:
            reach = max(reach, len(w.ids) - len(ending))
    return min(reach, max_context - len(whole))


def record_beyond(
    target: Engine, prompt_ids: Sequence[int], ids: Sequence[int], sampling: Sampling, n: int
) -> tuple[int, ...]:
    """The n tokens that the target would say after its text, an end of sequence notwithstanding."""
    out: list[int] = []
    slot = target.open()
    try:
        feed = [*prompt_ids, *ids]
        for _ in range(n):
            [[token]] = target.choose([Chunk(slot, feed, 1)], [sampling])
            out.append(token)
            feed = [token]
    finally:
        target.close(slot)
    return tuple(out)
