"""Outliers of inputs moved into the weights: SmoothQuant."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.configurable import register
from mono_quant.transforms.groups import Group
from mono_quant.transforms.objective import Consumer
from mono_quant.transforms.scaling import (
    InputScaling,
    check_alpha,
    check_steps,
    exponents,
    peak_columns,
    peak_inputs,
)


@register
@attrs.frozen
class SmoothQuant(InputScaling):
    """Scales channels so that inputs with outliers become easier to quantize, weights less easy.

    ``s = max|x| ** alpha / max|w| ** (1 - alpha)`` for each channel, over the data and over all
    weights that meet the channel. Alpha is given for all, or searched for each group of layers,
    from 0 to 1 in steps of ``1 / steps``. For layers whose inputs are quantized.

    Source: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models", section 4, https://arxiv.org/abs/2211.10438.

    Attributes:
        alpha: how much of the difficulty is moved, 0 to 1; None: searched.
        steps: of the search.
    """

    kind: ClassVar[str] = "smooth_quant"
    alpha: float | None = attrs.field(default=None, validator=check_alpha)
    steps: int = attrs.field(default=20, validator=check_steps)

    def refuse(self, consumers: Sequence[Consumer]) -> str | None:
        """Return that no inputs are quantized, or None."""
        if any(one.target.inputs is not None for one in consumers):
            return None
        return "they stay float; for weights alone there is AWQ()"

    def scales(self, group: Group, consumers: Sequence[Consumer]) -> Mapping[float, Tensor]:
        """Return the scale for each alpha; 1 for a channel that is zero on either side."""
        inputs, weights = peak_inputs(group, consumers), peak_columns(group, consumers)
        alive = (inputs > 0) & (weights > 0)
        return {
            alpha: torch.where(alive, inputs**alpha / weights ** (1 - alpha), 1.0)
            for alpha in exponents(self.alpha, self.steps)
        }
