"""Weights as the integer operators want them, and what makes up for zero points.

The operators know no zero points of weights. With ``w = scale * (q - z)``, a product with `w` is
``scale * (product with q - z * sum of the inputs)``: the sum over a window is a convolution with
ones, one for each group of channels.
"""

from typing import Self

import attrs
import torch
from torch import Tensor

from mono_quant.kernels import onednn
from mono_quant.kernels.onednn import Numbers, Place

_Met = tuple[torch.Size, bool]
"""Height and width of inputs, and whether their zero point is 0."""


@attrs.define(eq=False)
class PackedWeight:
    """One weight for one operator; opaque, so it can be neither copied nor pickled.

    oneDNN orders the weight of a convolution by the size of its inputs and by whether their zero
    point is 0, and puts one of another order right at each call, which may take longer than the
    product. So it is packed anew for the first inputs, and later for others that come twice in a
    row.

    Attributes:
        weight: of signed codes.
        scale: ``float32 [out]``.
        place: of a convolution; None for a matrix.
        zeros: what the sum of its inputs is multiplied by, ``float32 [out]``; None for a weight
            without zero points.
        ones: of a convolution with zero points, the sum over a window.
    """

    weight: Tensor
    scale: Tensor
    place: Place | None
    zeros: Tensor | None = None
    ones: Tensor | None = None
    _met: _Met | None = attrs.field(default=None, init=False)
    """The inputs that the weight is packed for; None for no known ones."""
    _last: _Met | None = attrs.field(default=None, init=False)
    """Those that came last."""

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        place: Place | None,
    ) -> Self:
        """Return a weight, packed.

        Args:
            codes: int8, in the weight's native shape.
            scale: ``float32 [out]``.
            zero_point: what of the codes means zero, ``[out]``, or None for 0.
            place: of a convolution; None for a matrix.
        """
        zeros = -zero_point.to(torch.float32) * scale if zero_point is not None else None
        if place is None:
            return cls(onednn.pack_linear(codes), scale, place, zeros)
        packed = onednn.pack_conv(codes, scale, place)
        if zeros is None:
            return cls(packed, scale, place)
        groups = place[3]
        window = codes.new_ones(groups, *codes.shape[1:])
        units = zeros if groups == len(scale) else scale.new_ones(groups)
        return cls(packed, scale, place, zeros, onednn.pack_conv(window, units, place))

    def product(
        self, x: Tensor, inputs: Numbers, bias: Tensor | None, output: Numbers | None
    ) -> Tensor:
        """Return the product with codes `x` on the grid `output`, or floats; without zero points.

        Args:
            x: uint8, ``[..., in]`` for a matrix, otherwise ``[N, C, H, W]`` in channels_last.
            inputs: grid of `x`.
            bias: ``float32 [out]`` or None.
            output: of 8 bits, or None.
        """
        if self.place is None:
            return onednn.linear(x, inputs, self.weight, self.scale, bias, output)
        head = (x, inputs, self._taps(x, inputs), self.scale, bias)
        return onednn.conv(*head, self.place, output)

    def sum_with(
        self,
        x: Tensor,
        inputs: Numbers,
        bias: Tensor | None,
        output: Numbers,
        sums: Tensor,
        grid: Numbers,
    ) -> Tensor:
        """Return a convolution's `product` with the codes `sums` added, which are overwritten."""
        assert self.place is not None  # a matrix has no such operator
        head = (x, inputs, self._taps(x, inputs), self.scale, bias)
        return onednn.conv(*head, self.place, output, (sums, grid))

    def corrected(self, x: Tensor, inputs: Numbers, bias: Tensor, unit: float = 1.0) -> Tensor:
        """Return the product with a weight that has zero points, in float32.

        Args:
            x: as for `product`.
            inputs: grid of `x`.
            bias: ``float32 [out]``, in units of the result.
            unit: of the result.
        """
        assert self.zeros is not None  # that is what makes this method needed
        scale, zeros = self.scale / unit, self.zeros / unit
        if self.place is None or self.ones is None:
            step, zero_point, _ = inputs
            sums = x.sum(-1, keepdim=True, dtype=torch.int32).sub_(x.shape[-1] * zero_point)
            y = onednn.linear(x, inputs, self.weight, scale, bias, None)
            return y.addcmul_(sums * step, zeros)
        head, groups, taps = (x, inputs), self.place[3], self._taps(x, inputs)
        if groups == len(scale):  # each channel has a sum of its own
            sums = onednn.conv(*head, self.ones, zeros, None, self.place, None)
            added = (sums, (1.0, 0, 0))
            return onednn.conv(*head, taps, scale, bias, self.place, None, added)
        sums = onednn.conv(*head, self.ones, scale.new_ones(groups), None, self.place, None)
        y = onednn.conv(*head, taps, scale, bias, self.place, None)
        by_group = y.view(len(y), groups, -1, *y.shape[2:])  # [N, groups, out / groups, H, W]
        by_group.addcmul_(sums.unsqueeze(2), zeros.view(groups, -1, 1, 1))
        return y

    def _taps(self, x: Tensor, inputs: Numbers) -> Tensor:
        """Return the weight of a convolution, packed for inputs such as `x` where that pays."""
        assert self.place is not None  # of a matrix there is one order
        zero_point = inputs[1]
        met, last = (x.shape[2:], zero_point == 0), self._last
        self._last = met
        if met != self._met and (self._met is None or met == last):
            codes = self.weight.to_dense()
            self.weight = onednn.pack_conv(codes, self.scale, self.place, (x.shape, zero_point))
            self._met = met
        return self.weight
