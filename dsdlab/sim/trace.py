"""A trace: the target's text for each prompt, and what the drafter would propose at every position of it.

Replaying it repeats the accept/reject sequence of a real run exactly, because a window depends on the
committed text alone: the drafter's arithmetic is a function of the text, whatever was computed before, and a
shorter window is the beginning of a longer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from dsdlab.decoding import Sampling
from dsdlab.nodes.request import STREAMING_MODES

if TYPE_CHECKING:
    from dsdlab.scenario import Cell, Scenario
    from dsdlab.sweep.plan import Job

__all__ = [
    "Trace",
    "TraceError",
    "TracedText",
    "TracedWindow",
    "load_trace",
    "longest_window",
    "save_trace",
]

TRACE_VERSION = 1
EMULATED = "emulated:"

_SamplingKey = tuple[float, int, float, int]


class TraceError(ValueError):
    """A trace cannot serve: broken, of another version, of other models, too short. One line for the user."""


class TracedWindow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the drafter proposes after the first `base` tokens (prompt included), and how it comes to it.

    ids: up to the trace's `gamma` tokens, fewer where the drafter had no idea; as the drafter says them,
    before the node cuts what the target's vocabulary lacks.
    by_model: for each of them, whether the model said it; otherwise lookup did, at no cost.
    """

    base: int
    ids: tuple[int, ...]
    by_model: tuple[bool, ...]


class Proposal(NamedTuple):
    """A window as replay needs it: its ids, which places the model said, how many ids the text confirms."""

    ids: list[int]
    places: tuple[int, ...]
    agrees: int


class TracedText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """One prompt under one sampling."""

    key: str  # the reference's key: hash of target, precision, prompt, sampling, limits
    prompt: str  # the prompt's key
    prompt_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ids: tuple[int, ...]  # the target alone, an end-of-sequence id included
    windows: tuple[TracedWindow, ...]  # base = len(prompt_ids) + 1 … len(prompt_ids) + len(ids) - 1
    beyond: tuple[int, ...] = ()
    """What the target would say after an end of sequence, as far as a drafted window can reach: nobody sees
    it, but a verdict counts the drafts that equal it as accepted."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def first_base(self) -> int:
        """The base of `windows[0]`: the target decides the first token before anything is drafted."""
        return len(self.prompt_ids) + 1

    @cached_property
    def whole(self) -> list[int]:
        """Prompt and text."""
        return [*self.prompt_ids, *self.ids]

    @cached_property
    def said(self) -> list[int]:
        """The target's token at each absolute position, as far as known: `whole` and `beyond`."""
        return [*self.whole, *self.beyond]

    @cached_property
    def proposals(self) -> list[Proposal]:
        """`windows`, prepared for replay."""
        out = []
        for w in self.windows:
            agrees = 0
            for drafted, true in zip(w.ids, self.said[w.base : w.base + len(w.ids)], strict=False):
                if drafted != true:
                    break
                agrees += 1
            out.append(Proposal(list(w.ids), tuple(i for i, m in enumerate(w.by_model) if m), agrees))
        return out

    def serves(self, max_new_tokens: int, stop_at_eos: bool, eos_ids: Sequence[int]) -> bool:
        """Whether the text is long enough: as many tokens as asked for, or to its end of sequence."""
        return len(self.ids) >= max_new_tokens or (stop_at_eos and self.ids[-1] in eos_ids)


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """All texts of a scenario. `gamma`: the longest window recorded; 0: none."""

    version: int = TRACE_VERSION
    target: str
    drafter: str
    precision: str
    tokenizer: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_context: int
    gamma: int
    texts: tuple[TracedText, ...]
    provenance: dict[str, object] = {}

    @cached_property
    def _index(self) -> dict[_SamplingKey, tuple[dict[tuple[int, ...], TracedText], list[int]]]:
        """By sampling: the texts by prompt, and the prompts' lengths, longest first."""
        by_sampling: dict[_SamplingKey, dict[tuple[int, ...], TracedText]] = {}
        for text in self.texts:
            by_sampling.setdefault(self._sampling_key(text.sampling), {})[text.prompt_ids] = text
        return {
            key: (texts, sorted({len(prompt) for prompt in texts}, reverse=True))
            for key, texts in by_sampling.items()
        }

    def _sampling_key(self, sampling: Sampling) -> _SamplingKey:
        """What of a sampling decides a text: the seed does not of a real model's greedy one."""
        if self.target.startswith(EMULATED):
            return sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed
        if sampling.greedy:
            return 0.0, 0, 1.0, 0
        return sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed

    def find(self, ids: Sequence[int], sampling: Sampling) -> TracedText:
        """The text that begins with `ids`: a prompt and what was committed after it. Raises TraceError."""
        texts, lengths = self._index.get(self._sampling_key(sampling), ({}, []))
        n = len(ids)
        for length in lengths:
            if length > n:
                continue
            text = texts.get(tuple(ids[:length]))
            if text is not None and text.whole[length:n] == list(ids[length:]):
                return text
        raise TraceError(f"the trace has no text that begins with these {n} tokens {_under(sampling)}")

    def check(self, scenario: Scenario, jobs: Sequence[Job], where: str = "the trace") -> None:
        """Whether every job can be replayed. `where` names the trace for people. Raises TraceError."""
        models = scenario.models
        gamma = longest_window(job.cell for job in jobs)
        asked = [("target", self.target, models.target), ("precision", self.precision, models.precision)]
        if gamma:
            asked.append(("drafter", self.drafter, models.drafter))
        for name, ours, theirs in asked:
            if ours != theirs:
                raise TraceError(f"{where} is of {name} {ours}; the scenario's is {theirs}")
        if gamma > self.gamma:
            raise TraceError(f"{where} has windows of {self.gamma} tokens; the scenario asks for {gamma}")
        work = scenario.workload
        for job in {job.reference: job for job in jobs}.values():
            try:
                text = self.find(job.prompt_ids, job.sampling)
            except TraceError:
                raise TraceError(
                    f"{where} has no text of prompt {job.prompt.key} {_under(job.sampling)}"
                ) from None
            if not text.serves(work.max_new_tokens, work.stop_at_eos, self.eos_ids):
                raise TraceError(
                    f"{where} has {len(text.ids)} tokens of prompt {job.prompt.key} {_under(job.sampling)}; "
                    f"the scenario asks for {work.max_new_tokens}"
                )


def longest_window(cells: Iterable[Cell]) -> int:
    """Tokens of the longest window that a trace must hold for cells to be replayed; 0: none is drafted.

    Where drafts stream, longer tails than that follow from one window after the other.
    """
    return max((max(c.gamma, c.beside, int(c.mode in STREAMING_MODES)) for c in cells), default=0)


def _under(sampling: Sampling) -> str:
    """For people: "under greedy", "under temperature 0.8, seed 7"."""
    cuts = [f"top_k {sampling.top_k}"] if sampling.top_k else []
    cuts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1.0 else []
    heat = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}"
    return f"under {', '.join([heat, *cuts, *([] if sampling.greedy else [f'seed {sampling.seed}'])])}"


# files -------------------------------------------------------------------------------------------


class _Head(msgspec.Struct):
    """What every version has."""

    version: int


def save_trace(path: Path, trace: Trace) -> None:
    """Write the file in one step. Raises StoreError."""
    from dsdlab.sweep.store import write_bytes  # not needed to replay

    write_bytes(path, msgspec.json.encode(trace) + b"\n")


def load_trace(path: Path) -> Trace:
    """A trace from its file. Raises TraceError with one line that names it."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise TraceError(f"trace {path}: {e.strerror}") from None
    try:
        version = msgspec.json.decode(data, type=_Head).version
        if version == TRACE_VERSION:
            trace = msgspec.json.decode(data, type=Trace)
            _check_shape(trace)
            return trace
    except ValueError as e:  # msgspec's errors are ValueErrors too
        raise TraceError(f"trace {path} cannot be used: {' '.join(str(e).split())}") from None
    raise TraceError(f"trace {path} has version {version}; this dsdlab reads {TRACE_VERSION}")


def _check_shape(trace: Trace) -> None:
    """What the types do not say. Raises ValueError."""
    for at, text in enumerate(trace.texts):
        where = f"texts[{at}]"
        text.sampling  # noqa: B018 - raises
        if not text.prompt_ids or not text.ids:
            raise TraceError(f"{where} is empty")
        if min(text.said) < 0 or max(text.said) >= trace.vocab_size:
            raise TraceError(f"{where} has a token outside the vocabulary of {trace.vocab_size}")
        bases = range(text.first_base, len(text.whole)) if trace.gamma else range(0)
        if [w.base for w in text.windows] != list(bases):
            raise TraceError(f"{where} has no window for each of its positions")
        for w in text.windows:
            if len(w.ids) != len(w.by_model) or len(w.ids) > trace.gamma or min(w.ids, default=0) < 0:
                raise TraceError(f"{where}: the window at {w.base} is no window of {trace.gamma} tokens")
