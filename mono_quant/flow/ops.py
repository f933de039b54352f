"""oneDNN's operators on uint8 codes, typed: every call of `torch.ops` is in this file.

They take int8 weights without zero points and ignore one in silence, so none can be given here.
Packed weights are opaque: they can be neither copied nor pickled, and are made anew where needed.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor

IntTuple = tuple[int, ...]
Numbers = tuple[float, int, int]
"""Scale, zero point and largest code of a grid."""


def pack_conv(
    codes: Tensor,
    scale: Tensor,
    inputs: Numbers,
    stride: IntTuple,
    padding: IntTuple,
    dilation: IntTuple,
    groups: int,
) -> Tensor:
    """Return the weight of a 2d convolution as `conv` takes it.

    Args:
        codes: ``int8 [out, in / groups, height, width]``.
        scale: ``float32 [out]``.
        inputs: grid of the inputs.
        stride: of both sides, as `padding` and `dilation`.
        padding: around the input, of real zeros.
        dilation: between the taps.
        groups: of channels.
    """
    packed = torch.ops.onednn.qconv_prepack(
        codes, scale, inputs[0], inputs[1], stride, padding, dilation, groups, None
    )
    return cast("Tensor", packed)


def conv(
    x: Tensor,
    inputs: Numbers,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: IntTuple,
    padding: IntTuple,
    dilation: IntTuple,
    groups: int,
    output: Numbers | None,
    added: tuple[Tensor, Numbers] | None = None,
) -> Tensor:
    """Return a 2d convolution of codes, with the sums of its products exact.

    Args:
        x: ``uint8 [N, C, H, W]``, fastest in channels_last.
        inputs: grid of `x`.
        packed: from `pack_conv`, called with the same numbers.
        scale: ``float32 [out]``.
        bias: ``float32 [out]`` or None.
        stride: as for `pack_conv`; so are `padding`, `dilation` and `groups`.
        padding: see there.
        dilation: see there.
        groups: see there.
        output: grid of the uint8 result; None for a float32 one.
        added: codes of the result's shape and their grid, to be added before the result is put on
            its grid; they are overwritten. Only with `output`.
    """
    zeros = torch.zeros(scale.shape, dtype=torch.int32)
    out_scale, out_zero, dtype = _target(output)
    place = (stride, padding, dilation, groups, out_scale, out_zero, dtype)
    head = (x, inputs[0], inputs[1], packed, scale, zeros)
    if added is not None:
        sums, grid = added
        done = torch.ops.onednn.qconv2d_pointwise.binary(
            *head, sums, bias, *place, grid[0], grid[1], "sum", 1.0, "none", [], ""
        )
    else:
        done = torch.ops.onednn.qconv_pointwise(*head, bias, *place, "none", [], "")
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
    zeros = torch.zeros(scale.shape, dtype=torch.int32)
    done = torch.ops.onednn.qlinear_pointwise(
        x, inputs[0], inputs[1], packed, scale, zeros, bias, *_target(output), "none", [], ""
    )
    return cast("Tensor", done)


def _target(output: Numbers | None) -> tuple[float, int, torch.dtype]:
    return (1.0, 0, torch.float32) if output is None else (output[0], output[1], torch.uint8)


_INPUTS, _OUTPUT = (0.5, 3, 255), (0.25, 7, 255)


@cache
def has_conv() -> bool:
    """Return whether `conv` works here, with codes added too: by trying it."""
    x = torch.full((1, 1, 2, 2), 5, dtype=torch.uint8)
    weight, scale = torch.full((1, 1, 1, 1), 2, dtype=torch.int8), torch.ones(1)
    place = ((1, 1), (0, 0), (1, 1), 1)
    try:
        packed = pack_conv(weight, scale, _INPUTS, *place)
        plain = conv(x, _INPUTS, packed, scale, None, *place, None)
        added = (x.clone(), _INPUTS)
        summed = conv(x, _INPUTS, packed, scale, None, *place, _OUTPUT, added)
    except (AttributeError, RuntimeError):  # not in this build of torch, or not for this processor
        return False
    return bool((plain == 2).all()) and bool((summed == 19).all())


@cache
def has_linear() -> bool:
    """Return whether `linear` works here: by trying it."""
    x, scale = torch.full((1, 1), 5, dtype=torch.uint8), torch.ones(1)
    try:
        packed = pack_linear(torch.full((1, 1), 2, dtype=torch.int8))
        done = linear(x, _INPUTS, packed, scale, None, _OUTPUT)
    except (AttributeError, RuntimeError):
        return False
    return bool((done == 15).all())
