"""Oracles and small things that several tests share.

Nothing here calls the code under test to find out what is right: codes are unpacked bit by bit and
weights are computed in float64 from codes, scales and zero points as a file holds them.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mono_quant import (
    Affine,
    Change,
    Codebook,
    FittedCodebook,
    Float8,
    FloatCast,
    LayerReport,
    Microscaling,
    PackedTensor,
    PerChannel,
    QParams,
    QuantizedModule,
    Quantizer,
    RangeEstimator,
    Scheme,
    Transform,
    TransformContext,
)
from mono_quant.base import WITHOUT_DATA
from mono_quant.configurable import register
from mono_quant.numerics.blocks import block_range
from mono_quant.numerics.granularity import Shape
from mono_quant.schemes.codebook import NF4
from mono_quant.testing.law import same_bits as same_bits
from mono_quant.testing.models import noise as noise
from mono_quant.testing.strategies import tensors as tensors

ModelT = TypeVar("ModelT", bound=nn.Module)

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""How far an output may lie from its float64 oracle, as a share of the largest output."""

WEIGHTS_ONLY = Quantizer().activations(None)
"""8 bits, inputs left in float: what a layer computes is then what its float twin does."""

GRIDS = {
    "8-bit": WEIGHTS_ONLY,
    "8-bit asymmetric": WEIGHTS_ONLY.asymmetric(),
    "4-bit": Quantizer().bits(4),
    "4-bit, float zero points": Quantizer().bits(4).float_zero_point(),
    "3-bit": Quantizer().bits(3),
    "16-bit": Quantizer().bits(16),
    "NF4": Quantizer().scheme(Codebook.nf4(PerChannel())),
    "NF4, 8-bit scales": Quantizer().scheme(Codebook.nf4(PerChannel(), torch.float8_e4m3fn)),
    "fitted": Quantizer().scheme(FittedCodebook(3, PerChannel())),
    "fp8": Quantizer().scheme(Float8()),
}
"""A grid of each kind: symmetric, asymmetric, packed, straddling bytes, none at all, and tables."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of e2m1, as table 5 of the OCP Microscaling specification 1.0 lists them."""


def quantized(model: ModelT, quantizer: Quantizer | None = None) -> ModelT:
    """Return the model with every layer that can be quantized, small ones and embeddings too."""
    return (quantizer or WEIGHTS_ONLY).only("*").apply(model).model


def unpacked(stream: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes of each row: value i from bit ``i * bits`` on, or a signed byte."""
    if bits == 8:
        assert stream.dtype == torch.int8
        return stream[..., :count].to(torch.int64)
    ones = (stream.to(torch.int64).unsqueeze(-1) >> torch.arange(8) & 1).flatten(-2)
    rows = ones[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    return (rows << torch.arange(bits)).sum(-1)


def stack_and_step(packed: PackedTensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the values ``[G, out, length]`` of a weight and the step of each, in float64."""
    tensors, scheme = packed.tensors, packed.scheme
    if isinstance(scheme, FloatCast):
        values = tensors["codes"].to(torch.float64)
        limits = torch.finfo(scheme.dtype)
        return values, values.abs().clamp(min=limits.smallest_normal) * limits.eps
    if not isinstance(scheme, Affine):
        return levels_and_gaps(packed, length)
    scale = tensors["scale"].to(torch.float64)
    codes = unpacked(tensors["codes"], scheme.bits, length)
    zero = torch.full(scale.shape, 1 << scheme.bits - 1 if scheme.bits < 8 else 0)
    if scheme.float_zero_point:
        zero = tensors["zero_point"].to(torch.float64)
        codes = codes + (128 if scheme.bits == 8 else 0)  # exact, which a sum with zero is not
    elif not scheme.symmetric:
        zero = unpacked(tensors["zero_point"], scheme.bits, scale.numel()).reshape(scale.shape)
    scale, zero = for_each(scale, codes.shape), for_each(zero, codes.shape)
    return (codes - zero) * scale, scale


def levels_and_gaps(packed: PackedTensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the values of a weight whose codes look levels up, and the widest gap at each.

    Beyond the last level, the gap is twice what is left to the end of the range: so far may a
    value lie from it.
    """
    tensors, scheme = packed.tensors, packed.scheme
    table = table_of(scheme, tensors)
    bits = scheme.code_bits
    assert bits is not None
    patterns = unpacked(tensors["codes"], bits, length)
    if bits == 8:  # signed bytes, of counted codes less 128
        patterns = patterns % 256 if scheme.code_min else patterns + 128
    scale = scales_of(tensors)
    scale = for_each(scale, patterns.shape)
    points = torch.unique(table[torch.isfinite(table)])
    ends = torch.tensor([[min(-1.0, float(points[0]))], [max(1.0, float(points[-1]))]]).double()
    if isinstance(scheme, Microscaling) and scheme.scale == "e8m0":
        ends = 2.0 ** (points[-1].log2().floor() + 1) * torch.tensor([[-1.0], [1.0]])
    around = torch.cat([2 * ends[0] - points[:1], points, 2 * ends[1] - points[-1:]])
    gaps = torch.maximum(around[1:-1] - around[:-2], around[2:] - around[1:-1])
    values = table[patterns]
    return rounded(values * scale), gaps[torch.searchsorted(points, values)] * scale.abs()


def table_of(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the level of each pattern of bits in float64, as specifications and torch have it."""
    if isinstance(scheme, FittedCodebook):
        return tensors["levels"].to(torch.float64)
    if isinstance(scheme, Codebook):
        assert scheme.levels == "nf4"
        return torch.tensor(NF4, dtype=torch.float64)
    every = torch.arange(256).to(torch.uint8)
    if isinstance(scheme, Float8):
        return every.view(scheme.dtype).to(torch.float64)
    assert isinstance(scheme, Microscaling)
    if scheme.element == "e2m1":
        magnitudes = torch.tensor(E2M1, dtype=torch.float64)
        return torch.cat([magnitudes, -magnitudes])
    return every.view({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[scheme.element]).to(
        torch.float64
    )


def scales_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the scales of a weight whose codes look levels up."""
    scale = tensors["scale"]
    if scale.dtype == torch.uint8:  # e8m0
        return 2.0 ** (scale.to(torch.float64) - 127)
    whole = tensors.get("global_scale", torch.ones(1)).to(torch.float64)
    return rounded(scale.to(torch.float64) * whole)


def rounded(product: Tensor) -> Tensor:
    """Return exact products of two float32 values as float32 has them, in float64."""
    return product.to(torch.float32).to(torch.float64)


def native(stack: Tensor, source: nn.Module, shape: torch.Size) -> Tensor:
    """Return a stack ``[G, out, in]`` as the weight of `source` has it."""
    if isinstance(source, nn.modules.conv._ConvTransposeNd):  # [in, out / G, *kernel]
        groups, outputs, _ = stack.shape
        parts = stack.reshape(groups, outputs, shape[0] // groups, -1).transpose(1, 2)
        return parts.reshape(shape)
    if type(source).__name__ == "Conv1D":  # [in, out]
        return stack[0].t()
    return stack.reshape(shape)


def dense(layer: nn.Module, source: nn.Module, name: str = "weight") -> Tensor:
    """Return a weight of a quantized `layer` in float64, seen to be nearest to its source's."""
    assert isinstance(layer, QuantizedModule)
    packed = layer.packed_weights()[name]
    weight = getattr(source, name)
    assert isinstance(weight, Tensor)
    weight = weight.detach().to(torch.float64)
    groups = source.groups if isinstance(source, nn.modules.conv._ConvNd) else 1
    inputs_first = isinstance(source, nn.modules.conv._ConvTransposeNd)
    if inputs_first or type(source).__name__ == "Conv1D":
        rows = weight.shape[1]
    else:
        rows = weight.shape[0] // groups
    length = weight.numel() // (groups * rows)
    stack, step = stack_and_step(packed, length)
    assert stack.shape == (groups, rows, length)
    values = native(stack, source, weight.shape)
    room = 0.65 * native(step, source, weight.shape)  # half a step, and a rounded scale at the ends
    assert ((values - weight).abs() <= room + 1e-12).all(), "a code is not the nearest"
    return values


def oracle(model: nn.Module, source: ModelT) -> ModelT:
    """Return `source` in float64 and eval, with the weights of the quantized `model`."""
    source = copy.deepcopy(source).eval()
    twin = copy.deepcopy(source).to(torch.float64)
    for path, layer in model.named_modules():
        for name in layer.packed_weights() if isinstance(layer, QuantizedModule) else ():
            weight = dense(layer, source.get_submodule(path), name)
            place = twin.get_submodule(path)
            if parametrize.is_parametrized(place, name):
                parametrize.remove_parametrizations(place, name, leave_parametrized=True)
            place.register_parameter(name, nn.Parameter(weight))
    return twin


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that `found` is `expected`, a float64 tensor, but for the arithmetic of its dtype."""
    dtype = dtype or found.dtype
    assert found.dtype == dtype
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    room = TOLERANCES[dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.to(torch.float64), expected, rtol=0, atol=room + 1e-30)


def assert_like_float(model: nn.Module, source: nn.Module, *inputs: Tensor) -> None:
    """Assert that a model computes what its float source does on the dequantized weights."""
    twin = oracle(model, source)
    wide = [x.to(torch.float64) if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        found, expected = model(*inputs), twin(*wide)
    assert_near(found, expected)


def sqnr64(references: list[Tensor], others: list[Tensor]) -> float:
    """Return the signal to noise ratio over all tensors in dB, computed in float64."""
    signal = sum(float(x.double().square().sum()) for x in references)
    pairs = zip(references, others, strict=True)
    noise_power = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    return 10 * math.log10(signal / noise_power)


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules' state dicts have the same names, dtypes and bits."""
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype and same_bits(first[key], second[key])
        for key in first
    )


def for_each(per_block: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values per block repeated to `shape`: for each value that of its block."""
    for dim, size in enumerate(shape):
        count = per_block.shape[dim]
        per_block = per_block.repeat_interleave(size // count if count else 0, dim)
    return per_block


def torch_fake_quantize(x: Tensor, scheme: Affine, qparams: QParams) -> Tensor:
    """Return what torch's own operator makes of a stack whose blocks are runs of whole rows."""
    assert qparams.scale is not None
    scale = qparams.scale.to(torch.float32).flatten()
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    if qparams.zero_point is not None:
        zero = qparams.zero_point.flatten().to(torch.int32)
    blocks = x.reshape(scale.numel(), -1)
    ends = (scheme.quant_min, scheme.quant_max)
    return torch.fake_quantize_per_channel_affine(blocks, scale, zero, 0, *ends).reshape(x.shape)


def layer_rows(quantizer: Quantizer, model: nn.Module) -> dict[str, LayerReport]:
    """Return the rows of a plan by their names."""
    return {row.name: row for row in quantizer.plan(model).outline.report.layers}


def fates(quantizer: Quantizer, model: nn.Module) -> dict[str, str]:
    """Return what a plan says of each weight by the weight's name."""
    return {name: row.fate for name, row in layer_rows(quantizer, model).items() if row.shape}


@register
@attrs.frozen
class Whole(RangeEstimator):
    """Finds ranges, and only of tensors that it sees whole."""

    kind: ClassVar[str] = "tests.whole"

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        return block_range(x, block_size)


@attrs.frozen
class Doubled(Transform):
    """Doubles every weight of a linear layer."""

    kind: ClassVar[str] = "tests.doubled"

    def apply(self, model: nn.Module, context: TransformContext = WITHOUT_DATA) -> list[Change]:
        changes = []
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach() * 2)
                changes.append(Change(path, f"{path}.weight is doubled"))
        return changes


def three_layers() -> nn.Sequential:
    """Return three linear layers, the last one too small for low widths."""
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 4))


class TiedModel(nn.Module):
    """A language model in small: its head shares the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.middle = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.middle(self.embedding(x)))
        scores: Tensor = self.head(hidden)
        return scores
