"""What a weight must be, and what must be known of its inputs, to be rounded."""

import torch
from torch import Tensor

from mono_quant.base import Scheme, Statistics
from mono_quant.errors import CalibrationError, InputError, Mend
from mono_quant.numerics.extremes import all_finite
from mono_quant.plan.request import WeightPlan


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that holds NaN or infinity, by its name."""
    if not all_finite(tensor):
        raise InputError(f"{name} holds NaN or infinity", Mend.SKIP, layer=name.rpartition(".")[0])


def check_fits(name: str, tensor: Tensor, scheme: Scheme) -> None:
    """Refuse a weight whose range a scheme cannot hold, by its name."""
    if tensor.numel():
        low, high = (end.reshape(1) for end in torch.aminmax(tensor.detach().float()))
        try:
            scheme.calculate_qparams(low, high, block_size=(1,))
        except InputError as reason:
            raise InputError(f"{name} cannot be quantized: {reason}") from reason


def check_gathered(weight: WeightPlan, statistics: Statistics) -> None:
    """Refuse a weight whose rounding needs statistics that were not gathered, by its layer."""
    if weight.recipe is None:
        return
    if any(need not in statistics for need in weight.recipe.rounding.needs):
        raise CalibrationError(
            f"no data reached {weight.path!r}, or {type(weight.maker).__name__} does not "
            f"read its inputs; {type(weight.recipe.rounding).__name__} needs them",
            Mend.ROUNDING,
            layer=weight.path,
        )
