"""Models that are no Llama, through the hf engine: exact, and the same as transformers says; or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS, VOCAB, tiny_gemma, write_tiny_other

from dsdlab.models.base import Chunk, Engine, ModelError
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.selftest import selftest

N = 200
TEXT = np.random.default_rng(0).integers(0, VOCAB, N).tolist()
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": EOS, "bos_token_id": 1}


def configuration(kind: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, kind)(**fields)

    return make


def seeing() -> Any:
    """Gemma 3 from 4 B on: a language model inside one that also sees."""
    from transformers import Gemma3Config

    sight = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return Gemma3Config(text_config=tiny_gemma().to_dict(), vision_config=sight)


RUN = {
    "gemma3": tiny_gemma,
    "gemma3 that sees": seeing,
    "gemma2, capped logits": configuration("Gemma2Config", **COMMON, head_dim=16, sliding_window=40),
    "qwen2, biased": configuration("Qwen2Config", **COMMON),
    "gpt2, learnt positions": configuration("GPT2Config", **GPT2),
}


def load(folder: Path, precision: str) -> Engine:
    options = EngineOptions(precision=precision, device="cpu", slots=2, max_context=300)
    return load_engine(f"hf:{folder}", options)


@pytest.mark.parametrize("kind", RUN)
def test_an_architecture(tmp_path: Path, kind: str) -> None:
    """The same bits however computed, also beyond a sliding window; and what transformers says at once."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_other(tmp_path, RUN[kind]())
    result = selftest(load(folder, "bf16"))
    assert result.exact, result
    assert "depths up to 256" in result.what
    engine = load(folder, "fp32")
    assert engine.info.vocab_size == VOCAB
    slot = engine.open()
    rows = []
    for start in range(0, N, 13):
        rows += engine.extend([Chunk(slot, TEXT[start : start + 13], len(TEXT[start : start + 13]))])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(rows), expected, rtol=2e-4, atol=2e-4)


CONV = configuration("Lfm2Config", **COMMON, layer_types=["conv", "full_attention"])
MAMBA = configuration("MambaConfig", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2)


@pytest.mark.parametrize(("make", "what"), [(CONV, r"\(conv\)"), (MAMBA, "")])
def test_what_cannot_be_rolled_back_is_refused(tmp_path: Path, make: Callable[[], Any], what: str) -> None:
    folder = write_tiny_other(tmp_path, make())
    with pytest.raises(ModelError, match=f"has layers whose state cannot be rolled back .*{what}") as e:
        load(folder, "bf16")
    assert str(folder) in str(e.value)
    assert "\n" not in str(e.value)


def test_gemma_is_refused_by_the_torch_engine(tmp_path: Path) -> None:
    folder = write_tiny_other(tmp_path, tiny_gemma())
    with pytest.raises(
        ModelError, match="architecture Gemma3ForCausalLM is not Llama-family; use the hf: engine"
    ):
        load_engine(str(folder), EngineOptions(device="cpu"))
