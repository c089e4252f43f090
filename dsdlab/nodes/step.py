"""One step of the target: judge a window (an empty one decodes a single token)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from dsdlab.decoding import Sampling, SparseQ, verify, verify_rejection
from dsdlab.models.base import Chunk, Engine, NoFreeSlot
from dsdlab.models.compute import Compute, Timing
from dsdlab.models.drafters import Drafter, GoesOn, ModelDrafter
from dsdlab.nodes.text import Text

PROMPT_PIECE = 128
"""Rows of a text that are computed at a time before its first step: what others wait for at most."""


@asynccontextmanager
async def slot_of(compute: Compute, owner: Engine | Drafter) -> AsyncIterator[int]:
    """A slot of an engine or drafter for the length of a block, given back even under cancellation.

    Raises NoFreeSlot.
    """
    opening = asyncio.ensure_future(compute.run(owner.open))
    try:
        slot, _ = await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(NoFreeSlot):
            late, _ = await opening
            await compute.run(lambda: owner.close(late))
        raise
    try:
        yield slot
    finally:
        await asyncio.shield(asyncio.ensure_future(compute.run(lambda: owner.close(slot))))


def judge(
    engine: Engine, slot: int, ids: Sequence[int], draft: Sequence[int], sampling: Sampling
) -> tuple[int, int]:
    """(accepted, next id) for `draft` after the session's text `ids`; runs in the compute thread.

    INVARIANT V1: afterwards the slot holds exactly ids + draft[:accepted], without the next id, whose
    keys and values the next step computes. Before the first step the slot is empty and this prefills.
    """
    pending = [*ids[engine.length(slot) :], *draft]
    picks = engine.choose([Chunk(slot, pending, len(draft) + 1)], [sampling])[0]
    accepted, next_id = verify(draft, picks)
    engine.rollback(slot, len(ids) + accepted)
    return accepted, next_id


def judge_drawn(
    engine: Engine,
    slot: int,
    ids: Sequence[int],
    draft: Sequence[int],
    reported: Sequence[SparseQ],
    sampling: Sampling,
) -> tuple[int, int]:
    """`judge` by rejection sampling: `draft` was drawn from `reported`."""
    pending = [*ids[engine.length(slot) :], *draft]
    [rows] = engine.extend([Chunk(slot, pending, len(draft) + 1)])
    accepted, next_id = verify_rejection(
        draft, reported, list(rows), sampling, len(ids), engine.info.vocab_size, engine.output_ids
    )
    engine.rollback(slot, len(ids) + accepted)
    return accepted, next_id


async def read_ahead(text: Text, engine: Engine, slot: int, compute: Compute) -> Timing:
    """The beginning of a long text into an empty slot in pieces, the last PROMPT_PIECE rows or fewer left for
    `judge`; what it cost in all.

    INVARIANT V4: between two pieces whoever else waits for the engine has a turn, so that a target's prompt
    of any length delays others by PROMPT_PIECE rows at most. The engine's rows do not depend on the pieces.
    """
    ids, sampling = text.ids, text.sampling
    cost = Timing(0.0, 0.0)
    for at in range(0, len(ids) - PROMPT_PIECE, PROMPT_PIECE):
        chunk = Chunk(slot, ids[at : at + PROMPT_PIECE], 0)
        _, timing = await compute.run(lambda: engine.choose([chunk], [sampling]))  # noqa: B023 - awaited at once
        cost = cost.then(timing)
    return cost


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of `decode` committed, and what it cost."""

    base: int  # absolute position of ids[0]
    ids: list[int]
    drafted: int
    accepted: int
    t_draft_s: float
    timing: Timing
    beside: int = 0  # of `drafted`, how many a drafter beside the target added


async def decode(
    text: Text, engine: Engine, slot: int, compute: Compute, gamma: int, drafter: Drafter | None
) -> AsyncGenerator[Step]:
    """Decode to the end on one node: alone (`gamma` 0), or with a drafter beside the target.

    The first step prefills and decides one token, so that the time to first token does not wait for
    a draft. Used by `cloud-ar`, `cloud-sd` and `edge-sd`.
    """
    async with AsyncExitStack() as stack:
        draft_slot = -1
        if drafter is not None and gamma > 0:
            draft_slot = await stack.enter_async_context(slot_of(compute, drafter))
        first = True
        while text.finish is None:
            draft: list[int] = []
            t_draft_s = 0.0
            want = 0 if first else min(gamma, text.room - 1)
            if drafter is not None and want > 0:
                draft, t_draft_s = await propose(
                    compute, drafter, draft_slot, text.ids, want, text.sampling, engine.info.vocab_size
                )
            read = await read_ahead(text, engine, slot, compute) if first else None
            (accepted, next_id), timing = await compute.run(
                lambda: judge(engine, slot, text.ids, draft, text.sampling)  # noqa: B023 - awaited at once
            )
            if read is not None:
                timing = read.then(timing)
            base = len(text)
            kept = text.append([*draft[:accepted], next_id])
            first = False
            yield Step(base, kept, len(draft), accepted, t_draft_s, timing, len(draft))


async def propose(
    compute: Compute,
    drafter: Drafter,
    slot: int,
    ids: Sequence[int],
    n: int,
    sampling: Sampling,
    vocab_size: int,
    tail: Sequence[int] = (),
    goes_on: GoesOn | None = None,
) -> tuple[list[int], float]:
    """At most n tokens to follow ids + tail, and the seconds it took to draft them.

    vocab_size: the target's; a drafter padded to a larger one may say what the target cannot. The rest is as
    `Drafter.propose` has it. `ids` must not change before this returns: a thread reads it.
    """
    draft, timing = await compute.run(
        (lambda: drafter.propose(slot, ids, n, sampling, tail, goes_on))
        if tail or goes_on
        else (lambda: drafter.propose(slot, ids, n, sampling))
    )
    if draft and max(draft) >= vocab_size:
        draft = draft[: next(i for i, token in enumerate(draft) if token >= vocab_size)]
    return draft, timing.compute_s


async def draw(
    compute: Compute,
    drafter: ModelDrafter,
    slot: int,
    text: Text,
    n: int,
    vocab_size: int,
    top_q: int,
    goes_on: GoesOn | None = None,
) -> tuple[tuple[list[int], list[SparseQ]], float]:
    """`propose` for rejection sampling: as `ModelDrafter.draw` has it, and the seconds it took."""
    drawn, timing = await compute.run(
        lambda: drafter.draw(slot, text.ids, n, text.sampling, vocab_size, top_q, goes_on)
    )
    return drawn, timing.compute_s
