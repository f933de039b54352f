"""Float layers whose inputs are on the grids that they will be on, while a block is learned."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import cast

from torch import nn

from mono_quant.base import Activation, Change
from mono_quant.gathering import Gathered
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.settings import Recipe


def activation_of(weight: WeightPlan, gathered: Gathered) -> Activation | None:
    """Return how the inputs of a weight are quantized; None for floats, or if no data came by."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    scheme = recipe.activations.scheme
    if recipe.activations.mode is None:
        return None
    if recipe.activations.mode == "dynamic":
        return Activation(scheme)
    if recipe.observer not in gathered.inputs:
        return None
    state = gathered.inputs.state(recipe.observer)
    return Activation.calibrated(scheme, recipe.observer, state)


class QuantizedInputs(ExitStack):
    """Has layers put their inputs on their grids, until it is closed.

    Attributes:
        changes: what to say of layers whose inputs stay float in spite of it.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[WeightPlan],
        gathered: Mapping[tuple[str, str], Gathered],
    ) -> None:
        """Have the layers of some weights do so.

        Args:
            model: with these layers, which are float.
            weights: of it; those that will be quantized.
            gathered: what is known of inputs, by layer and weight.
        """
        super().__init__()
        self.changes: list[Change] = []
        for path, here in by_layer(weights).items():
            found = {
                weight.name: activation
                for weight in here
                if (activation := _simulated(weight, gathered)) is not None
            }
            if not found:
                continue
            context = here[0].maker.quantizing_inputs(model.get_submodule(path), found)
            if context is None:
                text = f"the inputs of {path!r} are quantized, which its block does not see while "
                self.changes.append(Change(path, f"{text}it is learned", done=False))
            else:
                self.enter_context(context)


def _simulated(
    weight: WeightPlan, gathered: Mapping[tuple[str, str], Gathered]
) -> Activation | None:
    """Return how inputs of a weight will be quantized, unless some of them stay float."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    if recipe.grid.scheme.columns_apart is not None:
        return None
    return activation_of(weight, gathered.get((weight.path, weight.name), Gathered()))
