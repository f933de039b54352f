"""Weights of every grid, inputs of every kind, and exact products to compare with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mono_quant import (
    Activation,
    Codebook,
    FittedCodebook,
    Float8,
    Microscaling,
    PackedTensor,
    PerChannel,
    PerTensor,
    QuantizedLayer,
    Quantizer,
)
from mono_quant.base import Kernel, KernelSpec
from mono_quant.operations import MatrixProduct
from tests.helpers import noise, stack_and_step

CPU = torch.device("cpu")
DYNAMIC = Quantizer().activations("dynamic")
STATIC = (
    Quantizer().activations("static"),
    Quantizer().activations("static", symmetric=True),
    Quantizer().activations("static", bits=7),
)
INTEGERS = {
    "dynamic": DYNAMIC,
    "dynamic symmetric": Quantizer().activations("dynamic", symmetric=True),
    "dynamic 4-bit": Quantizer().activations("dynamic", bits=4),
    "asymmetric weight": DYNAMIC.asymmetric(),
    "static": STATIC[0],
    "static symmetric": STATIC[1],
}
"""8-bit weights that meet quantized inputs."""

FLOATS = {
    "8-bit": Quantizer().activations(None),
    "8-bit asymmetric": Quantizer().activations(None).asymmetric(),
}
"""8-bit weights that meet float inputs."""

DECODED = {
    **FLOATS,
    "dynamic": DYNAMIC,
    "4-bit per channel": Quantizer().bits(4).granularity("channel"),
    "3-bit": Quantizer().bits(3).granularity("channel"),
    "2-bit": Quantizer().bits(2).granularity("channel"),
    "fp16": Quantizer().bits(16),
    "NF4 per tensor": Quantizer().scheme(Codebook.nf4(PerTensor())),
    "fitted": Quantizer().scheme(FittedCodebook(3, PerChannel(), torch.float8_e4m3fn)),
    "fp8": Quantizer().scheme(Float8()),
}
"""What is decoded by blocks, of rows of any length."""

GROUPED = {
    "4-bit": Quantizer().bits(4),
    "4-bit symmetric": Quantizer().bits(4).symmetric(),
    "4-bit in odd groups": Quantizer().bits(4).group_size(13),
    "3-bit": Quantizer().bits(3),
    "8-bit": Quantizer().activations(None).group_size(32),
    "4-bit, float zero points": Quantizer().bits(4).float_zero_point(),
    "4-bit, float zero points, odd groups": Quantizer().bits(4).group_size(13).float_zero_point(),
    "8-bit, float zero points": Quantizer().activations(None).float_zero_point(),
    "2-bit, float zero points": Quantizer().bits(2).float_zero_point(),
    "NF4": Quantizer().scheme(Codebook.nf4()),
    "MXFP4": Quantizer().scheme(Microscaling.mxfp4()),
    "NVFP4": Quantizer().scheme(Microscaling.nvfp4()),
}
"""What is decoded by blocks, of rows of `GROUPED_SHAPE`."""

GROUPED_SHAPE = (81, 832)
SHAPES = {"wide": (65, 1040), "long": (7, 10001), "one column": (65537, 1)}
"""Rows and columns of weights: just large enough, odd, and no multiples of anything."""

ROWS = (1, 2, 3, 17, 64, 130)
EPS = 2.0**-24
"""Half a step of float32 at 1: what one operation rounds by."""


def layer(quantizer: Quantizer, out: int, length: int, bias: bool = True) -> QuantizedLayer:
    """Return a quantized linear layer whose rows differ in size."""
    source = nn.Linear(length, out, bias=bias)
    with torch.no_grad():
        source.weight.copy_(noise(out, length) * torch.logspace(-2, 1, out)[:, None])
    if quantizer in STATIC:
        quantizer = quantizer.fit(noise(64, length, seed=5))
    made = quantizer.only("*").apply(source, progress=False).model
    assert isinstance(made, QuantizedLayer)
    return made


def spec_of(made: QuantizedLayer) -> KernelSpec:
    """Return what the layer asks of a kernel."""
    weight = made.packed_weights()["weight"]
    return KernelSpec(
        MatrixProduct(), weight.scheme, weight.layout, made.activations().get("weight")
    )


def exact(made: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product without bias in float64, and that of absolute values, ``[M, out]``."""
    weight, spec = made.packed_weights()["weight"], spec_of(made)
    values, _ = stack_and_step(weight, spec.layout.stack[2])
    rows = on_grid(spec.activation, x.reshape(-1, x.shape[-1]))
    return rows @ values[0].t(), rows.abs() @ values[0].t().abs()


def on_grid(activation: Activation | None, rows: Tensor) -> Tensor:
    """Return inputs as the reference sees them, in float64."""
    rows = rows.to(torch.float32)
    if activation is None:
        return rows.to(torch.float64)
    quantized = activation.scheme.quantize(rows, activation.qparams(rows))
    scale, zero = quantized.qparams.scale, quantized.qparams.zero_point
    assert scale is not None
    if isinstance(activation.scheme, Float8):
        floats = quantized.codes.view(activation.scheme.dtype)
        return floats.to(torch.float64) * scale.to(torch.float64)
    centre = zero.to(torch.float64) if zero is not None else 0.0
    return (quantized.codes.to(torch.float64) - centre) * scale.to(torch.float64)


Call = Callable[[KernelSpec, Tensor, PackedTensor, Tensor | None], Tensor]


def run(kernel: Call, made: QuantizedLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a kernel makes of a layer's weight."""
    with torch.no_grad():
        return kernel(spec_of(made), x, made.packed_weights()["weight"], bias)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sees how many values the largest tensor of float32 or wider that is made has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # so is this
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own signature is untyped
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype in (torch.float32, torch.float64):
            self.size = max(self.size, made.numel())
        return made


Times = Callable[[Sequence[Kernel], KernelSpec, Tensor, PackedTensor], dict[str, float]]


def each(seconds: Callable[[Kernel, KernelSpec, Tensor, PackedTensor], float]) -> Times:
    """Return what takes the place of the measurement: made-up times of each kernel, by name."""

    def by_turns(
        able: Sequence[Kernel], spec: KernelSpec, x: Tensor, weight: PackedTensor
    ) -> dict[str, float]:
        return {kernel.name: seconds(kernel, spec, x, weight) for kernel in able}

    return by_turns
