"""What forwards of known model shapes cost on this GPU: random weights of real sizes, timed as CUDA graphs.

    python -m bench.gpu_shapes --out measured.json

A forward's time depends on the sizes of its weights and not on their values, so no model need be here. Each
point is a captured graph of one forward over a ragged batch with the cache it would hold (bfloat16, flash
attention, greedy choice of the token included), replayed; the median is kept. `python -m bench.gpu_profiles`
turns the file into profiles for `dsdlab simulate`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.bfloat16
REPLAYS = 8
SPARE_BYTES = 3 << 30  # for activations and graphs


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-family model, as its config names them."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Weights that a forward reads; the embedding, of which it reads a row a token, is not among them."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, a position."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


SHAPES = (
    Shape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152),
    Shape("qwen2.5-0.5b", 896, 24, 14, 2, 64, 4864, 151936),
    Shape("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256),
    Shape("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256),
    Shape("qwen2.5-32b", 5120, 64, 40, 8, 128, 27648, 152064),
)

ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 64)
CONTEXTS = (128, 1024, 4096)
BATCHES = (2, 4, 8, 16, 32)


def points() -> list[tuple[int, int, int]]:
    """(rows a session, sessions, positions held by each)."""
    alone = [(rows, 1, context) for rows in ROWS for context in CONTEXTS]
    together = [(rows, batch, 512) for batch in BATCHES for rows in (1, 5, 9)]
    deep = [(rows, batch, 2048) for batch in (4, 16, 32) for rows in (1, 5)]
    prompts = [(rows, 1, 0) for rows in (128, 512, 2048)]
    return alone + together + deep + prompts


class RandomModel:
    """Weights of a shape's sizes and one forward over them."""

    def __init__(self, shape: Shape) -> None:
        s = self.shape = shape
        d, hd = s.hidden_size, s.head_dim

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=DTYPE, device="cuda").normal_(std=columns**-0.5)

        self.embed = matrix(1024, d)  # a row a token is read, whatever its size
        self.head = matrix(s.vocab_size, d)
        self.norm = torch.ones(d, dtype=DTYPE, device="cuda")
        self.layers = [
            (matrix((s.num_heads + 2 * s.num_kv_heads) * hd, d), matrix(d, s.num_heads * hd),
             matrix(2 * s.intermediate_size, d), matrix(d, s.intermediate_size))
            for _ in range(s.num_layers)
        ]  # fmt: skip

    def cache(self, batch: int, positions: int) -> Tensor:
        """[layers, 2, batch, positions, kv_heads, head_dim]"""
        s = self.shape
        size = (s.num_layers, 2, batch, positions, s.num_kv_heads, s.head_dim)
        return torch.empty(size, dtype=DTYPE, device="cuda").normal_()

    def forward(self, ids: Tensor, cache: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """ids [batch, rows] after the positions that the cache holds beside them; their next tokens."""
        s = self.shape
        (batch, rows), d, hd = ids.shape, (s.hidden_size,), s.head_dim
        cos, sin = turn  # [rows, 1, head_dim]
        x = F.embedding(ids.flatten(), self.embed)
        for i, (qkv, o, gate_up, down) in enumerate(self.layers):
            y = F.linear(F.rms_norm(x, d, self.norm), qkv).view(batch, rows, -1, hd)
            qk, v = y.split([s.num_heads + s.num_kv_heads, s.num_kv_heads], dim=2)
            qk = torch.addcmul(qk * cos, qk.roll(hd // 2, dims=-1), sin)
            cache[i, 0, :, -rows:] = qk[:, :, s.num_heads :]
            cache[i, 1, :, -rows:] = v
            mixed = torch.ops.aten._flash_attention_forward(
                qk[:, :, : s.num_heads], cache[i, 0], cache[i, 1], None, None, rows, cache.shape[3],
                0.0, rows > 1, False,
            )[0]  # fmt: skip
            x = x + F.linear(mixed.reshape(batch * rows, -1), o)
            gate, up = F.linear(F.rms_norm(x, d, self.norm), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, d, self.norm), self.head).argmax(-1)

    def seconds(self, rows: int, batch: int, context: int) -> float:
        """Median of replays of one forward."""
        ids = torch.randint(0, 1024, (batch, rows), device="cuda")
        cache = self.cache(batch, context + rows)
        turn = (torch.rand(rows, 1, self.shape.head_dim, device="cuda", dtype=DTYPE),) * 2
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.forward(ids, cache, turn)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward(ids, cache, turn)
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        times_ms: list[float] = [a.elapsed_time(b) for a, b in pairwise(marks)]
        return statistics.median(times_ms) / 1e3


def measure(shape: Shape, seed: int = 0) -> dict[str, Any]:
    """All points of one shape that fit in memory: [rows in all, sessions, context in all, seconds]."""
    torch.manual_seed(seed)
    begun = time.monotonic()
    model = RandomModel(shape)
    free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
    found, left_out = [], []
    for rows, batch, context in points():
        if batch * (context + rows) * shape.cache_bytes > free:
            left_out.append([rows, batch, context])
            continue
        found.append([rows * batch, batch, context * batch, model.seconds(rows, batch, context)])
    one = next(s for n, b, c, s in found if (n, b, c) == (1, 1, 128))
    rate = f"1 row {1e3 * one:.2f} ms, {2 * shape.parameters / one / 1e12:.2f} TB/s"
    print(f"{shape.name}: {len(found)} points, {rate}, {time.monotonic() - begun:.0f} s", flush=True)
    return {"shape": asdict(shape), "points": found, "left_out": left_out}


def copy_tb_s() -> float:
    """Bytes read and written a second by a large copy on the device, in TB/s."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    for _ in range(5):
        target.copy_(source)
    marks[1].record()
    torch.cuda.synchronize()
    took_ms: float = marks[0].elapsed_time(marks[1])
    return 5 * 2 * source.numel() / (took_ms / 1e3) / 1e12


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "copy_tb_s": copy_tb_s(),
        "models": [],
    }
    torch.cuda.empty_cache()
    for shape in SHAPES:
        if shape.name in asked.shapes:
            try:
                result["models"].append(measure(shape))
            except torch.OutOfMemoryError as error:
                print(f"{shape.name}: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.empty_cache()
            asked.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
