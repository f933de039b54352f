"""oneDNN's operators on uint8 codes, typed, and whether this machine has them.

They take int8 weights without zero points and ignore one in silence, so none can be given here.
Sums of another dtype than the result's are misread in silence, so they have to be of that. Packed
weights are opaque: they can be neither copied nor pickled, and are made anew where needed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from mono_quant.kernels.trial import refusal

IntTuple = tuple[int, ...]
Numbers = tuple[float, int, int]
"""Scale, zero point and largest code of a grid."""
Place = tuple[IntTuple, IntTuple, IntTuple, int]
"""Stride, padding (with real zeros) and dilation of both sides of a convolution, and its groups."""

_SOME_SCALE = 0.5  # of inputs: it is no matter for how a weight is packed
_SOME_ZERO = 1


def pack_conv(
    codes: Tensor, scale: Tensor, place: Place, inputs: tuple[Sequence[int], int] | None = None
) -> Tensor:
    """Return the weight of a 2d convolution as `conv` takes it, for inputs on any grid.

    Its ``to_dense()`` is `codes` again. torch 2.13 keeps the order that it found first for a
    convolution and inputs of a shape, whatever zero point others have that follow.

    Args:
        codes: ``int8 [out, in / groups, height, width]``.
        scale: ``float32 [out]``.
        place: of the convolution.
        inputs: shape ``[N, C, H, W]`` and zero point of those that it will meet most; others take
            longer.
    """
    shape, zero_point = (None, _SOME_ZERO) if inputs is None else inputs
    packed = torch.ops.onednn.qconv_prepack(codes, scale, _SOME_SCALE, zero_point, *place, shape)
    return cast("Tensor", packed)


def conv(
    x: Tensor,
    inputs: Numbers,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    place: Place,
    output: Numbers | None,
    added: tuple[Tensor, Numbers] | None = None,
) -> Tensor:
    """Return a 2d convolution of codes, with the sums of its products exact.

    Args:
        x: ``uint8 [N, C, H, W]``, fastest in channels_last.
        inputs: grid of `x`.
        packed: from `pack_conv`, called with the same place.
        scale: ``float32 [out]``.
        bias: ``float32 [out]`` or None.
        place: as for `pack_conv`.
        output: grid of the uint8 result; None for a float32 one.
        added: what has the result's shape and dtype, and its grid, to be added before the result
            is put on `output`; it is overwritten. Of floats, the grid's zero point is 0.
    """
    zeros = scale.new_zeros(scale.shape, dtype=torch.int32)
    out_scale, out_zero, dtype = _target(output)
    tail = (*place, out_scale, out_zero, dtype)
    head = (x, inputs[0], inputs[1], packed, scale, zeros)
    if added is not None:
        sums, grid = added
        done = torch.ops.onednn.qconv2d_pointwise.binary(
            *head, sums, bias, *tail, grid[0], grid[1], "sum", 1.0, "none", [], ""
        )
    else:
        done = torch.ops.onednn.qconv_pointwise(*head, bias, *tail, "none", [], "")
    return cast("Tensor", done)


def pack_linear(codes: Tensor) -> Tensor:
    """Return a matrix of codes, ``int8 [out, in]``, as `linear` takes it."""
    return cast("Tensor", torch.ops.onednn.qlinear_prepack(codes, None))


def linear(
    x: Tensor,
    inputs: Numbers,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    output: Numbers | None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` for codes ``uint8 [..., in]``.

    The other arguments are those of `conv`.
    """
    zeros = _zeros(len(scale))
    done = torch.ops.onednn.qlinear_pointwise(
        x, inputs[0], inputs[1], packed, scale, zeros, bias, *_target(output), "none", [], ""
    )
    return cast("Tensor", done)


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """Return the zero points of a weight that has none: a row of inputs waits for each operator."""
    return torch.zeros(count, dtype=torch.int32, device="cpu")


def _target(output: Numbers | None) -> tuple[float, int, torch.dtype]:
    return (1.0, 0, torch.float32) if output is None else (output[0], output[1], torch.uint8)


def refuse_conv() -> str | None:
    """Return why `conv` cannot be used by this torch on this machine, or None: by trying it."""
    return refusal("the integer convolution", _CONV_TRIAL)


def refuse_linear() -> str | None:
    """Return why `linear` cannot be used by this torch on this machine, or None: by trying it."""
    return refusal("the integer Linear", _LINEAR_TRIAL)


_CONV_TRIAL = """
import torch
from torch.nn.functional import conv2d

onednn = torch.ops.onednn
for channels, groups, taps, side in ((1, 1, 1, 2), (64, 1, 3, 9), (64, 64, 3, 9), (256, 1, 1, 9)):
    x = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (channels, channels // groups, taps, taps)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    place = ((1, 1), (taps // 2, taps // 2), (1, 1), groups)
    scale, zeros = torch.full((channels,), 0.5), torch.zeros(channels, dtype=torch.int32)
    for zero, sizes in ((0, None), (3, None), (0, list(x.shape)), (3, list(x.shape))):
        packed = onednn.qconv_prepack(weight, scale, 1.0, 1, *place, sizes)
        assert torch.equal(packed.to_dense(), weight), "a weight does not come back"
        head = (x, 0.25, zero, packed, scale, zeros)
        exact = conv2d(x.double() - zero, weight.double(), None, *place) / 8
        done = onednn.qconv_pointwise(*head, None, *place, 1.0, 0, torch.float32, "none", [], "")
        assert torch.equal(done.double(), exact), "a product is wrong"
    step = float(exact.abs().max()) / 100
    added = torch.randint(0, 256, exact.shape, dtype=torch.uint8)
    added = added.contiguous(memory_format=torch.channels_last)
    codes = ((exact + (added.double() - 5) * step) / step + 7).round().clamp(0, 255)
    done = onednn.qconv2d_pointwise.binary(
        *head, added, None, *place, step, 7, torch.uint8, step, 5, "sum", 1.0, "none", [], ""
    )
    assert (done.double() - codes).abs().max() <= 1, "a sum is wrong"
    added = exact.float().contiguous(memory_format=torch.channels_last)
    done = onednn.qconv2d_pointwise.binary(
        *head, added, None, *place, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )
    assert torch.equal(done.double(), 2 * exact), "a sum of floats is wrong"
"""

_LINEAR_TRIAL = """
import torch

onednn = torch.ops.onednn
for rows, length, count in ((1, 1, 1), (1, 256, 128), (3, 64, 32), (64, 256, 256)):
    x = torch.randint(0, 256, (rows, length), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (count, length), dtype=torch.int8)
    scale, zeros = torch.full((count,), 0.5), torch.zeros(count, dtype=torch.int32)
    head = (x, 0.25, 3, onednn.qlinear_prepack(weight, None), scale, zeros, None)
    exact = (x.double() - 3) @ weight.double().t() / 8
    done = onednn.qlinear_pointwise(*head, 1.0, 0, torch.float32, "none", [], "")
    assert torch.equal(done.double(), exact), "a product is wrong"
    step = float(exact.abs().max()) / 100 or 1.0
    done = onednn.qlinear_pointwise(*head, step, 7, torch.uint8, "none", [], "")
    codes = (exact / step + 7).round().clamp(0, 255)
    assert (done.double() - codes).abs().max() <= 1, "a code is wrong"
"""
