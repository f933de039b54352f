"""The error that quantizing leaves in what layers return, for scales that are tried."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant.base import Target
from mono_quant.numerics.metrics import SquaredError
from mono_quant.transforms.groups import Group
from mono_quant.transforms.rescaling import Rescaling, dimensions, layout_of
from mono_quant.transforms.samples import Inputs


@attrs.frozen(eq=False)
class Consumer:
    """A layer of a group that is going to be quantized.

    Attributes:
        path: its dotted name.
        layer: the float one.
        target: how it will be quantized.
        inputs: what it is given on the data.
    """

    path: str
    layer: nn.Module
    target: Target
    inputs: Inputs

    def error(self, scale: Tensor, sample: Tensor, exact: Tensor) -> SquaredError:
        """Return the error of its outputs with its inputs divided by `scale`, columns multiplied.

        The weight is rounded to the nearest point of its grid, and so are inputs that will be.

        Args:
            scale: of its input channels, ``float64 [in]``.
            sample: inputs.
            exact: what the float layer returns for them.
        """
        layout = layout_of(self.layer)
        weight = Rescaling(inputs=scale).parameters(self.layer)[0].to(torch.float32)
        stack = layout.to_stack(weight)
        grid = self.target.grid
        rounded = grid.scheme.fake_quantize(stack, grid.qparams(stack))
        shape = [1, -1, *[1] * (sample.dim() - 2)]
        x = sample / scale.to(sample.device, sample.dtype).reshape(shape)
        activation = self.target.activation(x)
        if activation is not None:
            spatial = dimensions(self.layer)
            x = activation.fake_quantize(x.flatten(1) if spatial else x).reshape(x.shape)
        return SquaredError.between(exact, self.outputs(x, layout.to_native(rounded)))

    def outputs(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what the layer returns for inputs in float32, with another weight if one is given.

        Args:
            x: ``[n, in]``, of a convolution ``[n, in, *positions]``.
            weight: in its native shape.
        """
        own = {name: one.detach().float() for name, one in self.layer.named_parameters()}
        if weight is not None:
            own["weight"] = weight
        with torch.no_grad():
            found: Tensor = functional_call(self.layer, own, (x,))
        return found


@attrs.frozen(eq=False)
class Objective:
    """The error of a group's layers on the sample: the mean of their noise over their signal.

    Attributes:
        group: the layers.
        consumers: those that will be quantized.
    """

    group: Group
    consumers: Sequence[Consumer]

    def errors(self, scales: Sequence[Tensor]) -> list[float]:
        """Return the error for each of some scales of the source's channels, ``float64 [width]``.

        NaN where something is not finite.
        """
        totals = [0.0] * len(scales)
        for consumer in self.consumers:
            sample = torch.stack(consumer.inputs.rows)
            exact = consumer.outputs(sample)
            for place, scale in enumerate(scales):
                found = consumer.error(self.group.spread(scale, consumer.path), sample, exact)
                if found.signal:
                    totals[place] += found.noise / found.signal / len(self.consumers)
        return totals
