"""The torch engine: Llama-family models with static KV slots and row-invariant arithmetic.

Exactness. A row's logits must not depend on how many rows are computed with it, or a near-tie would
flip a token and the output would depend on the window. So every kernel here runs in a shape regime in
which a row's bits are independent of the other rows: linears on at least `fewest` rows (a library may
sum a single row in other steps), attention with a fixed count of query rows per block, or for a lone row
LONE_QUERIES heads, over a padded cache whose visible length follows from the row's position, everything
else elementwise or row-wise. On CUDA `dsdlab.models.blocks` runs the same model recorded, its attention
row by row. `dsdlab.models.selftest` proves it on the processor at hand. docs/exactness.md has the
measurements behind the choices.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dsdlab.models.base import Chunk, ContextFull, Logits, ModelError, ModelInfo, SlotEngine
from dsdlab.models.linears import Linear, Tally, linear, packs
from dsdlab.models.weights_io import LlamaWeights

if TYPE_CHECKING:
    from dsdlab.models.blocks import BlockForward

log = logging.getLogger("dsdlab.models")
PRECISIONS = ("bf16", "fp32", "int4", "int8")
QUERY_BLOCK = 4  # attention query rows per block, CPU
LONE_QUERIES = 4  # query rows from which on attention sums each in the same steps, CPU
KV_BLOCK = 64  # the visible cache grows in steps of this many positions
FP32_BLOCK = 8  # rows of every forward in fp32 on a CPU whose library takes no packed weights
CUDA_BLOCK = 16  # rows of every forward on CUDA: one shape, one kernel choice
HEAD_OF = {"int4": "int8"}  # precisions whose head is of another: in 4 bits it moves the output most
PREFILL_ROWS = 256  # longest forward; longer chunks are split


class _Layer:
    """The kernels of one transformer layer."""

    def __init__(
        self, weights: LlamaWeights, i: int, precision: str, device: torch.device, tally: Tally
    ) -> None:
        w = weights.layers[i]
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.attn_norm = w.attn_norm.to(device, dtype)
        self.mlp_norm = w.mlp_norm.to(device, dtype)
        self.qkv = linear(w.qkv, precision, device, tally)
        self.o = linear(w.o, precision, device, tally)
        self.gate_up = linear(w.gate_up, precision, device, tally)
        self.down = linear(w.down, precision, device, tally)


class TorchEngine(SlotEngine):
    """A Llama-family model on CPU or CUDA.

    slots: sessions it can hold; max_context: positions per session (at most the model's).
    exact=False takes what is fastest instead, the baseline that exactness is priced against: as many rows as
    there are, all queries of a run in one block, and no more of the cache than they see.
    """

    _blocks: BlockForward | None

    def __init__(
        self,
        weights: LlamaWeights,
        info: ModelInfo,
        *,
        slots: int = 8,
        device: str = "cpu",
        exact: bool = True,
    ) -> None:
        if info.precision not in PRECISIONS:
            raise ModelError(f"precision is {info.precision!r}; allowed: {', '.join(PRECISIONS)}")
        self.info = info
        self.output_ids = None if weights.head_ids is None else weights.head_ids.numpy().astype(np.int64)
        self._shape = shape = weights.shape
        self._device = torch.device(device)
        self._dtype = torch.float32 if info.precision == "fp32" else torch.bfloat16
        self._choose_shapes(exact)
        self._begin_slots(slots)

        with torch.inference_mode():
            embed = weights.embed.dense(self._dtype).to(self._device)
            self._embed = (
                embed if weights.embed_map is None else embed[weights.embed_map.to(self._device).long()]
            )
            self._embed_proj = (
                None
                if weights.embed_proj is None
                else linear(weights.embed_proj, info.precision, self._device)
            )
            self.int4 = Tally()  # of the layers; the head is int8
            self._layers = [
                _Layer(weights, i, info.precision, self._device, self.int4) for i in range(shape.num_layers)
            ]
            self._norm = weights.norm.to(self._device, self._dtype)
            self._head = linear(weights.head, HEAD_OF.get(info.precision, info.precision), self._device)
            self._cos, self._sin = self._rotary_tables(info.max_context)
            self._seen = torch.zeros(info.max_context + KV_BLOCK, dtype=self._dtype, device=self._device)
            self._seen[info.max_context :] = float("-inf")  # any row's mask is a part of it
        if exact and self._device.type == "cuda":
            self._blocks = self._recorded(slots)

    def _recorded(self, slots: int) -> BlockForward | None:
        """The forward as a graph; None, with a warning, where its kernels cannot be compiled.

        Raises ModelError where the sessions' cache does not fit.
        """
        try:
            return self._in_blocks(slots)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"{self.info.model_id}: no memory on the GPU for {slots} sessions of {self.info.max_context} "
                "positions; allowed: fewer slots, a smaller max_context"
            ) from None
        except Exception as error:  # whatever Triton raises without a compiler, or for this GPU
            log.warning("slow: the forward is not recorded: %s", str(error).partition("\n")[0])
            return None

    def _in_blocks(self, slots: int) -> BlockForward:
        """The same model over recorded blocks of rows, with a cache of its own."""
        from dsdlab.models.blocks import BlockForward

        return BlockForward(
            rows=CUDA_BLOCK,
            slots=slots,
            kv_heads=self._shape.num_kv_heads,
            eps=self._shape.rms_norm_eps,
            embed=self._embed,
            embed_proj=self._embed_proj,
            layers=self._layers,
            norm=self._norm,
            head=self._head,
            tables=(self._cos[:, 0], self._sin[:, 0]),
        )

    def _choose_shapes(self, exact: bool) -> None:
        """Rows of a forward, queries of a block, query heads of a lone row (0: it fills a block)."""
        self._exact, self._lone = exact, 0
        self._blocks = None
        if not exact:
            self._min_rows, self._max_rows, self._query_block, self._lone = 1, PREFILL_ROWS, 0, 1
        elif self._device.type == "cuda":
            self._min_rows = self._max_rows = self._query_block = CUDA_BLOCK
        elif self.info.precision == "fp32" and not packs("fp32"):  # threads split products by their rows
            self._min_rows = self._max_rows = self._query_block = FP32_BLOCK
        else:
            self._min_rows, self._max_rows, self._query_block = 1, PREFILL_ROWS, QUERY_BLOCK
            group = self._shape.num_heads // self._shape.num_kv_heads
            if group + self._shape.num_kv_heads >= LONE_QUERIES:  # its last group finds as many heads
                self._lone = LONE_QUERIES

    def _begin_slots(self, slots: int) -> None:
        super()._begin_slots(slots)
        self._kv: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def inexact_twin(self) -> TorchEngine:
        """What `exact=False` gives, over the very same weights in memory: where they lie costs time too."""
        twin = copy.copy(self)
        twin._choose_shapes(False)
        twin._begin_slots(self._slots)
        return twin

    def _rotary_tables(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, [n, 1, head_dim]; the sign makes rotate_half a plain roll."""
        half = self._shape.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float32) / half
        angles = torch.arange(n, dtype=torch.float32)[:, None] / self._shape.rope_theta**exponents
        cos = torch.cat([angles.cos(), angles.cos()], dim=1)
        sin = torch.cat([-angles.sin(), angles.sin()], dim=1)
        return (
            cos[:, None].to(self._device, self._dtype),
            sin[:, None].to(self._device, self._dtype),
        )

    # sessions ------------------------------------------------------------------------------------

    def open(self) -> int:
        slot = super().open()
        if slot not in self._kv and self._blocks is None:
            s = self._shape
            size = (s.num_layers, 2, s.num_kv_heads, self.info.max_context, s.head_dim)
            # zeros, not empty: masked positions meet probability 0, and 0 · NaN is NaN
            cache = torch.zeros(size, dtype=self._dtype, device=self._device)
            self._kv[slot] = [(cache[i, 0], cache[i, 1]) for i in range(s.num_layers)]
        return slot

    # compute -------------------------------------------------------------------------------------

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        for c in chunks:
            if self._length[c.slot] + len(c.ids) > self.info.max_context:
                raise ContextFull(
                    f"{self._length[c.slot] + len(c.ids)} positions; {self.info.model_id} is loaded for "
                    f"{self.info.max_context}"
                )
        wanted: list[list[torch.Tensor]] = [[] for _ in chunks]
        with torch.inference_mode():
            for part in self._parts(chunks):
                logits = self._forward([(c, ids, rows) for c, ids, rows, _ in part])
                for (_, _, _, index), block in zip(part, logits, strict=True):
                    if block.shape[0]:
                        wanted[index].append(block)
        width = self._embed.shape[0] if self.output_ids is None else len(self.output_ids)
        empty = np.zeros((0, width), dtype=np.float32)
        return [_joined(blocks) if blocks else empty for blocks in wanted]

    def _parts(self, chunks: Sequence[Chunk]) -> list[list[tuple[int, list[int], int, int]]]:
        """Split ragged chunks into forwards of at most `_max_rows` rows: (slot, ids, rows, chunk index)."""
        parts: list[list[tuple[int, list[int], int, int]]] = [[]]
        used = 0
        for index, c in enumerate(chunks):
            start, n = 0, len(c.ids)
            while start < n:
                if used == self._max_rows:
                    parts.append([])
                    used = 0
                take = min(n - start, self._max_rows - used)
                end = start + take
                rows = max(0, end - max(start, n - c.rows))
                parts[-1].append((c.slot, list(c.ids[start:end]), rows, index))
                used += take
                start = end
        return parts if parts[0] else []

    def _forward(self, part: list[tuple[int, list[int], int]]) -> list[torch.Tensor]:
        """One forward over ragged rows; logits [rows, n_out] in float32 on the host, per entry."""
        shape, device = self._shape, self._device
        ids: list[int] = []
        positions: list[int] = []
        for slot, chunk_ids, _ in part:
            start = self._length[slot]
            ids += chunk_ids
            positions += range(start, start + len(chunk_ids))
        n = len(ids)
        if self._blocks is not None:
            return self._block(self._blocks, part, ids, positions)
        pad = max(0, self._min_rows - n)
        index = torch.tensor([ids + [0] * pad, positions + [0] * pad], device=device)
        cos, sin = self._cos[index[1]], self._sin[index[1]]  # [R, 1, head_dim]
        x = F.embedding(index[0], self._embed)  # [R, e]
        if self._embed_proj is not None:
            x = self._product(self._embed_proj, x)  # [R, d]
        plans = self._attention_plans(part)
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        d, eps = (shape.hidden_size,), shape.rms_norm_eps
        padding = [x.new_zeros(pad, heads * head_dim)] if pad else []
        for i, layer in enumerate(self._layers):
            qkv = self._product(layer.qkv, F.rms_norm(x, d, layer.attn_norm, eps))
            qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
            qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
            qk = torch.addcmul(qk * cos, qk.roll(head_dim // 2, dims=-1), sin)  # rotary
            out = []
            for slot, row, count, start, visible, mask in plans:
                k_cache, v_cache = self._kv[slot][i]  # [kv_heads, context, head_dim]
                rows = slice(row, row + count)
                k_cache[:, start : start + count] = qk[rows, heads:].transpose(0, 1)
                v_cache[:, start : start + count] = v[rows].transpose(0, 1)
                out.append(self._attend(qk[rows, :heads], k_cache[:, :visible], v_cache[:, :visible], mask))
            out += padding
            x = x + self._product(layer.o, out[0] if len(out) == 1 else torch.cat(out))
            gate, up = self._product(layer.gate_up, F.rms_norm(x, d, layer.mlp_norm, eps)).chunk(2, dim=-1)
            x = x + self._product(layer.down, F.silu(gate) * up)
        for slot, chunk_ids, _ in part:
            self._length[slot] += len(chunk_ids)
        return self._logits(x, part)

    def _block(
        self,
        blocks: BlockForward,
        part: list[tuple[int, list[int], int]],
        ids: list[int],
        positions: list[int],
    ) -> list[torch.Tensor]:
        """`_forward` as one recorded block."""
        slots = [slot for slot, chunk_ids, _ in part for _ in chunk_ids]
        ends = np.cumsum([len(chunk_ids) for _, chunk_ids, _ in part]).tolist()
        spans = [(end - rows, end) for end, (_, _, rows) in zip(ends, part, strict=True)]
        asked = [span for span in spans if span[0] < span[1]]
        first = asked[0][0] if asked else 0
        logits = blocks(ids, positions, slots, (first, asked[-1][1]) if asked else None)
        for slot, chunk_ids, _ in part:
            self._length[slot] += len(chunk_ids)
        if logits is None:
            return [torch.zeros(0) for _ in part]
        return [logits[max(0, a - first) : max(0, b - first)] for a, b in spans]

    def _product(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """`linear` of x [rows, in]; a lone row is computed twice where its kernel would sum it otherwise."""
        if self._exact and x.shape[0] < linear.fewest:
            return linear(torch.cat([x, x]))[:1]
        return linear(x)

    def _attention_plans(
        self, part: list[tuple[int, list[int], int]]
    ) -> list[tuple[int, int, int, int, int, torch.Tensor]]:
        """Per run of rows: slot, first row, rows, first position, visible cache, additive mask of its blocks.

        A run ends where the visible cache grows, so that its length, over which the kernel sums in steps
        of its own choice, is a function of the position alone and not of what is computed with it.
        """
        plans = []
        row = 0
        for slot, start, count in self._runs(part):
            visible = min((start // KV_BLOCK + 1) * KV_BLOCK, self.info.max_context)
            visible = visible if self._exact else start + count
            plans.append((slot, row, count, start, visible, self._mask(start, count, visible)))
            row += count
        return plans

    def _mask(self, start: int, count: int, visible: int) -> torch.Tensor:
        """0 where a query may look, -inf elsewhere: [blocks, 1, group · block, visible].

        Of a lone row it is [1, 1, 1, visible], the same for all its heads.
        """
        if count == 1 and self._lone:
            first = self.info.max_context - start - 1
            return self._seen[first : first + visible].view(1, 1, 1, visible)
        group = self._shape.num_heads // self._shape.num_kv_heads
        block = self._query_block or count
        blocks = -(-count // block)
        last = torch.arange(blocks * block, device=self._device).clamp_(max=count - 1) + start
        look = torch.arange(visible, device=self._device) <= last[:, None]
        mask = torch.zeros(look.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(~look, float("-inf"))
        mask = mask.view(blocks, 1, 1, block, visible)
        return mask.expand(-1, -1, group, -1, -1).reshape(blocks, 1, -1, visible)

    def _runs(self, part: list[tuple[int, list[int], int]]) -> Iterator[tuple[int, int, int]]:
        """(slot, first position, rows) of each entry, cut at the multiples of KV_BLOCK."""
        for slot, ids, _ in part:
            start, end = self._length[slot], self._length[slot] + len(ids)
            while start < end:
                cut = min(end, (start // KV_BLOCK + 1) * KV_BLOCK) if self._exact else end
                yield slot, start, cut - start
                start = cut

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """q [rows, heads, head_dim] over k, v [kv_heads, visible, head_dim] → [rows, heads · head_dim].

        The query heads that share a key head are folded into query rows, so the cache is never copied.
        """
        count, heads, head_dim = q.shape
        kv_heads, blocks = k.shape[0], mask.shape[0]
        group = heads // kv_heads
        if count == 1 and self._lone:
            # a group that is too small takes in what lies behind it in memory: the next heads, or the keys
            size = (1, kv_heads, max(group, self._lone), head_dim)
            q = q.as_strided(size, (0, group * head_dim, head_dim, 1))
            o = F.scaled_dot_product_attention(q, k[None], v[None], attn_mask=mask)
            return o[:, :, :group].reshape(1, heads * head_dim)
        block = mask.shape[2] // group
        if blocks * block != count:
            q = F.pad(q, (0, 0, 0, 0, 0, blocks * block - count))
        # [blocks, block, kv_heads, group, hd] → [blocks, kv_heads, group · block, hd]
        q = q.view(blocks, block, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(blocks, kv_heads, group * block, head_dim)
        o = F.scaled_dot_product_attention(
            q, k.expand(blocks, -1, -1, -1), v.expand(blocks, -1, -1, -1), attn_mask=mask
        )
        o = o.view(blocks, kv_heads, group, block, head_dim).permute(0, 3, 1, 2, 4)
        return o.reshape(blocks * block, heads * head_dim)[:count]

    def _logits(self, x: torch.Tensor, part: list[tuple[int, list[int], int]]) -> list[torch.Tensor]:
        """Final norm and head for the wanted rows only: per entry [rows, n_out], float32, host."""
        wanted: list[int] = []
        row = 0
        for _, ids, rows in part:
            row += len(ids)
            wanted += range(row - rows, row)
        if not wanted:
            return [x.new_zeros(0) for _ in part]
        pad = max(0, self._min_rows - len(wanted))
        chosen = x[torch.tensor(wanted + wanted[:1] * pad, device=self._device)]
        chosen = F.rms_norm(chosen, (self._shape.hidden_size,), self._norm, self._shape.rms_norm_eps)
        logits = self._product(self._head, chosen)[: len(wanted)].float().cpu()
        return list(logits.split([rows for _, _, rows in part]))


def _joined(blocks: list[torch.Tensor]) -> Logits:
    """Logits of one chunk [rows, n_out]; those of a single forward are not copied."""
    return blocks[0].numpy() if len(blocks) == 1 else np.concatenate([b.numpy() for b in blocks])
