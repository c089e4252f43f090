"""The real target: exact at its true size, and the same text as plain transformers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dsdlab.models.base import Chunk, Engine
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
from dsdlab.models.selftest import selftest
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.zoo import fetch

pytestmark = pytest.mark.model

TARGET = "smollm2-135m-instruct"
NEW_TOKENS = 24
NEAR_TIE = 1e-3
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three fruits.",
    "Translate to French: good morning.",
    "What is 12 times 7?",
    "Who wrote Hamlet?",
    "Name the planets of the solar system.",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "Summarise: The cat sat on the mat. The dog barked. The cat ran.",
    "Write a short story about a robot.",
    "What are the benefits of exercise?",
    "How do I boil an egg?",
    "Tell me a joke.",
    "What is the speed of light?",
    "Describe a sunset.",
    "A train travels 60 miles in 1.5 hours. What is its speed?",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread would wait for whatever else runs on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(TARGET)
    assert tokenizer is not None
    return tokenizer


def load(precision: str, *, exact: bool = True, slots: int = 3) -> Engine:
    return load_engine(
        TARGET, EngineOptions(precision, device="cpu", slots=slots, max_context=512, exact=exact)
    )


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_the_same_bits_over_real_text(precision: str, tokenizer: Tokenizer) -> None:
    """100 positions each alone, then in random pieces of three sessions batched in random order.

    The text is long enough to pass 192, where a kernel begins to sum the cache in other steps.
    """
    engine = load(precision)
    text = tokenizer.encode_chat(" ".join(PROMPTS))
    text = (text + tokenizer.encode(" ".join(reversed(PROMPTS))))[:260]
    assert len(text) == 260
    first = 150
    slots = [engine.open() for _ in range(3)]
    engine.extend([Chunk(slots[0], text[:first], 0)])
    expected = np.concatenate([engine.extend([Chunk(slots[0], [i], 1)])[0] for i in text[first:]])
    engine.rollback(slots[0], 0)
    rng = np.random.default_rng(1)
    at = [0, 0, 0]
    compared = 0
    while min(at) < len(text):
        turn = [i for i in rng.permutation(3) if at[i] < len(text)]
        sizes = [int(rng.integers(1, 18 if at[i] >= first - 20 else 80)) for i in turn]
        chunks = [
            Chunk(slots[i], part := text[at[i] : at[i] + n], len(part))
            for i, n in zip(turn, sizes, strict=True)
        ]
        for i, logits in zip(turn, engine.extend(chunks), strict=True):
            start = at[i]
            at[i] += len(logits)
            skip = max(0, first - start)
            if skip < len(logits):
                got = logits[skip:]
                assert np.array_equal(got, expected[start + skip - first : at[i] - first]), (i, start, at)
                compared += len(got)
    assert compared == 3 * len(expected) >= 300


def test_the_real_target_keeps_its_four_bits() -> None:
    """Its file is Q4_1: every group of every layer is found again; nothing is rounded to a level twice."""
    engine = load("int4", slots=1)
    assert isinstance(engine, TorchEngine)
    assert engine.int4.on_grid == engine.int4.groups == 30 * (960 * 576 + 576 * 576 + 3 * 1536 * 576) // 32


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_the_selftest_on_the_real_target(precision: str) -> None:
    result = selftest(load(precision, slots=2))
    assert result.exact, result
    assert result.elements >= 10_000_000


def test_the_selftest_catches_the_plain_one_row_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 too, at the true size; a short text is enough."""
    monkeypatch.setattr("dsdlab.models.selftest.POSITIONS", 18)
    monkeypatch.setattr("dsdlab.models.selftest.DEPTHS", (20,))
    result = selftest(load("bf16", slots=1, exact=False))
    assert not result.exact
    assert result.differing > 1000


def test_greedy_text_is_that_of_plain_transformers(tokenizer: Tokenizer) -> None:
    """Shows 4: 20 prompts, 24 tokens each, fp32 on both sides, `generate` as the oracle.

    Ours are read off one window over the oracle's text, which is what decoding one by one gives, bit for
    bit. Where a token differs, the two logits must be within a thousandth of each other: another order
    of summation may decide such a tie either way. Nothing else counts as equal.
    """
    from transformers import LlamaForCausalLM

    engine = load("fp32", slots=1)
    oracle = LlamaForCausalLM.from_pretrained(fetch(TARGET), dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None  # all 24 tokens, whatever they are
    ties = 0
    for prompt in PROMPTS:
        ids = tokenizer.encode_chat(prompt)
        with torch.inference_mode():
            theirs = oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=2,
            )[0, len(ids) :].tolist()
        assert len(theirs) == NEW_TOKENS
        slot = engine.open()
        rows = engine.extend([Chunk(slot, [*ids, *theirs[:-1]], NEW_TOKENS)])[0]
        engine.close(slot)
        for at, (row, token) in enumerate(zip(rows, theirs, strict=True)):
            choice = int(row.argmax())
            if choice != token:
                gap = float(row[choice] - row[token])
                assert gap < NEAR_TIE, (prompt, at, choice, token, gap)
                ties += 1
    assert ties <= 2
    print(f"{len(PROMPTS)} prompts, {NEW_TOKENS} tokens each, {ties} near-ties")
