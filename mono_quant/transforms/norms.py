"""What a batch normalization does in eval mode, and what it tells of its outputs."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.base import QuantizedModule
from mono_quant.transforms.graph import NORMS
from mono_quant.transforms.nodes import hooked
from mono_quant.transforms.rescaling import Rescaling


def unfit(norm: nn.Module) -> str | None:
    """Return why a batch normalization is not what its parameters say in eval mode, or None."""
    if isinstance(norm, QuantizedModule):
        return "it is quantized"
    base = next(one for one in NORMS if isinstance(norm, one))
    if "forward" in vars(norm) or type(norm).forward is not base.forward:
        return f"its {type(norm).__name__} has a forward of its own"
    if norm.training:
        return "it is in train mode, where it normalizes by each batch; call model.eval() first"
    if norm._buffers.get("running_mean") is None or norm._buffers.get("running_var") is None:
        return "it keeps no running mean and variance (track_running_stats=False)"
    if any(norm._parameters.get(name) is not getattr(norm, name) for name in ("weight", "bias")):
        return "its weight or bias is computed from other parameters"
    tensors = [*norm._parameters.values(), *norm._buffers.values()]
    if any(one is not None and (is_lazy(one) or one.is_meta) for one in tensors):
        return "it has no values yet"
    return "it has hooks" if hooked(norm) else None


def rescaling_of(norm: nn.Module) -> Rescaling:
    """Return what a normalization does to the channels before it, in float64."""
    mean, variance = running(norm, "running_mean"), running(norm, "running_var")
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    scale = (variance + cast("float", norm.eps)).rsqrt()
    if weight is not None:
        scale = scale * _wide(weight)
    shift = -mean * scale
    return Rescaling(scale, shift=shift if bias is None else shift + _wide(bias))


def outputs_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of its outputs, float64 ``[channels]``.

    As far as its inputs have the running mean and variance.
    """
    done, variance = rescaling_of(norm), running(norm, "running_var")
    shift, scale = cast("Tensor", done.shift), cast("Tensor", done.outputs)  # it has both
    return running(norm, "running_mean") * scale + shift, variance.sqrt() * scale.abs()


def running(norm: nn.Module, name: str) -> Tensor:
    """Return a running statistic in float64."""
    return _wide(norm.get_buffer(name))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
