"""Recording: what is recorded in one pass over a text is what the drafter says in any other run of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, engine_of, tiny_drafter, write_tiny_llama
from tracing_tools import Forward, Metered, generate, record_text, trace_of

from dsdlab.decoding import Sampling
from dsdlab.models.base import Engine
from dsdlab.models.drafters import (
    FIRST_LONGEST,
    FIRST_SHORTEST,
    FIRST_UNSAYABLE,
    Drafter,
    LookupFirst,
    ModelDrafter,
    PromptLookup,
    believed,
    load_drafter,
)
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
from dsdlab.models.tracing import reach_beyond, record_windows
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.nodes import GenerationRequest
from dsdlab.sim.replay import ReplayDrafter, ReplayTarget, windows_of
from dsdlab.sim.trace import TracedText, TracedWindow

GREEDY = Sampling()
COUPLED = Sampling(0.8, 0, 1.0, 42)
SAMPLINGS = {"greedy": GREEDY, "coupled": COUPLED}
GAMMA = 8
PROMPTS = (
    "What is the capital of France?",  # a short answer: it ends by itself
    "Count: one, two, three, four, one,",
    "Write a Python function that adds two numbers.",
)
STORY = "The cat sat on the mat, and the dog sat on the mat. The red cat ran; the old dog ran too. "
TARGET, DRAFTER = "smollm2-135m-instruct", "lookup+smollm2-drafter"


def check_windows(
    drafter: Drafter, prompt: list[int], ids: list[int], sampling: Sampling, rng: np.random.Generator
) -> tuple[TracedWindow, ...]:
    """The recorded windows, held against sessions with other bases and other γ."""
    windows = record_windows(drafter, prompt, ids, sampling, GAMMA)
    assert [w.base for w in windows] == [len(prompt) + n for n in range(1, len(ids))]
    text = prompt + ids
    for _ in range(6):
        slot = drafter.open()
        base = len(prompt) + 1 + int(rng.integers(0, len(ids) - 1))
        while base < len(text):
            n = int(rng.integers(1, GAMMA + 1))
            draft = drafter.propose(slot, text[:base], n, sampling)
            recorded = windows[base - len(prompt) - 1]
            assert tuple(draft) == recorded.ids[:n], (base, n)
            assert tuple(drafter.by_model) == recorded.by_model[: len(draft)]
            base += int(rng.integers(1, n + 2))
        drafter.close(slot)
    return windows


def repeating(rng: np.random.Generator, n: int, vocab_size: int) -> list[int]:
    """Pieces that come again, and others."""
    pieces = [rng.integers(3, vocab_size, 5).tolist() for _ in range(4)]
    out: list[int] = []
    while len(out) < n:
        out += pieces[rng.integers(0, 4)] if rng.random() < 0.5 else rng.integers(3, vocab_size, 3).tolist()
    return out[:n]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["model", "lookup", "lookup first"])
def test_one_pass_is_every_run(tmp_path: Path, kind: str, sampling: str) -> None:
    """The text passes 64 and 192 positions, where the attention's visible cache grows."""
    model = ModelDrafter(tiny_drafter(tmp_path / "d.safetensors"))
    kinds: dict[str, Drafter] = {"model": model, "lookup": PromptLookup(), "lookup first": LookupFirst(model)}
    rng = np.random.default_rng(3)
    text = repeating(rng, 230, VOCAB)
    windows = check_windows(kinds[kind], text[:50], text[50:], SAMPLINGS[sampling], rng)
    said = {m for w in windows for m in w.by_model}
    assert said == {"model": {True}, "lookup": {False}, "lookup first": {True, False}}[kind]


def test_who_said_it(tmp_path: Path) -> None:
    """Lookup says a token exactly where its rule believes it; the model says the rest."""
    model = ModelDrafter(tiny_drafter(tmp_path / "d.safetensors"))
    assert model.engine.output_ids is not None
    sayable = set(model.engine.output_ids.tolist())
    drafter = LookupFirst(model)
    text = repeating(np.random.default_rng(5), 90, 12)
    lookup = PromptLookup(FIRST_LONGEST, FIRST_UNSAYABLE)
    sources = set()
    for w in record_windows(drafter, text[:20], text[20:], GREEDY, GAMMA):
        slot = lookup.open()
        assert len(w.ids) == GAMMA
        for i, by_model in enumerate(w.by_model):
            at, matched = lookup.find(slot, text[: w.base], w.ids[:i])
            looked_up = matched > 0 and believed(matched, text[at], sayable)
            assert by_model == (not looked_up)
            sources.add((by_model, matched >= FIRST_SHORTEST))
        lookup.close(slot)
    assert sources == {(True, False), (False, True), (False, False)}  # the last: what the model cannot say


@pytest.mark.parametrize(
    ("ids", "reach"),
    [
        ((5, 6, 0, 8, 9), 2),  # it foresees the end, and goes on
        ((5, 6, 0), 0),
        ((5, 7, 0, 8, 9), 0),  # wrong before the end: nothing behind is judged as right
        ((5, 6), 0),
    ],
)
def test_how_far_beyond_the_end(ids: tuple[int, ...], reach: int) -> None:
    windows = [TracedWindow(3, ids, (True,) * len(ids)), TracedWindow(4, (1,), (True,))]
    assert reach_beyond(windows, [3, 3], [4, 5, 6, 0], (0,), 64) == reach
    assert reach_beyond(windows, [3, 3], [4, 5, 6, 0], (0,), 7) == min(reach, 1)
    assert reach_beyond(windows, [3, 3], [4, 5, 6, 0], (), 64) == 0


def test_no_slot_is_lost(tmp_path: Path) -> None:
    """One slot is enough for any number of texts, failed ones included."""
    folder = write_tiny_llama(tmp_path, num_hidden_layers=1)
    drafter = ModelDrafter(engine_of(load_llama_dir(folder, ""), "bf16", slots=1))
    for _ in range(2):
        with pytest.raises(ValueError, match="seed is -1"):
            record_windows(drafter, [1], [2, 3], Sampling(seed=-1), 2)
        with pytest.raises(IndexError):
            record_windows(drafter, [1], [2, -VOCAB - 1, 3], GREEDY, 2)
        assert len(record_windows(drafter, [1], [2, 3], GREEDY, 2)) == 1


# the real pair -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    """A second thread would wait for whatever else runs on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encode(text: str) -> list[int]:
    tokenizer = load_tokenizer(TARGET)
    assert tokenizer is not None
    return tokenizer.encode_chat(text)


@pytest.mark.model
@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_pass_is_every_run_of_the_real_drafter(sampling: str) -> None:
    drafter = load_drafter(DRAFTER, EngineOptions(device="cpu", slots=1, max_context=512))
    ids = encode(f"Summarise this. {STORY * 4}Then tell it again in other words: the cat, the mat, the dog.")
    assert len(ids) > 120
    windows = check_windows(drafter, ids[:50], ids[50:], SAMPLINGS[sampling], np.random.default_rng(1))
    by_model = [m for w in windows for m in w.by_model]
    assert 0.1 < sum(by_model) / len(by_model) < 0.9


@pytest.fixture(scope="module")
def real_target(_one_thread: None) -> Engine:
    return load_engine(TARGET, EngineOptions("bf16", device="cpu", slots=1, max_context=512))


@pytest.mark.model
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_replay_is_the_real_run(real_target: Engine, prompt: str, sampling: str) -> None:
    """For every window of every generation the same number drafted and accepted; the same forwards."""
    target = Metered(real_target)
    drafter = load_drafter(DRAFTER, EngineOptions(device="cpu", slots=1, max_context=512))
    assert isinstance(drafter, LookupFirst)
    drafter.model.engine = model = Metered(drafter.model.engine)
    ask = SAMPLINGS[sampling]
    ids = encode(prompt)
    text = record_text(target, drafter, ids, ask, 28, GAMMA, target.info.eos_ids)
    trace = trace_of(target, drafter, GAMMA, text)
    n_windows = 0
    for mode, gamma in (("dsd-sync", 2), ("dsd-sync", 4), ("dsd-sync", 8), ("cloud-sd", 4)):
        request = GenerationRequest(ids, mode, gamma=gamma, sampling=ask, max_new_tokens=28)
        target.forwards, model.forwards = [], []
        real = generate(target, drafter, request)
        verified: list[Forward] = []
        drafted: list[Forward] = []
        ours = generate(
            ReplayTarget(trace, lambda *f, to=verified: to.append(f[:3])),
            ReplayDrafter(trace, lambda *f, to=drafted: to.append(f[:3])),
            request,
        )
        assert ours.ids == real.ids == list(text.ids)
        assert ours.windows == real.windows == windows_of(trace, text, mode, gamma, 28), (mode, gamma)
        assert verified == target.forwards
        assert drafted == model.forwards
        n_windows += len(real.windows)
    print(f"{n_windows} windows, {len(text.ids)} tokens, {len(text.beyond)} beyond")


@pytest.mark.model
@pytest.mark.parametrize("kind", ["model", "lookup first"])
def test_replay_is_the_real_stream(real_target: Engine, kind: str) -> None:
    """One token at a time behind a tail that is not judged yet: the same tokens while it is right, and of a
    model the same forwards throughout. The text is one that the drafter often foresees."""
    first = load_drafter(DRAFTER, EngineOptions(device="cpu", slots=1, max_context=512))
    assert isinstance(first, LookupFirst)
    first.model.engine = model = Metered(first.model.engine)
    drafter: Drafter = first if kind == "lookup first" else first.model
    ids = encode(f"Say this again and again, please. {STORY * 3}")
    prompt, said_ids = ids[:50], ids[50:]
    windows = record_windows(drafter, prompt, said_ids, GREEDY, GAMMA)
    text = TracedText(
        key="k", prompt="p", prompt_ids=tuple(prompt), ids=tuple(said_ids), windows=windows,
        temperature=0.0, top_k=0, top_p=1.0, seed=0,
    )  # fmt: skip
    charged: list[Forward] = []
    replay = ReplayDrafter(trace_of(real_target, drafter, GAMMA, text), lambda *f: charged.append(f[:3]))
    whole, rng = text.whole, random.Random(4)
    compared = longest = 0
    for _ in range(4):
        charged.clear()
        model.forwards = []
        a, b = drafter.open(), replay.open()
        p = text.first_base
        real, ours = list[int](), list[int]()
        while p < len(whole) - 1:
            if p + len(real) < len(whole) - 1:
                said = drafter.propose(a, whole[:p], 1, GREEDY, real)
                told = replay.propose(b, whole[:p], 1, GREEDY, ours)
                if real == whole[p : p + len(real)]:
                    assert told == said, (p, real)
                    compared += 1
                    longest = max(longest, len(real))
                assert kind == "lookup first" or charged == model.forwards
                real, ours = real + said, ours + told
            for true in whole[p : p + rng.choice((0, 0, 0, 0, 0, 0, 1, 4))]:
                p += 1
                real = real[1:] if real and real[0] == true else []
                ours = ours[1:] if ours and ours[0] == true else []
        drafter.close(a)
        replay.close(b)
    print(f"{kind}: {compared} tokens compared, tails of up to {longest}")
    assert compared > 80
    assert longest > (GAMMA if kind == "lookup first" else 2)
