"""llama.cpp as an engine: what is refused without it; with it, sessions of the real model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from dsdlab.models.base import Chunk, ContextFull, ModelError, NoFreeSlot
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.zoo import default_precision

NAME = "llama:smollm2-135m-instruct"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModelError, match=r"llama.cpp is not here; pip install 'dsdlab\[llama\]'"):
        load_engine(NAME, EngineOptions(precision="gguf"))


def test_what_it_takes(tmp_path: Path) -> None:
    assert default_precision(NAME) == "gguf"
    with pytest.raises(ModelError, match="precision is 'bf16'; the llama engine allows: gguf"):
        load_engine(NAME, EngineOptions(precision="bf16"))
    with pytest.raises(ModelError, match="precision is 'gguf'; allowed: bf16, fp32, int4, int8"):
        load_engine("smollm2-135m-instruct", EngineOptions(precision="gguf"))
    if importlib.util.find_spec("llama_cpp"):
        with pytest.raises(ModelError, match=r"allowed: llama: and one of .*, or a \.gguf file"):
            load_engine(f"llama:{tmp_path}", EngineOptions(precision="gguf"))


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="an optional extra, built on demand"
)
def test_sessions_of_the_real_model() -> None:
    """Windows, rollbacks and batches find what a plain reading finds, as near as llama.cpp's kernels are."""
    engine = load_engine(NAME, EngineOptions(precision="gguf", slots=2, max_context=128))
    ids = np.random.default_rng(1).integers(3, 40_000, 60).tolist()
    one, other = engine.open(), engine.open()
    with pytest.raises(NoFreeSlot):
        engine.open()
    whole = engine.extend([Chunk(one, ids, len(ids))])[0]
    assert whole.shape == (60, engine.info.vocab_size)
    engine.rollback(one, 20)
    again, beside = engine.extend([Chunk(one, ids[20:33], 5), Chunk(other, ids[:9], 9)])
    assert (engine.length(one), engine.length(other)) == (33, 9)
    for got, expected in ((again, whole[28:33]), (beside, whole[:9])):
        assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
        assert (got.argmax(1) == expected.argmax(1)).mean() > 0.7
    assert engine.extend([Chunk(other, [5], 0)])[0].shape == (0, engine.info.vocab_size)
    with pytest.raises(ContextFull):
        engine.extend([Chunk(one, ids * 2, 1)])
    engine.close(one)
    engine.close(one)
    third = engine.open()
    fresh = engine.extend([Chunk(third, ids[:9], 9)])[0]
    assert np.abs(fresh - whole[:9]).max() < 0.05 * np.abs(whole).max()
