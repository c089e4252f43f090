"""The recorded path of CUDA, with its kernels under Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from needs import need
from tiny_models import VOCAB, engine_of, tiny_drafter, write_tiny_llama

from dsdlab.models import torch_engine
from dsdlab.models.base import Chunk
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import load_llama_dir

SLOTS = 3


pytestmark = pytest.mark.usefixtures("_interpreted")


@pytest.fixture(scope="module")
def _interpreted() -> None:
    """tests/conftest.py asks Triton for its interpreter before anything imports it."""
    need("" if find_spec("triton") else "needs triton, which development installs on Linux on x86-64")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this machine has a GPU, for which kernels are compiled: make bench-gpu")


def in_blocks(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, rows: int = 4) -> TorchEngine:
    """The engine, computing as on CUDA but for the recording."""
    monkeypatch.setattr(torch_engine, "CUDA_BLOCK", rows)
    engine._max_rows = rows
    engine._blocks = engine._in_blocks(SLOTS)
    return engine


def target(folder: Path, precision: str = "bf16") -> TorchEngine:
    """One layer: the interpreter is slow."""
    weights = load_llama_dir(write_tiny_llama(folder, num_hidden_layers=1), "")
    return engine_of(weights, precision, slots=SLOTS)


def text(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB, n)]


@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_a_block_computes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The text passes 64 positions, where the kernel takes a second tile of the cache."""

    def make(folder: Path) -> TorchEngine:
        folder.mkdir()
        if kind == "drafter":  # a reduced head, and embeddings that are projected
            return tiny_drafter(folder / "d.safetensors", slots=SLOTS)
        return target(folder, "fp32")

    plain, blocks = make(tmp_path / "a"), in_blocks(make(tmp_path / "b"), monkeypatch, 16)
    ids = text(70)
    [want] = plain.extend([Chunk(plain.open(), ids, 6)])
    [got] = blocks.extend([Chunk(blocks.open(), ids, 6)])
    tolerance = 1e-4 if kind == "target" else 0.3  # the drafter's states are bf16
    np.testing.assert_allclose(got, want, atol=tolerance)


def test_rows_alone_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position's bits are the same alone, in a window, after a rollback and beside another session."""
    engine = in_blocks(target(tmp_path), monkeypatch)
    ids = text(12)
    a, b = engine.open(), engine.open()
    alone = np.concatenate([engine.extend([Chunk(a, [i], 1)])[0] for i in ids])
    engine.rollback(a, 2)
    np.testing.assert_array_equal(engine.extend([Chunk(a, ids[2:9], 5)])[0], alone[4:9])
    engine.extend([Chunk(b, ids[:3], 0)])
    with_none, both = engine.extend([Chunk(b, ids[3:6], 3), Chunk(a, ids[9:], 1)])
    np.testing.assert_array_equal(with_none, alone[3:6])
    np.testing.assert_array_equal(both, alone[11:])
    nothing, last = engine.extend([Chunk(a, ids[:2], 0), Chunk(b, ids[6:8], 2)])
    assert len(nothing) == 0
    np.testing.assert_array_equal(last, alone[6:8])
    assert (engine.length(a), engine.length(b)) == (14, 8)


def test_a_slot_taken_again_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = in_blocks(target(tmp_path), monkeypatch)
    ids = text(5)
    slot = engine.open()
    first = engine.extend([Chunk(slot, ids, 1)])[0]
    engine.close(slot)
    other = engine.open()
    engine.extend([Chunk(other, text(9, seed=1), 0)])
    engine.close(other)
    again = engine.open()
    np.testing.assert_array_equal(engine.extend([Chunk(again, ids, 1)])[0], first)
