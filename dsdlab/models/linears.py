"""One weight as a function of rows, in each of the engine's precisions.

int4 is the layout of llama.cpp's Q4_1: groups of 32 weights along the input, each with a scale d and a
minimum m, w = d · q + m with q in 0 … 15. Weights that came out of such a file lie on that grid and are taken
from it as they are; others are rounded onto one. Only d and m are rounded to what the kernel reads: bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsdlab.models.base import ModelError
from dsdlab.models.weights_io import Matrix

GROUP = 32  # weights that share a scale and a minimum
LEVELS = 16
PACKED_FOR = 16  # rows for which oneDNN lays a weight out: the largest window, near enough
PACK_ROWS = 16  # the kernel's packing takes output rows in such blocks

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Linear:
    """x [rows, in] → [rows, out] for one weight."""

    apply: Product
    fewest: int = 1  # rows from which on a row's bits do not depend on how many there are: 1 or 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply(x)


@dataclass(frozen=True, slots=True)
class Grouped:
    """A matrix [out, in] on grids of 16 levels, as the int4 kernel reads it."""

    levels: torch.Tensor  # int32 [out, in], 0 … 15
    scale: torch.Tensor  # bf16 [out, in / 32]
    centre: torch.Tensor  # bf16 [out, in / 32]: the weight of level 8
    on_grid: int  # groups whose weights lay on such a grid, in fp32

    @property
    def groups(self) -> int:
        return self.scale.numel()

    def dense(self) -> torch.Tensor:
        """What the kernel multiplies with: fp32 [out, in]."""
        scale, centre = (t.float().repeat_interleave(GROUP, 1) for t in (self.scale, self.centre))
        return (self.levels - LEVELS // 2).float() * scale + centre


@dataclass(slots=True)
class Tally:
    """How many groups of a model's int4 weights were found on a grid: none of those was rounded to levels."""

    groups: int = 0
    on_grid: int = 0

    def __str__(self) -> str:
        if self.on_grid == self.groups:
            return f"all {self.groups:,} groups of {GROUP} as they were stored in 4 bits"
        rounded = self.groups - self.on_grid
        return f"{rounded:,} of {self.groups:,} groups of {GROUP} rounded to {LEVELS} levels"


def grouped(weight: torch.Tensor) -> Grouped:
    """Levels, scales and minima of a weight [out, in], found again where it lies on the grid of a Q4_1 file.

    Such a file uses level 0 for a group's smallest weight and level 15 for its largest, and keeps d and m in
    fp16. Elsewhere the same formulas round each weight to the nearest of 16 levels between the two.
    """
    rows, width = weight.shape
    w = weight.float().view(rows, width // GROUP, GROUP)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / (LEVELS - 1)
    half = step.half().float()
    levels, fits = _levels(w, low, half)
    other, _ = _levels(w, low, step)
    step = torch.where(fits, half, step)
    levels = torch.where(fits, levels, other)
    return Grouped(
        levels=levels.to(torch.int32).view(rows, width),
        scale=step[..., 0].bfloat16(),
        centre=(low + LEVELS // 2 * step)[..., 0].bfloat16(),
        on_grid=int(fits.sum()),
    )


def _levels(w: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest level of each weight [out, groups, 32]; which groups [out, groups, 1] it gives exactly."""
    levels = ((w - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, LEVELS - 1)
    return levels, (levels * step + low == w).all(-1, keepdim=True)


def linear(matrix: Matrix, precision: str, device: torch.device, tally: Tally | None = None) -> Linear:
    """The product with one weight; `tally` counts int4 groups.

    Off the CPU int8 and int4 compute with bf16 weights. Raises ModelError where a shape does not fit int4.
    """
    if device.type == "cpu":
        if precision == "int8":
            return _int8(matrix)
        if precision == "int4":
            return _int4(matrix, tally)
    dense = matrix.dense(torch.float32 if precision == "fp32" else torch.bfloat16).to(device)
    if device.type == "cpu" and packs(precision):
        return _packed(dense)
    return Linear(lambda x: F.linear(x, dense), 2)


def packs(precision: str) -> bool:
    """Whether this processor's library takes weights of bf16 or fp32 that were laid out for it beforehand.

    Half the time of one row goes into that layout where each call makes it anew, and with it the library's
    choice among kernels by the number of rows.
    """
    if precision not in ("bf16", "fp32") or not torch.backends.mkldnn.is_available():
        return False
    return precision == "fp32" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(dense: torch.Tensor) -> Linear:
    rows, width = dense.shape
    return Linear(_laid_out(dense), _fewest(rows, width, dense.dtype, torch.get_num_threads()))


def _laid_out(dense: torch.Tensor) -> Product:
    """oneDNN's own layout of a weight, as PyTorch's compiler uses it for constant weights."""
    weight = torch.ops.mkldnn._reorder_linear_weight(dense, PACKED_FOR)
    apply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: apply(x, weight, None, "none", [], "")


@functools.cache
def _fewest(rows: int, width: int, dtype: torch.dtype, _threads: int) -> int:
    """1 if the library sums a row by itself in the same steps as among others, for weights so large; else 2.

    Tried on sums whose second half takes back the first in another order: what is left of them is how they
    were rounded, so that other steps show in bf16 too. Steps follow from shape and threads, not from values.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(width // 2, generator=generator)
    weight = torch.rand(rows, width // 2, generator=generator).to(dtype)
    x = torch.randn(PACKED_FOR, width // 2, generator=generator).to(dtype)
    product = _laid_out(F.pad(torch.cat([weight, weight[:, order]], 1), (0, width % 2)))
    x = F.pad(torch.cat([x, -x[:, order]], 1), (0, width % 2))
    return 1 if torch.equal(torch.cat([product(row[None]) for row in x]), product(x)) else 2


def _int8(matrix: Matrix) -> Linear:
    if matrix.scale is None:
        w = matrix.weight.to(torch.float32)
        scale = (w.abs().amax(dim=1) / 127.0).clamp_min(1e-12).to(torch.bfloat16)
        weight = (w / scale.to(torch.float32)[:, None]).round().clamp(-127, 127).to(torch.int8)
    else:
        # cloned: the kernel loads whole vectors, and memory mapped from a file need not be aligned
        weight, scale = matrix.weight.clone(), matrix.scale.to(torch.bfloat16).clone()
    return Linear(lambda x: torch._weight_int8pack_mm(x, weight, scale))


def _int4(matrix: Matrix, tally: Tally | None) -> Linear:
    rows, width = matrix.weight.shape
    if rows % PACK_ROWS or width % GROUP:
        raise ModelError(
            f"int4 needs weights of multiples of {PACK_ROWS} x {GROUP}, one is {rows} x {width}; "
            "allowed here: bf16, fp32, int8"
        )
    parts = grouped(matrix.dense(torch.float32))
    if tally is not None:
        tally.groups += parts.groups
        tally.on_grid += parts.on_grid
    packed = torch._convert_weight_to_int4pack_for_cpu(parts.levels, 1)
    # [in / 32, out, 2]
    scales = torch.stack([parts.scale, parts.centre], -1).transpose(0, 1).contiguous()
    return Linear(lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales))
