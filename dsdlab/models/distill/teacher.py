"""The target as a batch generator and a source of final hidden states.

A plain-torch Llama forward over ragged batches: bfloat16 weights, one preallocated key/value store per
batch, sequences compacted away as they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdlab.models.distill.kernels import attend, pick
from dsdlab.models.weights_io import LlamaWeights, Matrix


@dataclass
class Layer:
    """One decoder layer; linear weights are [out, in]."""

    attn_norm: Tensor  # [d]
    qkv: Tensor  # [(heads + 2 kv) hd, d]
    o: Tensor  # [d, heads hd]
    mlp_norm: Tensor  # [d]
    gate_up: Tensor  # [2 f, d]
    down: Tensor  # [d, f]


def rotary(positions: Tensor, hd: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin tables [*positions.shape, hd] (two equal halves, Hugging Face's convention)."""
    inverse = theta ** (-torch.arange(0, hd, 2, device=positions.device, dtype=torch.float32) / hd)
    angle = positions[..., None].float() * inverse
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + hd/2) of the last axis."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


@dataclass
class Generation:
    """One finished generation: ids, where the answer starts, hidden states from `start` on."""

    ids: list[int]
    prompt_len: int
    start: int  # first position whose hidden state is kept
    hidden: Tensor  # [len(ids) - 1 - start, d] bfloat16: row i belongs to position start + i
    lse: Tensor  # [len(ids) - 1 - start] float32 logsumexp of the full logits
    temperature: float


class Teacher:
    """Llama-family target for offline use. Not exact-by-construction: speed first."""

    def __init__(
        self, weights: LlamaWeights, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        shape = weights.shape
        self.device, self.dtype = torch.device(device), dtype
        self.d, self.heads, self.kv, self.hd = (
            shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim,
        )  # fmt: skip
        self.eps, self.theta, self.vocab = shape.rms_norm_eps, shape.rope_theta, shape.vocab_size

        def dense(matrix: Matrix) -> Tensor:
            return matrix.dense(dtype).to(self.device).contiguous()

        self.embed = dense(weights.embed)  # [vocab, d]
        self.head = self.embed if weights.head is weights.embed else dense(weights.head)
        self.norm = weights.norm.to(self.device, dtype)
        self.layers = [
            Layer(
                w.attn_norm.to(self.device, dtype), dense(w.qkv), dense(w.o),
                w.mlp_norm.to(self.device, dtype), dense(w.gate_up), dense(w.down),
            )
            for w in weights.layers
        ]  # fmt: skip

    def split(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split: [*, d] to q [*, heads, hd], k and v [*, kv, hd]."""
        y = F.linear(x, weight).unflatten(-1, (self.heads + 2 * self.kv, self.hd))
        q, k, v = y.split([self.heads, self.kv, self.kv], dim=-2)
        return q, k, v

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(F.rms_norm(x, (self.d,), layer.mlp_norm, self.eps), layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def prefill(self, ids: Tensor, store: Tensor | None, rows: Tensor) -> Tensor:
        """Forward right-padded prompts [B, L]; write keys and values; return normed hidden [B, L, d].

        store: [layers, 2, slots, kv, capacity, hd] or None; rows: [B] slot of each prompt.
        """
        length = ids.shape[1]
        cos, sin = rotary(torch.arange(length, device=self.device), self.hd, self.theta, self.dtype)
        x = F.embedding(ids, self.embed)
        for i, layer in enumerate(self.layers):
            q, k, v = self.split(F.rms_norm(x, (self.d,), layer.attn_norm, self.eps), layer.qkv)
            q, k = (rotate(t.transpose(1, 2), cos, sin) for t in (q, k))
            v = v.transpose(1, 2)
            if store is not None:
                store[i, 0, rows, :, :length] = k
                store[i, 1, rows, :, :length] = v
            group = self.heads // self.kv
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer.o)
            x = self._mlp(layer, x)
        return F.rms_norm(x, (self.d,), self.norm, self.eps)

    def step(self, ids: Tensor, store: Tensor, lens: Tensor) -> Tensor:
        """Append one token to each sequence: ids [B], lens [B] int32 before the token. Hidden [B, d]."""
        cos, sin = rotary(lens, self.hd, self.theta, self.dtype)
        cos, sin = cos[:, None], sin[:, None]
        every = torch.arange(len(ids), device=self.device)
        where = lens.long()
        held = lens + 1
        x = F.embedding(ids, self.embed)
        for i, layer in enumerate(self.layers):
            q, k, v = self.split(F.rms_norm(x, (self.d,), layer.attn_norm, self.eps), layer.qkv)
            store[i, 0][every, :, where] = rotate(k, cos, sin)
            store[i, 1][every, :, where] = v
            mixed = attend(rotate(q, cos, sin), store[i, 0], store[i, 1], held)
            x = x + F.linear(mixed.flatten(1), layer.o)
            x = self._mlp(layer, x)
        return F.rms_norm(x, (self.d,), self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, d] to [*, vocab]."""
        return F.linear(hidden, self.head)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        starts: Sequence[int],
        temperatures: Sequence[float],
        max_new: int,
        stop_ids: Sequence[int],
        generator: torch.Generator,
        prefill_tokens: int = 2048,
    ) -> list[Generation]:
        """Generate one continuation per prompt; keep hidden states from each prompt's start position.

        starts[i] <= len(prompts[i]) - 1. Sequences end at a stop id (kept) or after max_new tokens.
        """
        count = len(prompts)
        first: dict[tuple[int, ...], int] = {}
        twins: dict[int, list[int]] = {}
        starts = list(starts)
        for i, prompt in enumerate(prompts):
            owner = first.setdefault(tuple(prompt), i)
            twins.setdefault(owner, [])
            if owner != i:
                twins[owner].append(i)
                starts[i] = len(prompt) - 1
        order = sorted(twins, key=lambda i: len(prompts[i]))
        capacity = max(len(p) for p in prompts) + max_new
        shape = (len(self.layers), 2, count, self.kv, capacity, self.hd)
        store = torch.zeros(shape, dtype=self.dtype, device=self.device)
        kept: list[list[Tensor]] = [[] for _ in range(count)]
        kept_lse: list[list[Tensor]] = [[] for _ in range(count)]
        last = torch.empty(count, self.d, dtype=self.dtype, device=self.device)
        at = 0
        while at < len(order):  # prompts of about equal length together
            take = 1
            while at + take < len(order) and len(prompts[order[at + take]]) * (take + 1) <= prefill_tokens:
                take += 1
            chosen = order[at : at + take]
            at += take
            longest = len(prompts[chosen[-1]])
            ids = torch.zeros(take, longest, dtype=torch.long)
            for r, i in enumerate(chosen):
                ids[r, : len(prompts[i])] = torch.tensor(prompts[i])
            hidden = self.prefill(ids.to(self.device), store, torch.tensor(chosen, device=self.device))
            for r, i in enumerate(chosen):
                for twin in twins[i]:  # further continuations of the same prompt share its prefill
                    store[:, :, twin, :, : len(prompts[i])] = store[:, :, i, :, : len(prompts[i])]
                    last[twin] = hidden[r, len(prompts[i]) - 1]
                end = len(prompts[i])
                last[i] = hidden[r, end - 1]
                if starts[i] < end - 1:
                    part = hidden[r, starts[i] : end - 1].clone()
                    kept[i].append(part.cpu())
                    cold = torch.zeros(len(part), device=self.device)
                    kept_lse[i].append(pick(self.logits(part), cold, cold)[1].cpu())
        answers: list[list[int]] = [list(p) for p in prompts]
        stops = set(stop_ids)
        alive = list(range(count))
        lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=self.device)
        warm = torch.tensor(list(temperatures), dtype=torch.float32, device=self.device)
        hidden = last
        trace: list[tuple[list[int], Tensor, Tensor]] = []
        for n in range(max_new):
            u = torch.rand(len(alive), generator=generator).to(self.device)
            tokens, lse = pick(self.logits(hidden), warm, u)
            trace.append((alive, hidden.cpu(), lse.cpu()))
            row_tokens = tokens.tolist()
            for i, token in zip(alive, row_tokens, strict=True):
                answers[i].append(token)
            if n + 1 == max_new:
                break
            going = [r for r, token in enumerate(row_tokens) if token not in stops]
            if not going:
                break
            if len(going) < len(alive):
                index = torch.tensor(going, device=self.device)
                tokens, lens, warm = tokens[index], lens[index], warm[index]
                for r, old in enumerate(going):  # compact in place: going is increasing, so old >= r
                    if r != old:
                        used = int(lens[r])
                        store[:, :, r, :, :used] = store[:, :, old, :, :used]
                alive = [alive[r] for r in going]
            hidden = self.step(tokens, store[:, :, : len(alive)], lens)
            lens = lens + 1
        for rows, states, lse in trace:
            for r, i in enumerate(rows):
                kept[i].append(states[r : r + 1])
                kept_lse[i].append(lse[r : r + 1])
        return [
            Generation(
                answers[i], len(prompts[i]), starts[i],
                torch.cat(kept[i]), torch.cat(kept_lse[i]), float(temperatures[i]),
            )
            for i in range(count)
        ]  # fmt: skip
