"""Replay against real generations: the same tokens, the same windows, the same forwards in the same order."""

from __future__ import annotations

import random
import timeit
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from tiny_models import VOCAB, engine_of, write_tiny_llama
from tracing_tools import Forward, Metered, generate, record_text, trace_of

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, ContextFull, ModelError, NoFreeSlot
from dsdlab.models.drafters import Drafter, LookupFirst, ModelDrafter, PromptLookup
from dsdlab.models.weights_io import LlamaWeights, load_llama_dir
from dsdlab.nodes import GenerationRecord, GenerationRequest
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.sim.replay import ReplayDrafter, ReplayTarget, windows_of
from dsdlab.sim.trace import Trace, TracedText, TracedWindow, TraceError

GREEDY = Sampling()
COUPLED = Sampling(0.9, 0, 0.95, 42)
SAMPLINGS = {"greedy": GREEDY, "coupled": COUPLED}
PROMPT = [17, 250, 9, 9, 31, 17, 250]
GAMMA = 9
NEW_TOKENS = 36
KINDS = ("model", "lookup", "lookup first")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> LlamaWeights:
    return load_llama_dir(write_tiny_llama(tmp_path_factory.mktemp("replay"), num_hidden_layers=1), "")


def odd(position: int) -> bool:
    return position * 7 % 11 < 3


def seldom_odd(position: int) -> bool:
    return position % 17 == 3


def repetitive(engine: Metered) -> Metered:
    """Few different ids, so that lookup finds something in a random model's text."""
    choose = engine._inner.choose
    engine._inner.choose = lambda chunks, samplings: [  # type: ignore[method-assign]
        [i % 5 for i in row] for row in choose(chunks, samplings)
    ]
    return engine


class Pair:
    """A tiny target, a drafter of a kind that errs now and then, and their trace."""

    def __init__(
        self, weights: LlamaWeights, kind: str, sampling: Sampling, errs: Callable[[int], bool] = odd
    ) -> None:
        self.sampling = sampling
        self.target = repetitive(Metered(engine_of(weights, "bf16")))
        self.model = repetitive(Metered(engine_of(weights, "bf16"), errs))
        model = ModelDrafter(self.model)
        kinds: dict[str, Drafter] = {
            "model": model,
            "lookup": PromptLookup(),
            "lookup first": LookupFirst(model),
        }
        self.drafter = kinds[kind]
        self.text = record_text(self.target, self.drafter, PROMPT, sampling, NEW_TOKENS, GAMMA)
        self.trace = trace_of(self.target, self.drafter, GAMMA, self.text)

    def real(self, request: GenerationRequest) -> tuple[GenerationRecord, list[Forward], list[Forward]]:
        self.target.forwards, self.model.forwards = [], []
        record = generate(self.target, self.drafter, request)
        return record, self.target.forwards, self.model.forwards

    def replayed(self, request: GenerationRequest) -> tuple[GenerationRecord, list[Forward], list[Forward]]:
        return replayed(self.trace, request)


def replayed(
    trace: Trace, request: GenerationRequest
) -> tuple[GenerationRecord, list[Forward], list[Forward]]:
    """The record, and the forwards of target and drafter."""
    verified: list[Forward] = []
    drafted: list[Forward] = []
    record = generate(
        ReplayTarget(trace, lambda *f: verified.append(f[:3])),
        ReplayDrafter(trace, lambda *f: drafted.append(f[:3])),
        request,
    )
    return record, verified, drafted


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_generations(weights: LlamaWeights, kind: str, sampling: str) -> None:
    """Ids, windows and every forward of both models, in every mode, for windows up to the recorded length."""
    pair = Pair(weights, kind, SAMPLINGS[sampling])
    seen: set[str] = set()
    rows: set[int] = set()
    for mode in ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"):
        for gamma in (0,) if mode == "cloud-ar" else (1, 2, 4, 8, GAMMA):
            request = GenerationRequest(
                PROMPT,
                mode,
                gamma=gamma,
                sampling=pair.sampling,
                max_new_tokens=NEW_TOKENS,
                stop_at_eos=False,
            )
            real, ours = pair.real(request), pair.replayed(request)
            assert ours[0].ids == real[0].ids == list(pair.text.ids)
            assert ours[0].windows == real[0].windows
            assert ours[1] == real[1], (mode, gamma)
            assert ours[2] == real[2], (mode, gamma)
            assert ours[0].bytes_up == real[0].bytes_up
            assert ours[0].bytes_down == real[0].bytes_down
            expected = windows_of(pair.trace, pair.text, mode, gamma, NEW_TOKENS, stop_at_eos=False)
            assert expected == real[0].windows
            seen |= {"all" if a == d else "none" if a == 0 else "part" for d, a in expected if d}
            rows |= {tokens for tokens, _, _ in ours[2]}
    assert seen == {"all", "part", "none"}
    if kind == "lookup":
        assert rows == set()
    else:  # one token, one or two after a window, and more where lookup had spoken
        assert {1, 2} < rows
        assert kind == "model" or max(rows - {max(rows)}) > 3


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync", "dsd-stream"])
def test_a_prompt_in_pieces(weights: LlamaWeights, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Each piece is a forward of its own, in replay too, and only the last one finds the text."""
    pair = Pair(weights, "model", COUPLED)
    monkeypatch.setattr("dsdlab.nodes.step.PROMPT_PIECE", 3)
    request = GenerationRequest(PROMPT, mode, gamma=4, sampling=COUPLED, max_new_tokens=12, stop_at_eos=False)
    real, ours = pair.real(request), pair.replayed(request)
    assert ours[0].ids == real[0].ids == list(pair.text.ids[:12])
    assert ours[1][:3] == real[1][:3] == [(3, 1, 0), (3, 1, 3), (1, 1, 6)]


@pytest.mark.parametrize("kind", ["model", "lookup first"])
@pytest.mark.parametrize("seed", range(6))
def test_windows_in_any_order(weights: LlamaWeights, kind: str, seed: int) -> None:
    """Bases that skip or repeat, as after lost frames, or go back: what the model holds is right then too.

    Only a model's own text can go back; lookup has seen what followed.
    """
    pair = Pair(weights, kind, COUPLED)
    rng = np.random.default_rng(seed)
    drafted: list[Forward] = []
    replay = ReplayDrafter(pair.trace, lambda *f: drafted.append(f[:3]))
    first, last = len(PROMPT) + 1, len(pair.text.whole) - 1
    pair.model.forwards = []
    for _ in range(4):
        a, b = pair.drafter.open(), replay.open()
        base = first
        while base <= last:
            ids = pair.text.whole[:base]
            n = int(rng.integers(0, GAMMA + 1))
            assert replay.propose(b, ids, n, COUPLED) == pair.drafter.propose(a, ids, n, COUPLED)
            assert drafted == pair.model.forwards
            base += int(rng.integers(0, 4))
            if kind == "model" and rng.random() < 0.2:
                base = int(rng.integers(first, last + 1))
        pair.drafter.close(a)
        replay.close(b)
        replay.close(b)


@pytest.mark.parametrize("mode", ["cloud-sd", "dsd-sync"])
def test_a_window_that_foresees_the_end(weights: LlamaWeights, mode: str) -> None:
    """Drafts behind an end of sequence are judged and counted, though nobody sees them."""
    alone = Metered(engine_of(weights, "bf16"))
    free = record_text(alone, PromptLookup(), PROMPT, COUPLED, NEW_TOKENS, 1).ids
    end = next(i for i in range(12, NEW_TOKENS) if free.index(free[i]) == i)
    target = Metered(engine_of(weights, "bf16", eos_ids=(free[end],)))
    twin = ModelDrafter(Metered(engine_of(weights, "bf16"), lambda p: p == len(PROMPT) + end + 3))
    eos_ids = target.info.eos_ids
    text = record_text(target, twin, PROMPT, COUPLED, NEW_TOKENS, GAMMA, eos_ids)
    assert text.ids == free[: end + 1]
    assert text.beyond == free[end + 1 : end + 1 + len(text.beyond)]
    assert len(text.beyond) == GAMMA - 1  # the last window begins with the end itself
    trace = trace_of(target, twin, GAMMA, text)
    behind = set()
    for gamma in range(1, GAMMA + 1):
        request = GenerationRequest(PROMPT, mode, gamma=gamma, sampling=COUPLED, max_new_tokens=NEW_TOKENS)
        real = generate(target, twin, request)
        ours = generate(ReplayTarget(trace, ignore), ReplayDrafter(trace, ignore), request)
        assert ours.ids == real.ids == list(text.ids)
        assert ours.finish == "eos"
        assert ours.windows == real.windows == windows_of(trace, text, mode, gamma, NEW_TOKENS)
        behind.add(sum(accepted + 1 for _, accepted in real.windows) - len(real.ids))
    assert max(behind) == 3  # the end, two more, and the correction: the last accepted draft is never the end


def test_the_length_limit_is_not_the_traces(weights: LlamaWeights) -> None:
    """A shorter generation is the beginning of the recorded one; its last windows are cut."""
    pair = Pair(weights, "lookup first", GREEDY)
    for n in (1, 2, 3, 17):
        for mode in ("cloud-sd", "dsd-sync"):
            request = GenerationRequest(PROMPT, mode, gamma=5, max_new_tokens=n, stop_at_eos=False)
            real, ours = pair.real(request), pair.replayed(request)
            assert ours[1:] == real[1:]
            assert ours[0].ids == list(pair.text.ids[:n])
            expected = windows_of(pair.trace, pair.text, mode, 5, n, stop_at_eos=False)
            assert ours[0].windows == real[0].windows == expected


def test_what_the_targets_vocabulary_lacks_is_cut(weights: LlamaWeights) -> None:
    """The drafter says it, and computes on; the node sends the window up to it."""
    target = Metered(engine_of(weights, "bf16"))
    model = Metered(engine_of(weights, "bf16"), odd, foreign=VOCAB + 3)
    drafter = ModelDrafter(model)
    text = record_text(target, drafter, PROMPT, GREEDY, NEW_TOKENS, GAMMA)
    trace = trace_of(target, drafter, GAMMA, text)
    cut = 0
    for mode in ("cloud-sd", "dsd-sync"):
        request = GenerationRequest(PROMPT, mode, gamma=GAMMA, max_new_tokens=NEW_TOKENS, stop_at_eos=False)
        model.forwards = []
        real = generate(target, drafter, request)
        ours, _, drafted = replayed(trace, request)
        assert ours.ids == real.ids
        assert drafted == model.forwards
        expected = windows_of(trace, text, mode, GAMMA, NEW_TOKENS, stop_at_eos=False)
        assert ours.windows == real.windows == expected
        cut += sum(0 < d < GAMMA for d, _ in real.windows)
    assert cut > 4


def test_the_end_of_the_drafters_context(tmp_path: Path) -> None:
    """Where its context ends a drafter says less, and replay too."""
    weights = load_llama_dir(write_tiny_llama(tmp_path, num_hidden_layers=1), "")
    target = Metered(engine_of(weights, "bf16"))
    model = Metered(engine_of(weights, "bf16", max_context=len(PROMPT) + 20), odd)
    for drafter, lengths in ((ModelDrafter(model), {0, 1, 6}), (LookupFirst(ModelDrafter(model)), {2, 6})):
        text = record_text(target, drafter, PROMPT, GREEDY, 30, 6)
        trace = trace_of(target, drafter, 6, text)
        assert {len(w.ids) for w in text.windows} >= lengths
        request = GenerationRequest(PROMPT, gamma=6, max_new_tokens=30, stop_at_eos=False)
        model.forwards = []
        real = generate(target, drafter, request)
        ours, _, drafted = replayed(trace, request)
        assert ours.windows == real.windows
        assert drafted == model.forwards


# streams: a tail that is not judged yet ------------------------------------------------------------


class Streamed(NamedTuple):
    """What a stream of proposals was."""

    alive: int  # proposals behind a right tail
    dead: int
    beyond: int  # of the alive ones, those behind more tokens than a recorded window has
    died: int  # tails


def streamed(pair: Pair, seed: int, *, longest: int, exact_beyond: bool, dead_alike: bool) -> Streamed:
    """S9: the real drafter and its replay side by side, in a session that drafts ahead.

    longest: of a tail. exact_beyond: whether they are to agree where recorded windows do not reach.
    dead_alike: whether they are to compute alike behind a wrong token too.
    """
    rng = random.Random(seed)
    charged: list[Forward] = []
    replay = ReplayDrafter(pair.trace, lambda *f: charged.append(f[:3]))
    pair.model.forwards = []
    a, b = pair.drafter.open(), replay.open()
    whole, p = pair.text.whole, len(PROMPT) + 1
    real, ours = list[int](), list[int]()  # the tails: one while they are right
    alive_n = dead_n = beyond_n = died = 0
    while p < len(whole) - 1:
        ids = whole[:p]
        n = rng.choice((1, 1, 1, 2, GAMMA))
        n = min(n, longest - len(real), len(whole) - p - len(real) - 1)
        right = real == whole[p : p + len(real)]
        beyond = len(real) + max(n, 0) > GAMMA
        if n > 0 and (exact_beyond or not beyond):
            before = len(pair.model.forwards), len(charged)
            said = pair.drafter.propose(a, ids, n, pair.sampling, real)
            told = replay.propose(b, ids, n, pair.sampling, ours)
            assert replay._sessions[b].held <= p
            if right:
                assert told == said, (p, real, n)
                alive_n += 1
                beyond_n += beyond
            else:
                dead_n += 1
            if right or dead_alike:
                assert charged[before[1] :] == pair.model.forwards[before[0] :], (p, real, n)
            real, ours = real + said, ours + told
        for _ in range(rng.choice((0, 0, 1, 2, 5)) if p > len(PROMPT) + 1 or real else 1):
            if p == len(whole) - 1:
                break
            true = whole[p]
            p += 1
            died += bool(real) and real[0] != true
            # the tails part behind their first wrong token, and die of it
            real = real[1:] if real and real[0] == true else []
            ours = ours[1:] if ours and ours[0] == true else []
            assert bool(real) >= bool(ours)
    pair.drafter.close(a)
    replay.close(b)
    return Streamed(alive_n, dead_n, beyond_n, died)


def total(runs: Iterable[Streamed]) -> Streamed:
    return Streamed(*(sum(column) for column in zip(*runs, strict=True)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_s9_a_model_streams(weights: LlamaWeights, sampling: str) -> None:
    """Longer tails than any recorded window: re-anchored, the model says the same, dead or alive."""
    pairs = [Pair(weights, "model", SAMPLINGS[sampling], errs) for errs in (odd, seldom_odd)]
    runs = total(
        streamed(pair, seed, longest=3 * GAMMA, exact_beyond=True, dead_alike=True)
        for pair in pairs
        for seed in range(12)
    )
    assert min(runs) > 30, runs


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_s9_lookup_first_streams(weights: LlamaWeights, sampling: str) -> None:
    """What lookup finds hangs on what was committed: exact as far as the recorded windows reach."""
    pair = Pair(weights, "lookup first", SAMPLINGS[sampling])
    runs = total(
        streamed(pair, seed, longest=GAMMA, exact_beyond=False, dead_alike=False) for seed in range(12)
    )
    assert min(runs.alive, runs.dead, runs.died) > 10, runs


@pytest.mark.parametrize("mode", STREAMING_MODES)
@pytest.mark.parametrize("kind", ["model", "lookup first"])
def test_whole_streams(weights: LlamaWeights, kind: str, mode: str) -> None:
    """Where nothing takes time the steps may fall otherwise, never the text."""
    pair = Pair(weights, kind, COUPLED)
    for gamma, more in ((1, {}), (4, {"run_ahead": 20}), (4, {"free_run": True, "beside": 3})):
        if mode == "dsd-pipelined" or (mode == "dsd-adaptive" and "free_run" in more):
            more = {k: v for k, v in more.items() if k == "run_ahead"}
        request = GenerationRequest(
            PROMPT,
            mode,
            gamma=gamma,
            sampling=COUPLED,
            max_new_tokens=NEW_TOKENS,
            stop_at_eos=False,
            **more,
        )
        assert pair.real(request)[0].ids == pair.replayed(request)[0].ids == list(pair.text.ids)


def test_behind_a_tail() -> None:
    """Windows of two: the text after 1 2 is 30 40 41, and the drafter is wrong at position 3."""
    trace, sampling = hand_made(), Sampling(0.5, seed=7)
    drafter = ReplayDrafter(trace, ignore)

    def say(ids: list[int], tail: list[int], n: int) -> list[int]:
        return drafter.propose(drafter.open(), ids, n, sampling, tail)

    text = [1, 2, 30]
    assert say(text, [], 1) == [41]
    assert say(text, [41], 1) == [41]  # recorded behind it, though dead
    assert say(text, [40], 1) == [41]  # right, but not what the window at 3 says: the one at 4 goes on
    assert say(text, [9], 1) == [41]  # never recorded: as if it were the text
    assert say(text, [9, 8], 3) == [8, 8, 8]  # nor that: anything, as much as is asked for


# the parts by themselves -------------------------------------------------------------------------


def ignore(*_: int) -> None:
    """A charge that nobody counts."""


def hand_made(gamma: int = 2) -> Trace:
    """Two prompts, one the beginning of the other; the drafter is wrong at every second position."""

    def text(prompt: tuple[int, ...], ids: tuple[int, ...], sampling: Sampling) -> TracedText:
        whole = [*prompt, *ids]
        odd = [(t + p % 2) % 50 for p, t in enumerate(whole)]
        windows = tuple(
            TracedWindow(b, tuple(odd[b : b + n]), (True,) * n)
            for b in range(len(prompt) + 1, len(whole))
            if (n := min(gamma, len(whole) - b))
        )
        return TracedText(
            key="k",
            prompt=f"{len(prompt)} ids",
            prompt_ids=prompt,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            seed=sampling.seed,
            ids=ids,
            windows=windows,
        )

    return Trace(
        target="t",
        drafter="d",
        precision="bf16",
        tokenizer="x",
        vocab_size=50,
        eos_ids=(0,),
        max_context=16,
        gamma=gamma,
        texts=(
            text((1, 2), (3, 4, 5, 6), GREEDY),
            text((1, 2, 3), (9, 8, 7), GREEDY),
            text((1, 2), (30, 40, 41), Sampling(0.5, seed=7)),
        ),
    )


def test_batches_and_their_cost() -> None:
    """One forward for all sessions; past the end of a text comes an end of sequence, never an error."""
    spent: list[Forward] = []
    target = ReplayTarget(hand_made(), lambda *f: spent.append(f[:3]), slots=2)
    a, b = target.open(), target.open()
    with pytest.raises(NoFreeSlot, match="all 2 session slots of t"):
        target.open()
    assert target.choose([Chunk(a, [1, 2], 1)], [GREEDY]) == [[3]]
    both = [Chunk(b, [1, 2, 3], 1), Chunk(a, [3, 44, 45], 3)]
    assert target.choose(both, [GREEDY, GREEDY]) == [[9], [4, 5, 6]]
    assert spent == [(2, 1, 0), (6, 2, 2)]
    target.rollback(a, 3)
    assert target.length(a) == 3
    assert target.choose([Chunk(a, [4, 5, 6, 0], 4)], [GREEDY]) == [[5, 6, 0, 0]]
    with pytest.raises(ValueError, match="rollback to 8; allowed: 0 to the session's 7"):
        target.rollback(a, 8)
    with pytest.raises(ContextFull, match="17 positions; t is traced for 16"):
        target.choose([Chunk(a, [1] * 10, 1)], [GREEDY])
    with pytest.raises(ModelError, match="no logits"):
        target.extend([Chunk(a, [1], 1)])
    target.close(a)
    target.close(a)
    again = target.open()
    assert again == a
    assert target.choose([Chunk(again, [1, 2], 1)], [Sampling(0.5, seed=7)]) == [[30]]


def test_a_session_opened_along_its_text() -> None:
    """After a restart of the verifier: prompt and committed tokens come at once."""
    target = ReplayTarget(hand_made(), ignore)
    assert target.choose([Chunk(target.open(), [1, 2, 3, 4], 1)], [GREEDY]) == [[5]]
    assert target.choose([Chunk(target.open(), [1, 2, 3, 9], 1)], [GREEDY]) == [[8]]
    drafter = ReplayDrafter(hand_made(), ignore)
    slot = drafter.open()
    assert drafter.propose(slot, [1, 2, 3, 4], 2, GREEDY) == [5, 7]
    assert drafter.propose(slot, [1, 2, 3, 4], 1, GREEDY) == [5]
    assert drafter.propose(slot, [1, 2, 3, 4], 0, GREEDY) == []
    assert drafter.propose(slot, (1, 2, 3, 4, 5), 2, GREEDY) == [7]


@pytest.mark.parametrize(
    ("ids", "n", "sampling", "reason"),
    [
        ([1, 2, 3, 4], 3, GREEDY, "the trace has windows of 2 tokens; asked for 3"),
        ([1, 2, 3, 5], 1, GREEDY, "the trace has no text that begins with these 4 tokens under greedy"),
        ([1, 2, 30], 1, Sampling(0.5, seed=8), "3 tokens under temperature 0.5, seed 8"),
        ([1, 2, 30], 1, Sampling(0.5, top_p=0.5, seed=7), "under temperature 0.5, top_p 0.5, seed 7"),
        ([1, 2], 1, GREEDY, "the trace has no window after 2 tokens of prompt 2 ids"),
        ([1, 2, 3, 4, 5, 6], 1, GREEDY, "the trace has no window after 6 tokens of prompt 2 ids"),
    ],
)
def test_what_was_not_recorded(ids: list[int], n: int, sampling: Sampling, reason: str) -> None:
    drafter = ReplayDrafter(hand_made(), ignore)
    with pytest.raises(TraceError, match=reason) as error:
        drafter.propose(drafter.open(), ids, n, sampling)
    assert "\n" not in str(error.value)


def test_a_text_that_turns_out_another() -> None:
    """The drafter checks what is new of the text each time, not only its beginning."""
    drafter = ReplayDrafter(hand_made(), ignore)
    slot = drafter.open()
    drafter.propose(slot, [1, 2, 3, 4], 2, GREEDY)
    with pytest.raises(TraceError, match="begins with these 5 tokens"):
        drafter.propose(slot, [1, 2, 3, 4, 9], 2, GREEDY)


def test_the_seed_of_an_emulated_text() -> None:
    """A real model's greedy text has no seed; an emulated one's has."""
    trace = hand_made()
    assert trace.find([1, 2], Sampling(0.0, seed=99)).ids[0] == 3
    emulated = msgspec.structs.replace(trace, target="emulated:alpha=1")
    assert emulated.find([1, 2], GREEDY).ids[0] == 3
    with pytest.raises(TraceError):
        emulated.find([1, 2], Sampling(0.0, seed=99))


def test_windows_of_needs_enough() -> None:
    trace = hand_made()
    text = trace.texts[0]
    with pytest.raises(TraceError, match="has 4 tokens of prompt 2 ids; 5 are asked for"):
        windows_of(trace, text, "dsd-sync", 2, 5)
    with pytest.raises(TraceError, match="windows of 2 tokens; asked for 3"):
        windows_of(trace, text, "dsd-sync", 3, 4)
    assert windows_of(trace, text, "cloud-ar", 3, 4) == [(0, 0)] * 4
    assert windows_of(trace, text, "dsd-sync", 2, 4) == [(0, 0), (2, 0), (1, 1)]


def test_a_window_costs_microseconds(weights: LlamaWeights) -> None:
    """At most 10 µs a window on the development machine; a busy one gets five times that."""
    pair = Pair(weights, "model", GREEDY)
    drafter = ReplayDrafter(pair.trace, ignore)
    texts = [pair.text.whole[:b] for b in range(len(PROMPT) + 1, len(pair.text.whole))]
    slots: list[int] = []

    def play() -> None:
        slot = drafter.open()
        for ids in texts:
            drafter.propose(slot, ids, 4, GREEDY)
        drafter.close(slot)
        slots.append(slot)

    per_window_s = min(timeit.repeat(play, number=20, repeat=5)) / 20 / len(texts)
    print(f"{per_window_s * 1e6:.1f} µs a window")
    assert per_window_s < 50e-6
