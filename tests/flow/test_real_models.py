"""A published network as a graph of codes."""

import pytest
import torch

from mono_quant import Quantizer
from mono_quant.flow import integer_flow
from mono_quant.numerics.metrics import sqnr_db
from tests.models import AssetUnavailable, efficientnet_lite0


@pytest.mark.slow
@pytest.mark.network
def test_efficientnet_lite0_flows_whole_and_stays_as_near_to_float() -> None:
    try:
        model = efficientnet_lite0.load()
        images, _ = efficientnet_lite0.labelled_images()
        data = torch.split(efficientnet_lite0.unlabelled_crops()[:48], 8)
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    result = Quantizer().activations("static").fit(list(data)).apply(model, progress=False)
    flow = integer_flow(result.model)
    floats = [line for line in flow.lines if "uint8 -> float32" in line]
    assert [line.split(":")[0] for line in floats] == ["head", "classifier"]
    assert sum(" added" in line for line in flow.lines) == 9, "every shortcut"
    with torch.no_grad():
        exact = model(images)
        kept, found = sqnr_db(exact, result.model(images)), sqnr_db(exact, flow.model(images))
    assert found > kept - 0.5
