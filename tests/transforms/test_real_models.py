"""Folding a published network, and correcting its biases without data."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from mono_quant import BiasCorrection, FoldBatchNorm, Quantizer
from mono_quant.transforms import activations
from tests.models import AssetUnavailable, efficientnet_lite0
from tests.transforms.models import on


@pytest.fixture(scope="module")
def network() -> efficientnet_lite0.EfficientNetLite0:
    try:
        return efficientnet_lite0.load()
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("data", [True, False])
def test_all_49_normalizations_of_efficientnet_lite0_are_folded(
    network: efficientnet_lite0.EfficientNetLite0, data: bool
) -> None:
    x = torch.randn(2, 3, 96, 96)
    model = copy.deepcopy(network)
    changes = FoldBatchNorm().apply(model, on(x)) if data else FoldBatchNorm().apply(model)
    assert sum(change.done for change in changes) == len(changes) == 49
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert [one.activation.kind for one in activations(model)] == ["relu6"] * 33
    with torch.no_grad():
        found, expected = model(x), network(x)
        exact = copy.deepcopy(network).double()(x.double())
    room = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=room)
    error, rounding = (float((one - exact).norm()) for one in (found, expected))
    assert error < 4 * rounding, "as near to float64 as the network itself"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("fold", [True, False])
def test_without_data_39_of_50_biases_of_efficientnet_lite0_are_corrected(
    network: efficientnet_lite0.EfficientNetLite0, fold: bool
) -> None:
    quantizer = Quantizer().activations(None).fold(fold).transform(BiasCorrection())
    changes = quantizer.apply(network, progress=False).report.changes
    biases = [change for change in changes if "the bias of" in change.text]
    assert (len(biases), sum(change.done for change in biases)) == (50, 39)
    reasons = Counter(one.text.rpartition("comes from ")[2] for one in biases if not one.done)
    assert reasons == {"an addition": 9, "the model's input": 1, "mean()": 1}
