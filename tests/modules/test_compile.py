"""Quantized layers under torch.compile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Quantizer, kernels
from tests.helpers import TiedModel, same_bits
from tests.modules.layers import LAYERS, TAUGHT

Make = Callable[[], tuple[nn.Module, Tensor]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_layer_is_traced_whole_and_gives_the_same_bits(make: Make, bits: int) -> None:
    source, x = make()
    model = TAUGHT.bits(bits).apply(source).model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), kernels.use("reference"):
        assert same_bits(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@pytest.mark.parametrize(("name", "bits"), [("linear", 3), ("conv2d", 8), ("embedding", 4)])
def test_inductor_computes_what_eager_does(name: str, bits: int) -> None:
    source, x = LAYERS[name]()
    model = TAUGHT.bits(bits).apply(source).model.eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_with_ties_is_traced_whole() -> None:
    model = Quantizer().bits(4).only("*").apply(TiedModel().eval()).model
    x = torch.arange(64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), kernels.use("reference"):  # as a trace computes it
        assert same_bits(compiled(x), model(x))


def test_a_linear_layer_is_traced_whole() -> None:
    """The quick one of these."""
    model = Quantizer().apply(nn.Linear(64, 8)).model
    x = torch.randn(2, 64)
    assert same_bits(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
