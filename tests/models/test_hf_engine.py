"""The hf engine: any causal LM of transformers, with the same rules as the torch engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, VOCAB, engine_of, write_tiny_llama

from dsdlab.models.base import Chunk, ContextFull, Engine, ModelError, NoFreeSlot
from dsdlab.models.hf_engine import BLOCK_ROWS
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.selftest import selftest
from dsdlab.models.weights_io import load_llama_dir

TEXT = np.random.default_rng(0).integers(0, VOCAB, CONTEXT).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("hf"))


def load(folder: Path, precision: str = "fp32", slots: int = 4, max_context: int = CONTEXT) -> Engine:
    options = EngineOptions(precision=precision, device="cpu", slots=slots, max_context=max_context)
    return load_engine(f"hf:{folder}", options)


def alone(engine: Engine, upto: int) -> np.ndarray:
    slot = engine.open()
    rows = [engine.extend([Chunk(slot, [i], 1)])[0] for i in TEXT[:upto]]
    engine.close(slot)
    return np.concatenate(rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_in_windows_batches_and_deep_contexts(folder: Path, precision: str) -> None:
    result = selftest(load(folder, precision))
    assert result.exact, result
    assert "depths up to 512" in result.what


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_window_at_every_offset(folder: Path, precision: str) -> None:
    engine = load(folder, precision)
    expected = alone(engine, 44)
    slot = engine.open()
    engine.extend([Chunk(slot, TEXT[:12], 0)])
    for start in range(12, 26):
        for size in (1, 2, 3, 5, 7, 8, 9, 12, 16, 17):
            got = engine.extend([Chunk(slot, TEXT[start : start + size], size)])[0]
            assert np.array_equal(got, expected[start : start + size]), (start, size)
            engine.rollback(slot, start)
        engine.extend([Chunk(slot, [TEXT[start]], 0)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_deep_in_the_context(folder: Path, precision: str) -> None:
    """Where a kernel sums in steps, a row must not depend on how far its block reaches."""
    engine = load(folder, precision)
    expected = alone(engine, 400)
    slot = engine.open()
    rng = np.random.default_rng(1)
    for _ in range(2):
        engine.rollback(slot, 0)
        start = 0
        while start < 400:
            end = min(400, start + int(rng.integers(1, 14)))
            got = engine.extend([Chunk(slot, TEXT[start:end], end - start)])[0]
            assert np.array_equal(got, expected[start:end]), (start, end)
            start = end


def test_logits_agree_with_transformers_and_with_the_torch_engine(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT[:100]])).logits[0].numpy()
    ours = engine_of(load_llama_dir(folder, ""))
    for engine in (load(folder), ours):
        slot = engine.open()
        got = engine.extend([Chunk(slot, TEXT[:77], 77)])[0]
        more = engine.extend([Chunk(slot, TEXT[77:100], 23)])[0]
        np.testing.assert_allclose(np.concatenate([got, more]), expected, rtol=2e-4, atol=2e-4)


def test_rollback_to_nothing_and_reuse(folder: Path) -> None:
    engine = load(folder, slots=1)
    expected = alone(engine, 20)
    slot = engine.open()
    engine.extend([Chunk(slot, TEXT[100:150], 1)])
    engine.rollback(slot, 0)
    assert np.array_equal(engine.extend([Chunk(slot, TEXT[:20], 20)])[0], expected)
    engine.close(slot)
    engine.close(slot)
    slot = engine.open()
    assert engine.length(slot) == 0
    assert np.array_equal(engine.extend([Chunk(slot, TEXT[:20], 20)])[0], expected)


def test_sessions(folder: Path) -> None:
    engine = load(folder, slots=1, max_context=32)
    limit = engine.info.max_context
    assert limit == 32 - BLOCK_ROWS
    slot = engine.open()
    with pytest.raises(NoFreeSlot, match="all 1 session slots"):
        engine.open()
    engine.extend([Chunk(slot, TEXT[: limit - 1], 0)])
    with pytest.raises(ContextFull):
        engine.extend([Chunk(slot, TEXT[:2], 1)])
    assert engine.length(slot) == limit - 1
    assert engine.extend([Chunk(slot, TEXT[:1], 1)])[0].shape == (1, VOCAB)
    assert engine.extend([Chunk(slot, [], 0)])[0].shape == (0, VOCAB)
    with pytest.raises(ValueError, match=f"rollback to {limit + 1}"):
        engine.rollback(slot, limit + 1)


def test_info(folder: Path) -> None:
    info = load(folder).info
    assert info.eos_ids == (2,)
    assert info.vocab_size == VOCAB
    assert len(info.digest) == 64
    assert info.n_params > 100_000


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="precision is 'int8'; the hf engine allows: bf16, fp32"):
        load(folder, "int8")
    with pytest.raises(ModelError, match="unknown model"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="transformers cannot load") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
