"""The self-test proves exactness, finds its absence, and leaves the engine as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import engine_of, tiny_drafter, tiny_target, write_tiny_llama

from dsdlab.models.base import Chunk, Logits, NoFreeSlot
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.models.selftest import selftest
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import load_llama_dir


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_exact_engine_passes(tmp_path: Path, precision: str) -> None:
    result = selftest(tiny_target(tmp_path, precision))
    assert (result.exact, result.differing, result.positions) == (True, 0, 72)
    assert result.elements > 300 * 384
    assert result.seconds > 0
    assert "batches of two sessions" in result.what
    assert "depths up to 512" in result.what


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(4, 4), (2, 2), (8, 2), (6, 3)])
def test_a_lone_row_has_the_bits_of_a_block(tmp_path: Path, precision: str, heads: tuple[int, int]) -> None:
    """Its few query heads are filled up with others, whose number depends on the model's heads."""
    folder = write_tiny_llama(tmp_path, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert selftest(engine_of(load_llama_dir(folder, ""), precision)).exact


def test_lone_rows_whose_kernels_sum_otherwise_are_caught(tmp_path: Path) -> None:
    """Too few query heads, or a product of one row where the library's takes two."""
    engine = tiny_target(tmp_path / "a", "fp32")
    engine._lone = 1
    assert not selftest(engine).exact
    folder = write_tiny_llama(tmp_path / "b", intermediate_size=1536)
    engine = engine_of(load_llama_dir(folder, ""), "fp32")
    assert selftest(engine).exact
    if any(layer.down.fewest == 2 for layer in engine._layers):  # not on every processor
        for layer in engine._layers:
            layer.down = replace(layer.down, fewest=1)
        assert not selftest(engine).exact


def test_an_inexact_engine_is_caught(tmp_path: Path) -> None:
    """exact=False takes one row where there is one, and fp32 products round by their number of rows."""
    result = selftest(tiny_target(tmp_path, "fp32", exact=False))
    assert not result.exact
    assert result.differing > 100


def test_an_inexact_twin_leaves_its_engine_exact(tmp_path: Path) -> None:
    """They share weights, and nothing else."""
    engine = tiny_target(tmp_path, "fp32")
    twin = engine.inexact_twin()
    assert not selftest(twin).exact
    held = [twin.open() for _ in range(4)]
    twin.extend([Chunk(held[0], [1, 2, 3], 0)])
    assert selftest(engine).exact


class DeepFault(TorchEngine):
    """Exact but for one bit of one logit, in windows of more than one row beyond position 300."""

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        out = super().extend(chunks)
        for chunk, logits in zip(chunks, out, strict=True):
            if chunk.rows > 1 and self.length(chunk.slot) > 300:
                logits[0, 5] = np.nextafter(logits[0, 5], np.float32(np.inf))
        return out


class BatchFault(TorchEngine):
    """Exact but for one logit whenever two sessions share a forward."""

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        out = super().extend(chunks)
        if len(chunks) > 1 and len(out[0]):
            out[0][0, 0] += np.float32(1e-3)
        return out


@pytest.mark.parametrize("fault", [DeepFault, BatchFault])
def test_a_single_wrong_bit_is_caught(tmp_path: Path, fault: type[TorchEngine]) -> None:
    engine = tiny_target(tmp_path, "bf16")
    engine.__class__ = fault
    result = selftest(engine)
    assert not result.exact
    assert 0 < result.differing < 40


def test_the_engine_is_left_as_it_was(tmp_path: Path) -> None:
    engine = tiny_target(tmp_path, "bf16", slots=3)
    kept = engine.open()
    engine.extend([Chunk(kept, [1, 2, 3], 0)])
    assert selftest(engine, seed=7).exact
    assert engine.length(kept) == 3
    assert {engine.open(), engine.open()} | {kept} == {0, 1, 2}


def test_slots_come_back_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_target(tmp_path, "bf16", slots=1)

    def broken(_: Sequence[Chunk]) -> list[Logits]:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "extend", broken)
        with pytest.raises(RuntimeError, match="no such kernel"):
            selftest(engine)
    assert engine.open() == 0


def test_small_engines(tmp_path: Path) -> None:
    """One slot, a context shorter than the usual text, a reduced head, no weights at all."""
    single = selftest(tiny_target(tmp_path / "a", "bf16", slots=1))
    assert single.exact
    assert "batches untested" in single.what
    short = selftest(tiny_target(tmp_path / "b", "bf16", max_context=9))
    assert short.exact
    assert short.positions == 9
    assert selftest(tiny_drafter(tmp_path / "d.safetensors")).exact
    assert selftest(EmulatedEngine(EmulatedProfile(vocab_size=64), slots=2)).exact


def test_no_slot(tmp_path: Path) -> None:
    engine = tiny_target(tmp_path, "bf16", slots=1)
    engine.open()
    with pytest.raises(NoFreeSlot):
        selftest(engine)
