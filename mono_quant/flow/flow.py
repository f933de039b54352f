"""The one function that turns a statically quantized model into a graph of codes."""

import attrs
import torch
from torch import fx, nn

from mono_quant.base import QuantizedModule
from mono_quant.checkpoint import copy_structure
from mono_quant.errors import InputError
from mono_quant.flow.arithmetic import Grid
from mono_quant.flow.assign import assign
from mono_quant.flow.build import Writer
from mono_quant.flow.tracer import trace_products
from mono_quant.modules import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedLayer,
    QuantizedLinear,
)
from mono_quant.schemes import Affine

_FLOWING = (QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)


@attrs.frozen(eq=False)
class Flow:
    """A model as a graph in which layers pass codes to each other.

    Attributes:
        model: takes and returns what the model did. Its class is no longer the model's.
        lines: for readers: what each layer takes and gives, and where codes give way to floats and
            why, in the order of execution.
    """

    model: fx.GraphModule
    lines: tuple[str, ...]


def integer_flow(model: nn.Module, *, reference: bool = False) -> Flow:
    """Return a graph of a statically quantized model whose layers pass uint8 codes to each other.

    A layer's output is put on the grid that was calibrated for the inputs of the layers that read
    it, so no more data is needed, and what they are given is what the model would round at their
    doors. Clamping, padding with zeros, max pooling, concatenation and reshaping are done on codes
    and change nothing. Additions and averages take codes where their inputs are codes already for
    some layer: a shortcut is then rounded, which it is not in the model that keeps its class.
    Everything else is computed in float. NaN has no code and is not carried on.

    Products run on oneDNN's integer operators, where torch has them: 2d convolutions and Linear
    layers with weights of one scale a row, on a CPU; other layers are computed in float between
    their codes, which `Flow.lines` says. Whether an operator can be trusted on this machine is
    tried in a process of its own, once, which takes seconds. What the model's code does with sizes
    stays symbolic, so batches and images of all sizes may be given.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877; unlike there, outputs are rescaled by
    float32 numbers.

    Args:
        model: with Linear layers and convolutions whose inputs are static, asymmetric and of one
            scale; float32. The graph shares the storage of its parameters and quantized weights,
            never objects: moving either to another dtype or device leaves the other alone, and
            what writes into a weight in place (loading a state dict does) shows in both. Other
            buffers are copies. A weight is packed for its operator at the first call, once more.
        reference: compute products in float as the model that keeps its class does, bit for bit:
            an oracle, and no faster.

    Returns:
        the graph in eval mode and without gradients. Its state dict has the names of the model's;
        its quantized layers are of another class, so it is no checkpoint: save the model instead.

    Raises:
        InputError: no layer has static inputs; the model is not float32; its code cannot be traced,
            with the module and line where; or it changes a tensor in place that it reads again.
    """
    model = copy_structure(model).eval()
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.give_back()  # an activation is a step of its own
    refused: list[str] = []
    layers: dict[str, QuantizedLayer] = {}
    inputs: dict[str, Grid] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            grid = _grid_of(module)
            if isinstance(grid, str):
                refused.append(f"{path or 'layer'}: float32, as {grid}")
            elif isinstance(module, QuantizedLayer):
                layers[path], inputs[path] = module, grid
    if not layers:
        seen = f" ({refused[0]})" if refused else ""
        raise InputError(
            "no Linear or convolution of the model has calibrated inputs, so there are no codes to "
            f'pass on{seen}; quantize it with activations("static") and fit(data) first'
        )
    _check_dtype(layers)
    traced = trace_products(model, layers)
    modules = dict(model.named_modules(remove_duplicate=False))
    writer = Writer(traced, assign(traced, modules, inputs), modules, inputs, reference)
    graph = writer.build(type(model).__name__)
    return Flow(graph, (*writer.lines, *refused))


def _grid_of(module: QuantizedModule) -> Grid | str:
    """Return the grid of a layer's inputs, or why it takes floats."""
    if not isinstance(module, _FLOWING):
        return f"a {type(module).__name__} does not pass codes"
    activation = module.activations().get("weight")
    if activation is None:
        return "its inputs are not quantized"
    if activation.scale is None:
        return "its inputs were not calibrated"
    if not isinstance(activation.scheme, Affine):
        return f"its inputs are {activation.scheme.describe()}, not codes of even steps"
    return Grid.of(activation) or "its inputs are on a symmetric grid"


def _check_dtype(layers: dict[str, QuantizedLayer]) -> None:
    for path, layer in layers.items():
        dtype = layer.packed_weights()["weight"].dtype
        if dtype != torch.float32:
            raise InputError(f"{path!r} is {dtype}; call float() on the model first")
