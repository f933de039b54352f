"""nn.Embedding against the rows of the dequantized weight."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.modules import QuantizedEmbedding
from tests.helpers import GRIDS, TOLERANCES, WEIGHTS_ONLY, assert_like_float, dense, quantized


class Doubled(nn.Embedding):
    """Has a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_lookup_returns_the_rows_of_the_dequantized_weight(
    grid: Quantizer, dtype: torch.dtype
) -> None:
    source = nn.Embedding(20, 64).to(dtype)
    model = quantized(source, grid)
    indices = torch.tensor([[0, 19, 3], [7, 7, 1]])
    expected = dense(model, source)[indices].to(dtype)  # looked up, not computed: exact
    torch.testing.assert_close(model(indices), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_granularity_finds_the_scale_of_its_row(
    bits: int, granularity: str, symmetric: bool
) -> None:
    source = nn.Embedding(21, 192)
    grid = WEIGHTS_ONLY.bits(bits).granularity(granularity).symmetric(symmetric)
    model = quantized(source, grid)
    expected = dense(model, source).to(torch.float32)
    torch.testing.assert_close(model(torch.arange(21)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_indices_of_any_shape_and_both_widths_are_taken(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = nn.Embedding(20, 16)
    indices = torch.randint(0, 20, shape, dtype=dtype)
    model = quantized(source)
    assert model(indices).shape == (*shape, 16)
    assert_like_float(model, source, indices)


def test_indices_that_are_a_view_are_taken() -> None:
    source = nn.Embedding(20, 16)
    assert_like_float(quantized(source), source, torch.arange(20).reshape(4, 5).t()[::2])


def test_a_weight_that_is_a_view_is_quantized_as_it_reads() -> None:
    source = nn.Embedding(20, 16)
    source.weight = nn.Parameter(torch.randn(16, 20).t())
    assert_like_float(quantized(source, Quantizer().bits(4)), source, torch.arange(20))


@pytest.mark.parametrize("padding_idx", [0, 19, -1])
def test_the_padding_row_is_kept(padding_idx: int) -> None:
    source = nn.Embedding(20, 64, padding_idx=padding_idx)
    model = quantized(source, Quantizer().bits(4))
    assert model.padding_idx == source.padding_idx
    assert not model(torch.tensor([padding_idx % 20])).any()
    assert_like_float(model, source, torch.arange(20))


@pytest.mark.parametrize("index", [-1, -20, 20, 1 << 40])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_index_out_of_range_is_refused_as_torch_refuses_it(index: int, bits: int) -> None:
    source = nn.Embedding(20, 64)
    model = quantized(source, WEIGHTS_ONLY.bits(bits))
    with pytest.raises(IndexError):
        source(torch.tensor([index]))
    with pytest.raises(IndexError):
        model(torch.tensor([1, index]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_other_dtypes_are_no_indices(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="int32 or int64"):
        quantized(nn.Embedding(20, 16))(torch.ones(3, dtype=dtype))


def test_max_norm_stays_float_with_the_reason() -> None:
    source = nn.Sequential(nn.Embedding(20, 16, max_norm=1.0))
    [row] = Quantizer().plan(source).outline.report.kept
    assert row.reason == "max_norm rewrites the weight at each call"


def test_a_subclass_with_a_forward_of_its_own_stays_float_with_the_reason() -> None:
    source = nn.Sequential(Doubled(20, 16))
    [row] = Quantizer().plan(source).outline.report.kept
    assert row.reason == "Doubled has a forward of its own"


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_embeddings_stay_float_below_8_bits_unless_asked_for(bits: int) -> None:
    source = nn.Sequential(nn.Embedding(100, 64))
    assert type(WEIGHTS_ONLY.bits(bits).apply(source).model[0]) is nn.Embedding
    assert type(WEIGHTS_ONLY.bits(bits).only("0").apply(source).model[0]) is QuantizedEmbedding
    asked = WEIGHTS_ONLY.override("0", bits=bits)
    assert type(asked.apply(source).model[0]) is QuantizedEmbedding


def test_the_result_is_an_embedding_with_its_attributes() -> None:
    model = quantized(nn.Embedding(20, 16, padding_idx=3))
    assert isinstance(model, nn.Embedding)
    assert (model.num_embeddings, model.embedding_dim, model.padding_idx) == (20, 16, 3)
