"""Blocks that are learned are shown what quantized inputs do to them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mono_quant import (
    BlockCall,
    BlockRounding,
    BlockWeight,
    ConvQuantizer,
    FittedBlock,
    Grid,
    LayerQuantizer,
    LearnedRounding,
    LinearQuantizer,
    Quantizer,
    RoundToNearest,
    Statistics,
    kernels,
)
from mono_quant.numerics.values import QTensor
from tests.helpers import noise

SEEN: dict[str, Tensor] = {}
"""What the first block that was fitted returned with its weights on their grids."""


@attrs.frozen
class Probe(BlockRounding):
    """Rounds to nearest, and runs the block."""

    kind: ClassVar[str] = "tests.probe"

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        return RoundToNearest().round(weight, grid, statistics)

    def fit(
        self,
        block: nn.Module,
        weights: Mapping[str, BlockWeight],
        calls: Sequence[BlockCall],
        free: Sequence[str],
    ) -> FittedBlock:
        found = {
            name: self.round(one.stack, one.grid, one.statistics) for name, one in weights.items()
        }
        state = {
            name: weights[name].layout.to_native(weights[name].grid.scheme.dequantize(q))
            for name, q in found.items()
        }
        with torch.no_grad():
            output = functional_call(block, state, calls[0].args, dict(calls[0].kwargs))
        SEEN.setdefault("block", output)
        return FittedBlock(found)


class Padded(nn.Conv2d):
    """Pads by itself, and scales what it convolves."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.pad(3 * input, (1, 1, 1, 1)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.after = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        made: Tensor = self.after(attended) + x
        return made


class Blocks(nn.Module):
    """A model whose first block is the one that is looked at."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def convolutions() -> nn.Module:
    return nn.Sequential(Padded(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1))


class Several(nn.Module):
    """Blocks of several layers, which are not entries of a list themselves."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


KINDS = {
    "linears": (linears, (8, 16)),
    "convolutions": (convolutions, (2, 16, 5, 5)),
    "attention": (Attending, (2, 5, 16)),
}


def blocks_of(kind: str) -> Blocks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = KINDS[kind][0]
        return Blocks(Several(make()), Several(make())).eval()


def data_of(kind: str) -> list[Tensor]:
    return [noise(*KINDS[kind][1], seed=seed) for seed in range(4)]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_run_with_its_inputs_on_their_grids(kind: str, mode: str) -> None:
    SEEN.clear()
    source, data = blocks_of(kind), data_of(kind)
    quantizer = Quantizer().activations(mode, bits=3).only("*").rounding(Probe()).fit(data)
    result = quantizer.apply(source, progress=False)
    with kernels.use("reference"), torch.no_grad():
        expected = result.model.blocks[0](data[0])
        floats = result.dequantize().blocks[0](data[0])
    assert torch.allclose(SEEN["block"], expected, atol=1e-5)
    assert not torch.allclose(floats, expected, atol=1e-2)
    assert not [change.text for change in result.report.changes if not change.done]


def test_what_a_block_is_not_shown_is_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.after = nn.GRU(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.after(self.inner(x)[0])
            return made

    source = Blocks(Recurrent(), Recurrent()).eval()
    quantizer = Quantizer().activations("static").only("*").rounding(Probe())
    report = quantizer.fit([noise(5, 2, 16)]).apply(source, progress=False).report
    said = [change.text for change in report.changes if not change.done]
    assert said == [
        f"the inputs of 'blocks.{place}.inner' are quantized, which its block does not see while "
        "it is learned"
        for place in range(2)
    ]


@pytest.mark.parametrize("kind", ["linears", "convolutions"])
def test_what_is_learned_makes_up_for_quantized_inputs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = LearnedRounding(120, start=RoundToNearest(), rounding_rate=0.01, scale_rate=0.003)
    quantizer = Quantizer().bits(4).activations("static", bits=3).only("*").rounding(learned)
    quantizer = quantizer.fit(data_of(kind))
    shown = quantizer.apply(blocks_of(kind), progress=False).report.output_sqnr_db
    for cls in (LinearQuantizer, ConvQuantizer):
        monkeypatch.setattr(cls, "quantizing_inputs", LayerQuantizer.quantizing_inputs)
    hidden = quantizer.apply(blocks_of(kind), progress=False).report.output_sqnr_db
    assert shown is not None
    assert hidden is not None
    assert shown > hidden + 0.1
