"""One step of a recurrent layer on integers, in as few operators as torch has for it.

At a few hundred units the calls cost more than the arithmetic, so what a step makes is written to
memory that the next one uses again, and what holds for a whole sequence is found once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mono_quant.base import Activation
from mono_quant.kernels.digits import Factor
from mono_quant.kernels.ops import int_mm_columns
from mono_quant.numerics.granularity import PerTensor
from mono_quant.recurrence import GATES, States
from mono_quant.schemes import Affine

_SIGN = 128  # what turns a signed byte into an unsigned one
_TINY = torch.finfo(torch.float32).tiny


def knows(activation: Activation) -> bool:
    """Return whether `Codes` can be of such a grid: its scales are float32."""
    scheme = activation.scheme
    return isinstance(scheme, Affine) and scheme.scale_dtype is torch.float32


class Codes(ABC):
    """The codes of h, as unsigned bytes: those of `Affine.quantize`, but for a neighbour on a half.

    Attributes:
        codes: ``uint8 [B, in]``.
    """

    def __init__(self, scheme: Affine, like: Tensor) -> None:
        """Make room for the codes of ``like [B, in]``."""
        self.codes = torch.empty_like(like, dtype=torch.uint8)
        self._values = torch.empty_like(like)
        self._symmetric, self._shift = scheme.symmetric, _SIGN if scheme.symmetric else 0
        self._least, self._most = scheme.quant_min + self._shift, scheme.quant_max + self._shift
        self._steps = scheme.quant_max - (0 if scheme.symmetric else scheme.quant_min)

    @staticmethod
    def of(activation: Activation, like: Tensor) -> "Codes":
        """Return room for the codes of ``like [B, in]``, on a grid that `knows` is true of."""
        scheme = activation.scheme
        assert isinstance(scheme, Affine)  # `knows` saw to it
        if activation.scale is not None:
            return _OneGrid(scheme, like, activation)
        if len(like) == 1 or isinstance(scheme.granularity, PerTensor):
            return _OneGrid(scheme, like, None)
        return _Grids(scheme, like)

    @abstractmethod
    def take(self, h: Tensor) -> None:
        """Take the codes of ``h [B, in]``."""

    @abstractmethod
    def times(self, factor: Factor, sums: Tensor, added: Tensor, out: Tensor) -> None:
        """Write a product plus `added` to ``out [B, gates * units]``.

        Args:
            factor: what the codes were multiplied by.
            sums: of that, less what zero points of the factor add; overwritten.
            added: of the shape of `out`, or ``[gates * units]``.
            out: ``float32``.
        """

    def _to_codes(self, values: Tensor) -> None:
        self.codes.copy_(values.round_().clamp_(self._least, self._most))


class _OneGrid(Codes):
    """All of h on one grid, calibrated or found: its parameters are numbers of Python."""

    def __init__(self, scheme: Affine, like: Tensor, static: Activation | None) -> None:
        super().__init__(scheme, like)
        self._static = static is not None
        self._scale, self._zero = 1.0, self._shift
        if static is not None and static.scale is not None:
            self._scale = static.scale.item()
            if static.zero_point is not None:
                self._zero = int(static.zero_point.item())
        self._added = like.new_full((), self._zero)

    def take(self, h: Tensor) -> None:
        if not self._static:
            self._cover(h)
            self._added.fill_(self._zero)
        values = torch.add(self._added, h, alpha=1.0 / self._scale, out=self._values)
        self._to_codes(values)

    def times(self, factor: Factor, sums: Tensor, added: Tensor, out: Tensor) -> None:
        sums.sub_(factor.sums, alpha=self._zero)
        torch.addcmul(added, sums, factor.scale, value=self._scale, out=out)

    def _cover(self, h: Tensor) -> None:
        """Find scale and zero point as `Affine.dynamic_qparams` does; NaN and infinity make NaN."""
        low, high = (end.item() for end in torch.aminmax(h))
        if self._symmetric:
            self._scale = max(max(high, -low) / self._steps, _TINY)
        else:
            low = min(low, 0.0)
            self._scale = max((max(high, 0.0) - low) / self._steps, _TINY)
            self._zero = -round(low / self._scale) if low > -math.inf else 0


class _Grids(Codes):
    """Each row of h on a grid of its own, found at each step."""

    def __init__(self, scheme: Affine, like: Tensor) -> None:
        super().__init__(scheme, like)
        ends = like.new_empty(5, len(like), 1)
        self._low, self._high, self._scale, self._inverse, self._zero = ends
        self._zeros = torch.full_like(self._zero, self._shift, dtype=torch.int32)
        self._zero.fill_(self._shift)

    def take(self, h: Tensor) -> None:
        low = torch.amin(h, 1, keepdim=True, out=self._low)
        high = torch.amax(h, 1, keepdim=True, out=self._high)
        if self._symmetric:
            torch.maximum(high, low.neg_(), out=self._scale)
        else:
            torch.sub(high.clamp_(min=0), low.clamp_(max=0), out=self._scale)
        self._scale.div_(self._steps).clamp_(min=_TINY)
        torch.reciprocal(self._scale, out=self._inverse)
        if not self._symmetric:
            torch.div(low, self._scale, out=self._zero).round_().neg_()
            self._zeros.copy_(self._zero)
        self._to_codes(torch.mul(h, self._inverse, out=self._values).add_(self._zero))

    def times(self, factor: Factor, sums: Tensor, added: Tensor, out: Tensor) -> None:
        sums.addcmul_(self._zeros, factor.sums, value=-1)
        torch.mul(sums, factor.scale, out=out)
        torch.addcmul(added, out, self._scale, out=out)


class IntegerStep:
    """Makes the states after a step from the product of its inputs and the states before it.

    What is not finite gets lost in codes: h must be, before the first step and after each.
    """

    def __init__(self, cell: str, factor: Factor, activation: Activation, like: Tensor) -> None:
        """Make room for steps of as many samples as there are in ``like [B, in]``, h.

        Args:
            cell: a name in `GATES`.
            factor: the hidden weight with its bias.
            activation: how h is quantized; a grid that `knows` is true of.
            like: h.
        """
        self._factor, self._codes = factor, Codes.of(activation, like)
        self._columns = factor.codes.t()
        self._gates = like.new_empty(len(like), factor.codes.shape[0])
        self._parts = self._gates.chunk(GATES[cell], -1)
        self._units = self._parts[0].shape[1]
        self._two = self._gates[:, : 2 * self._units]
        self._bias = factor.bias
        self._none = like.new_zeros(())
        self._advance = _ADVANCE[cell]

    def __call__(self, inputs: Tensor, states: States) -> States:
        """Return new states: h ``[B, units]``, for an LSTM also c.

        Args:
            inputs: their product ``[B, gates * units]``.
            states: before the step.
        """
        self._codes.take(states[0])
        return self._advance(self, inputs, states)

    def _sum(self, inputs: Tensor) -> Tensor:
        """Return both products, in the memory of the gates."""
        self._product(inputs)
        return self._gates if self._bias is None else self._gates.add_(self._bias)

    def _product(self, added: Tensor) -> None:
        """Write the product of h plus `added` to the memory of the gates."""
        sums = int_mm_columns(self._codes.codes, self._columns)
        if self._factor.zero is not None:
            of_rows = self._codes.codes.sum(1, keepdim=True, dtype=torch.int32)
            sums.addcmul_(of_rows, self._factor.zero, value=-1)
        self._codes.times(self._factor, sums, added, self._gates)

    def lstm(self, inputs: Tensor, states: States) -> States:
        """Return h and c as `mono_quant.recurrence.advance` does, in fewer operators."""
        self._sum(inputs)
        i, f, g, o = self._parts
        self._two.sigmoid_()
        c = torch.mul(f, states[1]).addcmul_(i, g.tanh_())
        return c.tanh().mul_(o.sigmoid_()), c

    def gru(self, inputs: Tensor, states: States) -> States:
        """Return h as `mono_quant.recurrence.advance` does, in fewer operators."""
        self._product(self._none if self._bias is None else self._bias)
        r, z, n = self._parts
        of_two, of_n = inputs.tensor_split((2 * self._units,), -1)
        self._two.add_(of_two).sigmoid_()
        n = torch.addcmul(of_n, r, n).tanh_()
        return (n.lerp(states[0], z),)

    def rnn_tanh(self, inputs: Tensor, states: States) -> States:
        """Return h as `mono_quant.recurrence.advance` does."""
        return (self._sum(inputs).tanh(),)

    def rnn_relu(self, inputs: Tensor, states: States) -> States:
        """Return h as `mono_quant.recurrence.advance` does."""
        return (self._sum(inputs).relu(),)


_ADVANCE: dict[str, Callable[[IntegerStep, Tensor, States], States]] = {
    "LSTM": IntegerStep.lstm,
    "GRU": IntegerStep.gru,
    "RNN_TANH": IntegerStep.rnn_tanh,
    "RNN_RELU": IntegerStep.rnn_relu,
}
