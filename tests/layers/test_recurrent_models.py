"""Recurrent layers of published models: what each way of quantizing them costs."""

from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import Layout, Quantizer, RecurrentQuantizer, sqnr_db
from mono_quant.modules import QuantizedRecurrent
from tests.models import g2p, resemblyzer
from tests.models.assets import AssetUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.network]
WEIGHTS = Quantizer().activations(None)
DYNAMIC = Quantizer().activations("dynamic")


@attrs.frozen
class WithoutFirst(RecurrentQuantizer):
    """Leaves the first input weight in float: spectrograms span many powers of ten."""

    kind: ClassVar[str] = "recurrent-without-first"

    def layouts(self, layer: nn.Module) -> dict[str, Layout]:
        found = RecurrentQuantizer.layouts(self, layer)
        return {name: layout for name, layout in found.items() if name != "weight_ih_l0"}


def speech() -> tuple[nn.Module, Tensor]:
    try:
        return resemblyzer.load(), torch.cat([resemblyzer.speech_clips(n) for n in ("en", "fr")])
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


def spelling() -> tuple[g2p.SpellingToSound, Tensor]:
    try:
        return g2p.load(), g2p.sample_inputs()[0]
    except AssetUnavailable as reason:
        pytest.skip(str(reason))


def error_db(model: nn.Module, source: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return sqnr_db(source(x), model(x))
