"""Tensors of a state dict whose model is not known."""

from pathlib import Path

import pytest
import torch

from mono_quant import (
    BareWeightQuantizer,
    ConfigurationError,
    QTensor,
    QuantizedModule,
    Quantizer,
    load_model,
)
from tests.helpers import noise


def test_tensors_of_a_state_dict_that_are_called_otherwise_are_quantized_by_pattern(
    tmp_path: Path,
) -> None:
    state = {
        "moe.experts_up": noise(4, 32, 64, seed=1),
        "moe.table": noise(32, 64, seed=2),
        "moe.bias": noise(64, seed=3),
    }
    plain = Quantizer().bits(4).plan(state)
    assert not any(weight.recipe for weight in plain.weights)
    maker = BareWeightQuantizer(also=("experts_*", "table"))
    result = Quantizer().bits(4).layer(maker).apply(state)
    assert [row.name for row in result.report.quantized] == ["moe.experts_up", "moe.table"]
    path = tmp_path / "experts.safetensors"
    result.save(path)
    loaded, module = load_model(path), result.model.get_submodule("moe")
    assert isinstance(module, QuantizedModule)
    for name, expected in module.qtensors().items():
        found = loaded[f"moe.{name}"]
        assert isinstance(found, QTensor)
        assert torch.equal(found.codes, expected.codes)
    with pytest.raises(ConfigurationError, match="also holds patterns of names"):
        BareWeightQuantizer(also=("",))
