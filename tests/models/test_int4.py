"""int4: weights of a 4-bit file taken as they are, others rounded, and products that know no neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import engine_of, tiny_target, write_tiny_llama

from dsdlab.models.base import ModelError
from dsdlab.models.linears import GROUP, Tally, grouped, linear
from dsdlab.models.weights_io import Matrix, load_llama_dir

CPU = torch.device("cpu")


def q4_1(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as a Q4_1 file's reader gives it (fp32, w = d · q + m), and its levels [rows, width].

    After llama.cpp's quantiser: d and m in fp16, the smallest weight at level 0 and the largest at 15.
    """
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width // GROUP, GROUP, generator=g) * 0.1
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / 15
    levels = ((w - low) / step + 0.5).floor().clamp(0, 15)
    stored = levels * step.half().float() + low.half().float()
    return stored.view(rows, width), levels.to(torch.int32).view(rows, width)


def test_a_q4_1_weight_is_found_again() -> None:
    weight, levels = q4_1(96, 160)
    parts = grouped(weight)
    assert torch.equal(parts.levels, levels)
    assert parts.on_grid == parts.groups == 96 * 5
    # only d and m lose bits: 2^-8 of each, eight steps away from the centre at most
    step = parts.scale.float().repeat_interleave(GROUP, 1)
    centre = parts.centre.float().abs().repeat_interleave(GROUP, 1)
    assert ((parts.dense() - weight).abs() <= 1.01 * (8 * step + centre) / 2**8).all()


def test_rows_in_another_order_are_found_too() -> None:
    """A conversion may permute the rows of queries and keys; groups lie along the input."""
    weight, levels = q4_1(64, 64, seed=1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    parts = grouped(weight[order])
    assert torch.equal(parts.levels, levels[order])
    assert parts.on_grid == parts.groups


def test_other_weights_are_rounded() -> None:
    w = torch.randn(32, 96, generator=torch.Generator().manual_seed(3))
    parts = grouped(w)
    assert parts.on_grid == 0
    step = parts.scale.float().repeat_interleave(GROUP, 1)
    assert ((parts.dense() - w).abs() <= 0.56 * step).all()  # half a step, and what bf16 takes


def test_constant_groups() -> None:
    w = torch.zeros(16, 64)
    w[:, 32:] = 0.375
    parts = grouped(w)
    assert torch.equal(parts.dense(), w)
    assert parts.on_grid == parts.groups


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (80, 160), (960, 576), (576, 1536)])
def test_a_row_of_a_product_does_not_know_the_others(rows: int, width: int, threads: int) -> None:
    """1 to 64 rows at several places of a batch, against each row alone, at the real target's sizes too."""
    product = linear(Matrix(q4_1(rows, width)[0]), "int4", CPU)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(4)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([product(x[i : i + 1]) for i in range(64)])
        for count in range(1, 65):
            for start in {0, (64 - count) // 2, 64 - count}:
                assert torch.equal(product(x[start : start + count]), alone[start : start + count]), count
    finally:
        torch.set_num_threads(before)


def test_products_are_those_of_the_levels() -> None:
    weight, _ = q4_1(80, 160)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.double() @ grouped(weight).dense().double().T
    got = linear(Matrix(weight), "int4", CPU)(x).double()
    assert ((got - expected).abs() <= expected.abs() / 2**8 + 1e-5).all()


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 16 x 32, one is 16 x 48; allowed here: bf16"):
        linear(Matrix(torch.zeros(16, 48)), "int4", CPU)


def test_an_engine_says_what_was_rounded(tmp_path: Path) -> None:
    rounded = tiny_target(tmp_path / "a", "int4").int4
    assert rounded.groups == 3 * (128 * 2 + 64 * 2 + 320 * 2 + 64 * 5)
    assert rounded.on_grid == 0
    assert "rounded to 16 levels" in str(rounded)
    assert str(Tally(2000, 2000)) == "all 2,000 groups of 32 as they were stored in 4 bits"
    assert engine_of(load_llama_dir(write_tiny_llama(tmp_path / "b"), ""), "bf16").int4.groups == 0


def test_int4_of_stored_weights_is_nearer_than_int8(tmp_path: Path) -> None:
    """What the format is for: no second rounding of weights that were rounded once."""
    from safetensors.torch import load_file, save_file

    from dsdlab.models.base import Chunk

    folder = write_tiny_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for i, (name, t) in enumerate(tensors.items()):
        if "proj" in name:
            tensors[name] = q4_1(*t.shape, seed=i)[0] * 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def logits(precision: str) -> np.ndarray:
        engine = engine_of(load_llama_dir(folder, ""), precision)
        return engine.extend([Chunk(engine.open(), list(range(3, 83)), 80)])[0]

    exact, four, eight = logits("fp32"), logits("int4"), logits("int8")
    assert np.sqrt(((four - exact) ** 2).mean()) < np.sqrt(((eight - exact) ** 2).mean())
