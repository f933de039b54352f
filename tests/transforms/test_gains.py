"""Norms and what looks like one: what their parameters do to their output, found by trying."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mono_quant.transforms.gains import gain_of
from tests.helpers import noise, same_tensors
from tests.transforms.wirings import WIDTH, Scaled


class Wide(nn.Module):
    """Computes in float32 whatever it is given, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normal * self.gamma).to(x.dtype)


class Clipped(Wide):
    """Does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Shifted(nn.Module):
    """Adds its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


FOUND: dict[str, tuple[nn.Module, tuple[tuple[str, float], ...]]] = {
    "layer norm": (nn.LayerNorm(WIDTH), (("weight", 0.0), ("bias", 0.0))),
    "without bias": (nn.LayerNorm(WIDTH, bias=False), (("weight", 0.0),)),
    "rms norm": (nn.RMSNorm(WIDTH), (("weight", 0.0),)),
    "in float32": (Wide(), (("gamma", 0.0),)),
    "one plus its weight": (Scaled(), (("weight", 1.0),)),
}


@pytest.mark.parametrize("name", FOUND)
def test_its_output_is_scaled_and_put_back(name: str) -> None:
    module, offsets = FOUND[name]
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    before = copy.deepcopy(module)
    gain = gain_of(module)
    assert gain is not None
    assert (gain.offsets, gain.width) == (offsets, WIDTH)
    assert same_tensors(module, before)
    scale, x = noise(WIDTH).double().exp(), noise(2, 5, WIDTH)
    undo = gain.apply(module, scale)
    assert callable(undo)
    with torch.no_grad():
        torch.testing.assert_close(module(x), before(x) * scale.float(), rtol=1e-5, atol=1e-6)
    undo()
    assert same_tensors(module, before)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(2),
        nn.GroupNorm(2, WIDTH),
        nn.InstanceNorm1d(WIDTH, affine=True),
        nn.LayerNorm((3, WIDTH)),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.PReLU(WIDTH),
        nn.Embedding(5, WIDTH),
        nn.Sequential(nn.LayerNorm(WIDTH)),
        nn.LayerNorm(WIDTH, device="meta"),
        Clipped(),
        Shifted(),
    ],
    ids=repr,
)
def test_others_are_none(module: nn.Module) -> None:
    assert gain_of(module) is None


def test_a_forward_on_the_instance_is_not_trusted() -> None:
    module = nn.LayerNorm(WIDTH)
    vars(module)["forward"] = lambda x: x
    assert gain_of(module) is None


def test_what_would_overflow_is_left_alone() -> None:
    module = nn.LayerNorm(WIDTH).half()
    gain = gain_of(module)
    assert gain is not None
    found = gain.apply(module, torch.full((WIDTH,), 1e6, dtype=torch.float64))
    assert found == "the new parameters would hold NaN or infinity"
    assert bool((module.weight == 1).all())
