"""The exact path on CUDA: every forward is one block of as many rows, recorded once and replayed.

A step of a small model is hundreds of kernels that each take a few microseconds, less than starting one from
Python. All of them have the same shapes whatever is computed, so they are recorded as a CUDA graph; ids,
positions and slots are the only inputs. Rows that are missing repeat the last one: the same bits written
to the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from dsdlab.models.linears import Linear
from dsdlab.models.row_kernels import attend, place

WARM_UPS = 3  # runs before recording: kernels are compiled and libraries take their workspaces


class Layer(Protocol):
    """Norms [d] and linears of one transformer layer."""

    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class BlockForward:
    """A Llama-family model over blocks of `rows` rows, with the cache of all its sessions.

    tables: cos and signed sin, [context, head_dim]; embed [vocab, e]. On a CPU, where nothing can be
    recorded, the same calls are made one by one: that is for tests of the kernels under Triton's interpreter.
    """

    def __init__(
        self,
        *,
        rows: int,
        slots: int,
        kv_heads: int,
        eps: float,
        embed: torch.Tensor,
        embed_proj: Linear | None,
        layers: Sequence[Layer],
        norm: torch.Tensor,
        head: Linear,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.rows = rows
        self._eps, self._embed, self._embed_proj, self._layers = eps, embed, embed_proj, layers
        self._norm, self._head, self._tables = norm, head, tables
        self._cache = embed.new_zeros(len(layers), 2, slots, kv_heads, *tables[0].shape)
        self._inputs = torch.zeros(3, rows, dtype=torch.long, device=embed.device)
        with torch.inference_mode():
            self._body, self._hidden = self._recorded(self._run_layers)
            self._top, self._scores = self._recorded(self._run_head)

    def __call__(
        self, ids: list[int], positions: list[int], slots: list[int], wanted: tuple[int, int] | None
    ) -> torch.Tensor | None:
        """Compute at most `rows` rows; logits [last - first, n_out], float32, host, of the rows `wanted`."""
        missing = self.rows - len(ids)
        inputs = [row + row[-1:] * missing for row in (ids, positions, slots)]
        self._inputs.copy_(torch.tensor(inputs))
        self._body()
        if wanted is None:
            return None
        self._top()
        return self._scores[wanted[0] : wanted[1]].to("cpu", copy=True)

    def _run_layers(self) -> torch.Tensor:
        """All layers: [rows, d]."""
        ids, positions, slots = self._inputs
        x = F.embedding(ids, self._embed)
        if self._embed_proj is not None:
            x = self._embed_proj(x)
        d = x.shape[1:]
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            qkv = layer.qkv(F.rms_norm(x, d, layer.attn_norm, self._eps))
            q = place(qkv, self._tables, positions, slots, (keys, values))
            x = x + layer.o(attend(q, (keys, values), positions, slots))
            gate, up = layer.gate_up(F.rms_norm(x, d, layer.mlp_norm, self._eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return x

    def _run_head(self) -> torch.Tensor:
        """Final norm and head of all rows: [rows, n_out] in float32."""
        x = self._hidden
        return self._head(F.rms_norm(x, x.shape[1:], self._norm, self._eps)).float()

    def _recorded(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A call that does `work` again, and the tensor that then holds its result."""
        if self._inputs.device.type == "cpu":
            result = work()

            def again() -> None:
                result.copy_(work())

            return again, result
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result
