"""Carrying out what was decided, one layer at a time."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mono_quant.base import Activation, PackedTensor, Scheme, Statistics
from mono_quant.calibration import Gathered, evaluating
from mono_quant.checkpoint import ModelT
from mono_quant.errors import CalibrationError, InputError, Mend
from mono_quant.modules import tie
from mono_quant.numerics.extremes import all_finite
from mono_quant.numerics.metrics import tensor_bytes
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.plan.weight_error import WeightError
from mono_quant.report import LayerReport
from mono_quant.settings import Recipe
from mono_quant.transforms.edits import put


def quantize_weights(
    model: ModelT,
    todo: Sequence[WeightPlan],
    gathered: Mapping[tuple[str, str], Gathered],
    label: str | None,
) -> tuple[ModelT, Mapping[str, LayerReport]]:
    """Quantize the weights of `model` in place; return it and what is known of each by its name.

    What comes back is another object where the model is one layer and its quantizer made a new one.
    """
    multiplied = {  # by one of those that share it
        (weight.tied_to or weight).key for weight in todo if not weight.maker.looks_up
    }
    rows: dict[str, LayerReport] = {}
    packed: dict[str, PackedTensor] = {}
    activations: dict[str, Activation | None] = {}
    done: dict[str, nn.Module] = {}
    bar = tqdm(
        by_layer(todo).items(),
        desc=label,
        unit="layer",
        disable=None if label else True,
        leave=False,
    )
    with torch.no_grad(), bar:
        for path, weights in bar:
            layer = model.get_submodule(path)
            for weight in weights:
                known = gathered.get((path, weight.name), Gathered())
                activations[weight.key] = activation_of(weight, known)
                said, size = _inputs(weight, activations[weight.key])
                why = _input_reason(weight, known)
                if weight.tied_to is not None:
                    first = weight.tied_to.key
                    packed[weight.key] = packed[first]
                    rows[first] = rows[first].with_inputs(said, size, weight.key, reason=why)
                    continue
                looked_up = weight.key not in multiplied
                packed[weight.key], row = rounded(weight, layer, known.rows, looked_up)
                rows[weight.key] = row.with_inputs(said, size, reason=why)
            module = weights[0].maker.replace(
                layer,
                {weight.name: packed[weight.key] for weight in weights},
                {
                    weight.name: activation
                    for weight in weights
                    if (activation := activations[weight.key]) is not None
                },
            )
            module.made_by = weights[0].maker
            model = put(model, layer, module)
            done[path] = module
            for weight in weights:
                if weight.tied_to is not None:
                    lead = weight.tied_to
                    tie(done[lead.path], lead.name, module, weight.name)
    return model, rows


def rounded(
    weight: WeightPlan, layer: nn.Module, statistics: Statistics, looked_up: bool = False
) -> tuple[PackedTensor, LayerReport]:
    """Return a weight of `layer` on its grid, and what is known of it.

    Args:
        weight: which, with a recipe.
        layer: the float one.
        statistics: of its inputs.
        looked_up: its rows are the layer's output, and meet no inputs.

    Raises:
        InputError: it is not finite, or no grid can hold it; names it.
        CalibrationError: its rounding needs statistics that were not gathered.
    """
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe are rounded
    with evaluating(layer):  # in train mode, reading a spectral_norm weight changes it
        view = weight.maker.weights(layer)[weight.name]
    stack = view.stack()
    check_finite(weight.key, stack)
    missing = [need for need in recipe.rounding.needs if need not in statistics]
    if missing:
        raise CalibrationError(
            f"no data reached {weight.path!r}, or {type(weight.maker).__name__} does not "
            f"read its inputs; {type(recipe.rounding).__name__} needs them",
            Mend.ROUNDING,
            layer=weight.path,
        )
    try:
        q = recipe.rounding.round(stack, recipe.grid, statistics)
    except InputError as reason:
        raise InputError(f"{weight.key} cannot be quantized: {reason}") from reason
    scheme = recipe.grid.scheme
    error = WeightError.of(stack, q, scheme)
    why = (
        recipe.grid.observer.remark(stack, scheme, q.qparams)
        if q.qparams.scale is not None
        else None
    )
    dead = int((error.by_row == 0).sum()) if stack.shape[2] else 0
    notes = (
        weight.kept,
        scheme.remark(q),
        f"{dead} of {error.by_row.numel()} rows are all zero" if dead else None,
    )
    packed = PackedTensor.pack(q, scheme, weight.layout, view.native.dtype, consume=True)
    row = LayerReport(
        weight.key,
        weight.layer,
        weight.layout.native,
        weight.parameters,
        weight.float_bytes,
        packed.nbytes,
        scheme=scheme.describe(),
        sqnr_db=error.total.sqnr_db,
        estimated_db=error.total.sqnr_db if looked_up else error.estimated_db,
        outliers=error.outliers,
        row_outliers=error.row_outliers,
        columns=stack.shape[2],
        scale_block=q.qparams.block_size if q.qparams.scale is not None else (),
        ranges=(f"weight range by {why}",) if why else (),
        note="; ".join(part for part in notes if part) or None,
        aliases=weight.aliases,
        speed=weight.speed,
        kernel=weight.kernel,
    )
    return packed, row


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


def _input_reason(weight: WeightPlan, gathered: Gathered) -> str | None:
    """Return why the calibrated range of the inputs of a weight is what it is, or None."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    if recipe.activations.mode != "static" or recipe.observer not in gathered.inputs:
        return None
    state = gathered.inputs.state(recipe.observer)
    return recipe.observer.explain(state, recipe.activations.scheme)


def _inputs(weight: WeightPlan, activation: Activation | None) -> tuple[str | None, int]:
    """Return what is to be said of the inputs of a weight, and the bytes that they take."""
    if activation is not None:
        calibrated = sum(map(tensor_bytes, activation.tensors.values()))
        return f"{activation.describe()} inputs", calibrated
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe come here
    why = "no data reached it" if recipe.activations.mode is not None else weight.float_inputs
    return (f"float inputs: {why}" if why is not None else None), 0


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
