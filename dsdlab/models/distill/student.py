"""The drafter as a trainable module: initialisation from the target, int8 export, and reading it back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsdlab.models.distill.config import ShapeConfig
from dsdlab.models.distill.teacher import Teacher, rotary, rotate

FORMAT = "drafter/1"


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row symmetric int8: weight [out, in] to (int8 [out, in], bfloat16 scale [out])."""
    scale = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-8).to(torch.bfloat16)
    steps = (weight.detach().float() / scale.float()[:, None]).round().clamp(-127, 127)
    return steps.to(torch.int8), scale


def through_int8(weight: Tensor) -> Tensor:
    """The weight as the exported file will hold it; gradients pass straight through."""
    steps, scale = quantise(weight)
    return weight + (steps.float() * scale.float()[:, None] - weight).detach()


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Grouped attention: q [B, heads, L, hd], k and v [B, kv, L, hd], bias [B, 1, L, L] or None for causal.

    On a CPU two batched products and a softmax train twice as fast as the fused operator.
    """
    batch, heads, length, hd = q.shape
    kv = k.shape[1]
    if q.device.type != "cpu" or bias is None:
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    grouped = (q * hd**-0.5).reshape(batch * kv, heads // kv * length, hd)
    scores = torch.bmm(grouped, k.reshape(batch * kv, length, hd).transpose(1, 2))
    scores = scores.view(batch, heads, length, length) + bias
    weights = scores.softmax(-1, dtype=scores.dtype).view(batch * kv, -1, length)
    return torch.bmm(weights, v.reshape(batch * kv, length, hd)).view(batch, heads, length, hd)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: ShapeConfig, eps: float) -> None:
        super().__init__()
        d, f, hd = shape.hidden_size, shape.intermediate_size, shape.head_dim
        self.heads, self.kv, self.hd, self.eps = shape.num_heads, shape.num_kv_heads, hd, eps
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Parameter(torch.empty((self.heads + 2 * self.kv) * hd, d))
        self.o = nn.Parameter(torch.empty(d, self.heads * hd))
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Parameter(torch.empty(2 * f, d))
        self.down = nn.Parameter(torch.empty(d, f))
        for weight in (self.qkv, self.o, self.gate_up, self.down):
            nn.init.normal_(weight, std=0.5 / math.sqrt(weight.shape[1]))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, fake: bool) -> Tensor:
        """x: [B, L, d]; cos, sin: [1 or B, 1, L, hd]; mask: [B, 1, L, L] added to
        the scores, or None for causal."""
        cast = through_int8 if fake else (lambda w: w)
        d = x.shape[-1]
        y = F.linear(F.rms_norm(x, (d,), self.attn_norm.to(x.dtype), self.eps), cast(self.qkv))
        q, k, v = y.unflatten(-1, (self.heads + 2 * self.kv, self.hd)).split(
            [self.heads, self.kv, self.kv], dim=-2
        )
        q, k = (rotate(t.transpose(1, 2), cos, sin).to(y.dtype) for t in (q, k))
        mixed = attention(q, k, v.transpose(1, 2), mask)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), cast(self.o))
        gate, up = F.linear(
            F.rms_norm(x, (d,), self.mlp_norm.to(x.dtype), self.eps), cast(self.gate_up)
        ).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, cast(self.down))


class Student(nn.Module):
    """A small Llama over a reduced vocabulary.

    head_ids: [rows] token id of each output row; input_map: [vocab] row of each input id (rare ids share the
    row of their nearest kept neighbour). The head is tied to the embedding when `tied`.
    """

    head_ids: Tensor
    input_map: Tensor

    def __init__(
        self, shape: ShapeConfig, head_ids: Tensor, input_map: Tensor, *, theta: float, eps: float, tied: bool
    ) -> None:
        super().__init__()
        self.shape, self.theta, self.eps, self.tied = shape, theta, eps, tied
        self.register_buffer("head_ids", head_ids)
        self.register_buffer("input_map", input_map)
        self.embed = nn.Parameter(torch.randn(shape.rows, shape.hidden_size) * 0.05)
        self.blocks = nn.ModuleList(Block(shape, eps) for _ in shape.layers)
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.head = None if tied else nn.Parameter(torch.randn(shape.rows, shape.hidden_size) * 0.02)

    def body(
        self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, fake: bool = False
    ) -> Tensor:
        """ids [B, L] to normed hidden [B, L, d]; positions and mask default to those of causal text."""
        table = through_int8(self.embed) if fake else self.embed
        x = F.embedding(self.input_map[ids].long(), table)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = (
            t[:, None].to(x.dtype) for t in rotary(positions, self.shape.head_dim, self.theta, torch.float32)
        )
        for block in self.blocks:
            x = block(x, cos, sin, mask, fake)
        return F.rms_norm(x, (self.shape.hidden_size,), self.norm.to(x.dtype), self.eps)

    def rows(self, hidden: Tensor, fake: bool = False) -> Tensor:
        """[*, d] to logits over the kept rows [*, rows]."""
        table = self.embed if self.head is None else self.head
        return F.linear(hidden, through_int8(table) if fake else table)


def rank_rows(counts: Tensor, rows: int, must: Sequence[int]) -> Tensor:
    """The `rows` most frequent ids, `must` among them, most frequent first: [rows] int32."""
    ranked = counts.double()
    ties = torch.linspace(1e-9, 0, len(ranked), dtype=torch.float64)  # lower ids were merged earlier
    ranked = ranked + ties * max(1.0, float(ranked.sum()))
    ranked[list(must)] = ranked.max() + 1
    return ranked.argsort(descending=True)[:rows].to(torch.int32)


def map_inputs(embed: Tensor, head_ids: Tensor) -> Tensor:
    """Row of every input id: its own where kept, else its nearest kept neighbour by cosine. [vocab] int32."""
    unit = F.normalize(embed.float(), dim=1)
    kept = unit[head_ids.to(embed.device).long()]
    out = torch.cat([(part @ kept.t()).argmax(1) for part in unit.split(4096)]).to("cpu", torch.int32)
    out[head_ids.long()] = torch.arange(len(head_ids), dtype=torch.int32)
    return out


@torch.no_grad()
def _trace(teacher: Teacher, ids: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Mean |activation| of each MLP neuron per wanted layer, and the covariance of the residual stream."""
    length = ids.shape[1]
    cos, sin = rotary(torch.arange(length, device=teacher.device), teacher.hd, teacher.theta, teacher.dtype)
    x = F.embedding(ids.to(teacher.device), teacher.embed)
    seen: dict[int, Tensor] = {}
    cov = torch.zeros(teacher.d, teacher.d)

    def gather(x: Tensor) -> None:
        nonlocal cov
        flat = F.rms_norm(x.float(), (teacher.d,), None, teacher.eps).flatten(0, 1).cpu()
        cov += flat.t() @ flat / len(flat)

    group = teacher.heads // teacher.kv
    for i, layer in enumerate(teacher.layers):
        if i in layers:
            gather(x)
        q, k, v = teacher.split(F.rms_norm(x, (teacher.d,), layer.attn_norm, teacher.eps), layer.qkv)
        q, k = (rotate(t.transpose(1, 2), cos, sin) for t in (q, k))
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v.transpose(1, 2)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer.o)
        normed = F.rms_norm(x, (teacher.d,), layer.mlp_norm, teacher.eps)
        gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
        act = F.silu(gate) * up
        if i in layers:
            seen[i] = act.float().abs().mean((0, 1)).cpu()
        x = x + F.linear(act, layer.down)
    gather(x)
    return [seen[i] for i in layers], cov


def build(
    shape: ShapeConfig, teacher: Teacher, head_ids: Tensor, input_map: Tensor, sample: Tensor, seed: int
) -> Student:
    """A student of this shape; `sample` [B, L] is text on which neurons and directions are ranked.

    Raises ValueError where the shape cannot be started from the target.
    """
    torch.manual_seed(seed)
    same = shape.hidden_size == teacher.d
    student = Student(shape, head_ids, input_map, theta=teacher.theta, eps=teacher.eps, tied=same)
    if shape.init == "random":
        return student
    if (shape.num_heads, shape.num_kv_heads, shape.head_dim) != (teacher.heads, teacher.kv, teacher.hd):
        raise ValueError(f"shape {shape.name}: init {shape.init!r} needs the target's attention heads")
    if max(shape.layers) >= len(teacher.layers):
        raise ValueError(f"shape {shape.name}: layers = {shape.layers}: the target has {len(teacher.layers)}")
    if shape.init == "layers" and not same:
        raise ValueError(f"shape {shape.name}: init 'layers' needs hidden_size = {teacher.d}; use 'slice'")
    loud, cov = _trace(teacher, sample, shape.layers)
    d, f = shape.hidden_size, min(shape.intermediate_size, teacher.layers[0].down.shape[1])
    basis = torch.eye(teacher.d)
    if not same:
        basis = torch.linalg.eigh(cov.double())[1].flip(1)[:, :d].float()
    widen = math.sqrt(teacher.d / d)  # the norm of a slice is taken over fewer entries
    rows = head_ids.long()
    with torch.no_grad():
        table = teacher.embed[rows].float().cpu()
        student.embed.copy_(table @ basis)
        if student.head is not None:
            head = teacher.head[rows].float().cpu() * teacher.norm.float().cpu()
            student.head.copy_(head @ basis * widen)
        else:
            student.norm.copy_(teacher.norm.float().cpu())
        for block, index, loudness in zip(student.blocks, shape.layers, loud, strict=True):
            assert isinstance(block, Block)
            layer = teacher.layers[index]
            down = layer.down.float().cpu()
            keep = (loudness * down.norm(dim=0)).argsort(descending=True)[:f].sort().values
            gate, up = layer.gate_up.float().cpu().chunk(2)
            attn_norm, mlp_norm = layer.attn_norm.float().cpu(), layer.mlp_norm.float().cpu()
            width = shape.intermediate_size
            if same:
                block.attn_norm.copy_(attn_norm)
                block.mlp_norm.copy_(mlp_norm)
                attn_norm, mlp_norm = torch.ones_like(attn_norm), torch.ones_like(mlp_norm)
            block.qkv.copy_(layer.qkv.float().cpu() * attn_norm @ basis * widen)
            block.o.copy_(basis.t() @ layer.o.float().cpu())
            block.gate_up[:f] = gate[keep] * mlp_norm @ basis * widen
            block.gate_up[width : width + f] = up[keep] * mlp_norm @ basis * widen
            block.down[:, :f] = basis.t() @ down[:, keep]
    return student


def trim(student: Student, rows: int, counts: Tensor, embed: Tensor) -> Student:
    """Keep the `rows` most frequent output rows (counts [vocab]; embed: the target's, [vocab, d])."""
    if rows >= len(student.head_ids):
        return student
    ranked = counts[student.head_ids.long()].argsort(descending=True)[:rows]
    head_ids = student.head_ids[ranked]
    shape = student.shape.model_copy(update={"rows": rows})
    out = Student(
        shape, head_ids, map_inputs(embed, head_ids), theta=student.theta, eps=student.eps, tied=student.tied
    )
    state = {k: v for k, v in student.state_dict().items() if k not in ("head_ids", "input_map")}
    for name in ("embed", "head"):
        if name in state:
            state[name] = state[name][ranked]
    out.load_state_dict(state, strict=False)
    return out


def export(
    student: Student, path: Path, *, vocab: int, base: str, tokenizer: str, recipe: dict[str, Any]
) -> int:
    """Write the drafter as int8 rows in one safetensors file; returns its size in bytes."""
    shape = student.shape
    tensors: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor) -> None:
        tensors[name + ".weight"], tensors[name + ".scale"] = quantise(weight.cpu())

    put("embed", student.embed)
    tensors["embed.map"] = student.input_map.cpu().to(torch.int32).contiguous()
    tensors["head.ids"] = student.head_ids.cpu().to(torch.int32).contiguous()
    if student.head is not None:
        put("head", student.head)
    for i, block in enumerate(student.blocks):
        assert isinstance(block, Block)
        put(f"layers.{i}.attn.qkv", block.qkv)
        put(f"layers.{i}.attn.o", block.o)
        put(f"layers.{i}.mlp.gate_up", block.gate_up)
        put(f"layers.{i}.mlp.down", block.down)
        tensors[f"layers.{i}.attn_norm.weight"] = block.attn_norm.detach().cpu().to(torch.bfloat16)
        tensors[f"layers.{i}.mlp_norm.weight"] = block.mlp_norm.detach().cpu().to(torch.bfloat16)
    tensors["norm.weight"] = student.norm.detach().cpu().to(torch.bfloat16)
    config = {
        "architecture": "llama",
        "hidden_size": shape.hidden_size,
        "num_layers": len(shape.layers),
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rope_theta": student.theta,
        "rms_norm_eps": student.eps,
        "max_context": 8192,
        "vocab_size": vocab,
        "tokenizer": tokenizer,
        "base": base,
        "recipe": recipe,
    }
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, part, metadata={"dsdlab_format": FORMAT, "config": json.dumps(config, sort_keys=True)})
    part.replace(path)
    return path.stat().st_size


def load_exported(path: Path) -> tuple[Student, dict[str, Any]]:
    """Read an exported drafter back as a Student of the dequantised rows. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path}: no such drafter file")
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("dsdlab_format") != FORMAT:
            raise ValueError(f"{path}: dsdlab_format = {meta.get('dsdlab_format')!r}: expected {FORMAT!r}")
        config = json.loads(meta["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tied = "head.weight" not in tensors
    shape = ShapeConfig(
        name=config.get("recipe", {}).get("shape", "exported"),
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=list(range(config["num_layers"])),
        num_heads=config["num_heads"],
        num_kv_heads=config["num_kv_heads"],
        head_dim=config["head_dim"],
        rows=len(tensors["head.ids"]),
    )
    student = Student(
        shape, tensors["head.ids"], tensors["embed.map"],
        theta=config["rope_theta"], eps=config["rms_norm_eps"], tied=tied,
    )  # fmt: skip

    def get(name: str) -> Tensor:
        weight: Tensor = tensors[name + ".weight"].float() * tensors[name + ".scale"].float()[:, None]
        return weight

    with torch.no_grad():
        student.embed.copy_(get("embed"))
        student.norm.copy_(tensors["norm.weight"].float())
        if student.head is not None:
            student.head.copy_(get("head"))
        for i, block in enumerate(student.blocks):
            assert isinstance(block, Block)
            for name, weight in (("attn.qkv", block.qkv), ("attn.o", block.o)):
                weight.copy_(get(f"layers.{i}.{name}"))
            for name, weight in (("mlp.gate_up", block.gate_up), ("mlp.down", block.down)):
                weight.copy_(get(f"layers.{i}.{name}"))
            block.attn_norm.copy_(tensors[f"layers.{i}.attn_norm.weight"].float())
            block.mlp_norm.copy_(tensors[f"layers.{i}.mlp_norm.weight"].float())
    return student, config
