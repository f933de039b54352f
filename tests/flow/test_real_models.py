"""A published network as a graph of codes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from mono_quant import Quantizer, integer_flow, load_model
from mono_quant.numerics.metrics import sqnr_db
from tests.flow.marks import needs_integers
from tests.models import AssetUnavailable, efficientnet_lite0

pytestmark = [pytest.mark.slow, pytest.mark.network]


def network_and_images() -> tuple[efficientnet_lite0.EfficientNetLite0, Tensor, list[Tensor]]:
    """Return the network, photos to measure on, and crops of others to calibrate on."""
    try:
        model = efficientnet_lite0.load()
        images, _ = efficientnet_lite0.labelled_images()
        data = torch.split(efficientnet_lite0.unlabelled_crops()[:48], 8)
    except AssetUnavailable as reason:
        pytest.skip(str(reason))
    return model, images, list(data)


@needs_integers
def test_efficientnet_lite0_flows_whole_and_stays_as_near_to_float(tmp_path: Path) -> None:
    model, images, data = network_and_images()
    result = Quantizer().fit(data).graph().apply(model, progress=False)
    graph: fx.GraphModule = result.model
    flow = result.report.flow
    floats = [line for line in flow if "uint8 -> float32" in line]
    assert [line.split(":")[0] for line in floats] == ["head", "classifier"]
    assert sum(" added" in line for line in flow) == 9, "every shortcut"
    with torch.no_grad():
        exact, found = model(images), graph(images)
        kept = sqnr_db(exact, result.kept.model(images))
    assert sqnr_db(exact, found) > kept - 0.5
    assert result.report.output_sqnr_db is not None
    assert result.report.class_kept_sqnr_db is not None
    assert result.report.output_sqnr_db > result.report.class_kept_sqnr_db - 0.5
    assert result.validate()
    path = result.save(tmp_path / "efficientnet.safetensors")
    again = integer_flow(load_model(path, efficientnet_lite0.load())).model
    with torch.no_grad():
        assert torch.equal(again(images), found)
