"""A quantized model in a LightningModule, and a LightningModule that is quantized whole."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mono_quant import Quantizer

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of a trainer's own affairs: workers, devices, loggers
]


class Predictor(lightning.LightningModule):  # type: ignore[name-defined,misc]  # Any
    """Hands batches to a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        predicted: Tensor = self.network(rows)
        return predicted

    def predict_step(self, rows: Tensor, _: int) -> Tensor:
        return self.forward(rows)


def predicted(module: Any, loader: "DataLoader[Tensor]") -> Tensor:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    return torch.cat(trainer.predict(module, loader))


@torch.no_grad()
def test_a_quantized_model_predicts_inside_a_module(
    network: nn.Module, rows: Tensor, loader: "DataLoader[Tensor]"
) -> None:
    model = Quantizer().fit(loader).apply(network).model
    assert torch.equal(predicted(Predictor(model), loader), model(rows))


@torch.no_grad()
def test_a_module_is_quantized_whole_and_stays_one(
    network: nn.Module, rows: Tensor, loader: "DataLoader[Tensor]"
) -> None:
    result = Quantizer().fit(loader).apply(Predictor(network).eval())
    assert type(result.model) is Predictor
    names = {row.name for row in result.report.quantized}
    assert names == {"network.0.weight", "network.2.weight"}
    assert torch.equal(predicted(result.model, loader), result.model(rows))
    assert result.validate()


@torch.no_grad()
def test_a_module_that_a_trainer_has_run_is_quantized_like_a_fresh_one(
    network: nn.Module, rows: Tensor, loader: "DataLoader[Tensor]"
) -> None:
    fresh, used = Predictor(copy.deepcopy(network)).eval(), Predictor(network).eval()
    predicted(used, loader)
    models = [Quantizer().apply(module).model for module in (fresh, used)]
    assert torch.equal(models[0](rows), models[1](rows))
