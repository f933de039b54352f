"""Writing the graph of codes, once it is decided which values are codes."""

from collections.abc import Callable, Mapping
from typing import cast

import attrs
from torch import fx, nn
from torch.nn import functional

from mono_quant.base import Operation
from mono_quant.flow import arithmetic
from mono_quant.flow.arithmetic import Grid
from mono_quant.flow.assign import Assignment, name_of
from mono_quant.flow.layer import IntegerLayer
from mono_quant.flow.tracer import PRODUCT, VALUE, Traced
from mono_quant.modules import QuantizedLayer


@attrs.frozen(eq=False)
class Writer:
    """Writes one graph.

    Attributes:
        traced: the graph in floats.
        assignment: which values are codes.
        modules: of the model, by name.
        inputs: grids of the inputs of layers, by their names.
        reference: compute products in float.
        graph: what is being written.
        held: modules and tensors of the new graph, by name.
        values: what stands for each node: codes where it has a grid, floats elsewhere.
        lines: what there is to say.
    """

    traced: Traced
    assignment: Assignment
    modules: Mapping[str, nn.Module]
    inputs: Mapping[str, Grid]
    reference: bool
    graph: fx.Graph = attrs.field(factory=fx.Graph, init=False)
    held: dict[str, object] = attrs.field(factory=dict, init=False)
    values: dict[fx.Node, fx.Node] = attrs.field(factory=dict, init=False)
    lines: list[str] = attrs.field(factory=list, init=False)
    _floats: dict[fx.Node, fx.Node] = attrs.field(factory=dict, init=False)
    _codes: dict[tuple[fx.Node, Grid], fx.Node] = attrs.field(factory=dict, init=False)

    def build(self, name: str) -> fx.GraphModule:
        """Return the graph as a module whose class is called `name`."""
        late = set(self.assignment.sums.values())
        for node in self.assignment.steps:
            unused = node.op == "get_attr" and not node.users
            if not unused and node not in self.traced.asserted and node not in late:
                self.values[node] = self._write(node)
        self.graph.lint()
        return fx.GraphModule(self.held, self.graph, name).eval().requires_grad_(False)

    def _write(self, node: fx.Node) -> fx.Node:
        if PRODUCT in node.meta:
            return self._product(node)
        step, grid = self.assignment.steps[node], self.assignment.grids.get(node)
        if step.kind == "add" and grid is not None:
            return self._add(node, grid)
        if not step.commutes or grid is None:
            return self._copy(node)
        parts = [self._codes_of(one, grid, node) for one in step.inputs]
        match step.kind:
            case "clamp":
                bounds = grid.bounds(step.low, step.high)
                return self._call(arithmetic.clamp, parts[0], *bounds) if bounds else parts[0]
            case "pad":
                around = fx.node.map_arg(cast("fx.node.Argument", step.around), self._float_of)
                return self._call(functional.pad, parts[0], around, "constant", grid.zero_point)
            case "pool" if step.pool is not None:
                return self._call(arithmetic.max_pool, parts[0], *step.pool)
        taken = dict(zip(step.inputs, parts, strict=True))
        return self._copy(node, taken)

    def _copy(self, node: fx.Node, taken: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """Write a node as it is, on what is `taken` for its inputs and on floats otherwise."""
        if node.op == "call_module":
            self.held[str(node.target)] = self.modules[str(node.target)]
        if node.op == "get_attr":
            self.held[str(node.target)] = node.meta[VALUE]
        asks = self.assignment.steps[node].kind == "ask"

        def value(one: fx.Node) -> fx.Node:
            if taken is not None and one in taken:
                return taken[one]
            return self.values[one] if asks else self._float_of(one)

        return self.graph.node_copy(node, value)

    def _product(self, node: fx.Node, added: fx.Node | None = None) -> fx.Node:
        """Write a layer; with an addition that it computes, on the grid of that."""
        path = str(node.target)
        result = node if added is None else added
        output = self.assignment.grids.get(result)
        source = cast("fx.Node", node.args[0])  # as the tracer recorded it
        operation = cast("Operation", node.meta[PRODUCT])
        layer = cast("QuantizedLayer", self.modules[path])  # as the tracer recorded it
        inputs = self.inputs[path]
        codes = self._codes_of(source, inputs, node)
        module = IntegerLayer(layer, operation, inputs, output, self.reference)
        target = self._place(path or "layer")
        self.held[target] = module
        arguments: list[object] = [codes]
        said = ""
        if added is not None:
            other = next(one for one in self.assignment.steps[added].inputs if one is not node)
            arguments += [self.values[other], self.assignment.grids[other].numbers]
            said = f", {name_of(other)} added"
        end = "uint8" if output else f"float32, as {self.assignment.reasons[result]}"
        line = f"{target}: uint8 -> {end}{said}"
        if module.in_float is not None:
            line += f"; computed in float: {module.in_float}"
        self.lines.append(line)
        return self.graph.call_module(target, cast("tuple[fx.node.Argument, ...]", (*arguments,)))

    def _add(self, node: fx.Node, grid: Grid) -> fx.Node:
        if node in self.assignment.sums:
            return self._product(self.assignment.sums[node], node)
        one, other = self.assignment.steps[node].inputs
        grids = self.assignment.grids
        if one in grids and other in grids:
            numbers = (grids[one].numbers, grids[other].numbers, grid.numbers)
            return self._call(arithmetic.add, self.values[one], self.values[other], *numbers)
        return self._call(arithmetic.quantize, self._copy(node), *grid.numbers)

    def _float_of(self, node: fx.Node) -> fx.Node:
        grid = self.assignment.grids.get(node)
        if grid is None:
            return self.values[node]
        if node not in self._floats:
            numbers = grid.numbers
            self._floats[node] = self._call(arithmetic.dequantize, self.values[node], *numbers)
        return self._floats[node]

    def _codes_of(self, node: fx.Node, grid: Grid, reader: fx.Node) -> fx.Node:
        if self.assignment.grids.get(node) == grid:
            return self.values[node]
        if (node, grid) not in self._codes:
            floats = self._float_of(node)
            self._codes[node, grid] = self._call(arithmetic.quantize, floats, *grid.numbers)
            self.lines.append(f"{name_of(node)}: float32, rounded to uint8 for {name_of(reader)}")
        return self._codes[node, grid]

    def _call(self, function: Callable[..., object], *arguments: object) -> fx.Node:
        given = cast("tuple[fx.node.Argument, ...]", arguments)  # nodes and numbers
        return self.graph.call_function(function, given)

    def _place(self, path: str) -> str:
        """Return the name of a layer; a further one for each further call of it."""
        name, count = path, 1
        while name in self.held:
            count += 1
            name = f"{path}_{count}"
        return name
