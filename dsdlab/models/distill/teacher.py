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

from dsdlab.models.distill.kernels import READ_BLOCK, attend, pick
from dsdlab.models.weights_io import LlamaWeights, Matrix

PREFILL_TOKENS, PREFILL_TOKENS_DEVICE = 2048, 65_536  # padded prompt tokens a forward, CPU and elsewhere
LSE_ROWS = 4096  # rows of full logits at a time
CHECK_EVERY = 8  # steps between two looks, off the CPU, at which sequences have ended


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

    def step(self, ids: Tensor, store: Tensor, lens: Tensor, longest: int) -> Tensor:
        """Append one token to each sequence. ids [B]; lens [B] int32 before the token, < longest: [B, d]."""
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
            mixed = attend(rotate(q, cos, sin), store[i, 0], store[i, 1], held, longest)
            x = x + F.linear(mixed.flatten(1), layer.o)
            x = self._mlp(layer, x)
        return F.rms_norm(x, (self.d,), self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[*, d] to [*, vocab]."""
        return F.linear(hidden, self.head)

    def logsumexp(self, hidden: Tensor) -> Tensor:
        """Of the full logits: [N, d] to [N] float32, in pieces that fit in memory."""
        parts = [self.logits(part).float().logsumexp(-1) for part in hidden.split(LSE_ROWS)]
        return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)

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
    ) -> list[Generation]:
        """Generate one continuation per prompt; keep hidden states from each prompt's start position.

        starts[i] <= len(prompts[i]) - 1; of equal prompts only the first keeps states before its last token.
        Sequences end at a stop id (kept) or after max_new tokens. generator: of the CPU.
        """
        count, on_cpu = len(prompts), self.device.type == "cpu"
        capacity = -(-(max(len(p) for p in prompts) + max_new) // READ_BLOCK) * READ_BLOCK
        shape = (len(self.layers), 2, count, self.kv, capacity, self.hd)
        store = torch.zeros(shape, dtype=self.dtype, device=self.device)
        starts, last, cold = self._read(prompts, list(starts), store)
        uniform = torch.rand(max_new, count, generator=generator).to(self.device)
        lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=self.device)
        warm = torch.tensor(list(temperatures), dtype=torch.float32, device=self.device)
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=self.device)
        written = torch.full((count, max_new), -1, dtype=torch.long, device=self.device)
        states = torch.empty(count, max_new, self.d, dtype=self.dtype, device=self.device)
        lse = torch.empty(count, max_new, device=self.device)
        alive = torch.arange(count, device=self.device)
        stopped = torch.zeros(count, dtype=torch.bool, device=self.device)
        longest = max(len(p) for p in prompts)
        hidden = last
        for n in range(max_new):
            tokens, total = pick(self.logits(hidden), warm, uniform[n, alive])
            written[alive, n], states[alive, n], lse[alive, n] = tokens, hidden, total
            if n + 1 == max_new:
                break
            stopped = stopped | torch.isin(tokens, stops)
            if on_cpu or n % CHECK_EVERY == CHECK_EVERY - 1:  # elsewhere, asking waits for the device
                going = (~stopped).nonzero().squeeze(1)
                if not len(going):
                    break
                if len(going) < (1.0 if on_cpu else 0.8) * len(alive):
                    self._compact(store, going, lens)
                    tokens, lens, warm, alive = tokens[going], lens[going], warm[going], alive[going]
                    stopped = torch.zeros(len(alive), dtype=torch.bool, device=self.device)
            longest += 1
            hidden = self.step(tokens, store[:, :, : len(alive)], lens, longest)
            lens = lens + 1
        ends = torch.isin(written, stops) | (written < 0)
        first_end = torch.where(ends.any(1), ends.int().argmax(1) + 1, max_new).tolist()
        written, states, lse = written.cpu(), states.cpu(), lse.cpu()
        out = []
        for i, prompt in enumerate(prompts):
            n = first_end[i]
            before, before_lse = cold.get(i, (states[i, :0], lse[i, :0]))
            out.append(
                Generation(
                    [*prompt, *written[i, :n].tolist()], len(prompt), starts[i],
                    torch.cat([before, states[i, :n]]), torch.cat([before_lse, lse[i, :n]]),
                    float(temperatures[i]),
                )
            )  # fmt: skip
        return out

    def _compact(self, store: Tensor, going: Tensor, lens: Tensor) -> None:
        """Move the rows that go on to the front of the store, in order."""
        if self.device.type != "cpu":
            for layer in store:
                layer[:, : len(going)] = layer[:, going]
            return
        for r, old in enumerate(going.tolist()):  # `going` is increasing, so old >= r
            if r != old:
                used = int(lens[old])
                store[:, :, r, :, :used] = store[:, :, old, :, :used]

    def _read(
        self, prompts: Sequence[Sequence[int]], starts: list[int], store: Tensor
    ) -> tuple[list[int], Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Forward every different prompt once into the store.

        Returns the starts, those of later equal prompts moved to the prompt's end; the state after each
        prompt [count, d]; and by prompt the states and logsumexps from its start to before its last token.
        """
        owner: dict[tuple[int, ...], int] = {}
        twins: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            mine = owner.setdefault(tuple(prompt), i)
            twins.setdefault(mine, []).append(i)
            if mine != i:
                starts[i] = len(prompt) - 1
        order = sorted(twins, key=lambda i: len(prompts[i]))
        last = torch.empty(len(prompts), self.d, dtype=self.dtype, device=self.device)
        cold: dict[int, tuple[Tensor, Tensor]] = {}
        most = PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS_DEVICE
        at = 0
        while at < len(order):  # prompts of about equal length together
            take = 1
            while at + take < len(order) and len(prompts[order[at + take]]) * (take + 1) <= most:
                take += 1
            chosen = order[at : at + take]
            at += take
            lengths = [len(prompts[i]) for i in chosen]
            ids = torch.zeros(take, lengths[-1], dtype=torch.long)
            for r, i in enumerate(chosen):
                ids[r, : lengths[r]] = torch.tensor(prompts[i])
            hidden = self.prefill(ids.to(self.device), store, torch.tensor(chosen, device=self.device))
            for r, i in enumerate(chosen):
                for twin in twins[i][1:]:  # further continuations of the same prompt share its prefill
                    store[:, :, twin, :, : lengths[r]] = store[:, :, i, :, : lengths[r]]
            rows = [(r, twin) for r, i in enumerate(chosen) for twin in twins[i]]
            source = torch.tensor([r for r, _ in rows], device=self.device)
            ends = torch.tensor([lengths[r] - 1 for r, _ in rows], device=self.device)
            last[torch.tensor([twin for _, twin in rows], device=self.device)] = hidden[source, ends]
            wanted = [(r, i) for r, i in enumerate(chosen) if starts[i] < lengths[r] - 1]
            if wanted:
                parts = [hidden[r, starts[i] : lengths[r] - 1] for r, i in wanted]
                sizes = [len(part) for part in parts]
                flat = torch.cat(parts)
                pieces = zip(flat.cpu().split(sizes), self.logsumexp(flat).cpu().split(sizes), strict=True)
                cold.update({i: piece for (_, i), piece in zip(wanted, pieces, strict=True)})
        return starts, last, cold
