"""The error that quantizing leaves in what layers return, for scales that are tried."""

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant.base import Target
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.metrics import SquaredError
from mono_quant.transforms.groups import Group
from mono_quant.transforms.rescaling import layout_of, matrices
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

    def errors(self, scales: Sequence[Tensor]) -> list[SquaredError]:
        """Return the error of its outputs with its inputs divided by each of some scales.

        Columns are multiplied by it; the weight is rounded to the nearest point of its grid, and
        so are inputs that will be.

        Args:
            scales: of its input channels, ``float64 [in]``.

        Returns:
            one for each; of noise NaN where a weight would not be finite.
        """
        sample = torch.stack(self.inputs.rows)
        exact = self._outputs(sample)
        layout, grid = layout_of(self.layer), self.target.grid
        weight = matrices(self.layer, self.layer.get_parameter("weight").detach().float())
        groups, _, columns, _ = weight.shape  # [groups, out / groups, in / groups, kernel]
        found: list[SquaredError] = []
        for scale in scales:
            factors = scale.to(weight.device, weight.dtype)
            stack = (weight * factors.reshape(groups, 1, columns, 1)).reshape(layout.stack)
            if not all_finite(stack):
                found.append(SquaredError(1.0, math.nan))
                continue
            rounded = grid.scheme.fake_quantize(stack, grid.qparams(stack))
            x = sample / factors.reshape(-1, *[1] * (sample.dim() - 2))
            activation = self.target.activation(x)
            if activation is not None:
                x = activation.fake_quantize(x.flatten(1)).reshape(x.shape)
            found.append(SquaredError.between(exact, self._outputs(x, layout.to_native(rounded))))
        return found

    def _outputs(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
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
            spread = [self.group.spread(scale, consumer.path) for scale in scales]
            for place, found in enumerate(consumer.errors(spread)):
                if found.signal:
                    totals[place] += found.noise / found.signal / len(self.consumers)
        return totals
