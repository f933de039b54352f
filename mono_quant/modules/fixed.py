"""Buffers that a model's dtype does not reach."""

from collections.abc import Callable, Iterable, Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn


class Fixed(nn.Module):
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
        """Take the dtypes of a state dict over: scales that had to be wider stay so.

        Codes of another dtype mean other values, and are an error.
        """
        for name in self._names:
            stored, own = state_dict.get(prefix + name), self.get_buffer(name)
            if stored is None or stored.dtype == own.dtype:
                continue
            if not (stored.is_floating_point() and own.is_floating_point()):
                said = f"{prefix + name} is {stored.dtype}, where {own.dtype} was expected"
                cast("list[str]", rest[-1]).append(said)  # what load_state_dict raises at its end
                return
            self.register_buffer(name, torch.empty_like(own, dtype=stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)
