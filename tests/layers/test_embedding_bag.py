"""nn.EmbeddingBag against the float bag on the dequantized weight."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.modules import QuantizedEmbeddingBag
from tests.helpers import GRIDS, TOLERANCES, WEIGHTS_ONLY, assert_near, oracle, quantized

INDICES = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9, 0, 3])
MODES = ["sum", "mean", "max"]


def assert_bags_agree(
    source: nn.EmbeddingBag,
    grid: Quantizer,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> None:
    model = quantized(source, grid)
    assert type(model) is QuantizedEmbeddingBag
    wide = per_sample_weights.to(torch.float64) if per_sample_weights is not None else None
    with torch.no_grad():
        found = model(indices, offsets, per_sample_weights)
        expected = oracle(model, source)(indices, offsets, wide)
    assert_near(found, expected)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bags_of_the_dequantized_rows(mode: str, grid: Quantizer, dtype: torch.dtype) -> None:
    source = nn.EmbeddingBag(10, 64, mode=mode).to(dtype)
    assert_bags_agree(source, grid, INDICES, torch.tensor([0, 4, 7]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bags_may_be_empty(mode: str, bits: int) -> None:
    source = nn.EmbeddingBag(10, 64, mode=mode)
    offsets = torch.tensor([0, 0, 4, 4, 10])
    assert_bags_agree(source, WEIGHTS_ONLY.bits(bits), INDICES, offsets)


@pytest.mark.parametrize("mode", MODES)
def test_the_last_offset_may_be_the_end(mode: str) -> None:
    source = nn.EmbeddingBag(10, 64, mode=mode, include_last_offset=True)
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES, torch.tensor([0, 4, 4, 10]))


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_indices_are_bags(mode: str) -> None:
    source = nn.EmbeddingBag(10, 64, mode=mode)
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES.reshape(2, 5))
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES.reshape(2, 5).t())


@pytest.mark.parametrize("padding_idx", [0, 4, -1])
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_left_out(mode: str, padding_idx: int) -> None:
    source = nn.EmbeddingBag(10, 64, mode=mode, padding_idx=padding_idx)
    offsets = torch.tensor([0, 2, 3, 5])  # the bag from 2 to 3 is nothing but index 4
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES, offsets)
    assert_bags_agree(source, Quantizer().bits(4), INDICES.reshape(5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_may_have_weights(dtype: torch.dtype) -> None:
    source = nn.EmbeddingBag(10, 64, mode="sum", padding_idx=4).to(dtype)
    weights = torch.randn(10, dtype=dtype)
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES, torch.tensor([0, 4, 7]), weights)
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES.reshape(2, 5), None, weights.reshape(2, 5))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_weights_of_samples_need_sums(mode: str) -> None:
    model = quantized(nn.EmbeddingBag(10, 64, mode=mode))
    with pytest.raises(NotImplementedError):
        model(INDICES, torch.tensor([0]), torch.randn(10))


@pytest.mark.parametrize("width", [torch.int32, torch.int64])
def test_both_widths_of_indices_are_taken(width: torch.dtype) -> None:
    source = nn.EmbeddingBag(10, 64)
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES.to(width), torch.tensor([0, 4], dtype=width))
    assert_bags_agree(source, WEIGHTS_ONLY, INDICES.to(width).reshape(2, 5))


def test_no_index_at_all_makes_empty_bags() -> None:
    source = nn.EmbeddingBag(10, 64)
    nothing = torch.empty(0, dtype=torch.int64)
    assert_bags_agree(source, WEIGHTS_ONLY, nothing, torch.tensor([0, 0]))


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    source = nn.EmbeddingBag(10, 64)
    model = quantized(source)
    bad, offsets = torch.tensor([1, index]), torch.tensor([0])
    with pytest.raises((IndexError, RuntimeError)):
        source(bad, offsets)
    with pytest.raises((IndexError, RuntimeError)):
        model(bad, offsets)


def test_indices_in_one_row_need_offsets() -> None:
    model = quantized(nn.EmbeddingBag(10, 64))
    with pytest.raises(ValueError, match="offsets"):
        model(INDICES)


def test_max_norm_stays_float_with_the_reason() -> None:
    source = nn.Sequential(nn.EmbeddingBag(20, 16, max_norm=1.0))
    [row] = Quantizer().plan(source).outline.report.kept
    assert row.reason == "max_norm rewrites the weight at each call"
