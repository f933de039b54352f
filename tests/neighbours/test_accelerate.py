"""A quantized model that an Accelerator prepares, and a prepared one that is quantized."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mono_quant import Quantizer

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_a_quantized_model_is_prepared_and_unwrapped(
    network: nn.Module, rows: Tensor, loader: "DataLoader[Tensor]"
) -> None:
    model = Quantizer().apply(network).model
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, batches = accelerator.prepare(model, loader)
    assert torch.equal(torch.cat([prepared(batch) for batch in batches]), model(rows))
    assert accelerator.unwrap_model(prepared) is model


@torch.no_grad()
def test_a_prepared_model_is_quantized_on_a_prepared_loader(
    network: nn.Module, rows: Tensor, loader: "DataLoader[Tensor]"
) -> None:
    plain = Quantizer().fit(loader).apply(network)
    prepared, batches = accelerate.Accelerator(cpu=True).prepare(network, loader)
    result = Quantizer().fit(batches).apply(prepared)
    assert torch.equal(result.model(rows), plain.model(rows))
    assert result.validate()
