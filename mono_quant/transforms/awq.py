"""Weights that meet large inputs kept finer: activation-aware weight quantization."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from mono_quant.configurable import register
from mono_quant.transforms.groups import Group
from mono_quant.transforms.objective import Consumer
from mono_quant.transforms.scaling import InputScaling, check_steps, exponents, mean_inputs


@register
@attrs.frozen
class AWQ(InputScaling):
    """Scales channels by how large they are on the data, so that weights that matter round finer.

    ``s = mean|x| ** alpha`` for each channel, over ``sqrt(max(s) * min(s))``; alpha is searched for
    each group of layers, from 0 in steps of ``1 / steps`` to below 1. For weights of few bits with
    scales shared along a row. Ranges are not clipped: that is for an observer such as `MSE`, which
    the search goes by as well.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", section 3.2, https://arxiv.org/abs/2306.00978.

    Attributes:
        steps: how many alphas are tried.
    """

    kind: ClassVar[str] = "awq"
    steps: int = attrs.field(default=20, validator=check_steps)

    def scales(self, group: Group, consumers: Sequence[Consumer]) -> Mapping[float, Tensor]:
        """Return the scale for each alpha; a channel that is always zero has 1."""
        mean = mean_inputs(group, consumers)
        alive = mean > 0
        found: dict[float, Tensor] = {}
        if not bool(alive.any()):
            return found
        for alpha in exponents(None, self.steps)[1:-1]:
            scale = mean**alpha
            low, high = scale[alive].aminmax()
            found[alpha] = torch.where(alive, scale / (low * high).sqrt(), 1.0)
        return found
