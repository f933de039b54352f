"""A quantized model's speed beside the float one, measured here and now."""

import statistics
from functools import partial

import torch
from torch import nn

from mono_quant.calibration import CalibrationData, device_of, evaluating
from mono_quant.modules import kernel_bytes, kernels_run
from mono_quant.speed import Speed, take_turns


@torch.no_grad()
def measure_speed(
    floats: nn.Module,
    quantized: nn.Module,
    data: CalibrationData,
    seconds: float,
    label: str | None = None,
) -> Speed:
    """Return the speed of two models on the first batch of `data`, which take turns.

    Args:
        floats: what is compared with.
        quantized: the model.
        data: its first batch is what both are called with.
        seconds: roughly how long to measure; each model is called five times at least.
        label: of a progress bar; None for none.

    Raises:
        CalibrationError: a model cannot be called with it.
    """
    batch = data.first()
    with evaluating(floats), evaluating(quantized):
        one = CalibrationData([batch], 1, data.forward)
        next(one.outputs(floats))  # what only a first call does is not counted
        with kernels_run() as ran:
            next(one.outputs(quantized))
        ours, theirs = (partial(data.call, model, batch) for model in (quantized, floats))
        found = take_turns(theirs, ours, seconds, device_of(quantized), label=label)
    paths = {module: path for path, module in quantized.named_modules()}
    return Speed(
        statistics.median(found.floats),
        statistics.median(found.quantized),
        found.ratio,
        rounds=len(found.floats),
        threads=torch.get_num_threads(),
        kernels={
            f"{paths[layer]}.{name}".removeprefix("."): kernel
            for (layer, name), kernel in ran.items()
        },
        kernel_bytes=kernel_bytes(quantized),
    )
