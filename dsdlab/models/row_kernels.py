"""Attention for a block of rows of any sessions, as two Triton kernels over one cache.

A program works on one row and one head and walks that row's own positions from the first on, so that what it
sums, and in which order, depends on the row alone: exact by construction (dsdlab.models.torch_engine says
what for), with no mask and nothing that depends on what is computed beside it.

Shapes: rows R, heads H, kv heads G, head size D; caches [slots, G, context, D]; positions, slots: int64 [R].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 64  # positions of the cache that a program reads at a time


@triton.jit  # type: ignore[untyped-decorator] # Triton has none
def _place(  # type: ignore[no-untyped-def]
    qkv, cos, sin, positions, slots, q, k_cache, v_cache, context,
    heads: tl.constexpr, kv: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    at = tl.arange(0, width)
    inside = at < dim
    own = qkv + (row * (heads + 2 * kv) + head) * dim
    x = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
    if head < heads + kv:
        turned = tl.load(own + (at + dim // 2) % dim, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + position * dim + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + position * dim + at, mask=inside, other=0.0).to(tl.float32)
        x = x * c + turned * s
    if head < heads:
        tl.store(q + (row * heads + head) * dim + at, x.to(q.dtype.element_ty), mask=inside)
    elif head < heads + kv:
        to = ((slot * kv + head - heads) * context + position) * dim
        tl.store(k_cache + to + at, x.to(k_cache.dtype.element_ty), mask=inside)
    else:
        to = ((slot * kv + head - heads - kv) * context + position) * dim
        tl.store(v_cache + to + at, x.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # Triton has none
def _attend(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, positions, slots, out, context, scale,
    heads: tl.constexpr, kv: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    seen, slot = tl.load(positions + row) + 1, tl.load(slots + row)
    at, along = tl.arange(0, width), tl.arange(0, step)
    inside = at < dim
    own = (row * heads + head) * dim
    query = tl.load(q + own + at, mask=inside, other=0.0).to(tl.float32) * scale
    begin = (slot * kv + head // (heads // kv)) * context * dim
    most, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([width], dtype=tl.float32)
    for first in range(0, seen, step):
        there = first + along < seen
        where = begin + (first + along)[:, None] * dim + at[None, :]
        both = there[:, None] & inside[None, :]
        keys = tl.load(k_cache + where, mask=both, other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(keys * query[None, :], 1), -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 0))
        weights = tl.exp(scores - higher)
        shrink = tl.exp(most - higher)
        values = tl.load(v_cache + where, mask=both, other=0.0).to(tl.float32)
        mixed = mixed * shrink + tl.sum(weights[:, None] * values, 0)
        total = total * shrink + tl.sum(weights, 0)
        most = higher
    tl.store(out + own + at, (mixed / total).to(out.dtype.element_ty), mask=inside)


def place(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Rotate queries and keys of qkv [R, (H + 2 G) D]; keys and values go into the cache; q: [R, H, D].

    tables: cos and signed sin, [context, D]: x · cos + roll(x, D / 2) · sin.
    """
    k_cache, v_cache = cache
    _, kv, context, dim = k_cache.shape
    heads = qkv.shape[1] // dim - 2 * kv
    q = qkv.new_empty(len(qkv), heads, dim)
    _place[(len(qkv), heads + 2 * kv)](
        qkv, *tables, positions, slots, q, k_cache, v_cache, context,
        heads=heads, kv=kv, dim=dim, width=triton.next_power_of_2(dim),
    )  # fmt: skip
    return q


def attend(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Each row's q [R, H, D] over its session's positions up to its own: [R, H · D]."""
    k_cache, v_cache = cache
    _, kv, context, dim = k_cache.shape
    rows, heads, _ = q.shape
    out = torch.empty_like(q)
    _attend[(rows, heads)](
        q, k_cache, v_cache, positions, slots, out, context, dim**-0.5,
        heads=heads, kv=kv, dim=dim, width=triton.next_power_of_2(dim), step=TILE,
    )  # fmt: skip
    return out.flatten(1)
