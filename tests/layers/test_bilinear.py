"""nn.Bilinear against F.bilinear on the dequantized weight."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer, Quantizer, load_model
from tests.helpers import (
    GRIDS,
    TOLERANCES,
    WEIGHTS_ONLY,
    assert_like_float,
    fates,
    noise,
    quantized,
    same_bits,
)


class Own(nn.Bilinear):
    """Has a forward of its own."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return 2 * super().forward(input1, input2)


class Scores(nn.Module):
    """Holds one word against another, named by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(16, 24, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.pair(input2=y, input1=x)
        return found


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bilinear_computes_what_the_float_layer_does_on_the_dequantized_weight(
    grid: Quantizer, dtype: torch.dtype
) -> None:
    source = nn.Bilinear(16, 24, 12).to(dtype)
    pair = noise(5, 16).to(dtype), noise(5, 24, seed=1).to(dtype)
    assert_like_float(quantized(source, grid), source, *pair)


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions_and_a_missing_bias_are_as_in_torch(
    leading: tuple[int, ...], bias: bool
) -> None:
    source = nn.Bilinear(8, 6, 4, bias=bias)
    model = quantized(source)
    assert_like_float(model, source, noise(*leading, 8), noise(*leading, 6, seed=1))


@pytest.mark.parametrize("shapes", [((5, 8), (1, 6)), ((5, 6), (5, 8)), ((8,), (5, 6))])
def test_sizes_that_do_not_fit_are_refused_as_torch_refuses_them(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    source = nn.Bilinear(8, 6, 4)
    for layer in (source, quantized(source)):
        with pytest.raises(RuntimeError):
            layer(*(torch.randn(shape) for shape in shapes))


def test_its_inputs_stay_float_and_the_plan_says_why() -> None:
    (row,) = (row for row in Quantizer().plan(Scores()).outline.report.quantized)
    assert row.activation == "float inputs: its weight meets the products of two inputs"


def test_a_bilinear_travels_in_files(tmp_path: Path) -> None:
    model = Scores()
    x, y = noise(40, 16), noise(40, 24, seed=1)
    result = Quantizer().fit({"x": x, "y": y}).apply(model, progress=False)
    assert isinstance(result.model.pair, QuantizedLayer)
    assert result.report.quantized[0].output_sqnr_db is not None
    assert result.validate()
    path = tmp_path / "pair.safetensors"
    result.save(path)
    assert same_bits(load_model(path, Scores())(x, y), result.model(x, y))


def test_a_bilinear_is_copied_and_given_back() -> None:
    source = Scores()
    result = WEIGHTS_ONLY.apply(source)
    x, y = noise(3, 16), noise(3, 24, seed=1)
    assert same_bits(copy.deepcopy(result.model)(x, y), result.model(x, y))
    floats = result.dequantize()
    assert type(floats.pair) is nn.Bilinear
    assert floats.pair.weight.shape == source.pair.weight.shape
    torch.testing.assert_close(floats(x, y), result.model(x, y))


def test_gradients_reach_both_inputs() -> None:
    model = quantized(nn.Bilinear(8, 6, 4), Quantizer())
    x, y = noise(3, 8).requires_grad_(), noise(3, 6, seed=1).requires_grad_()
    model(x, y).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.any()
    assert y.grad.any()


def test_a_subclass_with_a_forward_of_its_own_stays_float() -> None:
    assert fates(Quantizer(), nn.Sequential(Own(16, 24, 12))) == {
        "0.weight": "float: Own is a Bilinear with a forward of its own"
    }
