"""A layer with its channels scaled: ``f'(x) = outputs * f(inputs * x) + shift``."""

import copy
from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mono_quant.base import QuantizedModule
from mono_quant.numerics.values import Layout
from mono_quant.transforms.graph import LAYERS
from mono_quant.transforms.nodes import hooked

Undo = Callable[[], None]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EXTRA = 5
"""How many steps beyond its kernel a layer is tried on, along each dimension."""


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class of torch that makes a layer one of `LAYERS`, or None."""
    return next((one for one in LAYERS if isinstance(layer, one)), None)


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return how many channels one of `LAYERS` takes and gives."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels, layer.out_channels
    raise TypeError(f"{type(layer).__name__} has no channels")


def dimensions(layer: nn.Module) -> int:
    """Return how many dimensions the kernel of one of `LAYERS` has: 0 for a Linear."""
    return layer.get_parameter("weight").dim() - 2


def matrices(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as ``[groups, out / groups, in / groups, kernel]``."""
    layout = layout_of(layer)
    inputs = widths(layer)[0] // layout.stack[0]
    return layout.to_stack(weight).reshape(*layout.stack[:2], inputs, -1)


def refuse(model: nn.Module, path: str, partner: str) -> str | None:
    """Return why the parameters of a layer of `model` cannot be changed, or None.

    Args:
        model: holds the layer.
        path: the layer's dotted name.
        partner: dotted name of the module that is changed to make up for it.
    """
    layer = model.get_submodule(path)
    if isinstance(layer, QuantizedModule):
        return f"{path!r} is quantized"
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or (bias is None and layer.bias is not None):
        return f"the weight or bias of {path!r} is computed from other parameters"
    if weight.is_meta or is_lazy(weight):
        return f"{path!r} has no values yet"
    if not weight.is_floating_point():
        return f"the weight of {path!r} is {weight.dtype}"
    return shared(model, path) or watched(model, path, partner)


def shared(model: nn.Module, path: str) -> str | None:
    """Return which parameter of a module another one has as well, in words, or None."""
    module = model.get_submodule(path)
    for name, parameter in module.named_parameters(recurse=False):
        if (other := _other_owner(model, module, parameter)) is not None:
            return f"the {name} of {path!r} is also that of {other!r}"
    return None


def watched(model: nn.Module, path: str, partner: str) -> str | None:
    """Return which hook sees what flows between two modules, in words, or None.

    That of the first, or of a module around it that is not also around its partner.
    """
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        around = ".".join(parts[:depth])
        if not f"{partner}.".startswith(f"{around}.") and hooked(model.get_submodule(around)):
            return f"{around!r} has hooks"
    return None


@attrs.frozen(eq=False)
class Rescaling:
    """How a layer's function is to change, each value one per channel, in float64.

    Attributes:
        outputs: what each output is multiplied with, ``[out]``.
        inputs: what each input is multiplied with, ``[in]``.
        shift: what is added to each output, ``[out]``.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    shift: Tensor | None = None

    def apply(self, layer: nn.Module) -> Undo | str:
        """Give a layer new parameters and return what takes them back, or why it was left alone.

        The old ones are not written to. dtype, device, strides and requires_grad stay.
        """
        weight, bias = self.parameters(layer)
        old = layer.get_parameter("weight")
        new = {
            "weight": torch.empty_like(old.detach()).copy_(weight)
        }  # strides stay: channels_last
        if bias is not None:
            new["bias"] = bias.to(old.dtype)
        if not all(bool(torch.isfinite(value).all()) for value in new.values()):
            return f"the new parameters would hold NaN or infinity in {old.dtype}"
        if has_own_forward(layer) and (reason := self._try_on_copy(layer)) is not None:
            return reason
        before = {name: layer._parameters[name] for name in new}
        for name, value in new.items():
            like = before[name] if before[name] is not None else old
            requires_grad = like is not None and like.requires_grad
            layer.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))

        def undo() -> None:
            for name, parameter in before.items():
                layer.register_parameter(name, parameter)

        return undo

    def parameters(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in float64, where the device has it."""
        old = layer.get_parameter("weight").detach()
        wide = torch.float32 if old.device.type == "mps" else torch.float64
        layout = layout_of(layer)
        weight = matrices(layer, old.to(wide))  # [groups, out / groups, in / groups, kernel]
        groups, rows, columns, _ = weight.shape
        bias = layer._parameters.get("bias")
        shifted = bias.detach().to(wide) if bias is not None else None
        if self.outputs is not None:
            outputs = self.outputs.to(old.device, wide)
            weight = weight * outputs.reshape(groups, rows, 1, 1)
            shifted = shifted * outputs if shifted is not None else None
        if self.inputs is not None:
            weight = weight * self.inputs.to(old.device, wide).reshape(groups, 1, columns, 1)
        if self.shift is not None:
            shift = self.shift.to(old.device, wide)
            shifted = shift if shifted is None else shifted + shift
        return layout.to_native(weight.reshape(layout.stack)), shifted

    def _try_on_copy(self, layer: nn.Module) -> str | None:
        """Return why a layer with a forward of its own is not what its parameters say, or None.

        A forward may pad, which is well, or compute on the weight or the result, which is not. So a
        copy of the layer computes noise in float64 before and after.
        """
        name = type(layer).__name__
        if "forward" in vars(layer):  # its copy would call this layer
            return f"its {name} has a forward that was replaced on the instance"
        try:
            twin = copy.deepcopy(layer).to("cpu", torch.float64).eval()
            x = _noise(twin)
            dim = -1 if isinstance(twin, nn.Linear) else 1
            with torch.no_grad():
                y: Tensor = twin(_along(x, self.inputs, dim))
                expected = _along(y, self.outputs, dim)
                if self.shift is not None:
                    expected = expected + _shaped(self.shift.to("cpu", y.dtype), y, dim)
                for key, value in zip(("weight", "bias"), self.parameters(twin), strict=True):
                    if value is not None:
                        twin.register_parameter(key, nn.Parameter(value))
                found: Tensor = twin(x)
        except Exception as error:  # whatever a forward that is not torch's raises
            return f"its {name} could not be tried on noise ({type(error).__name__}: {error})"
        room = 1e-9 * float(expected.abs().max())
        if found.shape != expected.shape or not bool(((found - expected).abs() <= room).all()):
            return f"its {name} computes something else than its parameters say"
        return None


def layout_of(layer: nn.Module) -> Layout:
    """Return how the weight of one of `LAYERS` is seen as a stack of matrices."""
    shape = tuple(layer.get_parameter("weight").shape)
    if isinstance(layer, TRANSPOSED):
        return Layout.transposed(shape, layer.groups)
    return Layout.grouped(shape, layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1)


def _other_owner(model: nn.Module, layer: nn.Module, parameter: nn.Parameter) -> str | None:
    """Return the dotted name of another module that has a parameter, or None."""
    for path, module in model.named_modules():
        if module is not layer and any(one is parameter for one in module._parameters.values()):
            return path or "the model"
    return None


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether a layer may compute something else than torch's own of its kind does."""
    kind = kind_of(layer)
    if kind is None or "forward" in vars(layer) or type(layer).forward is not kind.forward:
        return True
    inner = "_conv_forward"
    return getattr(type(layer), inner, None) is not getattr(kind, inner, None)


def _noise(layer: nn.Module) -> Tensor:
    """Return an input for a layer: ``[2, in, ...]``, larger than its kernel."""
    shape = [2, widths(layer)[0]]
    if isinstance(layer, nn.modules.conv._ConvNd):
        spans = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape += [(kernel - 1) * step + _EXTRA * stride for kernel, step, stride in spans]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _along(x: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    return x if scale is None else x * _shaped(scale.to("cpu", x.dtype), x, dim)


def _shaped(values: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.reshape(shape)
