"""Weights without a model: a state dict as a tree of modules that only hold tensors."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from mono_quant.errors import InputError
from mono_quant.modules.layer import QuantizedLayer
from mono_quant.numerics.metrics import memory_of

_DEPTH = 100  # torch goes through nested modules by recursion


class BareModule(nn.Module):
    """A place in a state dict: tensors by name, no forward."""

    def forward(self) -> None:
        """Refuse: a state dict says nothing of what its model computes."""
        raise InputError("a bare state dict cannot be run; load the file into a model instead")


class QuantizedBareModule(QuantizedLayer, BareModule):
    """A place in a state dict whose weight is quantized."""

    float_class = BareModule


def tree_of(tensors: Mapping[str, Tensor]) -> BareModule:
    """Return the tensors of a state dict as parameters and buffers of nested modules.

    Tensors are shared, never copied; floating ones become parameters, so that tied tensors stay
    tied.
    """
    places = {key[: dot.start()] for key in tensors for dot in re.finditer(r"\.", key)}
    if both := sorted(places & set(tensors)):
        raise InputError(
            f"{both[0]!r} is a tensor of the state dict, and begins the names of others, as a "
            "module does; rename it"
        )
    root, plain = BareModule(), BareModule()
    parameters: dict[tuple[object, ...], nn.Parameter] = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{key!r} is a {type(tensor).__name__}, no tensor of a state dict")
        *path, name = key.split(".")
        if not all([*path, name]) or len(path) > _DEPTH:
            raise InputError(f"{key!r:.80} is no name in a state dict")
        if taken := [part for part in (*path, name) if hasattr(plain, part)]:
            raise InputError(
                f"{key!r} cannot be a name in a module, whose {taken[0]!r} is something else; "
                "rename it"
            )
        place: nn.Module = root
        for part in path:
            place = place._modules.setdefault(part, BareModule()) or place
        if tensor.is_floating_point():
            parameter = parameters.setdefault(
                memory_of(tensor), nn.Parameter(tensor.detach(), requires_grad=False)
            )
            place.register_parameter(name, parameter)
        else:
            place.register_buffer(name, tensor)
    return root
