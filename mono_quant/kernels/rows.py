"""Single rows through a layer of 8 bits, by way of nothing but what has to be done for each."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from mono_quant.base import Activation, Arranged, Kernel, KernelSpec, PackedTensor
from mono_quant.kernels.codes import DTYPES, constants, flat, shaped
from mono_quant.kernels.digits import on_one_grid
from mono_quant.kernels.fbgemm_linear import FBGEMM_LINEAR, FbgemmRows, of_alike
from mono_quant.kernels.integer import INTEGER, of_one_row
from mono_quant.kernels.ops import followed
from mono_quant.kernels.packed_linear import PACKED_LINEAR, PackedRows, of_one_grid
from mono_quant.kernels.store import STORE


class Row(ABC):
    """The product of one weight with single rows of quantized inputs, all but the row found before.

    A layer that meets one row waits longer for Python than for some of the operators: this is what
    its kernel does for it, to the bit, in the fewest steps. Nothing of it is true any more once the
    codes or their grid were written to or replaced, or another kernel may be chosen; then the
    answer is None.

    Args:
        spec: of the product.
        codes: canonical ones, where the layer has those.
        weight: the layer's own scale and zero point.
    """

    __slots__ = ("_activation", "_codes", "_length", "_scale", "_state", "_zero_point")

    def __init__(self, spec: KernelSpec, codes: Tensor | None, weight: PackedTensor) -> None:
        activation = spec.activation
        assert activation is not None  # `row_of` saw to it
        self._activation: Activation = activation
        self._length = spec.layout.stack[2]
        self._codes, self._scale = codes, weight.tensors["scale"]
        self._zero_point = weight.tensors.get("zero_point")
        self._state = self._now()

    def __call__(
        self,
        x: Tensor,
        codes: Tensor | None,
        grid: tuple[Tensor | None, Tensor | None],
        bias: Tensor | None,
    ) -> Tensor | None:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, or None where it is not for this.

        Args:
            x: any input; one row of a CPU's floats that nobody follows is what this is for.
            codes: canonical ones that the layer has now; None while they are in another order.
            grid: scale and zero point of the codes, as the layer has them now.
            bias: ``[out]``, or None.
        """
        if codes is not self._codes:
            return None
        if grid[0] is not self._scale or grid[1] is not self._zero_point:
            return None
        if x.numel() != self._length or x.shape[-1] != self._length:
            return None
        if x.dtype not in DTYPES or not x.is_cpu or followed(x, bias) or self._state != self._now():
            return None
        return self._product(x, self._activation, bias)

    @abstractmethod
    def _product(self, x: Tensor, activation: Activation, bias: Tensor | None) -> Tensor | None:
        """Return the product with one row ``[..., in]`` that is quantized, or None."""

    def _now(self) -> tuple[int, ...]:
        codes, zero_point = self._codes, self._zero_point
        written = codes._version if codes is not None else 0
        moved = zero_point._version if zero_point is not None else 0
        return (STORE.age, torch.get_num_threads(), self._scale._version, written, moved)


@final
class _Integers(Row):
    """What `Integer` does with a weight that has no zero points."""

    __slots__ = ("_columns", "_known")

    def __init__(self, spec: KernelSpec, weight: PackedTensor) -> None:
        codes = weight.tensors["codes"]
        super().__init__(spec, codes, weight)
        self._columns, self._known = codes[0].t(), constants(weight)

    def _product(self, x: Tensor, activation: Activation, bias: Tensor | None) -> Tensor | None:
        inputs = on_one_grid(flat(x, self._length), activation)
        if inputs is None:
            return None
        return shaped(of_one_row(inputs, self._columns, self._known, bias), None, x)


@final
class _Packed(Row):
    """What `PackedLinear` does."""

    __slots__ = ("_weight",)

    def __init__(self, spec: KernelSpec, weight: PackedRows) -> None:
        super().__init__(spec, None, weight.weight)
        self._weight = weight

    def _product(self, x: Tensor, activation: Activation, bias: Tensor | None) -> Tensor | None:
        inputs = on_one_grid(flat(x, self._length), activation)
        if inputs is None:
            return None
        return shaped(of_one_grid(inputs, self._weight, bias), None, x)


@final
class _Rounded(Row):
    """What `FbgemmLinear` does."""

    __slots__ = ("_weight",)

    def __init__(self, spec: KernelSpec, weight: FbgemmRows) -> None:
        super().__init__(spec, None, weight.weight)
        self._weight = weight

    def _product(self, x: Tensor, activation: Activation, bias: Tensor | None) -> Tensor | None:
        if x.dtype == torch.float32 and x.dim() > 1 and x.is_contiguous():  # it is one row as it is
            return of_alike(x, activation, self._weight, bias)
        product = of_alike(flat(x, self._length), activation, self._weight, bias)
        return shaped(product, None, x) if product is not None else None


def row_of(kernel: Kernel, spec: KernelSpec, weight: PackedTensor | Arranged) -> Row | None:
    """Return the shorter way to what a kernel makes of single rows, or None without one.

    Args:
        kernel: that was chosen.
        spec: of the product.
        weight: as the kernel reads it; in an order of the kernel's, the only copy of the codes.
    """
    if spec.activation is None:
        return None
    if kernel is PACKED_LINEAR and isinstance(weight, PackedRows):
        return _Packed(spec, weight)
    if kernel is FBGEMM_LINEAR and isinstance(weight, FbgemmRows) and weight.pieces:
        return _Rounded(spec, weight)
    if kernel is not INTEGER or not isinstance(weight, PackedTensor):
        return None
    if "zero_point" in weight.tensors or _counts_nothing(weight):
        return None
    return _Integers(spec, weight)


def _counts_nothing(weight: PackedTensor) -> bool:
    """Return whether tensors do not count how often they change, as those of inference mode."""
    return any(weight.tensors[name].is_inference() for name in ("codes", "scale"))
