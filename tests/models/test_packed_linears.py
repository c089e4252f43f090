"""Weights laid out beforehand: the same products, and rows that do not know of each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from needs import need

from dsdlab.models.linears import linear, packs
from dsdlab.models.weights_io import Matrix

SHAPES = ((960, 576), (576, 1536), (48, 96), (1000, 64))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 64, 128, 255, 256)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_among_any_number_of_rows(
    precision: str, shape: tuple[int, int], threads: int
) -> None:
    need(
        ""
        if packs(precision)
        else f"this processor's library takes no {precision} weights laid out beforehand"
    )
    generator = torch.Generator().manual_seed(threads)
    weight = torch.randn(shape, generator=generator) * 0.05
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    x = torch.randn(max(ROWS), shape[1], generator=generator).to(dtype)
    apply = linear(Matrix(weight), precision, torch.device("cpu"))
    with torch.inference_mode():
        whole = apply(x)
        for rows in ROWS:
            if rows >= apply.fewest:
                assert torch.equal(apply(x[:rows]), whole[:rows])
                assert torch.equal(apply(x[-rows:]), whole[-rows:])
        if apply.fewest == 1:
            assert torch.equal(torch.cat([apply(row[None]) for row in x]), whole)
        plain = torch.nn.functional.linear(x.double(), weight.to(dtype).double())
    assert float((whole.double() - plain).norm() / plain.norm()) < (1e-6 if precision == "fp32" else 3e-3)
