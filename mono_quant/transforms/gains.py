"""Norms, and whatever else multiplies its output by a vector of weights: found by trying."""

import copy

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.base import QuantizedModule
from mono_quant.transforms.graph import LAYERS
from mono_quant.transforms.rescaling import Undo

_TOLERANCE = 1e-6
"""Of the largest output; a norm may compute in float32 whatever it is given."""


@attrs.frozen
class Gain:
    """How the parameters of a module scale the last dimension of its output.

    With ``p' = s * (p + offset) - offset`` in place of each parameter p, the output is ``s`` times
    what it was, for any vector s: a LayerNorm, an RMSNorm, and what looks like one.

    Attributes:
        offsets: by the names of the parameters: 1 where the module multiplies by ``1 + weight``,
            else 0.
        width: how many channels.
    """

    offsets: tuple[tuple[str, float], ...]
    width: int

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(name for name, _ in self.offsets)

    def scaled(self, module: nn.Module, scale: Tensor) -> dict[str, Tensor]:
        """Return parameters for an output that is multiplied by `scale`, float64 ``[width]``.

        In float64, where the device has it.
        """
        found: dict[str, Tensor] = {}
        for name, offset in self.offsets:
            old = module.get_parameter(name).detach()
            wide = old.to(torch.float32 if old.device.type == "mps" else torch.float64)
            found[name] = (wide + offset) * scale.to(wide.device, wide.dtype) - offset
        return found

    def apply(self, module: nn.Module, scale: Tensor) -> Undo | str:
        """Multiply the output of a module by `scale`; return what takes it back, or why not.

        It gets new parameters; the old ones are not written to.
        """
        before = {name: module.get_parameter(name) for name in self.names}
        new = {name: value.to(before[name]) for name, value in self.scaled(module, scale).items()}
        if not all(bool(torch.isfinite(value).all()) for value in new.values()):
            return "the new parameters would hold NaN or infinity"
        for name, value in new.items():
            parameter = nn.Parameter(value, requires_grad=before[name].requires_grad)
            module.register_parameter(name, parameter)

        def undo() -> None:
            for name, parameter in before.items():
                module.register_parameter(name, parameter)

        return undo


def gain_of(module: nn.Module) -> Gain | None:
    """Return how a module scales its output, or None where it is not found to do so.

    Candidates have one or two vectors for parameters and no modules inside. A copy of them computes
    noise in float64, ``[3, width]`` and ``[2, 3, width]``, before and after.
    """
    named = {name: one for name, one in module._parameters.items() if one is not None}
    if isinstance(module, (*LAYERS, QuantizedModule, torch.jit.ScriptModule)) or module._modules:
        return None
    if "forward" in vars(module) or len(named) not in (1, 2) or any(map(_unfit, named.values())):
        return None
    sizes = {one.numel() for one in named.values()}
    if len(sizes) != 1:
        return None
    (width,) = sizes
    for offset in (0.0, 1.0):
        offsets = tuple((name, offset if name != "bias" else 0.0) for name in named)
        found = Gain(offsets, width)
        if _proves_true(found, module):
            return found
    return None


def _unfit(parameter: Tensor) -> bool:
    unset = is_lazy(parameter) or parameter.is_meta
    return unset or parameter.dim() != 1 or not parameter.is_floating_point()


def _proves_true(gain: Gain, module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randn(gain.width, generator=generator, dtype=torch.float64))
    rows = 3 if gain.width != 3 else 2  # else dimensions of one size could be mistaken
    try:
        twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
        with torch.no_grad():
            for parameter in twin.parameters():  # ones and zeros could hide what they do
                parameter.copy_(torch.randn(gain.width, generator=generator, dtype=torch.float64))
            inputs = [
                torch.randn(*shape, gain.width, generator=generator, dtype=torch.float64)
                for shape in ((rows,), (rows + 2, rows))
            ]
            expected = [twin.forward(x) * scale for x in inputs]
            for name, value in gain.scaled(twin, scale).items():
                twin.register_parameter(name, nn.Parameter(value))
            found = [twin.forward(x) for x in inputs]
    except Exception:  # whatever somebody's code raises on such an input
        return False
    return all(
        one.shape == x.shape and bool(((two - one).abs() <= _TOLERANCE * one.abs().max()).all())
        for x, one, two in zip(inputs, expected, found, strict=True)
    )
