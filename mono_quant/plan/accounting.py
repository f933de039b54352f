"""What a model's bytes are and will be: every parameter and buffer counted once."""

from collections.abc import Collection, Iterable, Sequence

import attrs
from torch import Tensor, nn

from mono_quant.base import Change, QuantizedModule
from mono_quant.evidence import LayerReport
from mono_quant.modules import BareModule, QuantizedInput, QuantizedWeight
from mono_quant.numerics.metrics import memory_of, tensor_bytes
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.report import Report
from mono_quant.transforms.edits import BIAS, IDENTITY
from mono_quant.transforms.graph import NORMS
from mono_quant.transforms.rescaling import widths


def account(
    model: nn.Module, weights: Sequence[WeightPlan], changes: Sequence[Change] = ()
) -> Report:
    """Return a report of predicted bytes: a row for each weight and for all that stays float.

    Args:
        model: to be quantized, or quantized.
        weights: their fates.
        changes: of the float model, made or to come; those that come change the bytes.
    """
    rows = tuple(_rows(model, weights, changes))
    left = sum(map(tensor_bytes, _buffers(model, without=_edited(changes, IDENTITY))))
    gone = sum(map(tensor_bytes, _buffers(model))) - left
    report = Report(rows, left, head=_last_weight(model, rows), changes=tuple(changes))
    return attrs.evolve(report, original_bytes=report.float_bytes + gone) if gone else report


def inside(path: str, paths: set[str]) -> bool:
    """Return whether a module lies below one of `paths`."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in paths for end in range(1, len(parts)))


def _rows(
    model: nn.Module, weights: Sequence[WeightPlan], changes: Sequence[Change]
) -> Iterable[LayerReport]:
    """Yield a row for each weight, one for each module's other parameters, one for all biases."""
    removed, given = _edited(changes, IDENTITY), _edited(changes, BIAS)
    by_path = by_layer(weights)
    tied = [weight for weight in weights if weight.tied_to is not None]
    sources = (source for weight in weights for source in weight.sources)
    counted: set[object] = {memory_of(model.get_parameter(source)) for source in sources}
    biases: list[nn.Parameter] = []
    new: list[nn.Module] = []  # layers that will be given a bias
    for path, module in model.named_modules():
        for weight in by_path.get(path, ()):
            if weight.tied_to is None:
                row = _weight_row(weight)
                for other in (other for other in tied if other.tied_to is weight):
                    row = row.with_inputs(_activation(other), other.input_bytes, other.key)
                yield row
        if isinstance(module, QuantizedModule):
            yield from _quantized_rows(path, module, counted)
        if path in given and module._parameters.get("bias") is None:
            new.append(module)
        own = {memory_of(one): one for one in module._parameters.values() if one is not None}
        rest = [one for identity, one in own.items() if identity not in counted]
        counted.update(own)
        if path in by_path or isinstance(module, QuantizedModule):
            biases += rest
        elif rest:
            layer = type(module).__name__
            reason = f"no quantizer knows a {layer}"
            if isinstance(module, NORMS) and (fate := _folding(path, changes)) is not None:
                reason = fate
            elif inside(path, set(by_path)):
                reason = "its parent's quantizer leaves it"
            elif isinstance(module, BareModule):
                reason = (
                    "of a state dict, tensors of 2 to 5 dimensions called as weights are quantized"
                )
            row = _float_row(path or "(root)", layer, rest, reason)
            yield attrs.evolve(row, bytes=0) if path in removed else row
    if count := len(biases) + len(new):
        name = f"({count} biases)" if count > 1 else "(1 bias)"
        row = _float_row(name, "", biases, "biases stay float")
        yield attrs.evolve(
            row,
            parameters=row.parameters + sum(widths(layer)[1] for layer in new),
            bytes=row.bytes + sum(map(_bias_bytes, new)),
        )


def _folding(path: str, changes: Iterable[Change]) -> str | None:
    """Return what changes say of a batch normalization, as a sentence on it, or None."""
    start = f"{path} is "
    texts = (one.text for one in changes if one.path == path and one.text.startswith(start))
    return next((f"it is {text.removeprefix(start)}" for text in texts), None)


def _edited(changes: Iterable[Change], op: str) -> set[str]:
    """Return the names of the modules that changes edit in one way."""
    return {edit.path for change in changes for edit in change.edits if edit.op == op}


def _bias_bytes(layer: nn.Module) -> int:
    """Return the bytes of a bias that a layer without one is given, in the dtype of its weight."""
    return widths(layer)[1] * layer.get_parameter("weight").dtype.itemsize


def _float_row(
    name: str, layer: str, parameters: Sequence[nn.Parameter], reason: str
) -> LayerReport:
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(map(tensor_bytes, parameters))
    has_matrix = bool(layer) and any(parameter.dim() > 1 for parameter in parameters)
    return LayerReport(name, layer, (), count, size, size, reason=reason, has_matrix=has_matrix)


def _weight_row(weight: WeightPlan) -> LayerReport:
    scheme = weight.recipe.grid.scheme.describe() if weight.recipe is not None else None
    return LayerReport(
        weight.key,
        weight.layer,
        weight.layout.native,
        weight.parameters,
        weight.float_bytes,
        weight.nbytes,
        scheme=scheme,
        activation=_activation(weight),
        reason=weight.reason,
        aliases=weight.aliases,
        speed=weight.speed,
        kernel=weight.kernel,
    )


def _activation(weight: WeightPlan) -> str | None:
    """Return how the inputs of a weight will be quantized, or why not although they were to be."""
    if weight.recipe is None:
        return None
    if weight.float_inputs is not None:
        return f"float inputs: {weight.float_inputs}"
    activations = weight.recipe.activations
    if activations.mode is None:
        return None
    return f"{activations.mode} {activations.scheme.describe()} inputs"


def _quantized_rows(
    path: str, module: QuantizedModule, counted: set[object]
) -> Iterable[LayerReport]:
    for name, packed in module.packed_weights().items():
        if id(packed.tensors["codes"]) in counted:
            continue
        counted.add(id(packed.tensors["codes"]))
        count = 1
        for size in packed.layout.native:
            count *= size
        yield LayerReport(
            f"{path}.{name}" if path else name,
            type(module).__name__,
            packed.layout.native,
            count,
            packed.nbytes,
            packed.nbytes,
            scheme=packed.scheme.describe(),
            reason="quantized before",
        )


def _last_weight(model: nn.Module, rows: Iterable[LayerReport]) -> str | None:
    """Return the name of the last weight in the model's order, one that is tied among them."""
    places = {path: place for place, (path, _) in enumerate(model.named_modules())}
    names = [name for row in rows if row.shape for name in (row.name, *row.aliases)]
    return max(names, key=lambda name: places.get(name.rpartition(".")[0], -1), default=None)


def _buffers(model: nn.Module, without: Collection[str] = ()) -> Iterable[Tensor]:
    """Return every buffer once, those of quantized weights left out: their rows count them.

    Args:
        model: holds them.
        without: names of modules whose buffers are left out too.
    """
    found = {
        memory_of(buffer): buffer
        for path, module in model.named_modules()
        if path not in without and not isinstance(module, QuantizedWeight | QuantizedInput)
        for buffer in module._buffers.values()
        if buffer is not None
    }
    return found.values()
