"""Tiny models with random weights, written to disk as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsdlab.models.base import ModelInfo
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import LlamaWeights, load_drafter_file, load_llama_dir

VOCAB = 384
CONTEXT = 768
EOS = 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "dtype": "float32",
}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Weights whose products keep the size of their inputs, so that logits are spread as real ones are."""
    return torch.randn(*shape, generator=generator) * (1.3 / shape[-1] ** 0.5)


def write_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    g = torch.Generator().manual_seed(seed)
    d, f, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    t = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], d, generator=g) * 0.3,
        "model.norm.weight": torch.rand(d, generator=g) + 0.5,
    }
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        t |= {
            f"{name}.input_layernorm.weight": torch.rand(d, generator=g) + 0.5,
            f"{name}.post_attention_layernorm.weight": torch.rand(d, generator=g) + 0.5,
            f"{name}.self_attn.q_proj.weight": _random(g, q, d),
            f"{name}.self_attn.k_proj.weight": _random(g, kv, d),
            f"{name}.self_attn.v_proj.weight": _random(g, kv, d),
            f"{name}.self_attn.o_proj.weight": _random(g, d, q),
            f"{name}.mlp.gate_proj.weight": _random(g, f, d),
            f"{name}.mlp.up_proj.weight": _random(g, f, d),
            f"{name}.mlp.down_proj.weight": _random(g, d, f),
        }
    if not config["tie_word_embeddings"]:
        t["lm_head.weight"] = _random(g, config["vocab_size"], d)
    save_file(t, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json", config["vocab_size"])
    return folder


def write_tiny_other(folder: Path, config: Any, seed: int = 0) -> Path:
    """The same for any configuration of transformers, which builds the model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    g = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "norm" not in name:
                weight.copy_(_random(g, *weight.shape))
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", VOCAB)
    return folder


def tiny_gemma() -> Any:
    """Gemma 3: layers that see the last 40 positions only, norms of queries and keys, scaled embeddings."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=4096, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def write_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(vocab_size)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(path))


def write_tiny_drafter(path: Path, seed: int = 1, n_out: int = 96, n_rows: int = 128) -> Path:
    """A drafter/1 file: int8 rows, reduced embedding (map and projection) and a reduced head."""
    g = torch.Generator().manual_seed(seed)
    d, e, f, layers, heads, kv, head_dim = 48, 32, 96, 2, 3, 1, 16
    t: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        w = _random(g, *shape)
        scale = (w.abs().amax(1) / 127).to(torch.bfloat16)
        t[f"{name}.weight"] = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        t[f"{name}.scale"] = scale

    add("embed", n_rows, e)
    add("embed.proj", d, e)
    t["embed.map"] = torch.randint(n_rows, (VOCAB,), generator=g, dtype=torch.int32)
    for i in range(layers):
        add(f"layers.{i}.attn.qkv", (heads + 2 * kv) * head_dim, d)
        add(f"layers.{i}.attn.o", d, heads * head_dim)
        add(f"layers.{i}.mlp.gate_up", 2 * f, d)
        add(f"layers.{i}.mlp.down", d, f)
        for norm in ("attn_norm", "mlp_norm"):
            t[f"layers.{i}.{norm}.weight"] = torch.rand(d, generator=g) + 0.5
    t["norm.weight"] = torch.rand(d, generator=g) + 0.5
    add("head", n_out, d)
    t["head.ids"] = torch.randperm(VOCAB, generator=g)[:n_out].sort().values.to(torch.int32)
    config = {
        "hidden_size": d,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv,
        "head_dim": head_dim,
        "intermediate_size": f,
        "vocab_size": VOCAB,
        "max_context": CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tokenizer": "tiny",
    }
    save_file(t, path, metadata={"dsdlab_format": "drafter/1", "config": json.dumps(config)})
    return path


def engine_of(
    weights: LlamaWeights,
    precision: str = "fp32",
    *,
    slots: int = 4,
    max_context: int = CONTEXT,
    exact: bool = True,
    eos_ids: tuple[int, ...] = (EOS,),
) -> TorchEngine:
    info = ModelInfo(
        model_id="tiny",
        tokenizer="tiny",
        vocab_size=weights.shape.vocab_size,
        max_context=max_context,
        eos_ids=eos_ids,
        precision=precision,
        n_params=weights.n_params,
        digest=weights.digest,
    )
    return TorchEngine(weights, info, slots=slots, exact=exact)


def tiny_target(folder: Path, precision: str = "fp32", **options: Any) -> TorchEngine:
    """The engine on a tiny Llama written to `folder`."""
    return engine_of(load_llama_dir(write_tiny_llama(folder), ""), precision, **options)


def tiny_drafter(path: Path, **options: Any) -> TorchEngine:
    """The engine on a tiny int8 drafter file with a reduced head."""
    return engine_of(load_drafter_file(write_tiny_drafter(path)), "int8", eos_ids=(), **options)
