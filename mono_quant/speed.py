"""How fast a quantized model runs beside the float one, measured here and now."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping

import attrs
import torch
from torch import nn

from mono_quant.calibration import CalibrationData, device_of, evaluating
from mono_quant.configurable import Config
from mono_quant.modules import kernels_run

_ROUNDS = range(5, 100)
_AS_FAST = 0.05  # what is no difference


@attrs.frozen
class Speed:
    """What a call of a quantized model takes, and of the float one.

    Attributes:
        float_seconds: median of the float model's calls.
        seconds: median of the quantized model's.
        ratio: median over the rounds of the float model's time by the quantized one's: more than 1
            is faster.
        rounds: how often each was called, by turns.
        threads: that torch used.
        kernels: what computed each weight's product, by the weight's name.
    """

    float_seconds: float
    seconds: float
    ratio: float
    rounds: int
    threads: int
    kernels: Mapping[str, str]

    @property
    def faster(self) -> bool:
        """Whether the quantized model is faster by more than may be chance."""
        return self.ratio > 1 + _AS_FAST

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {**attrs.asdict(self), "kernels": dict(self.kernels)}

    def __str__(self) -> str:
        """Return the comparison and how many weights each kernel computed, as text."""
        if abs(self.ratio - 1) <= _AS_FAST:
            told = "as fast as float"
        elif self.ratio > 1:
            told = f"{self.ratio:.2f} times as fast as float"
        else:
            told = f"slower than float, {1 / self.ratio:.2f} times its time"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [
            f"{told}: {1e3 * self.float_seconds:.4g} ms -> {1e3 * self.seconds:.4g} ms a call, "
            f"median of {self.rounds} by turns, {threads}"
        ]
        counted = Counter(self.kernels.values()).most_common()
        if counted:
            lines.append("kernels: " + ", ".join(f"{name} {count}" for name, count in counted))
        return "\n".join(lines)


@torch.no_grad()
def measure_speed(
    floats: nn.Module, quantized: nn.Module, data: CalibrationData, seconds: float
) -> Speed:
    """Return the speed of two models on the first batch of `data`, which take turns.

    Args:
        floats: what is compared with.
        quantized: the model.
        data: its first batch is what both are called with.
        seconds: roughly how long to measure; each model is called five times at least.

    Raises:
        CalibrationError: a model cannot be called with it.
    """
    batch = data.first()
    models = (floats, quantized)
    taken: tuple[list[float], list[float]] = ([], [])
    with evaluating(floats), evaluating(quantized):
        one = CalibrationData([batch], 1, data.forward)
        next(one.outputs(floats))  # what only a first call does is not counted
        with kernels_run() as ran:
            next(one.outputs(quantized))
        begun = time.perf_counter()
        for turn in range(_ROUNDS.stop):
            if turn >= _ROUNDS.start and time.perf_counter() - begun > seconds:
                break
            for place in (turn % 2, 1 - turn % 2):
                taken[place].append(_timed(models[place], data, batch))
    ratios = [one / other for one, other in zip(*taken, strict=True)]
    paths = {module: path for path, module in quantized.named_modules()}
    return Speed(
        float_seconds=statistics.median(taken[0]),
        seconds=statistics.median(taken[1]),
        ratio=statistics.median(ratios),
        rounds=len(ratios),
        threads=torch.get_num_threads(),
        kernels={
            f"{paths[layer]}.{name}".removeprefix("."): kernel
            for (layer, name), kernel in ran.items()
        },
    )


def _timed(model: nn.Module, data: CalibrationData, batch: object) -> float:
    device = device_of(model)
    start = time.perf_counter()
    data.call(model, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
