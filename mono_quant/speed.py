"""How fast something quantized is beside its float twin: what is measured, and how it is told."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping

import attrs
import torch

from mono_quant.configurable import Config
from mono_quant.progress import progress_bar
from mono_quant.text import format_bytes, format_ms

NO_DIFFERENCE = 0.05
"""A difference of this share or less may be chance."""

_ROUNDS = range(5, 100)


@attrs.frozen
class LayerSpeed:
    """What a layer's calls take within one call of the model, float and quantized.

    Attributes:
        float_seconds: of the float layer.
        seconds: of the quantized one.
    """

    float_seconds: float
    seconds: float

    def __add__(self, other: "LayerSpeed") -> "LayerSpeed":
        """Return what both take together."""
        return LayerSpeed(self.float_seconds + other.float_seconds, self.seconds + other.seconds)

    @property
    def ratio(self) -> float:
        """The float layer's time by the quantized one's: more than 1 is faster."""
        return self.float_seconds / self.seconds

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {**attrs.asdict(self), "ratio": self.ratio}


@attrs.frozen
class Turns:
    """What calls of two things took that were called by turns, in seconds, round by round.

    Attributes:
        floats: of the float one.
        quantized: of the other.
    """

    floats: tuple[float, ...]
    quantized: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the rounds of the float one's time by the other's."""
        pairs = zip(self.floats, self.quantized, strict=True)
        return statistics.median(one / other for one, other in pairs)

    @property
    def quiet(self) -> LayerSpeed:
        """Lower quartiles: what a call takes where little else of the machine is in its way.

        A call of a layer is so short that another process touches it wholly or not at all.
        """
        return LayerSpeed(*(sorted(taken)[len(taken) // 4] for taken in attrs.astuple(self)))


def take_turns(
    floats: Callable[[], object],
    quantized: Callable[[], object],
    seconds: float,
    device: torch.device,
    before: tuple[Callable[[], object], Callable[[], object]] | None = None,
    label: str | None = None,
) -> Turns:
    """Call both by turns, five times each at least, and return what that took.

    What a first call alone does is the caller's to do before.

    Args:
        floats: the float one.
        quantized: the other.
        seconds: roughly how long to go on.
        device: where they compute.
        before: what is called right before each of them, and not timed.
        label: of a progress bar; None for none.
    """
    calls = (floats, quantized)
    taken: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    told = 0
    with progress_bar(label, "%", 100) as bar:
        for turn in range(_ROUNDS.stop):
            if turn >= _ROUNDS.start and time.perf_counter() - begun > seconds:
                break
            for place in (turn % 2, 1 - turn % 2):
                if before is not None:
                    before[place]()
                taken[place].append(timed(calls[place], device))
            spent = (time.perf_counter() - begun) / max(seconds, 1e-9)
            share = int(100 * max((turn + 1) / _ROUNDS.stop, min(1.0, spent)))
            bar.update(share - told)
            told = share
    return Turns(*map(tuple, taken))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, until its work on `device` is done."""
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        kernel_bytes: what kernels keep of the weights beside what a file holds: scales in a form
            of their own, and a second order of codes where `mono_quant.kernels.memory` is double.
    """

    float_seconds: float
    seconds: float
    ratio: float
    rounds: int
    threads: int
    kernels: Mapping[str, str]
    kernel_bytes: int = 0

    @property
    def faster(self) -> bool:
        """Whether the quantized model is faster by more than may be chance."""
        return self.ratio > 1 + NO_DIFFERENCE

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {**attrs.asdict(self), "kernels": dict(self.kernels)}

    def __str__(self) -> str:
        """Return the comparison and how many weights each kernel computed, as text."""
        if abs(self.ratio - 1) <= NO_DIFFERENCE:
            told = "as fast as float"
        elif self.ratio > 1:
            told = f"{self.ratio:.2f} times as fast as float"
        else:
            told = f"slower than float, {1 / self.ratio:.2f} times its time"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [
            f"{told}: {format_ms(self.float_seconds)} -> {format_ms(self.seconds)} a call, "
            f"median of {self.rounds} by turns, {threads}"
        ]
        counted = Counter(self.kernels.values()).most_common()
        if counted:
            beside = format_bytes(self.kernel_bytes)
            kept = f"; they keep {beside} beside the codes" if self.kernel_bytes else ""
            lines.append(
                "kernels: " + ", ".join(f"{name} {count}" for name, count in counted) + kept
            )
        return "\n".join(lines)
