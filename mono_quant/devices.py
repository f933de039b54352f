"""Where the tensors of a model lie."""

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn


def devices_of(model: nn.Module) -> Mapping[str, torch.device]:
    """Return the device of each module's own tensors, by its path; meta and none are left out."""
    found: dict[str, torch.device] = {}
    for path, module in model.named_modules():
        first = next(_tensors(module, recurse=False), None)
        if first is not None and not first.is_meta:
            found[path] = first.device
    return found


def move(model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Move modules to these devices by their paths, in place, and what lies below them as well.

    A path within another one's is moved after it, so that it has the last word.
    """
    wanted = set(devices.values())
    if len(wanted) == 1:
        if {tensor.device for tensor in _tensors(model, recurse=True)} != wanted:
            model.to(wanted.pop())
        return
    for path, module in list(model.named_modules()):
        if path in devices:
            module.to(devices[path])


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=recurse), module.buffers(recurse=recurse))
