"""Where the tensors of a model lie."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn


def devices_of(model: nn.Module) -> Mapping[str, torch.device]:
    """Return the device of each module's own tensors, by its path; meta and none are left out."""
    found: dict[str, torch.device] = {}
    for path, module in model.named_modules():
        own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        first = next(own, None)
        if first is not None and not first.is_meta:
            found[path] = first.device
    return found


def move(model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Move the modules of these paths, and all below them, in place; what is inside comes later."""
    if len(set(devices.values())) == 1:
        devices = {"": next(iter(devices.values()))}
    for path, module in list(model.named_modules()):
        if path in devices:
            module.to(devices[path])
