"""What a model's bytes are and will be: every parameter and buffer counted once."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mono_quant.base import QuantizedModule
from mono_quant.evidence import LayerReport
from mono_quant.modules import BareModule, QuantizedInput, QuantizedWeight
from mono_quant.numerics.metrics import memory_of, tensor_bytes
from mono_quant.plan.request import WeightPlan, by_layer
from mono_quant.report import Report


def account(model: nn.Module, weights: Sequence[WeightPlan]) -> Report:
    """Return a report of predicted bytes: a row for each weight and for all that stays float."""
    rows = tuple(_rows(model, weights))
    return Report(
        layers=rows,
        buffer_bytes=sum(map(tensor_bytes, _buffers(model))),
        head=_last_weight(model, rows),
    )


def inside(path: str, paths: set[str]) -> bool:
    """Return whether a module lies below one of `paths`."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in paths for end in range(1, len(parts)))


def _rows(model: nn.Module, weights: Sequence[WeightPlan]) -> Iterable[LayerReport]:
    """Yield a row for each weight, one for each module's other parameters, one for all biases."""
    by_path = by_layer(weights)
    tied = [weight for weight in weights if weight.tied_to is not None]
    sources = (source for weight in weights for source in weight.sources)
    counted: set[object] = {memory_of(model.get_parameter(source)) for source in sources}
    biases: list[nn.Parameter] = []
    for path, module in model.named_modules():
        for weight in by_path.get(path, ()):
            if weight.tied_to is None:
                row = _weight_row(weight)
                for other in (other for other in tied if other.tied_to is weight):
                    row = row.with_inputs(_activation(other), other.input_bytes, other.key)
                yield row
        if isinstance(module, QuantizedModule):
            yield from _quantized_rows(path, module, counted)
        own = {memory_of(one): one for one in module._parameters.values() if one is not None}
        rest = [one for identity, one in own.items() if identity not in counted]
        counted.update(own)
        if path in by_path or isinstance(module, QuantizedModule):
            biases += rest
        elif rest:
            layer = type(module).__name__
            reason = f"no quantizer knows a {layer}"
            if inside(path, set(by_path)):
                reason = "its parent's quantizer leaves it"
            elif isinstance(module, BareModule):
                reason = (
                    "of a state dict, tensors of 2 to 5 dimensions called as weights are quantized"
                )
            yield _float_row(path or "(root)", layer, rest, reason)
    if biases:
        name = f"({len(biases)} biases)" if len(biases) > 1 else "(1 bias)"
        yield _float_row(name, "", biases, "biases stay float")


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


def _buffers(model: nn.Module) -> Iterable[Tensor]:
    """Return every buffer once, those of quantized weights left out: their rows count them."""
    found = {
        memory_of(buffer): buffer
        for module in model.modules()
        if not isinstance(module, QuantizedWeight | QuantizedInput)
        for buffer in module._buffers.values()
        if buffer is not None
    }
    return found.values()
