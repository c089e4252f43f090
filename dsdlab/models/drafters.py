"""Drafters: what proposes a window. A model, prompt lookup, or lookup first and a model otherwise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from itertools import count

from dsdlab.decoding import Sampling, SparseQ, confidence, probabilities, sparsify
from dsdlab.models.base import Chunk, Engine, ModelError
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.zoo import DRAFTERS, default_precision

LOOKUP = "prompt-lookup"
LOOKUP_FIRST = "lookup+"
FIRST_LONGEST, FIRST_SHORTEST, FIRST_UNSAYABLE = 8, 5, 2
"""Most and fewest tokens that must repeat for lookup to be believed rather than the model, and how many are
enough for a token that the model cannot say, its vocabulary being reduced: docs/drafter.md compares."""

GoesOn = Callable[[Sequence[float]], bool]


class Drafter(ABC):
    """Proposes continuations of a session's committed text."""

    name: str
    tokenizer: str  # fingerprint; "" fits any
    by_model: Sequence[bool] = ()
    """Of the last `propose`: for each token, whether a model said it (lookup costs nothing)."""
    confidences: Sequence[float] = ()
    """Of the last `propose` with `goes_on`, for each token; NaN where no model spoke."""

    @abstractmethod
    def open(self) -> int:
        """Start a session. Raises NoFreeSlot."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """End a session; closing twice is harmless."""

    @abstractmethod
    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        """At most n tokens to follow ids + tail.

        ids: the session's whole text so far (prompt and committed). tail: what was drafted after it and is
        not judged yet. What an earlier call proposed and neither confirms is forgotten here.
        goes_on: asked after each token (but not always the n-th) with the confidences of all so far (see
        `WindowPolicy.goes_on`); False ends the window.
        Fewer than n tokens (even none) mean that the drafter has no better idea.
        """


def believed(matched: int, token: int, sayable: Container[int] | None) -> bool:
    """Whether lookup comes before a model that can say `sayable` (None: every token)."""
    if matched >= FIRST_SHORTEST:
        return True
    return matched >= FIRST_UNSAYABLE and sayable is not None and token not in sayable


def _always(_: Sequence[float]) -> bool:
    """A drafter that is asked nothing but how sure it is."""
    return True


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, by slices: microseconds for thousands of tokens."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class ModelDrafter(Drafter):
    """A model drafts one token after the other, choosing as the target would."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.info.model_id
        self.tokenizer = engine.info.tokenizer
        self._held: dict[int, list[int]] = {}  # ids whose keys and values the engine holds
        self._vocab_size = engine.info.vocab_size

    def open(self) -> int:
        slot = self.engine.open()
        self._held[slot] = []
        return slot

    def close(self, slot: int) -> None:
        self._held.pop(slot, None)
        self.engine.close(slot)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        def choose(chunk: Chunk) -> tuple[int, float]:
            if goes_on is None:
                return self.engine.choose([chunk], [sampling])[0][0], math.nan
            return self.engine.choose_surely(chunk, sampling)

        return self._one_by_one(slot, ids, n, tail, choose, goes_on)

    def draw(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        vocab_size: int,
        top_q: int = 0,
        goes_on: GoesOn | None = None,
    ) -> tuple[list[int], list[SparseQ]]:
        """As `propose`, but drawn for rejection sampling: the tokens, and what each was drawn from.

        vocab_size: the target's; ids beyond it are never drawn. top_q: ids that a distribution keeps; 0: all
        that 16 bits leave a weight.
        """

        drawn_from: list[SparseQ] = []

        def choose(chunk: Chunk) -> tuple[int, float]:
            row = self.engine.extend([chunk])[0][-1]
            q = probabilities(row, sampling, vocab_size, self.engine.output_ids)
            drawn_from.append(sparsify(q, top_q or vocab_size))
            token = drawn_from[-1].draw(sampling.seed, self.engine.length(slot))
            return token, math.nan if goes_on is None else confidence(row, sampling)

        return self._one_by_one(slot, ids, n, (), choose, goes_on), drawn_from

    def _one_by_one(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        tail: Sequence[int],
        choose: Callable[[Chunk], tuple[int, float]],
        goes_on: GoesOn | None,
    ) -> list[int]:
        """`propose`, where `choose` says the token behind a chunk, and how sure it is."""
        base = len(ids) + len(tail)
        n = min(n, self.engine.info.max_context - base)
        if n <= 0:
            self.by_model = self.confidences = ()
            return []
        held = self._held[slot]
        keep = common_prefix(held, ids)
        if keep == len(ids):  # no list of the whole text: this runs once a token
            keep += common_prefix(held[keep:], list(tail))
        keep = min(keep, base - 1)  # the last token is computed again if need be: its logits are wanted
        self.engine.rollback(slot, keep)
        feed = [*ids[keep:], *tail[max(keep - len(ids), 0) :]]
        known = feed
        if max(feed) >= self._vocab_size:  # a target padded to a larger vocabulary: any stand-in will do
            known = [i if i < self._vocab_size else 0 for i in feed]
        del held[keep:]
        out: list[int] = []
        confidences: list[float] = []
        while True:
            token, sure = choose(Chunk(slot, known, 1))
            if goes_on is not None:
                confidences.append(sure)
            held += feed
            out.append(token)
            if len(out) == n or not (goes_on is None or goes_on(confidences)):
                self.by_model = (True,) * len(out)
                self.confidences = confidences
                return out
            feed = known = [token]


class PromptLookup(Drafter):
    """The continuation of the latest earlier occurrence of the last n tokens, longest n first.

    Source: Saxena, "Prompt lookup decoding" (2023). Costs no model; pays where a text repeats itself.
    """

    name = LOOKUP
    tokenizer = ""

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._slots = count()
        self._index: dict[int, dict[tuple[int, ...], int]] = {}
        self._seen: dict[int, int] = {}

    def open(self) -> int:
        slot = next(self._slots)
        self._index[slot], self._seen[slot] = {}, 0
        return slot

    def close(self, slot: int) -> None:
        self._index.pop(slot, None)
        self._seen.pop(slot, None)

    def find(self, slot: int, ids: Sequence[int], tail: Sequence[int]) -> tuple[int, int]:
        """Where in `ids` the text after ids + tail would go on by analogy, and how many tokens matched.

        (len(ids), 0) if nowhere.
        """
        index = self._index[slot]
        # an n-gram is indexed once something follows it; later occurrences replace earlier ones
        for end in range(self._seen[slot] + 1, len(ids)):
            for n in self._lengths:
                if n <= end:
                    index[tuple(ids[end - n : end])] = end
        self._seen[slot] = max(self._seen[slot], len(ids) - 1)
        longest = self._lengths[0]
        recent = (*ids[-longest:], *tail)[-longest:]
        for n in self._lengths:
            at = index.get(recent[-n:], len(ids)) if n <= len(recent) else len(ids)
            if at < len(ids):  # a text that was longer before may have left more
                return at, n
        return len(ids), 0

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,  # noqa: ARG002 - lookup is blind to it
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        at, _ = self.find(slot, ids, tail)
        out = list(ids[at : at + n])
        sure = [math.nan] * len(out)  # no model spoke
        if goes_on is not None:
            enough = (k for k in range(1, len(out)) if not goes_on(sure[:k]))
            out = out[: next(enough, len(out))]
        self.by_model = (False,) * len(out)
        self.confidences = () if goes_on is None else sure[: len(out)]
        return out


class LookupFirst(Drafter):
    """Prompt lookup where five to eight tokens repeat, a model for every other position.

    Two tokens are enough where what followed them is a token that the model cannot say.
    """

    def __init__(self, model: ModelDrafter) -> None:
        self.name = LOOKUP_FIRST + model.name
        self.tokenizer = model.tokenizer
        self.model = model
        said = model.engine.output_ids
        self._sayable = None if said is None else frozenset(said.tolist())
        shortest = FIRST_SHORTEST if self._sayable is None else FIRST_UNSAYABLE
        self._lookup = PromptLookup(FIRST_LONGEST, shortest)
        self._slots: dict[int, int] = {}

    def open(self) -> int:
        slot = self.model.open()
        self._slots[slot] = self._lookup.open()
        return slot

    def close(self, slot: int) -> None:
        if slot in self._slots:
            self._lookup.close(self._slots.pop(slot))
        self.model.close(slot)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        out: list[int] = []
        by_model: list[bool] = []
        confidences: list[float] = []
        asked = None if goes_on is None else _always
        while len(out) < n:
            at, matched = self._lookup.find(self._slots[slot], ids, [*tail, *out])
            looked_up = matched > 0 and believed(matched, ids[at], self._sayable)
            if looked_up:
                out.append(ids[at])
            else:
                more = self.model.propose(slot, ids, 1, sampling, [*tail, *out], asked)
                if not more:
                    break
                out += more
            by_model.append(not looked_up)
            if goes_on is not None:
                confidences.append(self.model.confidences[-1] if by_model[-1] else math.nan)
                if not goes_on(confidences):
                    break
        self.by_model, self.confidences = by_model, confidences
        return out


def load_drafter(name: str, options: EngineOptions) -> Drafter:
    """A drafter by name: prompt-lookup, lookup+MODEL, or any model name. Raises ModelError.

    A distilled drafter is stored in int8 and always runs in it; another model runs in `options.precision`,
    the target's, where its engine has it, and else in its own.
    """
    if name == LOOKUP:
        return PromptLookup()
    if name.startswith(LOOKUP_FIRST):
        model = load_drafter(name.removeprefix(LOOKUP_FIRST), options)
        if not isinstance(model, ModelDrafter):
            raise ModelError(f"drafter {name!r}: after {LOOKUP_FIRST} a model's name is needed")
        return LookupFirst(model)
    return ModelDrafter(load_engine(name, replace(options, precision=_precision_of(name, options.precision))))


def _precision_of(name: str, target_precision: str) -> str:
    """What a drafter runs in beside a target of this precision."""
    if name in DRAFTERS or name.endswith(".safetensors"):
        return "int8"
    own = default_precision(name)
    foreign = name.startswith("hf:") and target_precision not in ("bf16", "fp32")
    return own if foreign or "gguf" in (target_precision, own) else target_precision
