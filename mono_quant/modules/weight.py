"""Where modules keep quantized weights, and what is known of the inputs that meet them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from mono_quant.base import Activation, PackedTensor


class _Fixed(nn.Module):
    """A module some of whose buffers keep their dtype when the module is moved to another one."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: Iterable[str] = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self.get_buffer(name) for name in self._names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *rest: object
    ) -> None:
        """Take the dtypes of a state dict over: scales that had to be wider stay so."""
        for name in self._names:
            stored, own = state_dict.get(prefix + name), self.get_buffer(name)
            if stored is not None and stored.dtype != own.dtype:
                self.register_buffer(name, torch.empty_like(own, dtype=stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class QuantizedWeight(_Fixed):
    """A packed weight as the buffers of a small module.

    A module of its own, so that layers with tied weights share one object: it stays shared when the
    model is moved, copied or saved. Moving it to another dtype changes the dtype that the weight is
    dequantized to, and never that of codes and scales.
    """

    def __init__(self, packed: PackedTensor) -> None:
        """Hold the tensors of `packed` as buffers of the same names."""
        super().__init__(packed.tensors)
        self.scheme = packed.scheme
        self.layout = packed.layout
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


class QuantizedInput(_Fixed):
    """What is known of a weight's inputs, its calibrated scale and zero point as buffers."""

    def __init__(self, activation: Activation) -> None:
        """Hold the tensors of `activation` as buffers of the same names."""
        super().__init__(activation.tensors)
        self.scheme = activation.scheme

    @property
    def activation(self) -> Activation:
        """How inputs are quantized, sharing this module's memory."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        return Activation(self.scheme, tensors.get("scale"), tensors.get("zero_point"))

    def extra_repr(self) -> str:
        """Return the mode and the scheme."""
        return self.activation.describe()
