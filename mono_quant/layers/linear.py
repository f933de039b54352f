"""Matrix products: nn.Linear and layers that compute the same."""

from typing import ClassVar, cast

import attrs
from torch import Tensor, nn

from mono_quant.base import QuantizedModule, Scheme
from mono_quant.configurable import register
from mono_quant.layers.single import ProductQuantizer, SingleWeightQuantizer, weight_shape
from mono_quant.modules import QuantizedBilinear, QuantizedLinear, QuantizedLinearLike
from mono_quant.numerics.values import Layout
from mono_quant.transforms.rotated import RotatedLinear


class _MatrixQuantizer(ProductQuantizer):
    """A layer that multiplies the rows of its input by a matrix."""

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        """Return the input ``[..., in]`` as ``[n, in]``."""
        return x.reshape(-1, x.shape[-1])

    def channel_dim(self, layer: nn.Module, name: str) -> int:
        """Return the last one."""
        return -1


@register
@attrs.frozen
class LinearQuantizer(_MatrixQuantizer):
    """`torch.nn.Linear` and subclasses that keep its forward, or that `Rotate` made.

    Attributes:
        own_forward: take subclasses with a forward of their own too; it goes on running, on a
            weight that is decoded each time it is read, or on the quantized product where it calls
            ``super().forward``.
    """

    kind: ClassVar[str] = "linear"
    float_classes: ClassVar = {nn.Linear: QuantizedLinear}
    own_forward: bool = False

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that a subclass has a forward of its own, or why its weight cannot be read."""
        known = (nn.Linear.forward, RotatedLinear.forward)
        if type(layer).forward not in known and not self.own_forward:
            return (
                f"{type(layer).__name__} is a Linear with a forward of its own; if it may be "
                "quantized all the same, say layer(LinearQuantizer(own_forward=True))"
            )
        return _MatrixQuantizer.refuse(self, layer, scheme)

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[1, out_features, in_features]``."""
        linear = cast("nn.Linear", layer)  # `matches` has seen to it
        return Layout.grouped(weight_shape(layer, (linear.out_features, linear.in_features)))


@register
@attrs.frozen
class BilinearQuantizer(SingleWeightQuantizer):
    """`torch.nn.Bilinear`: a row of the weight is one of its matrices, flat. Inputs stay float."""

    kind: ClassVar[str] = "bilinear"
    float_classes: ClassVar = {nn.Bilinear: QuantizedBilinear}

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that a subclass has a forward of its own, or why its weight cannot be read."""
        if type(layer).forward is not nn.Bilinear.forward:
            return f"{type(layer).__name__} is a Bilinear with a forward of its own"
        return SingleWeightQuantizer.refuse(self, layer, scheme)

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        """Return that two inputs meet the weight."""
        return "its weight meets the products of two inputs"

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[1, out_features, in1_features * in2_features]``."""
        one = cast("nn.Bilinear", layer)  # `matches` has seen to it
        shape = (one.out_features, one.in1_features, one.in2_features)
        return Layout.grouped(weight_shape(layer, shape))


@register
@attrs.frozen
class LinearLikeQuantizer(_MatrixQuantizer):
    """A third party's layer that computes ``x @ weight.T + bias``, known by its class's name.

    The class is never imported: a layer matches when its class, or a parent of it, has this name.

    Attributes:
        class_name: the full name, such as ``transformers.pytorch_utils.Conv1D``.
        transposed: the weight is ``[in, out]``.
    """

    kind: ClassVar[str] = "linear_like"
    float_classes: ClassVar = {nn.Module: QuantizedLinearLike}
    class_name: str
    transposed: bool = False

    def matches(self, layer: nn.Module) -> bool:
        """Return whether the layer's class, or a parent, has the name, and the layer a weight."""
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(layer).__mro__}
        return (
            self.class_name in names
            and not isinstance(layer, QuantizedModule)
            and isinstance(getattr(layer, "weight", None), Tensor)
        )

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Return that the layer has no matrix, or None."""
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            return f"{self.class_name} has no two-dimensional parameter named weight"
        return _MatrixQuantizer.refuse(self, layer, scheme)

    def layout(self, layer: nn.Module) -> Layout:
        """Return ``[1, out, in]``."""
        shape = tuple(cast("Tensor", layer.weight).shape)
        matrix = len(shape) == 2  # else it is refused
        return Layout.transposed(shape) if self.transposed and matrix else Layout.grouped(shape)
