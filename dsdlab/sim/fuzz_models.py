"""What speaks in a fuzzed run: a target whose every token hangs on the whole text, drafters with whims.

An emulated model's token is a function of its position alone, so a text with a wrong token before it would be
continued as if nothing had happened. Here a row of logits is a hash of all tokens before it: one wrong, lost
or doubled token changes everything after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from dsdlab.decoding import Sampling, gumbel, log_softmax, pick, warp
from dsdlab.models.base import Chunk, ContextFull, Engine, Logits, ModelInfo, NoFreeSlot
from dsdlab.models.drafters import Drafter, GoesOn
from dsdlab.models.emulated import EmulatedEngine

__all__ = ["HashEngine", "HashModel", "Whims", "said_alone"]

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHARPNESS = 1.5  # standard Gumbel logits times this: neither flat nor a foregone conclusion


def _mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


class HashModel:
    """Logits as a function of everything before: a state is a hash of a prefix, a row a hash of a state.

    One object serves a target and its drafters: rows and choices are kept.
    """

    __slots__ = ("_ids", "_picks", "_rows", "root", "vocab_size")

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.root = _mix((seed + _GOLDEN) & _MASK)  # of the empty text
        self.vocab_size = vocab_size
        self._ids = np.arange(vocab_size)
        self._rows: dict[int, Logits] = {}
        self._picks: dict[tuple[int, int, Sampling], int] = {}

    def after(self, state: int, token: int) -> int:
        """The state of a text that goes on with `token`."""
        return _mix((state * _GOLDEN + token + 1) & _MASK)

    def new_row(self, state: int) -> Logits:
        """Logits [vocab_size] behind a text, from scratch."""
        return (_SHARPNESS * gumbel(state, 0, self._ids)).astype(np.float32)

    def row(self, state: int) -> Logits:
        row = self._rows.get(state)
        if row is None:
            row = self._rows[state] = self.new_row(state)
        return row

    def choose(self, state: int, position: int, sampling: Sampling) -> int:
        """What the node's own code makes of a row."""
        key = state, position, sampling
        token = self._picks.get(key)
        if token is None:
            token = self._picks[key] = pick(self.row(state), sampling, position)
        return token


class HashEngine(Engine):
    """A `HashModel` behind session slots.

    agree: probability that it says the model's own row, and one of its own elsewhere (1 for the target); a
    function of the text. spend: takes the seconds of a forward, base_s + row_s · rows.
    """

    def __init__(
        self,
        model: HashModel,
        *,
        agree: float = 1.0,
        slots: int = 4,
        max_context: int = 1024,
        eos_ids: tuple[int, ...] = (),
        base_s: float = 0.0,
        row_s: float = 0.0,
        spend: Callable[[float], None],
    ) -> None:
        self.info = ModelInfo(
            model_id="hash",
            tokenizer=f"hash-{model.vocab_size}",
            vocab_size=model.vocab_size,
            max_context=max_context,
            eos_ids=eos_ids,
            precision="hash",
            n_params=0,
        )
        self._model, self._agree = model, round(agree * 2**64)
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._states: dict[int, list[int]] = {}  # by slot: of every prefix, the empty one's first
        self._base_s, self._row_s, self._spend = base_s, row_s, spend

    def open(self) -> int:
        if not self._free:
            raise NoFreeSlot(f"all {self._slots} session slots of the model are taken")
        slot = self._free.pop()
        self._states[slot] = [self._model.root]
        return slot

    def close(self, slot: int) -> None:
        if self._states.pop(slot, None) is not None:
            self._free.append(slot)

    def length(self, slot: int) -> int:
        return len(self._states[slot]) - 1

    def rollback(self, slot: int, length: int) -> None:
        if not 0 <= length <= self.length(slot):
            raise ValueError(f"rollback to {length}; allowed: 0 to the session's {self.length(slot)}")
        del self._states[slot][length + 1 :]

    def _said(self, state: int) -> int:
        """The state whose row this model says."""
        return state if _mix(state ^ _MIX_2) < self._agree else _mix(state ^ _MIX_1)

    def _advance(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if self.length(chunk.slot) + len(chunk.ids) > self.info.max_context:
                raise ContextFull(f"more than {self.info.max_context} positions")
        after = self._model.after
        rows = 0
        for chunk in chunks:
            states = self._states[chunk.slot]
            state = states[-1]
            for token in chunk.ids:
                state = after(state, token)
                states.append(state)
            rows += len(chunk.ids)
        self._spend(self._base_s + self._row_s * rows)

    def _wanted(self, chunk: Chunk) -> list[int]:
        states = self._states[chunk.slot]
        return states[len(states) - chunk.rows :]

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        self._advance(chunks)
        return [np.stack([self._model.row(self._said(s)) for s in self._wanted(c)]) for c in chunks]

    def choose(self, chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
        """As `Engine.choose`, but rows that are kept are chosen from once."""
        self._advance(chunks)
        out = []
        for chunk, sampling in zip(chunks, samplings, strict=True):
            first = self.length(chunk.slot) - chunk.rows + 1
            out.append([
                self._model.choose(self._said(state), first + r, sampling)
                for r, state in enumerate(self._wanted(chunk))
            ])  # fmt: skip
        return out


def said_alone(
    model: HashModel | EmulatedEngine,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int],
) -> tuple[list[int], str]:
    """(ids, finish) of the target by itself, a token at a time, by the definitions: nothing of the nodes, no
    engine's slots, no choice that is kept."""
    ids: list[int] = []
    state = 0
    if isinstance(model, HashModel):
        state = model.root
        for token in prompt:
            state = model.after(state, token)
    while True:
        position = len(prompt) + len(ids)
        if isinstance(model, EmulatedEngine):
            token = model.token(sampling.seed, position)
        else:
            token = _decide(model.new_row(state), sampling, position)
            state = model.after(state, token)
        ids.append(token)
        if token in eos_ids:
            return ids, "eos"
        if len(ids) == max_new_tokens:
            return ids, "length"


def _decide(row: Logits, sampling: Sampling, position: int) -> int:
    if sampling.greedy:
        return int(np.argmax(row))
    noise = gumbel(sampling.seed, position, np.arange(row.size))
    return int(np.argmax(log_softmax(warp(row, sampling)) + noise))


class Whims(Drafter):
    """A drafter that now and then has no idea, stops early, says something else or what no target can say.

    silent, short, wrong, alien: probabilities of that in a call, at most 1 together.
    """

    def __init__(
        self,
        inner: Drafter,
        rng: random.Random,
        vocab_size: int,
        *,
        silent: float = 0.0,
        short: float = 0.0,
        wrong: float = 0.0,
        alien: float = 0.0,
    ) -> None:
        self.name, self.tokenizer = inner.name, inner.tokenizer
        self._inner, self._rng, self._vocab_size = inner, rng, vocab_size
        self._silent = silent
        self._short = self._silent + short
        self._wrong = self._short + wrong
        self._alien = self._wrong + alien

    def open(self) -> int:
        return self._inner.open()

    def close(self, slot: int) -> None:
        self._inner.close(slot)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        rng = self._rng
        mood = rng.random()
        if mood < self._silent:
            self.by_model = ()
            return []
        out = list(self._inner.propose(slot, ids, n, sampling, tail, goes_on))
        if out and mood < self._alien:
            at = rng.randrange(len(out))
            if mood < self._short:
                del out[at:]
            elif mood < self._wrong:
                out[at] = (out[at] + 1 + rng.randrange(self._vocab_size - 1)) % self._vocab_size
            else:
                out[at] = self._vocab_size + rng.randrange((1 << 24) - self._vocab_size)
        self.by_model = (True,) * len(out)
        return out
