"""Grids that look levels up, compiled and exported."""

import pytest
import torch
from torch import nn

from mono_quant import (
    Codebook,
    FittedCodebook,
    Float8,
    Microscaling,
    PerGroup,
    Quantizer,
    Scheme,
    kernels,
)
from tests.helpers import noise, quantized, same_bits

SCHEMES: list[Scheme] = [
    Codebook.nf4(PerGroup(16)),
    FittedCodebook(4, PerGroup(8), torch.float8_e4m3fn),
    Microscaling.mxfp4(),
    Microscaling.nvfp4(),
    Float8(),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_a_compiled_and_an_exported_model_compute_the_same(scheme: Scheme) -> None:
    source = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    model, x = quantized(source, Quantizer().scheme(scheme)), noise(3, 64)
    torch.compiler.reset()
    with torch.no_grad(), kernels.use("reference"):
        expected = model(x)
        assert same_bits(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        assert same_bits(torch.export.export(model, (x,)).module()(x), expected)
