"""Weights of Llama-family models as the torch engine wants them: fused, named by role."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsdlab.models.base import ModelError

DRAFTER_FORMAT = "drafter/1"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers that fix a Llama-family architecture."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out, in]: floating point, or int8 rows with one bf16 scale [out] each."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight itself in `dtype` [out, in]."""
        if self.scale is None:
            return self.weight.to(dtype)
        return (self.weight.to(torch.float32) * self.scale.to(torch.float32)[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attn_norm: torch.Tensor  # [d]
    qkv: Matrix  # [(heads + 2 kv_heads) * head_dim, d]
    o: Matrix  # [d, heads * head_dim]
    mlp_norm: torch.Tensor  # [d]
    gate_up: Matrix  # [2 * intermediate, d]
    down: Matrix  # [d, intermediate]


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole model. `head_ids` names the token of each output row; None means all, in order."""

    shape: LlamaShape
    embed: Matrix  # [rows, e]
    embed_map: torch.Tensor | None  # int [vocab]: token id → row
    embed_proj: Matrix | None  # [d, e]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [d]
    head: Matrix  # [n_out, d]
    head_ids: torch.Tensor | None  # int [n_out]
    digest: str = ""
    tokenizer: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def n_params(self) -> int:
        matrices = [self.embed, *([self.embed_proj] if self.embed_proj else [])]
        matrices += [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if self.head is not self.embed:
            matrices.append(self.head)
        return sum(m.weight.numel() for m in matrices)


def file_digest(paths: list[Path]) -> str:
    """SHA-256 over the files' contents, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _tensors(paths: list[Path]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                    out[name] = f.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise ModelError(f"weights file {path} cannot be read: {e}") from None
    return out


def llama_shape(config: dict[str, Any], where: Path) -> LlamaShape:
    """The shape from a Hugging Face config.json. Raises ModelError naming what is not supported."""
    kind = (config.get("architectures") or ["?"])[0]
    if kind != "LlamaForCausalLM":
        raise ModelError(f"{where}: architecture {kind} is not Llama-family; use the hf: engine for it")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelError(f"{where}: scaled rotary embeddings are not supported here; use the hf: engine")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ModelError(f"{where}: biased linears are not supported here; use the hf: engine")
    if (act := config.get("hidden_act") or "silu") != "silu":
        raise ModelError(f"{where}: activation {act} is not supported here; use the hf: engine")
    heads = config["num_attention_heads"]
    return LlamaShape(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_context=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rms_norm_eps=float(config["rms_norm_eps"]),
    )


def load_llama_dir(folder: Path, digest: str) -> LlamaWeights:
    """A Hugging Face folder (config.json and *.safetensors) of a Llama-family model."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {e}") from None
    try:
        shape = llama_shape(config, folder)
    except KeyError as e:
        raise ModelError(f"{folder / 'config.json'}: {e.args[0]} is missing") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors file")
    t = _tensors(files)

    def get(name: str) -> torch.Tensor:
        if name not in t:
            raise ModelError(f"{folder}: tensor {name} is missing")
        return t[name]

    def fused(i: int, *names: str) -> Matrix:
        return Matrix(torch.cat([get(f"model.layers.{i}.{n}.weight") for n in names]))

    layers = [
        LayerWeights(
            attn_norm=get(f"model.layers.{i}.input_layernorm.weight"),
            qkv=fused(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=fused(i, "self_attn.o_proj"),
            mlp_norm=get(f"model.layers.{i}.post_attention_layernorm.weight"),
            gate_up=fused(i, "mlp.gate_proj", "mlp.up_proj"),
            down=fused(i, "mlp.down_proj"),
        )
        for i in range(shape.num_layers)
    ]
    embed = Matrix(get("model.embed_tokens.weight"))
    head = Matrix(t["lm_head.weight"]) if "lm_head.weight" in t else embed
    return LlamaWeights(
        shape=shape,
        embed=embed,
        embed_map=None,
        embed_proj=None,
        layers=layers,
        norm=get("model.norm.weight"),
        head=head,
        head_ids=None,
        digest=digest,
    )


def load_drafter_file(path: Path) -> LlamaWeights:
    """A distilled drafter: one safetensors file, int8 rows with bf16 scales, its config in the header."""
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise ModelError(f"weights file {path} cannot be read: {e}") from None
    if header.get("dsdlab_format") != DRAFTER_FORMAT:
        raise ModelError(
            f"{path} is format {header.get('dsdlab_format')!r}; this version reads {DRAFTER_FORMAT}"
        )
    try:
        return _drafter_weights(path, json.loads(header["config"]))
    except KeyError as e:
        raise ModelError(f"{path}: {e.args[0]} is missing") from None
    except ValueError as e:
        raise ModelError(f"{path}: its config cannot be read: {e}") from None


def _drafter_weights(path: Path, config: dict[str, Any]) -> LlamaWeights:
    """Raises KeyError, ModelError."""
    t = _tensors([path])

    def matrix(name: str) -> Matrix:
        if f"{name}.weight" not in t or f"{name}.scale" not in t:
            raise ModelError(f"{path}: tensor {name}.weight or {name}.scale is missing")
        return Matrix(t[f"{name}.weight"], t[f"{name}.scale"])

    shape = LlamaShape(**{k: config[k] for k in LlamaShape.__dataclass_fields__})
    embed = matrix("embed")
    head_ids = t.get("head.ids")
    if "head.weight" in t:
        head = matrix("head")
    else:
        n_out = shape.vocab_size if head_ids is None else head_ids.numel()
        assert embed.scale is not None
        head = Matrix(embed.weight[:n_out], embed.scale[:n_out])
    return LlamaWeights(
        shape=shape,
        embed=embed,
        embed_map=t.get("embed.map"),
        embed_proj=matrix("embed.proj") if "embed.proj.weight" in t else None,
        layers=[
            LayerWeights(
                attn_norm=t[f"layers.{i}.attn_norm.weight"],
                qkv=matrix(f"layers.{i}.attn.qkv"),
                o=matrix(f"layers.{i}.attn.o"),
                mlp_norm=t[f"layers.{i}.mlp_norm.weight"],
                gate_up=matrix(f"layers.{i}.mlp.gate_up"),
                down=matrix(f"layers.{i}.mlp.down"),
            )
            for i in range(shape.num_layers)
        ],
        norm=t["norm.weight"],
        head=head,
        head_ids=head_ids,
        digest=file_digest([path]),
        tokenizer=config.get("tokenizer", ""),
        meta=config,
    )
