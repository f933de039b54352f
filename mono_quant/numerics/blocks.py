"""Blockwise views and reductions: one block_size expresses every granularity."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mono_quant.numerics.granularity import Shape

AT_ONCE = 1 << 18
"""Values of a weight that are worked on at once: with temporaries, what a core's cache holds."""


def row_parts(shape: Shape) -> Iterator[slice]:
    """Return slices of the rows of a stack ``[G, out, in]`` that hold `AT_ONCE` values."""
    matrices, rows, length = shape
    at_once = max(1, AT_ONCE // max(1, matrices * length))
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def block_counts(shape: Shape, block_size: Shape) -> Shape:
    """Return how many blocks lie along each dimension of `shape`: the shape of the scales.

    A dimension of size zero holds one empty block, so that there is always a scale to speak of
    where a row is empty.
    """
    return tuple(
        size // block if block else 1 for size, block in zip(shape, block_size, strict=True)
    )


def to_blocks(x: Tensor, block_size: Shape) -> Tensor:
    """Return a view of `x` with each dimension split in two: ``[n0, b0, n1, b1, ...]``."""
    counts = block_counts(tuple(x.shape), block_size)
    return x.reshape([size for pair in zip(counts, block_size, strict=True) for size in pair])


def block_rows(x: Tensor, block_size: Shape) -> Tensor:
    """Return the blocks of `x` as rows ``[blocks, values]``: a view where it can be one."""
    blocks = to_blocks(x, block_size)
    counts, inside = range(0, blocks.dim(), 2), range(1, blocks.dim(), 2)
    return blocks.permute(*counts, *inside).reshape(-1, torch.Size(block_size).numel())


def spread(per_block: Tensor) -> Tensor:
    """Return values per block ``[n0, n1, ...]`` to meet `to_blocks`: ``[n0, 1, n1, 1, ...]``."""
    return per_block.reshape([size for count in per_block.shape for size in (count, 1)])


def meet(x: Tensor, block_size: Shape, *per_block: Tensor) -> tuple[Tensor, ...]:
    """Return views of `x` and of values per block ``[n0, n1, ...]`` whose shapes meet."""
    if _whole(x, block_size):
        return (x, *per_block)
    return (to_blocks(x, block_size), *map(spread, per_block))


def met(values: Tensor, shape: Shape) -> Tensor:
    """Return what came of views that `meet` in the shape that it had before.

    Where it has that shape it is left as it lies: a view of it that torch makes of a batch of one
    image in channels_last is in channels_last no more.
    """
    return values if values.shape == shape else values.reshape(shape)


def block_range(x: Tensor, block_size: Shape) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each block; zeros for empty blocks.

    Two reductions, because `torch.aminmax` over one dimension is several times slower than both.
    """
    if x.numel() == 0:
        counts = block_counts(tuple(x.shape), block_size)
        zeros = torch.zeros(counts, dtype=x.dtype, device=x.device)
        return zeros, zeros.clone()
    inside = [place for place, size in enumerate(x.shape) if size == block_size[place]]
    if inside and _whole(x, block_size):  # torch takes no dimensions for all of them
        return x.amin(inside, keepdim=True), x.amax(inside, keepdim=True)
    blocks = to_blocks(x, block_size)
    inside = list(range(1, blocks.dim(), 2))
    return blocks.amin(inside), blocks.amax(inside)


def row_range(x: Tensor, block_size: Shape) -> tuple[Tensor, Tensor]:
    """Return what `block_range` does of a stack ``[G, out, in]``, some rows at a time.

    Where no two rows share a block: the second reduction then finds values in a core's cache.
    """
    if x.dim() != 3 or x.numel() <= AT_ONCE or block_size[:2] != (1, 1):
        return block_range(x, block_size)
    counts = block_counts(tuple(x.shape), block_size)
    low, high = x.new_empty(counts), x.new_empty(counts)
    for part in row_parts((x.shape[0], x.shape[1], x.shape[2])):
        low[:, part], high[:, part] = block_range(x[:, part], block_size)
    return low, high


def _whole(x: Tensor, block_size: Shape) -> bool:
    """Return whether blocks take all or one of each dimension, so that none is to be split.

    Layers ask it of their inputs at each call, where a view that is not needed takes time.
    """
    sizes = zip(x.shape, block_size, strict=True)
    return all(block == size or block == 1 for size, block in sizes)


def block_sum(x: Tensor, block_size: Shape) -> Tensor:
    """Return the sum of each block."""
    blocks = to_blocks(x, block_size)
    return blocks.sum(tuple(range(1, blocks.dim(), 2)))
