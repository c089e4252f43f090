"""Single forwards of a loaded model, timed in its compute thread by what a node calls: judge, propose."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from dsdlab.decoding import Sampling, verify
from dsdlab.models.base import Chunk, Engine
from dsdlab.models.drafters import Drafter, LookupFirst, ModelDrafter
from dsdlab.models.measures import Sample
from dsdlab.nodes.step import judge

__all__ = ["GREEDY", "WINDOW_STEPS", "DrafterForwards", "TargetForwards", "calibration_text", "model_of"]

GREEDY = Sampling()
WINDOW_STEPS = 6  # of a drafter, in `DrafterForwards.window`


def model_of(drafter: Drafter | None) -> ModelDrafter | None:
    """The model inside a drafter; None where there is none to measure."""
    if isinstance(drafter, LookupFirst):
        return drafter.model
    return drafter if isinstance(drafter, ModelDrafter) else None


def calibration_text(vocab_size: int, length: int, seed: int) -> list[int]:
    """Token ids that repeat as little as the vocabulary allows, so that prompt lookup finds nothing."""
    rng = np.random.default_rng(seed)
    ids = np.arange(1, vocab_size)
    parts = [rng.permutation(ids) for _ in range(-(-length // len(ids)))]
    return [int(i) for i in np.concatenate(parts)[:length]]


class Clock:
    """Times work in the thread that it runs in, and asks the kernel for how long that thread had to wait.

    Linux tells it: proc(5), /proc/PID/schedstat, the time spent waiting on a run queue, in ns.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):  # not Linux, or not told
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def _waited_s(self) -> float:
        return 0.0 if self._file is None else int(os.pread(self._file, 128, 0).split()[1]) / 1e9

    def sample(self, tokens: int, batch: int, context: int, work: Callable[[], object]) -> Sample:
        """Do the work, which is a forward of these sizes."""
        waited_s = self._waited_s()
        begun_s = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun_s
        return Sample(tokens, batch, context, seconds, self._waited_s() - waited_s)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


class _Forwards:
    """What both kinds have: a text, slots that hold beginnings of it, and a clock."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)
        self._slots: dict[int, int] = {}
        self._clock: Clock | None = None

    @property
    def clock(self) -> Clock:
        """Of the thread that asks, always the same one."""
        if self._clock is None:
            self._clock = Clock()
        return self._clock


class TargetForwards(_Forwards):
    """Single forwards of a target, in the compute thread, from a text of which slots hold the beginning."""

    def __init__(self, engine: Engine, text: Sequence[int]) -> None:
        super().__init__(text)
        self._engine = engine

    def hold(self, session: int, length: int) -> int:
        """A slot that holds exactly the text's first `length` tokens."""
        if session not in self._slots:
            self._slots[session] = self._engine.open()
        slot = self._slots[session]
        held = min(self._engine.length(slot), length)
        self._engine.rollback(slot, held)
        if held < length:
            self._engine.choose([Chunk(slot, self._text[held:length], 0)], [GREEDY])
        return slot

    def judge(self, session: int, context: int, rows: int, sampling: Sampling = GREEDY) -> Sample:
        """One step of a node: a window of `rows` - 1 tokens after `context` + 1, or a prompt at context 0."""
        slot = self.hold(session, context)
        ids, draft = self._text[: context + 1], self._text[context + 1 : context + rows]
        found = self.clock.sample(rows, 1, context, lambda: judge(self._engine, slot, ids, draft, sampling))
        self._engine.rollback(slot, context)
        return found

    def prompt(self, session: int, rows: int) -> Sample:
        slot = self.hold(session, 0)
        ids = self._text[:rows]
        return self.clock.sample(rows, 1, 0, lambda: judge(self._engine, slot, ids, (), GREEDY))

    def batch(self, contexts: Sequence[int], rows: int) -> Sample:
        """A window of each of several sessions in one forward."""
        slots = [self.hold(session, context) for session, context in enumerate(contexts)]
        chunks = [Chunk(s, self._text[c : c + rows], rows) for s, c in zip(slots, contexts, strict=True)]
        samplings = [GREEDY] * len(chunks)

        def work() -> None:
            for chunk, picks in zip(chunks, self._engine.choose(chunks, samplings), strict=True):
                verify(chunk.ids[1:], picks)

        found = self.clock.sample(rows * len(contexts), len(contexts), sum(contexts), work)
        for slot, context in zip(slots, contexts, strict=True):
            self._engine.rollback(slot, context)
        return found

    def close(self) -> None:
        for slot in self._slots.values():
            self._engine.close(slot)
        self.clock.close()


class DrafterForwards(_Forwards):
    """Single forwards of a drafter's model, in the compute thread, by `propose`, one token at a time."""

    def __init__(self, drafter: Drafter, text: Sequence[int]) -> None:
        super().__init__(text)
        self._drafter = drafter

    def hold(self, session: int, length: int) -> int:
        """A slot whose session has just proposed after the text's first `length` tokens."""
        if session not in self._slots:
            self._slots[session] = self._drafter.open()
        slot = self._slots[session]
        self._drafter.propose(slot, self._text[:length], 1, GREEDY)
        return slot

    def propose(self, slot: int, context: int, rows: int, sampling: Sampling = GREEDY) -> Sample | None:
        """One token, which costs a forward of `rows` after `context`; None where no model was asked."""
        ids = self._text[: context + rows]
        found = self.clock.sample(rows, 1, context, lambda: self._drafter.propose(slot, ids, 1, sampling))
        return found if any(self._drafter.by_model) else None

    def catch_up(self, session: int, context: int, rows: int, sampling: Sampling = GREEDY) -> Sample | None:
        return self.propose(self.hold(session, context), context, rows, sampling)

    def prompt(self, rows: int) -> Sample | None:
        slot = self._drafter.open()
        try:
            return self.propose(slot, 0, rows)
        finally:
            self._drafter.close(slot)

    def window(self, session: int, context: int) -> list[Sample]:
        """Forwards of one row in a row, after a `hold` at `context` some time before."""
        steps = [self.propose(self._slots[session], context + i, 1) for i in range(WINDOW_STEPS)]
        return [step for step in steps if step is not None]

    def close(self) -> None:
        for slot in self._slots.values():
            self._drafter.close(slot)
        self.clock.close()
