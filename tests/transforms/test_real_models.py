"""Published networks: folded, corrected without data, and scaled between their layers."""

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mono_quant import (
    AWQ,
    BiasCorrection,
    FoldBatchNorm,
    Quantizer,
    SmoothQuant,
    Transform,
    TransformContext,
)
from mono_quant.demo import DemoUnavailable, load_minilm
from mono_quant.transforms import activations
from mono_quant.transforms.groups import find_groups
from tests.models import AssetUnavailable, efficientnet_lite0, smollm2
from tests.transforms.models import on
from tests.transforms.wirings import DYNAMIC, FOUR, aimed, targets_of


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


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("transform", [AWQ(steps=4), SmoothQuant(steps=4)], ids=repr)
def test_the_inputs_of_all_layers_in_blocks_of_smollm2_are_scaled(transform: Transform) -> None:
    try:
        model = smollm2.load()
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    model.blocks = model.blocks[:2]
    model = model.double()
    (ids,) = smollm2.sample_inputs()
    context = aimed(model, DYNAMIC, ids)
    groups, refused = find_groups(model, context)
    found = {group.source: group.layers for group in groups if group.source.startswith("blocks.1.")}
    assert found == {
        "blocks.1.attention_norm": tuple(
            f"blocks.1.attention.{name}" for name in ("query", "key", "value")
        ),
        "blocks.1.attention.value": ("blocks.1.attention.output",),
        "blocks.1.feed_forward_norm": ("blocks.1.feed_forward.gate", "blocks.1.feed_forward.up"),
        "blocks.1.feed_forward.up": ("blocks.1.feed_forward.down",),
    }
    assert refused == {"head": "the weight of 'head' is also that of 'embedding'"}
    assert all(group.untraced is None for group in groups)
    with torch.no_grad():
        before = model(ids)
        changes = transform.apply(model, context)
        after = model(ids)
    assert sum(change.done for change in changes) >= 6
    torch.testing.assert_close(after, before, rtol=0, atol=1e-11 * float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.network
def test_of_minilm_only_what_attention_puts_out_can_be_scaled() -> None:
    try:
        model = load_minilm().double()
    except DemoUnavailable as reason:
        pytest.skip(str(reason))
    ids = torch.arange(1000, 1024).reshape(2, 12)

    def outputs(of: nn.Module) -> Iterator[list[torch.Tensor]]:
        with torch.no_grad():
            yield [of(ids, torch.ones_like(ids))]

    context = TransformContext(outputs, targets_of(model, FOUR))
    (before,) = next(outputs(model))
    changes = AWQ(steps=4).apply(model, context)
    (after,) = next(outputs(model))
    done = [change.path for change in changes if change.done]
    assert done
    assert set(done) <= {f"blocks.{place}.attention.value" for place in range(6)}
    reasons = [change.text for change in changes if not change.done]
    assert sum("'blocks.0.attention_norm': its output feeds an addition" in one for one in reasons)
    assert sum("its input comes from gelu()" in one for one in reasons)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
