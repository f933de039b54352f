"""Layers of third parties that compute a matrix product, known by their class's name."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mono_quant import LinearLikeQuantizer, Quantizer
from mono_quant.modules import QuantizedLinearLike
from tests.helpers import GRIDS, TOLERANCES, WEIGHTS_ONLY, assert_like_float, dense, quantized

NAME = "transformers.pytorch_utils"
HERE = __name__


class Conv1D(nn.Module):
    """What transformers calls so: a linear layer whose weight is ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


class Projection(nn.Module):
    """A product without a bias, and without so much as the name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Shifted(Projection):
    """Keeps its bias as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.get_buffer("bias")


class Narrow(Projection):
    """Inherits everything."""


class Weightless(nn.Module):
    """Has the name and nothing to quantize."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Deep(nn.Module):
    """Has a weight that is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 64))


OURS = LinearLikeQuantizer(f"{HERE}.Projection")


@pytest.fixture
def transformers_conv1d(monkeypatch: pytest.MonkeyPatch) -> type[Conv1D]:
    """Return a class that is named as the one in transformers, which is not installed."""
    kind = type("Conv1D", (Conv1D,), {"__module__": NAME})
    for name in ("transformers", NAME):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[NAME], "Conv1D", kind, raising=False)
    return kind


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_conv1d_of_transformers_is_known_and_right(
    transformers_conv1d: type[Conv1D], grid: Quantizer, dtype: torch.dtype
) -> None:
    source = transformers_conv1d(12, 64).to(dtype)
    model = quantized(source, grid)
    assert isinstance(model, QuantizedLinearLike)
    x = torch.randn(2, 3, 64)
    if dtype in (torch.float32, torch.float64):
        assert_like_float(model, source, x.to(dtype))
        return
    # addmm in half precision is not what is tested: the product in float64 is the oracle
    weight, bias = dense(model, source), source.bias.detach().double()
    found = model(x.to(dtype)).detach().double()
    expected = x.to(dtype).double() @ weight + bias
    room = TOLERANCES[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=room)


def test_conv1d_of_transformers_stays_one_of_its_class(
    transformers_conv1d: type[Conv1D],
) -> None:
    assert isinstance(quantized(transformers_conv1d(12, 64)), transformers_conv1d)


def test_transformers_is_never_imported() -> None:
    """Importing it takes seconds, and it need not be there."""
    code = "import mono_quant, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_class_of_the_same_short_name_is_not_taken_for_it() -> None:
    [row] = Quantizer().plan(nn.Sequential(Conv1D(12, 64))).outline.report.kept
    assert row.reason == "no quantizer knows a Conv1D"


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_own_class_without_a_bias_is_taken(bits: int) -> None:
    source = Projection()
    model = quantized(source, WEIGHTS_ONLY.bits(bits).layer(OURS))
    assert isinstance(model, Projection)
    assert_like_float(model, source, torch.randn(5, 64))


@pytest.mark.parametrize("kind", [Narrow, Shifted])
def test_a_subclass_is_known_by_its_parents_name(kind: type[Projection]) -> None:
    source = kind()
    model = quantized(source, WEIGHTS_ONLY.layer(OURS))
    assert isinstance(model, kind)
    assert_like_float(model, source, torch.randn(5, 64))


@pytest.mark.parametrize("kind", [Weightless, Deep])
def test_a_layer_without_a_matrix_stays_float_with_the_reason(kind: type[nn.Module]) -> None:
    named = LinearLikeQuantizer(f"{HERE}.{kind.__name__}")
    model = nn.Sequential(kind(), nn.Linear(64, 64))
    result = WEIGHTS_ONLY.layer(named).apply(model)
    assert type(result.model[0]) is kind
    if kind is Deep:
        reasons = [row.reason for row in result.report.kept if row.name == "0.weight"]
        assert reasons == [f"{HERE}.Deep has no two-dimensional parameter named weight"]
