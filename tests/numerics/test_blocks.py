"""Views of a tensor by blocks, against loops over its values."""

from itertools import product

import pytest
import torch
from torch import Tensor

from mono_quant.numerics.blocks import (
    block_counts,
    block_range,
    block_sum,
    row_range,
    spread,
    to_blocks,
)
from mono_quant.numerics.granularity import Shape
from tests.helpers import for_each, noise

CASES = [
    ((2, 3, 8), (1, 1, 8)),
    ((2, 3, 8), (1, 1, 2)),
    ((2, 3, 8), (2, 3, 8)),
    ((4, 6, 8), (2, 3, 4)),
    ((4, 6), (4, 1)),
    ((4, 6), (1, 1)),
    ((12,), (3,)),
    ((2, 2, 3, 3), (1, 2, 3, 3)),
]


def blocks_of(x: Tensor, block: Shape) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return each block with its place, cut out one by one."""
    counts = [size // part for size, part in zip(x.shape, block, strict=True)]
    return [
        (place, x[tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, block, strict=True))])
        for place in product(*map(range, counts))
    ]


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_ranges_and_sums_are_those_of_each_block_cut_out(shape: Shape, block: Shape) -> None:
    x = noise(*shape).to(torch.float64)
    low, high = block_range(x, block)
    total = block_sum(x, block)
    assert low.shape == high.shape == total.shape == block_counts(shape, block)
    for place, part in blocks_of(x, block):
        values = part.flatten().tolist()
        assert float(low[place]) == min(values)
        assert float(high[place]) == max(values)
        assert float(total[place]) == pytest.approx(sum(values), abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 4099, 128), (1, 1, 128)),
        ((2, 2053, 128), (1, 1, 32)),
        ((1, 4099, 128), (1, 4099, 128)),
        ((1, 3, 128), (1, 1, 128)),
        ((1, 4099, 0), (1, 1, 0)),
    ],
)
def test_ranges_found_some_rows_at_a_time_are_the_same(shape: Shape, block: Shape) -> None:
    x = noise(*shape)
    for found, whole in zip(row_range(x, block), block_range(x, block), strict=True):
        assert torch.equal(found, whole)


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_spread_meets_each_value_with_the_one_of_its_block(shape: Shape, block: Shape) -> None:
    per_block = noise(*block_counts(shape, block))
    met = (to_blocks(torch.zeros(shape), block) + spread(per_block)).reshape(shape)
    assert torch.equal(met, for_each(per_block, shape))


def test_blocks_of_a_contiguous_tensor_are_a_view() -> None:
    x = noise(2, 3, 8)
    assert to_blocks(x, (1, 1, 4)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("shape", "block", "counts"),
    [
        ((1, 4, 0), (1, 1, 0), (1, 4, 1)),
        ((1, 0, 8), (1, 1, 8), (1, 0, 1)),
        ((1, 0, 0), (1, 0, 0), (1, 1, 1)),
    ],
)
def test_empty_blocks_have_the_range_zero(shape: Shape, block: Shape, counts: Shape) -> None:
    low, high = block_range(torch.zeros(shape), block)
    assert torch.equal(low, torch.zeros(counts))
    assert torch.equal(high, torch.zeros(counts))
    assert torch.equal(block_sum(torch.zeros(shape), block), torch.zeros(counts))
