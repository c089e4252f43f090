"""From names and files to engines; what is wrong with a file is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIG, VOCAB, write_tiny_drafter, write_tiny_llama

from dsdlab.models.base import Chunk, ModelError
from dsdlab.models.drafters import load_drafter
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer, resolve_device
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import DRAFTER_FORMAT, load_drafter_file, load_llama_dir
from dsdlab.models.zoo import default_precision
from dsdlab.scenario_parts import Models

CPU = EngineOptions(device="cpu", slots=1)


def test_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    engine = load_engine(str(folder), CPU)
    assert isinstance(engine, TorchEngine)
    info = engine.info
    assert (info.vocab_size, info.eos_ids, info.max_context, info.precision) == (VOCAB, (2,), 2048, "bf16")
    again = load_engine(str(folder), EngineOptions("fp32", "cpu", 1, 100_000))
    assert again.info.max_context == 4096  # cut to what the model was made for
    assert again.info.digest == info.digest  # of the file, whatever the precision
    assert again.info.tokenizer == info.tokenizer
    assert again.extend([Chunk(again.open(), [1, 2], 2)])[0].shape == (2, VOCAB)


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    before = load_engine(str(folder), CPU).info.digest
    write_tiny_llama(tmp_path, seed=1)
    assert load_engine(str(folder), CPU).info.digest != before


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 7], (2, 7)), (None, ())])
def test_end_of_sequence_ids(tmp_path: Path, eos: object, expected: tuple[int, ...]) -> None:
    folder = write_tiny_llama(tmp_path, eos_token_id=eos)
    assert load_engine(str(folder), CPU).info.eos_ids == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not Llama-family"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "scaled rotary embeddings"),
        ({"attention_bias": True}, "biased linears"),
        ({"mlp_bias": True}, "biased linears"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ],
)
def test_what_the_torch_engine_does_not_support(tmp_path: Path, changes: dict, reason: str) -> None:  # type: ignore[type-arg]
    write_tiny_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ModelError, match=reason) as e:
        load_engine(str(tmp_path), CPU)
    assert "hf:" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_named_model_of_another_architecture_is_refused_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSDLAB_CACHE", str(tmp_path / "cache"))
    for load in (lambda n: load_engine(n, CPU), load_tokenizer, lambda n: load_drafter(n, CPU)):
        with pytest.raises(ModelError) as e:
            load("gemma3-270m")
        assert str(e.value) == (
            "model 'gemma3-270m': architecture Gemma3ForCausalLM is not Llama-family; use hf:gemma3-270m"
        )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ModelError, match=r"unknown model 'gemma3'; allowed: .*, hf:gemma3-270m, "):
        load_engine("gemma3", CPU)


def without(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'), "is missing"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda f: broken(f / "model.safetensors"), "cannot be read"),
        (lambda f: without(f / "model.safetensors", "model.norm.weight"), "model.norm.weight is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), r"tokenizer\.json"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    write_tiny_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=reason) as e:
        load_engine(str(tmp_path), CPU)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_fused_weights_are_the_parts(tmp_path: Path) -> None:
    weights = load_llama_dir(write_tiny_llama(tmp_path), "")
    t = load_file(tmp_path / "model.safetensors")
    for i, layer in enumerate(weights.layers):
        parts = [t[f"model.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkv"]
        assert torch.equal(layer.qkv.weight, torch.cat(parts))
        parts = [t[f"model.layers.{i}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        assert torch.equal(layer.gate_up.weight, torch.cat(parts))
    assert weights.head is weights.embed
    assert weights.n_params == sum(v.numel() for k, v in t.items() if "norm" not in k)


# drafter files -----------------------------------------------------------------------------------


def rewritten(path: Path, config: str | None = None, form: str = DRAFTER_FORMAT, drop: str = "") -> Path:
    tensors = load_file(path)
    tensors.pop(drop, None)
    if config is None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as f:
            config = f.metadata()["config"]
    save_file(tensors, path, metadata={"dsdlab_format": form, "config": config})
    return path


def test_a_drafter_file(tmp_path: Path) -> None:
    weights = load_drafter_file(write_tiny_drafter(tmp_path / "d.safetensors"))
    assert weights.head_ids is not None
    assert weights.head.weight.shape == (len(weights.head_ids), weights.shape.hidden_size)
    assert weights.head.weight.dtype == torch.int8
    assert weights.tokenizer == "tiny"
    assert len(weights.digest) == 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"form": "drafter/9"}, "is format 'drafter/9'; this version reads drafter/1"),
        ({"config": "{}"}, "hidden_size is missing"),
        ({"config": "{"}, "its config cannot be read"),
        ({"drop": "norm.weight"}, "norm.weight is missing"),
        ({"drop": "embed.scale"}, "tensor embed.weight or embed.scale is missing"),
        ({"drop": "layers.1.attn.qkv.weight"}, "layers.1.attn.qkv.weight"),
        ({"drop": "layers.0.mlp_norm.weight"}, "layers.0.mlp_norm.weight is missing"),
    ],
)
def test_a_damaged_drafter_file_is_one_line(tmp_path: Path, changes: dict, reason: str) -> None:  # type: ignore[type-arg]
    path = rewritten(write_tiny_drafter(tmp_path / "d.safetensors"), **changes)
    with pytest.raises(ModelError, match=reason) as e:
        load_engine(str(path), CPU)
    assert "d.safetensors" in str(e.value)
    assert "\n" not in str(e.value)


def test_no_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    path.write_text("not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        load_engine(str(path), CPU)


# devices and tokenizers --------------------------------------------------------------------------


def test_devices() -> None:
    with pytest.raises(ModelError, match="device is 'tpu'; allowed: auto, cpu, cuda"):
        resolve_device("tpu")
    assert resolve_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("auto") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(ModelError, match="torch sees no CUDA GPU; allowed here: cpu"):
            resolve_device("cuda")


def test_tokenizers_are_told_apart(tmp_path: Path) -> None:
    names = [str(write_tiny_llama(tmp_path / f"{n}", vocab_size=n)) for n in (384, 320)]
    prints = [load_tokenizer(n) for n in [names[0], *names]]
    fingerprints = [t.fingerprint for t in prints if t is not None]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert load_tokenizer("emulated:alpha=1") is None


def test_the_precision_that_is_taken_unless_told() -> None:
    """The default target's weights were published in 4 bits; nobody else's are rounded unasked."""
    assert Models().precision == "int4"
    assert Models(precision="bf16").precision == "bf16"
    assert Models(target="hf:gemma3-270m").precision == "bf16"
    assert Models(target="some/folder").precision == "bf16"
    assert default_precision("smollm2-135m-instruct") == "int4"
