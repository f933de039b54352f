"""mono_quant: what it does without data and with it, and what `quality` chooses by itself."""

from collections.abc import Callable

from torch import nn

from mono_quant import GPTQ, HQQ, MSE, Quantizer, Rounding, RoundToNearest, __version__
from mono_quant.settings import QUALITIES
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


def _way(quantizer: Callable[[Grid], Quantizer]) -> Way:
    def way(task: Task, grid: Grid) -> Quantize:
        return lambda: _apply(quantizer(grid).only("blocks").fit(task.batches), task.model)

    return way


def _apply(quantizer: Quantizer, model: nn.Module) -> Read:
    result = quantizer.apply(model, progress=False)

    def read() -> Quantized:
        before, after = model.state_dict(), result.dequantize().state_dict()
        changed = {name: value for name, value in after.items() if not value.equal(before[name])}
        return Quantized(changed, result.report.bits_per_weight)

    return read


def _even(grid: Grid) -> Quantizer:
    return Quantizer().bits(grid.bits).group_size(grid.group)


def _searched(rounding: Rounding) -> Offer:
    return Offer(_way(lambda grid: _even(grid).observer(weights=MSE()).rounding(rounding)))


def _chosen(quality: str) -> Offer:
    return Offer(_way(lambda grid: Quantizer().bits(grid.bits).quality(quality)), TABLES)


PACKAGE = Package(
    f"mono_quant {__version__}",
    (),
    {
        "to nearest": Offer(_way(_even)),
        "to nearest, MSE": _searched(RoundToNearest()),
        "HQQ": Offer(_way(lambda grid: _even(grid).float_zero_point().rounding(HQQ()))),
        "GPTQ, MSE": _searched(GPTQ()),
        **{
            f"rounded as {quality}, MSE": _searched(rounding)
            for quality, rounding in QUALITIES.items()
            if rounding is not None
        },
        **{f"quality({quality!r})": _chosen(quality) for quality in QUALITIES},
    },
)
