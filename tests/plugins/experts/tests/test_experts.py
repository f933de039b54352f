"""What the author of the distribution tests: the laws, and one run from end to end."""

from pathlib import Path

import torch
from monoquant_experts import Experts, ExpertsQuantizer, QuantizedExperts, ZipSerializer
from torch import nn

from mono_quant import Quantizer, load_model
from mono_quant.testing import Check, LayerCase, parametrize_with_checks

EXPERTS = LayerCase(
    ExpertsQuantizer(),
    make=lambda: Experts(4, 64, 32),
    inputs=(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)),),
)


@parametrize_with_checks([EXPERTS, ZipSerializer()])
def test_the_laws_are_kept(check: Check) -> None:
    check()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), Experts(4, 64, 64), nn.Linear(64, 8)).eval()


def test_a_model_is_quantized_and_goes_through_a_file_of_ones_own(tmp_path: Path) -> None:
    model, x = network(), torch.randn(16, 64)
    result = Quantizer().bits(4).layer(ExpertsQuantizer()).only("*").fit(x).apply(model)
    assert isinstance(result.model[1], QuantizedExperts)
    path = result.save(tmp_path / "model.zip", serializer=ZipSerializer())
    with torch.device("meta"):
        skeleton = network()
    loaded = load_model(path, skeleton, layers=(ExpertsQuantizer(),), serializer=ZipSerializer())
    assert torch.equal(loaded(x), result.model(x))
    assert result.validate(serializer=ZipSerializer())
