"""mono_quant: what it does without data and with it, and what `quality` chooses by itself.

With data its report is measured on the first sample alone, since others measure nothing, but where
a way says that it is measured on all of the data.
"""

from collections.abc import Callable

import torch
from torch import nn

from mono_quant import (
    GPTQ,
    HQQ,
    MSE,
    LearnedRounding,
    Quantizer,
    Rotate,
    Rounding,
    RoundToNearest,
    Transform,
    __version__,
)
from mono_quant.numerics.rotation import block_of, matrix_of
from mono_quant.settings import QUALITIES
from mono_quant.transforms.rotated import RotatedLinear
from tests.benchmarks.measure import first_sample
from tests.benchmarks.weight_only.package import (
    TABLES,
    Grid,
    Offer,
    Package,
    Quantize,
    Quantized,
    Read,
    Task,
    Way,
)


def _way(
    quantizer: Callable[[Grid], Quantizer], *, with_data: bool = False, measured: bool = False
) -> Way:
    def way(task: Task, grid: Grid) -> Quantize:
        chosen = quantizer(grid).only("blocks")
        if with_data:
            chosen = chosen.fit(task.batches)
        if with_data and not measured:
            chosen = chosen.measure_on(first_sample(task.batches))
        return lambda: _apply(chosen, task.model)

    return way


def _apply(quantizer: Quantizer, model: nn.Module) -> Read:
    result = quantizer.apply(model, progress=False)

    def read() -> Quantized:
        floats = result.dequantize()
        for module in floats.modules():
            if isinstance(module, RotatedLinear):
                _turn_back(module)
        before, after = model.state_dict(), floats.state_dict()
        changed = {name: value for name, value in after.items() if not value.equal(before[name])}
        return Quantized(changed, result.report.bits_per_weight)

    return read


@torch.no_grad()
def _turn_back(layer: RotatedLinear) -> None:
    """Give a layer the weight that does the same with inputs as they come."""
    size = block_of(layer.in_features)
    assert size is not None  # else it was not turned
    blocks = layer.weight.double().reshape(layer.out_features, -1, size)
    layer.weight.copy_((blocks @ matrix_of(size).t()).reshape(layer.weight.shape))


def _even(grid: Grid) -> Quantizer:
    return Quantizer().bits(grid.bits).group_size(grid.group)


def _searched(rounding: Rounding, *changes: Transform, with_data: bool = True) -> Offer:
    def quantizer(grid: Grid) -> Quantizer:
        return _even(grid).observer(weights=MSE()).rounding(rounding).transform(*changes)

    return Offer(_way(quantizer, with_data=with_data))


def _tables(rounding: Rounding) -> Callable[[Grid], Quantizer]:
    return lambda grid: Quantizer().bits(grid.bits).quality("balanced").rounding(rounding)


def _chosen(quality: str, *, measured: bool = False) -> Offer:
    def quantizer(grid: Grid) -> Quantizer:
        return Quantizer().bits(grid.bits).quality(quality)

    learns = QUALITIES[quality].rounding is not None
    return Offer(_way(quantizer, with_data=learns, measured=measured), TABLES)


PACKAGE = Package(
    f"mono_quant {__version__}",
    (),
    {
        "to nearest": Offer(_way(_even)),
        "to nearest, MSE": _searched(RoundToNearest(), with_data=False),
        "HQQ": Offer(_way(lambda grid: _even(grid).float_zero_point().rounding(HQQ()))),
        "HQQ, zero on the grid, MSE": Offer(
            _way(
                lambda grid: (
                    _even(grid)
                    .float_zero_point()
                    .observer(weights=MSE())
                    .rounding(HQQ(zero_on_grid=True))
                )
            )
        ),
        "HQQ, zero on the grid": Offer(
            _way(lambda grid: _even(grid).float_zero_point().rounding(HQQ(zero_on_grid=True)))
        ),
        "GPTQ, MSE": _searched(GPTQ()),
        "GPTQ refined once, MSE": _searched(GPTQ(refinements=1)),
        "GPTQ refined twice": Offer(
            _way(_tables(GPTQ(damping=0.1, refinements=2)), with_data=True), TABLES
        ),
        "quality('balanced'), measured on all of the data": _chosen("balanced", measured=True),
        "scales learned, 16 steps": Offer(
            _way(
                _tables(LearnedRounding(steps=16, rounding_rate=0.0, scale_rate=3e-3)),
                with_data=True,
            ),
            TABLES,
        ),
        "learned": Offer(_way(_tables(LearnedRounding()), with_data=True), TABLES),
        "GPTQ, MSE, inputs turned": _searched(GPTQ(), Rotate()),
        "GPTQ refined twice, MSE": _searched(GPTQ(damping=0.1, refinements=2)),
        "learned, MSE": _searched(LearnedRounding()),
        **{f"quality({quality!r})": _chosen(quality) for quality in QUALITIES},
    },
)
