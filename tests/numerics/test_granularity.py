"""A granularity answers with the shape of the block that shares one scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant import ConfigurationError, Granularity, InputError, PerChannel, PerGroup, PerTensor
from mono_quant.configurable import Json
from mono_quant.numerics.blocks import block_counts
from mono_quant.numerics.granularity import Shape

SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)


@pytest.mark.parametrize(
    ("granularity", "shape", "block", "scales"),
    [
        (PerTensor(), (1, 384, 1536), (1, 384, 1536), (1, 1, 1)),
        (PerTensor(), (4, 8, 9), (4, 8, 9), (1, 1, 1)),
        (PerChannel(), (1, 384, 1536), (1, 1, 1536), (1, 384, 1)),
        (PerChannel(), (4, 8, 9), (1, 1, 9), (4, 8, 1)),
        (PerGroup(64), (1, 384, 1536), (1, 1, 64), (1, 384, 24)),
        (PerGroup(3), (4, 8, 9), (1, 1, 3), (4, 8, 3)),
        # shapes as torch's layers and inputs have them
        (PerTensor(), (64, 3, 7, 7), (64, 3, 7, 7), (1, 1, 1, 1)),
        (PerChannel(), (32, 128), (1, 128), (32, 1)),
        (PerChannel(), (2, 7, 5, 128), (1, 1, 1, 128), (2, 7, 5, 1)),
        (PerGroup(32), (10, 128), (1, 32), (10, 4)),
        (PerGroup(5), (10,), (5,), (2,)),
        (PerGroup(1), (2, 3), (1, 1), (2, 3)),
    ],
)
def test_a_block_has_the_size_of_the_table(
    granularity: Granularity, shape: Shape, block: Shape, scales: Shape
) -> None:
    assert granularity.refuse(shape) is None
    assert granularity.block_size(shape) == block
    assert block_counts(shape, block) == scales


@given(shape=SHAPES, kind=st.sampled_from([PerTensor(), PerChannel(), PerGroup(1), PerGroup(3)]))
def test_blocks_tile_every_shape_that_is_not_refused(shape: Shape, kind: Granularity) -> None:
    if kind.refuse(shape) is not None:
        assert shape[-1] % 3
        return
    block = kind.block_size(shape)
    assert len(block) == len(shape)
    assert all(size % part == 0 for size, part in zip(shape, block, strict=True))
    counts = block_counts(shape, block)
    assert torch.Size(counts).numel() * torch.Size(block).numel() == torch.Size(shape).numel()


def test_a_group_that_does_not_divide_is_refused_and_never_shrunk() -> None:
    granularity = PerGroup(64)
    assert granularity.refuse((1, 8, 96)) == "a group of 64 does not divide a row of 96"
    with pytest.raises(InputError, match="a group of 64 does not divide a row of 96"):
        granularity.block_size((1, 8, 96))


def test_a_group_longer_than_the_row_is_refused() -> None:
    assert PerGroup(64).refuse((1, 8, 32)) == "a group of 64 does not divide a row of 32"


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "64", None])
def test_a_group_size_is_a_whole_number_from_one_on(size: Json) -> None:
    with pytest.raises(ConfigurationError, match="a group has 1 value or more"):
        PerGroup.from_config({"kind": "per_group", "size": size})


def test_granularities_are_values() -> None:
    assert PerGroup(32) == PerGroup(32) != PerGroup(64)
    assert len({PerTensor(), PerTensor(), PerChannel(), PerGroup(32), PerGroup(32)}) == 3


def test_granularities_describe_themselves_in_a_word() -> None:
    assert PerTensor().describe() == "per-tensor"
    assert PerChannel().describe() == "per-channel"
    assert PerGroup(128).describe() == "per-group 128"
