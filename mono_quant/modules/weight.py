"""The one place where a module keeps a quantized weight."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from mono_quant.base import PackedTensor


class QuantizedWeight(nn.Module):
    """A packed weight as the buffers of a small module.

    A module of its own, so that layers with tied weights share one object: it stays shared when the
    model is moved, copied or saved. Moving it to another dtype changes the dtype that the weight is
    dequantized to, and never that of codes and scales.
    """

    def __init__(self, packed: PackedTensor) -> None:
        """Hold the tensors of `packed` as buffers of the same names."""
        super().__init__()
        self.scheme = packed.scheme
        self.layout = packed.layout
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        device = packed.tensors["codes"].device
        like = torch.empty(0, dtype=packed.dtype, device=device)
        self.register_buffer("_like", like, persistent=False)  # follows the model's dtype

    @property
    def packed(self) -> PackedTensor:
        """The weight, sharing this module's memory."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        return PackedTensor(tensors, self.scheme, self.layout, self.get_buffer("_like").dtype)

    def extra_repr(self) -> str:
        """Return the shape and the scheme."""
        return f"{list(self.layout.native)}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self.get_buffer(name) for name in self._names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self
